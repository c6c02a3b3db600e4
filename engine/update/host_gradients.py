"""Gradients for masters in host memory: added up on the device, moved once an optimizer step, while it computes.

A micro-batch that is not the last adds its gradient to a float32 sum on the device. In the last backward pass each sum
is copied as soon as it is complete, on a stream of its own into pinned memory, and its place on the device is free
again. The sums take 4 bytes a weight on the device where a step has several micro-batches, else nothing that lasts.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


class HostGradients:
    """Puts the gradients of ``parameters`` into ``masters[name].grad``, where a backward pass leaves none of them.

        last_batch()   before the last backward pass of an optimizer step
        wait()         after it: the masters have all gradients, also of a step without ``last_batch``
        discard()      in place of it, and after the step: the next gradients are those of another step

    A master's gradient that is set before is overwritten in place: ranks sum it there (``GradientSum``). It is not
    pinned, so that its copy is complete when the hooks after this one see it.
    """

    def __init__(self, parameters: Mapping[str, Parameter], masters: Mapping[str, Tensor]) -> None:
        self.masters = masters
        self._sums: dict[str, Tensor] = {}  # on the device
        self._pinned: dict[str, Tensor] = {}  # by name, for all steps
        self._moves = False  # whether gradients are complete as they come
        device = next(iter(parameters.values())).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))
            for name, parameter in parameters.items()
        ]

    def last_batch(self) -> None:
        self._moves = True

    def wait(self) -> None:
        for name in list(self._sums):
            self._move(name, self._sums.pop(name))
        if self._stream is not None:
            self._stream.synchronize()
        self._moves = False

    def discard(self) -> None:
        self._sums.clear()
        self.wait()

    def _take(self, name: str, parameter: Tensor) -> None:
        gradient = own_gradient(parameter).to(self.masters[name].dtype)
        parameter.grad = None
        before = self._sums.pop(name, None)
        total = gradient if before is None else before.add_(gradient)
        if self._moves:
            self._move(name, total)
        else:
            self._sums[name] = total

    def _move(self, name: str, total: Tensor) -> None:
        master = self.masters[name]
        if master.grad is not None:
            master.grad.copy_(total)
        elif self._stream is None:
            master.grad = total
        else:
            target = self._pinned.setdefault(name, torch.empty_like(master, pin_memory=True))
            self._stream.wait_stream(torch.cuda.current_stream(total.device))
            with torch.cuda.stream(self._stream):
                target.copy_(total, non_blocking=True)
            total.record_stream(self._stream)  # its memory is not given to another tensor before the copy has ended
            master.grad = target


def own_gradient(parameter: Tensor) -> Tensor:
    """The gradient that the backward pass has just left. Raises RuntimeError where another hook has taken it."""
    if parameter.grad is None:
        raise RuntimeError("another learner is open on these weights and took their gradient: call its close() first")
    return parameter.grad
