"""Rotary position embedding (Su et al., arXiv 2104.09864) of queries and keys, in the half-split form of Llama.

    out[:d/2] = x[:d/2] cos[:d/2] - x[d/2:] sin[:d/2]
    out[d/2:] = x[d/2:] cos[d/2:] + x[:d/2] sin[d/2:]

cos and sin of a token are the same for all of its heads, and constants: they get no gradient.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend
from isomorph.kernels.layer_bodies import layer_body
from isomorph.kernels.strides import unit_stride


# -- reference: the specification
def rotary_ref(q_NHd: Tensor, k_NKd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of ``rotary``. Each product is rounded to the dtype of cos, as in transformers' models."""
    return _rotated(q_NHd, cos_Nd, sin_Nd), _rotated(k_NKd, cos_Nd, sin_Nd)


def _rotated(x_NHd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    first, second = x_NHd.chunk(2, -1)
    return (x_NHd * cos_Nd[:, None] + torch.cat((-second, first), -1) * sin_Nd[:, None]).to(x_NHd.dtype)


# -- fused
class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: ModuleType, q_NHd: Tensor, k_NKd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_Nd, sin_Nd)
        ctx.body = body
        return body.rotary(q_NHd, k_NKd, cos_Nd, sin_Nd, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_NHd: Tensor, dk_NKd: Tensor) -> tuple[Tensor | None, ...]:
        cos_Nd, sin_Nd = ctx.saved_tensors
        grads = (unit_stride(dq_NHd), unit_stride(dk_NKd))
        return (None, *ctx.body.rotary(*grads, cos_Nd, sin_Nd, transposed=True), None, None)


# -- public op
def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [N, H, d] and keys [N, K, d] of N tokens; cos and sin [N, d]. Differentiable once in q and k.

    q and k have one dtype, cos and sin the same or float32 (OLMo-2); d is even. Triton on CUDA for float32, bfloat16
    and float16, C++ on the CPU for float32 and bfloat16, both rounded once; elsewhere the specification. ValueError
    is raised for shapes or dtypes that do not agree.
    """
    num, dim = cos_Nd.shape
    for name, x in (("q", q_NHd), ("k", k_NKd)):
        if x.ndim != 3 or x.shape[0] != num or x.shape[2] != dim or x.dtype != q_NHd.dtype:
            raise ValueError(
                f"{name} must be [{num}, heads, {dim}] of {q_NHd.dtype}, as cos and q, got {tuple(x.shape)} {x.dtype}"
            )
    fits = cos_Nd.dtype in (q_NHd.dtype, torch.float32) and q_NHd.dtype.itemsize <= cos_Nd.dtype.itemsize
    if sin_Nd.shape != cos_Nd.shape or sin_Nd.dtype != cos_Nd.dtype or dim % 2 or not fits:
        raise ValueError(
            f"cos and sin must be [N, d] of one dtype, {q_NHd.dtype} as q or float32, d even, got "
            f"{tuple(cos_Nd.shape)} {cos_Nd.dtype} and {tuple(sin_Nd.shape)} {sin_Nd.dtype}"
        )
    body = layer_body("rotary", q_NHd, k_NKd)
    if body is None or not backend.has_memory(cos_Nd, sin_Nd):
        return rotary_ref(q_NHd, k_NKd, cos_Nd, sin_Nd)
    return _Rotary.apply(body, unit_stride(q_NHd), unit_stride(k_NKd), cos_Nd.contiguous(), sin_Nd.contiguous())
