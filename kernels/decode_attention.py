"""Attention of one new token per sequence over its KV cache; a shared prompt is read once. For sampling: no gradients.

Keys and values are stored in slots. Row b attends to the first ``len[b]`` entries of its prompt's slot and of its own
slot, under one softmax:

    k, v   = entries of prompt.slot[b], up to prompt.len[b], then of own.slot[b], up to own.len[b]
    out[b] = softmax(scale q[b] . k) v                  zeros for a row with no entries

The rows of a group have the same prompt slot. If they are adjacent in the batch, the prompt is read once for all of
them, as a [rows * H / K, D] x [D, L] product per KV head.
"""

import math

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.strides import unit_stride
from isomorph.kernels.types import CachedKV


# -- reference: the specification
def decode_attention_ref(q_BHD: Tensor, prompt: CachedKV, own: CachedKV, *, scale: float | None = None) -> Tensor:
    """The specification of ``decode_attention``, one row at a time."""
    scale = _check(q_BHD, prompt, own, scale)
    repeats = q_BHD.shape[1] // prompt.k_SKLD.shape[1]
    out_BHD = torch.zeros_like(q_BHD)
    for b, q_HD in enumerate(q_BHD):
        seen = [(cache, int(cache.slot_B[b]), int(cache.len_B[b])) for cache in (prompt, own)]
        k_KLD = torch.cat([cache.k_SKLD[slot, :, :length] for cache, slot, length in seen], 1)
        v_KLD = torch.cat([cache.v_SKLD[slot, :, :length] for cache, slot, length in seen], 1)
        k_HLD, v_HLD = (x.repeat_interleave(repeats, 0) for x in (k_KLD, v_KLD))
        prob_HL = (torch.einsum("hd,hld->hl", q_HD, k_HLD) * scale).softmax(-1)
        out_BHD[b] = torch.einsum("hl,hld->hd", prob_HL, v_HLD)
    return out_BHD


# -- argument checks
def _check(q_BHD: Tensor, prompt: CachedKV, own: CachedKV, scale: float | None) -> float:
    if q_BHD.ndim != 3 or prompt.k_SKLD.ndim != 4:
        raise ValueError(
            f"q must be [B, H, D] and keys [S, K, L, D], got {tuple(q_BHD.shape)} and {tuple(prompt.k_SKLD.shape)}"
        )
    num_heads, num_kv_heads = q_BHD.shape[1], prompt.k_SKLD.shape[1]
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a positive multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if q_BHD.shape[2] == 0:
        raise ValueError(f"heads must have at least one dimension, got q {tuple(q_BHD.shape)}")
    for name, cache in (("prompt", prompt), ("own", own)):
        _check_cache(name, cache, q_BHD, num_kv_heads)
    return q_BHD.shape[2] ** -0.5 if scale is None else scale


def _check_cache(name: str, cache: CachedKV, q_BHD: Tensor, num_kv_heads: int) -> None:
    k_SKLD, v_SKLD, slot_B, len_B = cache
    shape = tuple(k_SKLD.shape)
    if len(shape) != 4 or (shape[1], shape[3]) != (num_kv_heads, q_BHD.shape[2]):
        raise ValueError(f"{name}.k must be [S, {num_kv_heads}, L, {q_BHD.shape[2]}], got {shape}")
    if v_SKLD.shape != k_SKLD.shape:
        raise ValueError(f"{name}.v must be {shape}, the shape of {name}.k, got {tuple(v_SKLD.shape)}")
    if k_SKLD.dtype != q_BHD.dtype or v_SKLD.dtype != q_BHD.dtype:
        raise TypeError(
            f"{name}.k and {name}.v must have the dtype of q, {q_BHD.dtype}, got {k_SKLD.dtype} and {v_SKLD.dtype}; "
            "cast the cache or the query"
        )
    for what, values, most in (("slot", slot_B, shape[0] - 1), ("len", len_B, shape[2])):
        if values.shape != q_BHD.shape[:1]:
            raise ValueError(f"{name}.{what} must be [{len(q_BHD)}], one per row of q, got {tuple(values.shape)}")
        if values.dtype != torch.int64:
            raise TypeError(f"{name}.{what} must be int64, got {values.dtype}")
        # On a GPU, reading the values would synchronise the stream and cannot be captured in a CUDA graph.
        if values.device.type == "cpu" and len(values):
            low, high = (int(bound) for bound in torch.aminmax(values))
            if low < 0 or high > most:
                raise ValueError(f"{name}.{what} must lie in 0..{most}, got {low}..{high}")


