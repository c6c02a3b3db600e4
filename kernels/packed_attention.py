"""Attention over packed sequences that share prompts: the prompt of a group is stored once and computed once.

A response attends to its prompt and to itself, a prompt to itself, causally. In a tree, a segment attends to all of its
ancestors and to itself.
On a GPU ``gpu/attention.py`` or ``varlen_attention.py`` runs; ``attention_route.py`` selects. On a CPU
``csrc/attention_body.cpp`` runs, in float32 for every storage type (float64 for float64): blocks of keys in order, each
with all queries that attend to it

    P = exp(scale q . k - lse)      dS = P (dout . v - delta)      delta = dout . out
    dv += P^T dout                  dk += scale dS^T q             dq += scale dS k

so that the bits of a group's results do not depend on the other groups.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import attention_route, backend
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.strides import unit_stride
from isomorph.kernels.types import stats_dtype


# -- reference: the specification
def packed_attention_ref(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """The specification of ``packed_attention``, with all T x T scores."""
    scale = _check(q_THD, k_TKD, v_TKD, layout, scale)
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(repeats, 1) for x in (k_TKD, v_TKD))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scale
    mask_TT = layout.dense_mask().to(q_THD.device)
    prob_HTT = scores_HTT.masked_fill(~mask_TT, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", prob_HTT, v_THD)


def _check(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float | None) -> float:
    if q_THD.ndim != 3 or k_TKD.ndim != 3 or k_TKD.shape != v_TKD.shape or k_TKD.shape[2] != q_THD.shape[2]:
        raise ValueError(
            "q must be [T, H, D] and k, v [T, K, D] with the same D, got "
            f"{tuple(q_THD.shape)}, {tuple(k_TKD.shape)}, {tuple(v_TKD.shape)}"
        )
    if q_THD.shape[0] != layout.num_tok or k_TKD.shape[0] != layout.num_tok:
        raise ValueError(
            f"q, k, v must have the layout's {layout.num_tok} rows, got {q_THD.shape[0]} and {k_TKD.shape[0]}"
        )
    num_heads, num_kv_heads = q_THD.shape[1], k_TKD.shape[1]
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a positive multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if q_THD.shape[2] == 0:
        raise ValueError(f"heads must have at least one dimension, got q {tuple(q_THD.shape)}")
    if not q_THD.is_floating_point() or not q_THD.dtype == k_TKD.dtype == v_TKD.dtype:
        raise TypeError(f"q, k, v must have one floating-point dtype, got {q_THD.dtype}, {k_TKD.dtype}, {v_TKD.dtype}")
    scale = q_THD.shape[2] ** -0.5 if scale is None else scale
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be > 0 and finite, got {scale}")
    return scale


# -- body native
class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments_S4: Tensor, scale: float) -> Tensor:
        inputs = [unit_stride(x).detach() for x in (q_THD, k_TKD, v_TKD)]
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=stats_dtype(q_THD.dtype))
        backend.native().packed_attention(*inputs, segments_S4, scale, out_THD, lse_TH)
        ctx.save_for_backward(*inputs, out_THD, lse_TH)
        ctx.segments_S4, ctx.scale = segments_S4, scale
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        q_THD, k_TKD, *_, lse_TH = saved
        delta_TH = torch.empty_like(lse_TH)
        # dk and dv per query head, so that no two tasks write to the same row
        dq_THD, dk_THD, dv_THD = (lse_TH.new_empty(q_THD.shape) for _ in range(3))
        backend.native().packed_attention_backward(
            unit_stride(dout_THD).detach(), *saved, ctx.segments_S4, ctx.scale, delta_TH, dq_THD, dk_THD, dv_THD
        )
        dk_TKD, dv_TKD = (x.unflatten(1, (k_TKD.shape[1], -1)).sum(2) for x in (dk_THD, dv_THD))
        return *(grad.to(q_THD.dtype) for grad in (dq_THD, dk_TKD, dv_TKD)), None, None


def _segments(layout: PackedLayout) -> Tensor:
    """[S, 4] int64: start, end, vis_end, parent."""
    if "segments" not in layout.on_device:
        layout.on_device["segments"] = torch.tensor(layout.segments, dtype=torch.int64).view(-1, 4)
    return layout.on_device["segments"]


# -- bodies on a GPU
class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float, body: str
    ) -> Tensor:
        out_THD, lse_HT = _gpu_body(body).attend(q_THD, k_TKD, v_TKD, layout, scale)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, lse_HT)
        ctx.layout, ctx.scale, ctx.body = layout, scale, body
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        grads = _gpu_body(ctx.body).attend_backward(dout_THD, *ctx.saved_tensors, ctx.layout, ctx.scale)
        return *grads, None, None, None


def _gpu_body(body: str) -> Any:
    """The implementation's module; imported on use, because it needs Triton."""
    if body == "varlen":
        from isomorph.kernels import varlen_attention

        return varlen_attention
    from isomorph.kernels.gpu import attention

    return attention


# -- public op
def packed_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Returns [T, H, D], the causal attention of packed tokens: a response attends to its prompt and to itself.

    q [T, H, D], k and v [T, K, D] of one floating-point dtype, with rotary embedding (at ``layout.positions``) already
    applied; H is a multiple of K (grouped-query attention). scale defaults to D ** -0.5. Differentiable once; the
    gradient of a prompt is the sum over its responses.
    Raises ValueError or TypeError for shapes and dtypes that do not fit each other or the layout, for a scale that is
    not > 0 and finite, and if the requested implementation does not support the inputs.
    """
    scale = _check(q_THD, k_TKD, v_TKD, layout, scale)
    body = attention_route.choose(q_THD.device, q_THD.dtype, q_THD.shape[2], is_tree=layout.is_tree).body
    if body == "reference" or not backend.has_memory(q_THD, k_TKD, v_TKD):
        return packed_attention_ref(q_THD, k_TKD, v_TKD, layout, scale=scale)
    if body == "native":
        return _Native.apply(q_THD, k_TKD, v_TKD, _segments(layout), scale)
    return _OnGpu.apply(q_THD, k_TKD, v_TKD, layout, scale, body)
