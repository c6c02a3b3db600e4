"""Procedures to plan: named activities with durations and a partial order, generated from a seed.

All representations of a task describe one procedure. Its key does not depend on how steps are numbered, worded or
measured; its key, or that of its structure alone, decides which split it belongs to.
"""

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from isomorph.curriculum.tasks.canonical import canonical_key
from isomorph.curriculum.tasks.domains import rich_activities
from isomorph.curriculum.tasks.longest_path import Style, finish_times, topological_order
from isomorph.curriculum.tasks.shortcuts import StepGraph
from isomorph.curriculum.tasks.split import Part, SplitBy, part_of_key
from isomorph.curriculum.tasks.wording import MAX_STEPS, SCENARIOS, TERSE_ACTIVITIES

# Weeks at most: months and years have no fixed length, so answers would not be exact.
Unit = Literal["sec", "min", "hour", "day", "week"]
UNITS: tuple[str, ...] = get_args(Unit)  # ascending
SECONDS: dict[str, int] = {"sec": 1, "min": 60, "hour": 3_600, "day": 86_400, "week": 604_800}

# chosen among 3,000 so that both exams get an even share of the structures of 3 to 6 steps, frequent ones included
STRUCTURE_SALT = 287


class Difficulty(BaseModel):
    """Size and wording of generated procedures. The defaults are the smallest useful setting."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_steps: int = Field(3, ge=1, le=MAX_STEPS)
    max_steps: int = Field(5, ge=1, le=MAX_STEPS)
    max_predecessors: int = Field(2, ge=0, le=MAX_STEPS)  # direct predecessors of one step
    edge_probability: float = Field(0.5, ge=0, le=1)  # that an earlier step precedes a later one
    # width: the most steps that run at the same time when each starts as early as possible; at width 1 the answer is
    # the sum of all durations
    min_width: int = Field(1, ge=1, le=MAX_STEPS)
    max_width: int = Field(MAX_STEPS, ge=1, le=MAX_STEPS)
    min_duration: int = Field(1, ge=1, le=10_000)  # in the step's own unit
    max_duration: int = Field(9, ge=1, le=10_000)
    units: tuple[Unit, ...] = ("min",)  # one is sampled for each step; with several, answering needs conversion
    shuffled: bool = False  # number the steps at random instead of in a topological order
    hard_share: float = Field(0.0, ge=0, le=1)  # of procedures that no shortcut solves; the others are as they come
    # what training and the exams do not share: whole procedures, or structures, which are procedures whatever their
    # durations, so that no procedure of an exam differs from one of training in its durations only
    split_by: SplitBy = "procedure"
    form: Literal["full", "terse"] = "full"  # terse: short prompts from a small vocabulary, for tiny models
    # of the full form; rich: many sentence frames and domains, references by name, several edges in a sentence,
    # sentences that do not matter, a second form of graphs and programs
    language: Literal["plain", "rich"] = "plain"
    templates: int = Field(4, ge=1, le=4)  # number of wordings per kind of sentence of plain language
    demonstration: Style = "sentences"

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("steps", "width", "duration"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} must be at most max_{name}, got {low} > {high}")
        if not self.units or len(set(self.units)) != len(self.units):
            raise ValueError(f"units must name one or more different units of {UNITS}, got {self.units}")
        if self.min_width > self.max_steps:
            raise ValueError(f"min_width must be at most max_steps, got {self.min_width} > {self.max_steps}")
        if self.form == "terse" and self.language == "rich":
            raise ValueError('language = "rich" is of form = "full": the terse form has a closed vocabulary')
        if self.form == "terse" and self.demonstration == "sentences":
            raise ValueError(
                'form = "terse" needs demonstration = "compact" or "listed": sentences are not in its vocabulary'
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """A whole number of one unit."""

    value: int
    unit: str  # one of UNITS

    @property
    def seconds(self) -> int:
        return self.value * SECONDS[self.unit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Procedure:
    """Step j is ``activities[j]``, takes ``durations[j]`` and starts after all of ``predecessors[j]``."""

    goal: str
    activities: tuple[str, ...]
    durations: tuple[Duration, ...]
    predecessors: tuple[tuple[int, ...], ...]  # 0-based, ascending

    @property
    def num_steps(self) -> int:
        return len(self.durations)

    @property
    def unit(self) -> str:
        """The smallest unit of the durations; every finish time is a whole number of it."""
        return smallest_unit(self.durations)

    @property
    def amounts(self) -> list[int]:
        """The durations in ``unit``."""
        return amounts_of(self.durations)

    @property
    def successors(self) -> list[list[int]]:
        steps = range(self.num_steps)
        return [[j for j in steps if i in self.predecessors[j]] for i in steps]

    @property
    def width(self) -> int:
        """The most steps that run at the same time when each starts as early as possible."""
        finish = finish_times(self.amounts, self.predecessors)
        start = [f - a for f, a in zip(finish, self.amounts, strict=True)]
        return max(sum(s <= t < f for s, f in zip(start, finish, strict=True)) for t in start)

    @property
    def graph(self) -> StepGraph:
        """What shortcuts see of it."""
        return StepGraph.of(self.amounts, self.predecessors)

    @property
    def key(self) -> str:
        """The same for procedures that differ only in numbering, units and redundant edges."""
        return canonical_key([d.seconds for d in self.durations], self.predecessors)

    @property
    def structure(self) -> str:
        """The same for procedures that differ only in numbering, durations and redundant edges."""
        return canonical_key([0] * self.num_steps, self.predecessors)

    def part(self, split_by: SplitBy) -> Part:
        """The split that it belongs to."""
        if split_by == "procedure":
            return part_of_key(self.key)
        return _part_of_structure(self.predecessors, topological_order(self.predecessors))


def _part_of_structure(predecessors: Sequence[Sequence[int]], order: Sequence[int]) -> Part:
    """``order``: topological. Structures in such an order, transitively closed, are few enough to be remembered."""
    place = {j: k for k, j in enumerate(order)}
    above: list[int] = []  # for each place the set of places before it, as bits
    for j in order:
        mask = 0
        for i in predecessors[j]:
            mask |= above[place[i]] | 1 << place[i]
        above.append(mask)
    return _part_of_closure(tuple(above))


@functools.lru_cache(maxsize=65_536)
def _part_of_closure(above: tuple[int, ...]) -> Part:
    structure = canonical_key(
        [0] * len(above), [[i for i in range(j) if mask >> i & 1] for j, mask in enumerate(above)]
    )
    return part_of_key(structure, STRUCTURE_SALT)


def is_wide_enough(procedure: Procedure, difficulty: Difficulty) -> bool:
    """Whether its width is within the difficulty's limits."""
    any_width = difficulty.min_width == 1 and difficulty.max_width >= difficulty.max_steps
    return any_width or difficulty.min_width <= procedure.width <= difficulty.max_width