# -- body torch: no synchronisation, but a copy of the prompt's entries per row
def _decode(q_BHD: Tensor, prompt: CachedKV, own: CachedKV, scale: float) -> Tensor:
    num_kv_heads = prompt.k_SKLD.shape[1]
    q_BKrD = (q_BHD * scale).unflatten(1, (num_kv_heads, -1))
    parts = [_gathered(cache) for cache in (prompt, own)]
    k_BKLD, v_BKLD = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
    hidden_BL = torch.cat([part[2] for part in parts], 1)
    scores_BKrL = (q_BKrD @ k_BKLD.mT).masked_fill_(hidden_BL[:, None, None], -math.inf)
    out_BKrD = scores_BKrL.softmax(-1) @ v_BKLD
    return out_BKrD.masked_fill_(hidden_BL.all(1)[:, None, None, None], 0).flatten(1, 2)


def _gathered(cache: CachedKV) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values per row, and the mask of entries beyond its length. Those values are 0, since 0 * NaN is NaN."""
    hidden_BL = torch.arange(cache.k_SKLD.shape[2], device=cache.len_B.device) >= cache.len_B[:, None]
    k_BKLD, v_BKLD = cache.k_SKLD.index_select(0, cache.slot_B), cache.v_SKLD.index_select(0, cache.slot_B)
    return k_BKLD, v_BKLD.masked_fill_(hidden_BL[:, None, :, None], 0), hidden_BL


# -- body native
def _decode_native(q_BHD: Tensor, prompt: CachedKV, own: CachedKV, scale: float) -> Tensor:
    out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    operands = [q_BHD]
    for cache in (prompt, own):
        operands += [cache.k_SKLD, cache.v_SKLD, cache.slot_B.contiguous(), cache.len_B.contiguous()]
    backend.native().decode_attention(*(unit_stride(x).detach() for x in operands), scale, out_BHD)
    return out_BHD


# -- public op
def decode_attention(q_BHD: Tensor, prompt: CachedKV, own: CachedKV, *, scale: float | None = None) -> Tensor:
    """Returns [B, H, D], the attention of one new token per row over its prompt's and its own cached keys and values.

    q [B, H, D] of one floating-point dtype with the caches, which are [S, K, L, D]; H is a multiple of K (grouped-query
    attention). scale defaults to D ** -0.5. ``own`` must already contain, and count, the new token's key and value.
    Entries beyond a length are ignored, NaN included. No gradient. Views with stride 1 in the last dimension are not
    copied. A row's bits do not depend on the other rows (batch-invariant), except in the implementation "torch".
    On CUDA nothing synchronises, and the launch depends on shapes only, so that a CUDA graph can capture it; slots and
    lengths are not checked there.
    Raises ValueError or TypeError for shapes and dtypes that do not fit each other and, on the CPU, for slots and
    lengths out of range.
    """
    body = backend.choose("decode_attention", q_BHD.device)
    if body != "torch" and not backend.has_memory(q_BHD, *prompt, *own):
        body = "reference"
    if body == "reference":
        return decode_attention_ref(q_BHD, prompt, own, scale=scale)
    scale = _check(q_BHD, prompt, own, scale)
    if body == "triton":
        from isomorph.kernels.gpu import decode

        return decode.decode_attention(q_BHD, prompt, own, scale)
    with torch.no_grad():
        return (_decode_native if body == "native" else _decode)(q_BHD, prompt, own, scale)
