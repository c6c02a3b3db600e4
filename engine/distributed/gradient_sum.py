"""Sums the gradients of data parallel ranks while the backward pass still computes, in buckets, as DDP does
(arXiv 2006.15704, section 3.2.3).

The gradients of a bucket are views of one buffer, which is summed in place: nothing is copied. Buckets hold parameters
in the reverse of the model's order, about the order in which a backward pass ends with them. They are summed in one
fixed order, whatever the order in which the gradients of a rank are ready: ranks must call collectives in the same one.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

# gradients in one all-reduce: larger buckets are not faster, smaller ones begin earlier
BUCKET_BYTES = 64 * 2**20


class GradientSum:
    """Sums the gradients of ``masters`` over all ranks, to the same bits on each. All ranks must make the same calls.

    ``parameters``: by the masters' names; what autograd computes the gradient of. Its other hooks, which may add that
    gradient to the master's, must be registered before.

        begin()         before the first micro-batch of an optimizer step
        last_batch()    before its last backward pass: each bucket's sum begins as soon as the bucket is ready
        launch_rest()   after that pass: begins the sums that have not begun, so that other collectives may follow
        wait()          the gradients are sums
        abandon()       in place of all that is left, where a pass has failed
    """

    def __init__(self, parameters: Mapping[str, Parameter], masters: Mapping[str, Tensor]) -> None:
        self.masters = dict(masters)
        self._buckets = list(_buckets(reversed(self.masters.items())))
        self._bucket_of = {name: i for i, names in enumerate(self._buckets) for name in names}
        self._buffers: list[Tensor] = []
        self._missing: list[set[str]] = []  # of each bucket: gradients that are not there yet; empty: none is expected
        self._works: list[dist.Work] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._observe, name))
            for name, parameter in parameters.items()
        ]

    def begin(self) -> None:
        """Sets the masters' gradients to 0, in one buffer for each bucket."""
        self.abandon()
        for names in self._buckets:
            masters = [self.masters[name] for name in names]
            buffer = torch.zeros(sum(m.numel() for m in masters), dtype=masters[0].dtype, device=masters[0].device)
            for master, part in zip(masters, buffer.split([m.numel() for m in masters]), strict=True):
                master.grad = part.view_as(master)
            self._buffers.append(buffer)

    def last_batch(self) -> None:
        self._missing = [set(names) for names in self._buckets]

    def launch_rest(self) -> None:
        self._missing = []
        self._launch(len(self._buffers))

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._buffers = [], []

    def abandon(self) -> None:
        """Sums that have begun are not waited for: a rank that failed may never begin them."""
        self._missing, self._works, self._buffers = [], [], []

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _observe(self, name: str, _: Tensor) -> None:
        """After the gradient of parameter ``name`` was added to its master's."""
        if not self._missing:
            return
        missing = self._missing[self._bucket_of[name]]
        if name not in missing:
            raise RuntimeError(f"the gradient of {name} arrived twice in one backward pass: its sum may have begun")
        missing.discard(name)
        self._launch(next((i for i, left in enumerate(self._missing) if left), len(self._missing)))

    def _launch(self, until: int) -> None:
        """Begins the sums of the buckets before ``until`` that have not begun."""
        for buffer in self._buffers[len(self._works) : until]:
            work = dist.all_reduce(buffer, async_op=True)
            assert work is not None
            self._works.append(work)


def _buckets(masters: Iterable[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """Names of consecutive masters of one dtype and device, about BUCKET_BYTES in each list."""
    names: list[str] = []
    size, kind = 0, None
    for name, master in masters:
        own = (master.dtype, master.device)
        if names and (own != kind or size >= BUCKET_BYTES):
            yield names
            names, size = [], 0
        names.append(name)
        size, kind = size + master.nbytes, own
    if names:
        yield names
