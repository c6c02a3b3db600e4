"""Several devices: one process each, started by torchrun. A process is a rank.

Every rank asks the curriculum the same questions, draws and judges the responses to its share of them, and exchanges
both with the others. From there on all ranks know all groups, so statistics, denominators and the curriculum's state
are the same everywhere. Whole groups are then dealt out, evenly by their tokens; each rank makes the gradients of its
own, and the gradients are summed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from isomorph.engine.config import UserError
from isomorph.engine.serialise import join_draw, split_draw
from isomorph.engine.types import Draw, Rollout
from isomorph.kernels.packing import balanced_bins

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20  # of gradients summed at once: beyond it a collective gains nothing, and it is held twice


class Ranks:
    """Which rank this process is, of how many, and what they tell each other. Alone, everything is at hand already."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """The one that writes: the log, checkpoints, the model."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks hold."""
        return list(items[self.rank :: self.size])

    def exchange(
        self, rollouts: Sequence[Rollout], texts: Sequence[str], rewards: Sequence[float], group: int
    ) -> tuple[list[Rollout], list[str], list[float]]:
        """What all ranks made of their shares of the prompts, ``group`` responses each, in the order of the prompts."""
        if self.size == 1:
            return list(rollouts), list(texts), list(rewards)
        fields, tensors = split_draw(Draw(rollouts=tuple(rollouts), texts=tuple(texts), rewards=tuple(rewards)))
        sent = self.gather((fields, {name: tensor.numpy() for name, tensor in tensors.items()}))  # arrays pickle fast
        draws = [join_draw(told, {name: torch.from_numpy(a) for name, a in arrays.items()}) for told, arrays in sent]
        return (
            _woven([draw.rollouts for draw in draws], group),
            _woven([draw.texts for draw in draws], group),
            _woven([draw.rewards for draw in draws], group),
        )

    def deal(self, cost_tok: Sequence[int]) -> list[list[int]]:
        """For each rank the items that it takes, heaviest first to the rank that has least."""
        return balanced_bins(cost_tok, self.size)

    def any(self, flag: bool) -> bool:
        """True everywhere where it is anywhere."""
        return any(self.gather(flag))

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, or the UserError that it raises there; others do not call it."""
        told: list[tuple[Any, str | None]] = [(None, None)]
        if self.is_first:
            try:
                told = [(make(), None)]
            except UserError as error:
                told = [(None, str(error))]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0)
        made, refusal = told[0]
        if refusal is not None:
            raise UserError(refusal)
        return made

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes, in place, its sum over the ranks: the same bits everywhere. What FSDP has cut is one."""
        if self.size == 1:
            return
        for bucket in _buckets(t for t in tensors if not isinstance(t, DTensor)):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, own: T) -> list[T]:
        """What every rank says, in the order of the ranks."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found


ALONE = Ranks()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _woven(parts: Sequence[Sequence[T]], run: int) -> list[T]:
    """One run of each part in turn: item i of ``share`` went to rank i modulo their number."""
    num_runs = max(len(part) for part in parts) // run
    return [thing for i in range(num_runs) for part in parts for thing in part[i * run : (i + 1) * run]]
