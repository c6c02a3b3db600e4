"""Launches Triton kernels on the device of their tensors."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator: makes the GPU of the first argument the current device, on which Triton launches."""

    @functools.wraps(launch)
    def launched(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # no effect for a CPU tensor
            return launch(first, *args, **kwargs)

    return launched
