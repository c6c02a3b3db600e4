"""Strides and alignment of the operands of kernels: checks and copies.

A kernel uses the strides that its signature names, and assumes contiguous memory for the rest. So an op copies a tensor
with other strides, and the launch of a GPU kernel checks its operands. Strides are known on the host: a check does not
synchronise and takes well below a microsecond.
"""

from torch import Tensor


def has_unit_stride(x: Tensor) -> bool:
    """Whether the last dimension has stride 1, or at most one element."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if its last dimension does not have stride 1."""
    return x if has_unit_stride(x) else x.contiguous()


def dense(x: Tensor) -> Tensor:
    """The elements of ``x``, [numel] with stride 1, which ``contiguous`` does not ensure for a single one."""
    return x.contiguous().as_strided((x.numel(),), (1,))


def aligned(x: Tensor) -> Tensor:
    """``x`` or a copy, contiguous and starting at a multiple of 16 bytes, as tensor descriptors require."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that is not contiguous; None is skipped."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(_message(name, "contiguous", x))


def check_unit_stride(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor whose last dimension does not have stride 1."""
    for name, x in tensors.items():
        if not has_unit_stride(x):
            raise ValueError(_message(name, "of stride 1 in its last dimension", x))


def _message(name: str, required: str, x: Tensor) -> str:
    return f"{name} must be {required}, got shape {tuple(x.shape)} with strides {x.stride()}; call .contiguous() on it"
