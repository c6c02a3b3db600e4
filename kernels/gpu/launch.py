"""On which device a Triton kernel is launched."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """``launch`` with the GPU of its first argument as the current device, which is where Triton launches a kernel."""

    @functools.wraps(launch)
    def launched(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # does nothing for a tensor of the CPU
            return launch(first, *args, **kwargs)

    return launched
