"""SwiGLU (Shazeer, arXiv 2002.05202): the gate's SiLU times the other half.

    y = round(gate / (1 + exp(-gate))) * up

Roundings are those of transformers' MLP modules. The arithmetic is float32 (float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# -- reference: the specification
def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of ``swiglu``."""
    return torch.nn.functional.silu(gate) * up


# -- Triton
class _SwiGLU(torch.autograd.Function):
    """Keeps the two operands; the SiLU is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from isomorph.kernels.gpu import layer

        ctx.save_for_backward(gate, up)
        return layer.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        from isomorph.kernels.gpu import layer

        gate, up = ctx.saved_tensors
        return layer.swiglu_gradient(gate, up, dy.contiguous())


# -- public op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, of one shape and dtype. Differentiable once.

    Triton on CUDA for float32, bfloat16 and float16, elsewhere the specification. Raises ValueError where shapes or
    dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
    if backend.choose("swiglu", gate.device) != "triton" or gate.dtype not in TRITON_DTYPES:
        return swiglu_ref(gate, up)
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())
