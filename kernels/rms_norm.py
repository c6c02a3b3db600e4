"""Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), with the residual addition before it.

    s = residual + x                            rounded to the dtype of x; s = x without a residual
    y = weight * round(s / sqrt(mean(s^2) + eps))

The mean is over the last dimension. Roundings are those of transformers' RMSNorm modules: the normalised value is
rounded to the dtype of x before it is multiplied. Sums are float32 (float64 for float64).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import layer_native
from isomorph.kernels.layer_bodies import layer_body
from isomorph.kernels.types import stats_dtype

MAX_TRITON_DIM = 16_384  # a row is kept in registers


# -- reference: the specification
def rms_norm_ref(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The specification of ``rms_norm``."""
    wide = x.to(stats_dtype(x.dtype))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * normal.to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of ``add_rms_norm``."""
    total = residual + x
    return rms_norm_ref(total, weight_D, eps), total


# -- fused
class _RMSNorm(torch.autograd.Function):
    """Keeps s and one number for each row; everything else is computed again in the backward, by the same body."""

    @staticmethod
    def forward(
        ctx: Any, body: ModuleType, x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        x_ND, residual_ND = _rows(x), None if residual is None else _rows(residual)
        y_ND, total_ND, rstd_N = body.rms_norm(x_ND, residual_ND, weight_D, eps)
        ctx.save_for_backward(x_ND if total_ND is None else total_ND, weight_D, rstd_N)
        ctx.has_residual, ctx.body, ctx.shape = residual is not None, body, x.shape
        return y_ND, total_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor, dtotal_ND: Tensor | None) -> tuple[Tensor | None, ...]:
        total_ND, weight_D, rstd_N = ctx.saved_tensors
        dtotal_ND = None if dtotal_ND is None else dtotal_ND.contiguous()
        dx_ND, dweight_D = ctx.body.rms_norm_gradient(total_ND, weight_D, rstd_N, dy_ND.contiguous(), dtotal_ND)
        # One object for both: autograd copies it where it keeps it twice. It would not see that two views share memory,
        # and then add to both at once. So x and the residual come here as they are, and no view is between.
        dx = dx_ND.view(ctx.shape)
        return None, dx, dx if ctx.has_residual else None, dweight_D, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def fused_body(x: Tensor, weight_D: Tensor, *residual: Tensor) -> ModuleType | None:
    """The fused implementation for these operands; None: the specification runs."""
    body = layer_body("rms_norm", x, weight_D, *residual)
    return None if body is not None and body is not layer_native and x.shape[-1] > MAX_TRITON_DIM else body


def _check(x: Tensor, weight_D: Tensor, residual: Tensor | None = None) -> None:
    if weight_D.ndim != 1 or x.ndim == 0 or x.shape[-1] != len(weight_D):
        raise ValueError(
            f"x must be [..., D] and weight [D] of one width, got {tuple(x.shape)} and {tuple(weight_D.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


# -- public ops
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of x [..., D] over its last dimension, times weight [D] of its dtype. Differentiable once.

    A weight of another dtype is multiplied as PyTorch promotes the two, as in transformers' modules.

    Triton on CUDA for float32, bfloat16 and float16, C++ on the CPU for float32 and bfloat16; no row depends
    on the others in any bit. Elsewhere the specification. Raises ValueError for widths that do not agree.
    """
    _check(x, weight_D)
    body = fused_body(x, weight_D)
    if body is None:
        return rms_norm_ref(x, weight_D, eps)
    y_ND, _ = _RMSNorm.apply(body, x, None, weight_D.contiguous(), eps)
    return y_ND.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and residual + x itself, both [..., D] in the dtype of x. Otherwise as ``rms_norm``."""
    _check(x, weight_D, residual)
    body = fused_body(x, weight_D, residual)
    if body is None:
        return add_rms_norm_ref(x, residual, weight_D, eps)
    y_ND, total_ND = _RMSNorm.apply(body, x, residual, weight_D.contiguous(), eps)
    return y_ND.view(x.shape), total_ND.view(x.shape)
