"""Collectives of a run on several devices: one process (rank) for each, started by torchrun.

All ranks take the same prompts from the curriculum. Each generates and scores the responses to its share of them, and
responses and rewards are exchanged, so that every rank has all groups: statistics, loss denominators and the
curriculum's state are then equal without further communication. For the update whole groups are assigned to ranks,
balanced by tokens, and the gradients of the ranks are summed (gradient_sum.py, or FSDP2).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from isomorph.engine.config import UserError
from isomorph.engine.serialise import join_scored, split_scored
from isomorph.engine.types import Rollout, ScoredRollouts, Scores
from isomorph.kernels.packing import balanced_bins

T = TypeVar("T")


class Place(NamedTuple):
    """Where a rank runs."""

    node: int  # number of its launcher (torchrun's GROUP_RANK)
    host: str  # name of its machine

    def __str__(self) -> str:
        return f"node {self.node}, {self.host}"


class Ranks:
    """This process's rank, the world size and the collectives; with a world size of 1 collectives are no-ops.

    Every rank must call a collective, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, places: Sequence[Place] = ()) -> None:
        """``places``: of every rank; by default all are on one node."""
        self.rank = rank
        self.size = size
        self.places = tuple(places) or (Place(0, "localhost"),) * size
        self.lost: Callable[[], str] = lambda: "another rank exited, see its output"  # why a collective has failed

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes the log, checkpoints and the model."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Number of launchers."""
        return len({place.node for place in self.places})

    @property
    def num_on_host(self) -> int:
        """Number of ranks that share this one's machine."""
        return sum(place.host == self.places[self.rank].host for place in self.places)

    def named(self, ranks: Sequence[int]) -> str:
        """``ranks`` and where they run, as "ranks 2 and 3 (node 1, HOST)"."""
        found: dict[Place, list[str]] = {}
        for rank in ranks:
            found.setdefault(self.places[rank], []).append(str(rank))
        parts = (f"rank{'s' * (len(own) > 1)} {' and '.join(own)} ({place})" for place, own in found.items())
        return " and ".join(parts)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items of a list that all ranks hold: every ``size``-th, from ``rank`` on."""
        return list(items[self.rank :: self.size])

    def exchange(
        self, rollouts: Sequence[Rollout], texts: Sequence[str], scores: Scores, group: int
    ) -> tuple[list[Rollout], list[str], Scores]:
        """Rollouts, texts and scores of all ranks, in the order of the prompts before ``share``. A collective.

        The arguments are this rank's own, ``group`` for each prompt of its share, in the order of the prompts.
        """
        if self.size == 1:
            return list(rollouts), list(texts), scores
        fields, tensors = split_scored(ScoredRollouts(rollouts=tuple(rollouts), texts=tuple(texts), scores=scores))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}  # pickle is fast with arrays
        parts = self.gather((fields, arrays))
        draws = [join_scored(told, {name: torch.from_numpy(a) for name, a in found.items()}) for told, found in parts]
        return (
            _interleaved([draw.rollouts for draw in draws], group),
            _interleaved([draw.texts for draw in draws], group),
            _joined([draw.scores for draw in draws], group),
        )

    def assign(self, cost_tok: Sequence[int]) -> list[list[int]]:
        """For each rank the indices of its items: the most expensive item first, each to the least loaded rank.

        ``cost_tok``: the tokens of each item. Equal on all ranks without communication.
        """
        return balanced_bins(cost_tok, self.size)

    def any(self, flag: bool) -> bool:
        """Logical OR of ``flag`` over the ranks. A collective."""
        return any(self.gather(flag))

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, or the UserError it raises, on rank 0, which alone calls it. A collective."""
        result: list[tuple[Any, str | None]] = [(None, None)]
        if self.is_first:
            try:
                result = [(make(), None)]
            except UserError as error:
                result = [(None, str(error))]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        made, refusal = result[0]
        if refusal is not None:
            raise UserError(refusal)
        return made

    def wait(self) -> None:
        """Returns when every rank has called it. A collective."""
        if self.size > 1:
            dist.barrier()

    def gather(self, own: T) -> list[T]:
        """The value ``own`` of every rank, in the order of the ranks; it must be picklable. A collective."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found


ALONE = Ranks()


def _joined(parts: Sequence[Scores], run: int) -> Scores:
    """``_interleaved`` for scores."""
    slices = [[scores.slice(i, i + run) for i in range(0, len(scores.rewards), run)] for scores in parts]
    return Scores.joined(_interleaved(slices, 1)) if any(slices) else parts[0]


def _interleaved(parts: Sequence[Sequence[T]], run: int) -> list[T]:
    """Undoes ``Ranks.share``: the first ``run`` items of each part in turn, then the next ``run`` items, and so on."""
    num_runs = max(len(part) for part in parts) // run
    return [thing for i in range(num_runs) for part in parts for thing in part[i * run : (i + 1) * run]]
