"""How the operands of a kernel must lie in memory: checks and copies.

A kernel takes strides where its signature names them; it finds everything else by shapes alone. So an op copies a
tensor that lies otherwise, and the launch of a GPU kernel checks what it is given. Both read the strides that PyTorch
keeps on the host: that costs well below a microsecond and does not wait for the GPU.
"""

from torch import Tensor


def has_unit_stride(x: Tensor) -> bool:
    """Whether neighbours along the last dimension are neighbours in memory."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where its last dimension has another stride than 1."""
    return x if has_unit_stride(x) else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it, contiguous and beginning at a multiple of 16 bytes, as tensor descriptors require."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that is not contiguous; None is skipped."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(_message(name, "contiguous", x))


def check_unit_stride(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor whose last dimension has another stride than 1."""
    for name, x in tensors.items():
        if not has_unit_stride(x):
            raise ValueError(_message(name, "of stride 1 in its last dimension", x))


def _message(name: str, required: str, x: Tensor) -> str:
    return f"{name} must be {required}, got shape {tuple(x.shape)} with strides {x.stride()}; call .contiguous() on it"
