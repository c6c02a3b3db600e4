"""Attention of one new token per sequence against its cached keys and values; for sampling, no gradients.

Sequences come as P prompts with G rows each. A row sees the prompt's entries and its own, under one softmax:

    out[p, g] = softmax([q . k_prompt[p, :prompt_len[p]], q . k_own[p, g, :own_len[p, g]]]) [v_prompt; v_own]

A prompt's keys and values are stored once and read once for its G rows: one [G * H / K, D] x [D, L] product
per KV head.
"""

import math

import torch
from torch import Tensor

from isomorph.kernels import backend


# -- reference: the specification
def decode_attention_ref(
    q_PGHD: Tensor,
    k_prompt_PKLD: Tensor,
    v_prompt_PKLD: Tensor,
    prompt_len_P: Tensor,
    k_own_PGKLD: Tensor,
    v_own_PGKLD: Tensor,
    own_len_PG: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """What ``decode_attention`` computes, one row at a time."""
    scale = _check(q_PGHD, k_prompt_PKLD, v_prompt_PKLD, prompt_len_P, k_own_PGKLD, v_own_PGKLD, own_len_PG, scale)
    num_prompts, num_rows, num_heads, _ = q_PGHD.shape
    repeats = num_heads // k_prompt_PKLD.shape[1]
    out_PGHD = torch.empty_like(q_PGHD)
    for p in range(num_prompts):
        for g in range(num_rows):
            seen, own = slice(int(prompt_len_P[p])), slice(int(own_len_PG[p, g]))
            k_KLD = torch.cat([k_prompt_PKLD[p][:, seen], k_own_PGKLD[p, g][:, own]], 1)
            v_KLD = torch.cat([v_prompt_PKLD[p][:, seen], v_own_PGKLD[p, g][:, own]], 1)
            k_HLD, v_HLD = (x.repeat_interleave(repeats, 0) for x in (k_KLD, v_KLD))
            prob_HL = (torch.einsum("hd,hld->hl", q_PGHD[p, g], k_HLD) * scale).softmax(-1)
            out_PGHD[p, g] = torch.einsum("hl,hld->hd", prob_HL, v_HLD)
    return out_PGHD


def _check(
    q_PGHD: Tensor,
    k_prompt_PKLD: Tensor,
    v_prompt_PKLD: Tensor,
    prompt_len_P: Tensor,
    k_own_PGKLD: Tensor,
    v_own_PGKLD: Tensor,
    own_len_PG: Tensor,
    scale: float | None,
) -> float:
    if q_PGHD.ndim != 4 or k_prompt_PKLD.ndim != 4 or k_own_PGKLD.ndim != 5:
        raise ValueError(
            "q must be [P, G, H, D], k_prompt [P, K, L, D] and k_own [P, G, K, L, D], got "
            f"{tuple(q_PGHD.shape)}, {tuple(k_prompt_PKLD.shape)} and {tuple(k_own_PGKLD.shape)}"
        )
    num_prompts, num_rows, num_heads, dim = q_PGHD.shape
    num_kv_heads, prompt_room, own_room = k_prompt_PKLD.shape[1], k_prompt_PKLD.shape[2], k_own_PGKLD.shape[3]
    expected = {
        "k_prompt": (k_prompt_PKLD, (num_prompts, num_kv_heads, prompt_room, dim)),
        "v_prompt": (v_prompt_PKLD, (num_prompts, num_kv_heads, prompt_room, dim)),
        "prompt_len": (prompt_len_P, (num_prompts,)),
        "k_own": (k_own_PGKLD, (num_prompts, num_rows, num_kv_heads, own_room, dim)),
        "v_own": (v_own_PGKLD, (num_prompts, num_rows, num_kv_heads, own_room, dim)),
        "own_len": (own_len_PG, (num_prompts, num_rows)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} beside q {tuple(q_PGHD.shape)}, got {tuple(tensor.shape)}")
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if any(x.dtype != q_PGHD.dtype for x in (k_prompt_PKLD, v_prompt_PKLD, k_own_PGKLD, v_own_PGKLD)):
        raise TypeError(f"keys and values must have the dtype of q, {q_PGHD.dtype}; cast the cache or the query")
    _check_lens("prompt_len", prompt_len_P, 1, prompt_room)
    _check_lens("own_len", own_len_PG, 0, own_room)
    return dim**-0.5 if scale is None else scale


def _check_lens(name: str, lens: Tensor, low: int, high: int) -> None:
    if lens.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {lens.dtype}")
    if lens.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(lens))
    if least < low or most > high:
        raise ValueError(f"{name} must lie in {low}..{high}, the room of its cache, got {least}..{most}")


# -- PyTorch body
def _decode(
    q_PGHD: Tensor,
    k_prompt_PKLD: Tensor,
    v_prompt_PKLD: Tensor,
    prompt_len_P: Tensor,
    k_own_PGKLD: Tensor,
    v_own_PGKLD: Tensor,
    own_len_PG: Tensor,
    scale: float,
) -> Tensor:
    num_prompts, num_rows, num_heads, dim = q_PGHD.shape
    num_kv_heads, prompt_room = k_prompt_PKLD.shape[1:3]
    repeats = num_heads // num_kv_heads  # r below
    q_PGKrD = (q_PGHD * scale).view(num_prompts, num_rows, num_kv_heads, repeats, dim)
    # g: the G * r queries of a group that read one KV head
    q_PKgD = q_PGKrD.transpose(1, 2).reshape(num_prompts, num_kv_heads, num_rows * repeats, dim)
    on_prompt = (q_PKgD @ k_prompt_PKLD.mT).view(num_prompts, num_kv_heads, num_rows, repeats, prompt_room)
    on_own = q_PGKrD @ k_own_PGKLD.mT
    scores_PGKrL = torch.cat([on_prompt.transpose(1, 2), on_own], -1)
    hidden = torch.cat(
        [
            _beyond(prompt_len_P, prompt_room)[:, None].expand(-1, num_rows, -1),
            _beyond(own_len_PG, k_own_PGKLD.shape[3]),
        ],
        -1,
    )
    prob_PGKrL = scores_PGKrL.masked_fill_(hidden[:, :, None, None], -math.inf).softmax(-1)
    prompt_prob = prob_PGKrL[..., :prompt_room].transpose(1, 2).flatten(2, 3)
    own_prob = prob_PGKrL[..., prompt_room:]
    out_PGKrD = _weigh(prompt_prob, v_prompt_PKLD, own_prob, v_own_PGKLD)
    if not math.isfinite(float(out_PGKrD.sum())):  # weight 0 times garbage that is not finite is not 0
        v_prompt_PKLD = v_prompt_PKLD.masked_fill(_beyond(prompt_len_P, prompt_room)[:, None, :, None], 0)
        v_own_PGKLD = v_own_PGKLD.masked_fill(_beyond(own_len_PG, k_own_PGKLD.shape[3])[:, :, None, :, None], 0)
        out_PGKrD = _weigh(prompt_prob, v_prompt_PKLD, own_prob, v_own_PGKLD)
    return out_PGKrD.view(num_prompts, num_rows, num_heads, dim)


def _beyond(lens: Tensor, room: int) -> Tensor:
    """[..., room] bool, True at and after each length."""
    return torch.arange(room, device=lens.device) >= lens[..., None]


def _weigh(prompt_prob_PKgL: Tensor, v_prompt_PKLD: Tensor, own_prob_PGKrL: Tensor, v_own_PGKLD: Tensor) -> Tensor:
    out_PGKrD = own_prob_PGKrL @ v_own_PGKLD
    num_prompts, num_rows, num_kv_heads, repeats, dim = out_PGKrD.shape
    from_prompt = prompt_prob_PKgL @ v_prompt_PKLD
    return out_PGKrD.add_(from_prompt.view(num_prompts, num_kv_heads, num_rows, repeats, dim).transpose(1, 2))


# -- native body
def _decode_native(
    q_PGHD: Tensor,
    k_prompt_PKLD: Tensor,
    v_prompt_PKLD: Tensor,
    prompt_len_P: Tensor,
    k_own_PGKLD: Tensor,
    v_own_PGKLD: Tensor,
    own_len_PG: Tensor,
    scale: float,
) -> Tensor:
    out_PGHD = torch.empty(q_PGHD.shape, dtype=q_PGHD.dtype)
    q, k_prompt, v_prompt, k_own, v_own = (
        x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
        for x in (q_PGHD, k_prompt_PKLD, v_prompt_PKLD, k_own_PGKLD, v_own_PGKLD)
    )
    lens = prompt_len_P.contiguous(), own_len_PG.contiguous()
    backend.native().decode_attention(q, k_prompt, v_prompt, lens[0], k_own, v_own, lens[1], scale, out_PGHD)
    return out_PGHD


# -- public op
def decode_attention(
    q_PGHD: Tensor,
    k_prompt_PKLD: Tensor,
    v_prompt_PKLD: Tensor,
    prompt_len_P: Tensor,
    k_own_PGKLD: Tensor,
    v_own_PGKLD: Tensor,
    own_len_PG: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """[P, G, H, D] attention of one new token per row over its prompt's and its own cached keys and values.

    Lengths are int64, prompt_len in 1..L, own_len in 0..L; what lies beyond does not matter, be it NaN.
    The new token's own key and value must be in ``k_own`` already, and counted. Views with stride 1 in the
    last dimension cost no copy: pass the cache sliced to the longest live length. H is a multiple of K.
    Raises ValueError or TypeError for shapes, dtypes and lengths that do not fit.
    """
    operands = (q_PGHD, k_prompt_PKLD, v_prompt_PKLD, prompt_len_P, k_own_PGKLD, v_own_PGKLD, own_len_PG)
    body = backend.choose("decode_attention", q_PGHD.device)
    if body == "reference":
        return decode_attention_ref(*operands, scale=scale)
    scale = _check(*operands, scale)
    with torch.no_grad():
        return _decode_native(*operands, scale) if body == "native" else _decode(*operands, scale)
