"""y = x W^T + b, as ``torch.nn.functional.linear``, in float32 on the CPU by oneDNN instead of MKL.

PyTorch computes float32 matrix products on the CPU with MKL, which uses AVX2 code on processors not made by Intel.
oneDNN, which is in the same wheel and computes PyTorch's bfloat16 products, uses AVX-512 there: 2.2 times as fast. So
all three products of a layer run in oneDNN, through the operator that the CPU code of torch.compile calls:

    product(L, R) = L R^T        y = product(x, W)        dx = product(dy, W^T)        dW = product(dy^T, x^T)

Other dtypes, other devices and products too small to be faster call ``torch.nn.functional.linear``.

With few rows the time goes into reading the weight, and oneDNN reorders the weight in every call. ``prepack`` reorders
it once, for a sampler whose weights do not change while it decodes.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend

# Besides its cache of primitives oneDNN keeps up to 0.3 MiB per number of rows that it has multiplied, until the
# process ends. So numbers of rows are rounded up to few different values. That also lets the CPU and GPU allocators
# reuse blocks.
ROW_MULTIPLE = 64
MIN_TERMS = 2**22  # multiplications of the smallest product for which a primitive pays
# Elements of the smallest weight for which a primitive, or prepacking, pays. For smaller ones MKL is as fast, and
# primitives for 70 numbers of rows took 0.1 to 0.3 GiB for the four layers of the quickstart.
MIN_WEIGHT = 2**16
PREPACK_ROWS = 32  # the number of rows that a prepacked weight is optimised for; any number works


# -- reference: the specification
def linear_ref(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The specification of ``linear``."""
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


# -- oneDNN
@functools.cache
def _bound_primitive_cache() -> None:
    """Sets an environment variable that oneDNN reads at its first product.

    oneDNN caches a primitive per shape, about 1 MiB of code and scratch, and up to 1,024 of them by default. The number
    of rows changes from step to step, while one step repeats a few shapes in all layers, so 128 are enough.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def takes_onednn(left: Tensor, right_NK: Tensor, num_weights: int) -> bool:
    """Whether ``product`` supports left [..., K] and right [N, K], is expected to be faster, and is selected.

    ``num_weights``: the number of elements of the layer's weight, which is a factor or whose gradient is the product.
    """
    fit = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (left, right_NK))
    num_terms = left.numel() * right_NK.shape[0]
    is_large = num_terms >= max(1, MIN_TERMS) and num_weights >= MIN_WEIGHT
    return fit and is_large and _body() == "torch" and backend.has_memory(left, right_NK)


@torch.compiler.assume_constant_result  # compiled code keeps the implementation it was compiled with
def _body() -> str:
    return backend.choose("linear", "cpu")


def product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """Returns left right^T, [M, N] float32, of non-empty float32 CPU matrices with any strides. No gradient."""
    if torch.compiler.is_compiling():  # Inductor's own lowering of the operator requires constant weights
        return _opaque_product(left_MK, right_NK)
    _bound_primitive_cache()
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


@library.custom_op("isomorph::product", mutates_args=())
def _opaque_product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    _bound_primitive_cache()
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


@_opaque_product.register_fake
def _(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    return left_MK.new_empty(left_MK.shape[0], right_NK.shape[0])  # len() would specialise on the number of rows


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
    """The multiple to which ``num_rows`` is rounded up: 1 up to 8 rows, then 8; from 256 on 16, from 512 on 32, ...

    There are at most 16 rounded numbers between a power of two and the next, and rounding adds at most 7 rows or 1/16.
    """
    return max(8, 2 ** (num_rows.bit_length() - 5)) if num_rows > 8 else 1


def rounded_rows(num_rows: int) -> int:
    """``num_rows`` rounded up to a multiple of ``row_multiple(num_rows)``."""
    step = row_multiple(num_rows)
    return -(-num_rows // step) * step


def _with_rounded_rows(x: Tensor) -> Tensor:
    """[..., I] -> [R, I]: the rows, padded with rows of zeros, which do not change a gradient."""
    x_RI = x.reshape(-1, x.shape[-1])
    num_more = rounded_rows(len(x_RI)) - len(x_RI)
    return torch.nn.functional.pad(x_RI, (0, 0, 0, num_more)) if num_more else x_RI


def _fits(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> bool:
    """Whether the operands are those of a layer, outside autocast; of others PyTorch says itself what is wrong."""
    is_layer = weight_OI.ndim == 2 and x.ndim > 0 and x.shape[-1] == weight_OI.shape[1]
    is_biased = bias_O is None or (bias_O.dtype == x.dtype and bias_O.shape == weight_OI.shape[:1])
    return is_layer and is_biased and not torch.is_autocast_enabled("cpu")


# -- public
def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor: it needs AVX-512 or AVX-NE-CONVERT.

    Elsewhere PyTorch's own loops do, more slowly than MKL multiplies float32 (benchmarks/LOG.md, 2026-11-28).
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(weight_OI: Tensor) -> Tensor | None:
    """Returns a copy of the weight in oneDNN's blocked layout, for ``linear_prepacked``.

    weight [O, I] float32 or bfloat16 on the CPU; later changes of it do not reach the copy. Returns None for other
    weights, where oneDNN does not multiply bfloat16, and if it would not be faster.
    """
    dtype = weight_OI.dtype
    is_multiplied = dtype == torch.float32 or (dtype == torch.bfloat16 and onednn_has_bfloat16())
    is_fit = weight_OI.device.type == "cpu" and is_multiplied
    if not is_fit or weight_OI.numel() < max(1, MIN_WEIGHT) or _body() != "torch":
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), PREPACK_ROWS)


def linear_prepacked(x: Tensor, prepacked: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[..., I] -> [..., O]: x W^T + b with ``prepacked`` from ``prepack(W)``; all of one dtype. No gradient."""
    x_RI = _with_rounded_rows(x)
    _bound_primitive_cache()
    y_RO = torch.ops.mkldnn._linear_pointwise(x_RI, prepacked, bias_O, "none", [], "")
    return y_RO[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[..., I] -> [..., O]: x W^T + b, as ``torch.nn.functional.linear``, and with its errors.

    Any floating-point dtype, the same for all three; oneDNN runs for float32 on the CPU (see the module docstring),
    except in torch.autocast, whose dtype the result then has.
    Differentiable in all three, once if oneDNN runs.
    """
    if not _fits(x, weight_OI, bias_O) or not takes_onednn(x, weight_OI, weight_OI.numel()):
        return linear_ref(x, weight_OI, bias_O)
    if torch.compiler.is_compiling():  # the caller rounds: here the number of rows is symbolic
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)
    y_RO = _Linear.apply(_with_rounded_rows(x), weight_OI, bias_O)
    return y_RO[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)
