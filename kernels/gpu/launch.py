"""On which device a Triton kernel is launched, and how its tensors must lie in memory.

A kernel takes strides where its signature names them; it finds everything else by shapes alone. So each launch checks
its tensors, and those that come from a caller are copied first where they lie otherwise. A check reads the strides that
PyTorch keeps on the host: it costs well below a microsecond and waits for nothing.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """``launch`` with its first argument's GPU as the current one: Triton asks for nothing else."""

    @functools.wraps(launch)
    def launched(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # does nothing for a tensor of the CPU
            return launch(first, *args, **kwargs)

    return launched


def check_dense(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that is not contiguous; None is none."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(_must(name, "contiguous", x))


def check_dense_rows(**tensors: Tensor) -> None:
    """Raises ValueError where the numbers of a row, along the last dimension, are not neighbours."""
    for name, x in tensors.items():
        if not _has_dense_rows(x):
            raise ValueError(_must(name, "of stride 1 in its last dimension", x))


def dense_rows(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where the numbers of a row are not neighbours."""
    return x if _has_dense_rows(x) else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """``x``, contiguous and beginning at a multiple of 16 bytes, as a tensor descriptor asks; a copy where needed."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _has_dense_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def _must(name: str, be: str, x: Tensor) -> str:
    return f"{name} must be {be}, got shape {tuple(x.shape)} with strides {x.stride()}; call .contiguous() on it"
