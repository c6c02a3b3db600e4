"""y = x W^T + b, as ``torch.nn.functional.linear`` has it, by the faster of PyTorch's two CPU libraries.

PyTorch hands float32 products to MKL, which runs AVX2 code on processors that are not Intel's. oneDNN, which comes in
the same wheel and takes PyTorch's bfloat16 products already, runs AVX-512 there: 2.2 times as fast. So here all three
products of a layer are oneDNN's, by the operator that torch.compile's own CPU code calls:

    product(L, R) = L R^T        y = product(x, W)        dx = product(dy, W^T)        dW = product(dy^T, x^T)

Everything else is PyTorch's ``linear``: other dtypes, other devices, the reference body, products and weights that are
too small to gain.

Few rows cost the reading of the weight, and oneDNN arranges it anew for each product. ``prepack`` does that once, for a
sampler whose weights stay as they are while it decodes.
"""

import os
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend

# oneDNN keeps a primitive for every shape, with its code and its scratch about 1 MiB, and 1,024 of them. Numbers of
# rows differ from step to step; a step repeats a few shapes in every layer. Read when oneDNN first multiplies.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Beside that cache oneDNN keeps up to 0.3 MiB for every number of rows that it has ever multiplied, until the process
# ends. So numbers of rows that vary without end are rounded up, to few different ones; and the allocators of CPU and
# GPU reuse a block of the same size where they split one of another.
ROW_MULTIPLE = 64
MIN_TERMS = 2**22  # multiplications of a product that is worth a primitive
# Numbers in a weight that is worth one, or worth packing: for smaller ones MKL is as fast, and making primitives for
# 70 numbers of rows cost the four layers of the quickstart 0.1 to 0.3 GiB.
MIN_WEIGHT = 2**16
PACKED_FOR_ROWS = 32  # any number is multiplied; of these the arrangement is the best


# -- reference: the specification
def linear_ref(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What ``linear`` computes."""
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


# -- oneDNN
def takes_onednn(left: Tensor, right_NK: Tensor, num_weights: int) -> bool:
    """Whether ``product`` can multiply the rows of ``left`` [..., K] by these, gains by it, and is to.

    ``num_weights``: numbers in the weight, which is one factor, or whose gradient is the product.
    """
    fit = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (left, right_NK))
    num_terms = left.numel() * right_NK.shape[0]
    return fit and num_terms >= max(1, MIN_TERMS) and num_weights >= MIN_WEIGHT and _body() == "torch"


@torch.compiler.assume_constant_result  # compiled code keeps the body it was compiled with
def _body() -> str:
    return backend.choose("linear", "cpu")


def product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """[M, N] float32: left right^T, of float32 CPU matrices of any strides, none of them empty. No gradient."""
    if torch.compiler.is_compiling():  # Inductor's own form of the operator wants weights that never change
        return _opaque_product(left_MK, right_NK)
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


@library.custom_op("isomorph::product", mutates_args=())
def _opaque_product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


@_opaque_product.register_fake
def _(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    return left_MK.new_empty(left_MK.shape[0], right_NK.shape[0])  # len() would fix a number that varies


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        y_TO = product(x_TI, weight_OI)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(dy_TO, weight_OI.T) if needs_x else None,
            product(dy_TO.T, x_TI.T) if needs_weight else None,
            dy_TO.sum(0) if needs_bias else None,
        )


def row_multiple(num_rows: int) -> int:
    """What this number of rows is rounded up to a multiple of: 8, from 256 on 16, from 512 on 32, and so on.

    At most 16 different numbers between a power of two and the next, and at most 7 rows or a sixteenth more.
    """
    return max(8, 2 ** (num_rows.bit_length() - 5)) if num_rows > 8 else 1


def rounded_rows(num_rows: int) -> int:
    step = row_multiple(num_rows)
    return -(-num_rows // step) * step


def _with_rounded_rows(x: Tensor) -> Tensor:
    """[..., I] -> [R, I]: the rows, and after them rows of zeros, which add nothing to a gradient."""
    x_RI = x.reshape(-1, x.shape[-1])
    num_more = rounded_rows(len(x_RI)) - len(x_RI)
    return torch.nn.functional.pad(x_RI, (0, 0, 0, num_more)) if num_more else x_RI


# -- public
def prepack(weight_OI: Tensor) -> Tensor | None:
    """A copy of the weight as oneDNN multiplies by it, for ``linear_prepacked``; None where there is nothing to gain.

    It knows nothing of later changes of the weight.
    """
    is_fit = weight_OI.device.type == "cpu" and weight_OI.dtype in (torch.float32, torch.bfloat16)
    if not is_fit or weight_OI.numel() < max(1, MIN_WEIGHT) or _body() != "torch":
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), PACKED_FOR_ROWS)


def linear_prepacked(x: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[..., I] -> [..., O], in the dtype that ``packed`` was made from. No gradient."""
    x_RI = _with_rounded_rows(x)
    y_RO = torch.ops.mkldnn._linear_pointwise(x_RI, packed, bias_O, "none", [], "")
    return y_RO[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[..., I] -> [..., O]. Differentiable once in all three where oneDNN multiplies."""
    if not takes_onednn(x, weight_OI, weight_OI.numel()):
        return linear_ref(x, weight_OI, bias_O)
    if torch.compiler.is_compiling():  # the rows of compiled layers are rounded outside: here their number is a symbol
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)
    y_RO = _Linear.apply(_with_rounded_rows(x), weight_OI, bias_O)
    return y_RO[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)
