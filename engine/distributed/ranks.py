"""Several devices: one process each, started by torchrun. A process is a rank.

Every rank asks the curriculum the same questions, draws and judges the responses to its share of them, and exchanges
both with the others. From there on all ranks know all groups, so statistics, denominators and the curriculum's state
are the same everywhere. Whole groups are then dealt out, evenly by their tokens; each rank makes the gradients of its
own, and the gradients are summed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from isomorph.engine.config import UserError
from isomorph.engine.types import Finish, Rollout
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
        parts = [wire.opened() for wire in self.gather(_Wire.of(rollouts, texts, rewards))]
        return (
            _woven([rollouts for rollouts, _, _ in parts], group),
            _woven([texts for _, texts, _ in parts], group),
            _woven([rewards for _, _, rewards in parts], group),
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


def _woven(parts: Sequence[list[T]], run: int) -> list[T]:
    """One run of each part in turn: item i of ``share`` went to rank i modulo their number."""
    num_runs = max(len(part) for part in parts) // run
    return [thing for i in range(num_runs) for part in parts for thing in part[i * run : (i + 1) * run]]


class _Wire(NamedTuple):
    """Responses on their way: tokens as two arrays, because thousands of tensors would travel slowly."""

    about: list[tuple[int, int, Finish, int]]  # prompt_id, sample, finish, policy_version
    lens: list[int]
    token_ids: Any  # numpy's arrays are sent as they lie in memory
    sampler_logprob: Any  # None: demonstrations, or greedy responses
    texts: list[str]
    rewards: list[float]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], texts: Sequence[str], rewards: Sequence[float]) -> "_Wire":
        known = [r.sampler_logprob for r in rollouts if r.sampler_logprob is not None]
        return cls(
            about=[(r.prompt_id, r.sample, r.finish, r.policy_version) for r in rollouts],
            lens=[len(r.token_ids) for r in rollouts],
            token_ids=torch.cat([torch.empty(0, dtype=torch.int64), *(r.token_ids for r in rollouts)]).numpy(),
            sampler_logprob=torch.cat(known).numpy() if known else None,
            texts=list(texts),
            rewards=list(rewards),
        )

    def opened(self) -> tuple[list[Rollout], list[str], list[float]]:
        token_ids = torch.from_numpy(self.token_ids).split(self.lens)
        unknown = [None] * len(self.lens)
        known = self.sampler_logprob is not None and torch.from_numpy(self.sampler_logprob).split(self.lens)
        rollouts = [
            Rollout(
                prompt_id=prompt_id,
                sample=sample,
                token_ids=tokens,
                sampler_logprob=logprob,
                finish=finish,
                policy_version=version,
            )
            for (prompt_id, sample, finish, version), tokens, logprob in zip(
                self.about, token_ids, known or unknown, strict=True
            )
        ]
        return rollouts, self.texts, self.rewards
