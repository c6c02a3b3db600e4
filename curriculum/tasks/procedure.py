"""Procedures to plan: named activities with durations and a partial order, generated from a seed.

All representations of a task describe one procedure. Its key does not depend on how steps are numbered, worded or
measured, and decides which split it belongs to.
"""

import random
from dataclasses import dataclass
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from isomorph.curriculum.tasks.canonical import canonical_key
from isomorph.curriculum.tasks.longest_path import Style, finish_times
from isomorph.curriculum.tasks.task import DataError, Split
from isomorph.curriculum.tasks.wording import MAX_STEPS, SCENARIOS, TERSE_ACTIVITIES

# Weeks at most: months and years have no fixed length, so answers would not be exact.
Unit = Literal["sec", "min", "hour", "day", "week"]
UNITS: tuple[str, ...] = get_args(Unit)  # ascending
SECONDS: dict[str, int] = {"sec": 1, "min": 60, "hour": 3_600, "day": 86_400, "week": 604_800}

EVAL_SHARE = 8  # one procedure in eight belongs to the evaluation split
MAX_DRAWS = 10_000


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
    form: Literal["full", "terse"] = "full"  # terse: short prompts from a small vocabulary, for tiny models
    templates: int = Field(4, ge=1, le=4)  # number of wordings per kind of sentence
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
        if self.form == "terse" and self.demonstration != "compact":
            raise ValueError('form = "terse" needs demonstration = "compact": sentences are not in its vocabulary')
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
        return min((d.unit for d in self.durations), key=SECONDS.__getitem__)

    @property
    def amounts(self) -> list[int]:
        """The durations in ``unit``."""
        return [d.seconds // SECONDS[self.unit] for d in self.durations]

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
    def key(self) -> str:
        """The same for procedures that differ only in numbering, units and redundant edges."""
        return canonical_key([d.seconds for d in self.durations], self.predecessors)

    @property
    def split(self) -> Split:
        return "eval" if int(self.key, 16) % EVAL_SHARE == 0 else "train"


def draw(rng: random.Random, difficulty: Difficulty, *, split: Split) -> Procedure:
    """A random procedure of the given difficulty that belongs to ``split``. No procedure belongs to both.

    Raises:
        ValueError: split is not "train" or "eval".
        DataError: MAX_DRAWS attempts gave no such procedure; the limits may contradict each other.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'split must be "train" or "eval", got {split!r}')
    for _ in range(MAX_DRAWS):
        procedure = _draw(rng, difficulty)
        if _wide_enough(procedure, difficulty) and procedure.split == split:
            return procedure
    raise DataError(
        f"the difficulty must allow procedures for the {split} split, got none in {MAX_DRAWS} draws with "
        f"{difficulty}; widen the width, the edge probability, the predecessors or the durations"
    )


def _wide_enough(procedure: Procedure, difficulty: Difficulty) -> bool:
    any_width = difficulty.min_width == 1 and difficulty.max_width >= difficulty.max_steps
    return any_width or difficulty.min_width <= procedure.width <= difficulty.max_width


def _draw(rng: random.Random, difficulty: Difficulty) -> Procedure:
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
    goal, activities = ("", TERSE_ACTIVITIES) if difficulty.form == "terse" else rng.choice(SCENARIOS)
    return Procedure(
        goal=goal,
        activities=tuple(rng.sample(activities, n)),
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
