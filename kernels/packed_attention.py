"""Attention over packed segments; the prompt of a group stands once and is computed once.

A prompt is seen by itself and by all responses of its group, a response by itself alone; both causally. In a tree of
segments each one sees all that it continues.
On a GPU by ``gpu/attention.py`` or ``varlen_attention.py``; ``attention_route.py`` has the rule.
On the CPU by ATen's flash attention, in parts that are merged by log-sum-exp:

    own     every segment on its own keys, causal                         o1, l1
    cross   all that continues a segment on its keys, full; by depth      o2, l2
    merge   l = logaddexp(l1, l2)     o = exp(l1 - l) o1 + exp(l2 - l) o2

The backward of each part, given the merged o and l, is exact: a weight is exp(score - l) wherever its key is.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import attention_route
from isomorph.kernels.packed_layout import Batch, PackedLayout, Plan, Ranges

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# -- reference: the specification
def packed_attention_ref(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """What ``packed_attention`` computes, with all T x T scores."""
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
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if not q_THD.is_floating_point() or not q_THD.dtype == k_TKD.dtype == v_TKD.dtype:
        raise TypeError(f"q, k, v must have one floating-point dtype, got {q_THD.dtype}, {k_TKD.dtype}, {v_TKD.dtype}")
    scale = q_THD.shape[2] ** -0.5 if scale is None else scale
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be > 0 and finite, got {scale}")
    return scale


# -- CPU body
class _FlashMerged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: Plan, scale: float) -> Tensor:
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_dtype = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=lse_dtype)
        for batch in plan.own:
            out, lse = _attend(batch, q_THD, k_TKD, v_TKD, scale)
            batch.queries.put(out_THD, out)
            batch.queries.put(lse_TH, lse)
        for batch in plan.cross:
            _merge(batch.queries, out_THD, lse_TH, *_attend(batch, q_THD, k_TKD, v_TKD, scale))
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, lse_TH)
        ctx.plan, ctx.scale = plan, scale
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse_TH = ctx.saved_tensors
        dtype = inputs[0].dtype
        # ATen's backward is faster in float32 than in bfloat16, conversions included, and sums parts unrounded
        q_THD, k_TKD, v_TKD, out_THD, dout_THD = (x.to(lse_TH.dtype) for x in (*inputs, dout_THD))
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_TKD, v_TKD))
        for batch in (*ctx.plan.own, *ctx.plan.cross):
            queries, keys = batch.queries, batch.keys
            parts = _flash_backward(
                queries.gather(dout_THD),
                queries.gather(q_THD),
                keys.gather(k_TKD),
                keys.gather(v_TKD),
                queries.gather(out_THD),
                _gather_lse(queries, lse_TH),
                0.0,
                batch.is_causal,
                attn_mask=_mask(batch, q_THD.dtype),
                scale=ctx.scale,
            )
            for ranges, grad, part in zip((queries, keys, keys), grads, parts, strict=True):
                # own batches come first and cover every row
                (ranges.put if batch.is_causal else ranges.add)(grad, part)
        return *(grad.to(dtype) for grad in grads), None, None


def _attend(batch: Batch, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, D] and LSE [B, H, L]; values on padded queries are meaningless."""
    return _flash(
        batch.queries.gather(q_THD),
        batch.keys.gather(k_TKD),
        batch.keys.gather(v_TKD),
        0.0,
        batch.is_causal,
        attn_mask=_mask(batch, q_THD.dtype),
        scale=scale,
    )


def _mask(batch: Batch, dtype: torch.dtype) -> Tensor | None:
    if batch.hide_padding is None:
        return None
    return torch.zeros(batch.hide_padding.shape, dtype=dtype).masked_fill_(batch.hide_padding, -math.inf)


def _gather_lse(queries: Ranges, lse_TH: Tensor) -> Tensor:
    lse_BHL = queries.gather(lse_TH)
    if queries.is_padding is None:
        return lse_BHL
    # exp(score - inf) = 0: a padded query gives nothing to any gradient
    is_padding = queries.is_padding.view(queries.num_ranges, 1, queries.max_len)
    return lse_BHL.masked_fill_(is_padding, math.inf)


def _merge(queries: Ranges, out_THD: Tensor, lse_TH: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    out_nHD, lse_nH = queries.strip(part_out), queries.strip(part_lse)
    own_out_nHD, own_lse_nH = out_THD[queries.rows], lse_TH[queries.rows]
    weight_nH1 = torch.sigmoid(lse_nH - own_lse_nH)[..., None]
    merged_nHD = torch.lerp(own_out_nHD.to(lse_nH.dtype), out_nHD.to(lse_nH.dtype), weight_nH1)
    out_THD[queries.rows] = merged_nHD.to(out_THD.dtype)
    lse_TH[queries.rows] = torch.logaddexp(own_lse_nH, lse_nH)


# -- GPU bodies
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
    """The module; imported late, because it needs Triton."""
    if body == "varlen":
        from isomorph.kernels import varlen_attention

        return varlen_attention
    from isomorph.kernels.gpu import attention

    return attention


# -- public op
def packed_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """[T, H, D] attention of packed tokens; a response sees its prompt and itself, a prompt itself, causally.

    q [T, H, D], k and v [T, K, D] of one floating-point dtype, rotary embedding (at ``layout.positions``)
    already applied; H is a multiple of K (grouped-query attention). scale defaults to D ** -0.5.
    Differentiable once.
    Raises ValueError or TypeError for shapes and dtypes that do not fit each other or the layout.
    """
    scale = _check(q_THD, k_TKD, v_TKD, layout, scale)
    body = attention_route.choose(q_THD.device, q_THD.dtype, q_THD.shape[2], is_tree=layout.is_tree).body
    if body == "reference":
        return packed_attention_ref(q_THD, k_TKD, v_TKD, layout, scale=scale)
    if body == "torch":
        return _FlashMerged.apply(q_THD, k_TKD, v_TKD, layout.plan, scale)
    return _OnGpu.apply(q_THD, k_TKD, v_TKD, layout, scale, body)