def random_procedure(rng: random.Random, difficulty: Difficulty) -> Procedure:
    """One of any split, width and hardness."""
    n = rng.randint(difficulty.min_steps, difficulty.max_steps)
    durations = [
        Duration(
            value=rng.randint(difficulty.min_duration, difficulty.max_duration),
            unit=rng.choice(difficulty.units),
        )
        for _ in range(n)
    ]
    predecessors = [_draw_predecessors(rng, difficulty, j) for j in range(n)]
    if difficulty.shuffled:
        predecessors = _renumber(predecessors, rng.sample(range(n), n))
    return named(rng, difficulty, durations, predecessors)


def random_graph(rng: random.Random, difficulty: Difficulty, part: Part) -> tuple[list[Duration], StepGraph] | None:
    """Durations and graph as those of ``random_procedure``, at a fraction of its time; other draws of ``rng``.

    None where ``difficulty`` splits by structure, and this one does not belong to ``part``.
    """
    n = rng.randint(difficulty.min_steps, difficulty.max_steps)
    predecessors = [_draw_predecessors(rng, difficulty, j) for j in range(n)]
    if difficulty.split_by == "structure" and _part_of_structure(predecessors, range(n)) != part:
        return None
    drawn = rng.random
    low, span = difficulty.min_duration, difficulty.max_duration - difficulty.min_duration + 1
    units = difficulty.units
    durations = [
        Duration(value=low + int(span * drawn()), unit=units[int(len(units) * drawn())] if len(units) > 1 else units[0])
        for _ in range(n)
    ]
    order = rng.sample(range(n), n) if difficulty.shuffled else list(range(n))
    if difficulty.shuffled:
        predecessors = _renumber(predecessors, order)
    return durations, StepGraph(amounts_of(durations), tuple(map(tuple, predecessors)), order)


def amounts_of(durations: Sequence[Duration]) -> list[int]:
    """In the smallest of their units."""
    seconds = [d.seconds for d in durations]
    ratio = SECONDS[smallest_unit(durations)]
    return [s // ratio for s in seconds]


def smallest_unit(durations: Sequence[Duration]) -> str:
    return min((d.unit for d in durations), key=SECONDS.__getitem__)


def named(
    rng: random.Random,
    difficulty: Difficulty,
    durations: Sequence[Duration],
    predecessors: Iterable[Iterable[int]],
) -> Procedure:
    """The procedure with activities of a random scenario."""
    if difficulty.language == "rich":
        goal, chosen = rich_activities(rng, len(durations))
    else:
        goal, activities = ("", TERSE_ACTIVITIES) if difficulty.form == "terse" else rng.choice(SCENARIOS)
        chosen = tuple(rng.sample(activities, len(durations)))
    return Procedure(
        goal=goal,
        activities=chosen,
        durations=tuple(durations),
        predecessors=tuple(map(tuple, predecessors)),
    )


def _draw_predecessors(rng: random.Random, difficulty: Difficulty, j: int) -> list[int]:
    chosen = [i for i in range(j) if rng.random() < difficulty.edge_probability]
    if len(chosen) > difficulty.max_predecessors:
        chosen = sorted(rng.sample(chosen, difficulty.max_predecessors))
    return chosen


def _renumber(predecessors: list[list[int]], new: list[int]) -> list[list[int]]:
    renumbered: list[list[int]] = [[] for _ in predecessors]
    for j, before in enumerate(predecessors):
        renumbered[new[j]] = sorted(new[i] for i in before)
    return renumbered
