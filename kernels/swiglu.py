"""SwiGLU (Shazeer, arXiv 2002.05202): the gate's SiLU times the other half.

    y = round(gate / (1 + exp(-gate))) * up

Roundings are those of transformers' MLP modules. The arithmetic is float32 (float64 for float64).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels.layer_bodies import layer_body


# -- reference: the specification
def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of ``swiglu``."""
    return torch.nn.functional.silu(gate) * up


# -- fused
class _SwiGLU(torch.autograd.Function):
    """Keeps the two operands; the SiLU is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, body: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.body = body
        return body.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return (None, *ctx.body.swiglu_gradient(gate, up, dy.contiguous()))


# -- public op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, of one shape and dtype. Differentiable once.

    Triton on CUDA for float32, bfloat16 and float16, C++ on the CPU for float32 and bfloat16, elsewhere the
    specification. Raises ValueError where shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
    body = layer_body("swiglu", gate, up)
    if body is None:
        return swiglu_ref(gate, up)
    return _SwiGLU.apply(body, gate.contiguous(), up.contiguous())
