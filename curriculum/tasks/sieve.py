"""``SievedGenerator``: a generator that draws instances at random and keeps those of a split and a hardness."""

import functools
import itertools
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from isomorph.curriculum.tasks.battery import BAG, LinearBag, Solvable
from isomorph.curriculum.tasks.generator import Generator, Instance
from isomorph.curriculum.tasks.split import SplitBy, part_of, part_of_key
from isomorph.curriculum.tasks.task import DataError, Split

MAX_DRAWS = 5_000  # of shapes
MOST_FILLINGS = 20  # draws of numbers for a shape, which cost less than a shape of the right split
NUM_FITTED = 2_000  # instances that the bag of numbers is fitted to
MOST_TEMPLATES = 4
KEPT = 2  # the last so many frames of each kind are used in the test exam only


class SievedDifficulty(BaseModel):
    """The keys that difficulties of several kinds share."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ranges: ClassVar[tuple[str, ...]] = ()  # names of pairs of keys, min_NAME and max_NAME

    hard_share: float = Field(0.0, ge=0, le=1)  # of instances that no shortcut solves; the others are as they come
    # what training and the exams do not share: whole instances, or structures, which are instances whatever their
    # numbers, so that no instance of an exam differs from one of training in its numbers only
    split_by: SplitBy = "procedure"
    form: Literal["full", "terse"] = "full"  # terse: short prompts from a small vocabulary, for tiny models
    templates: int = Field(MOST_TEMPLATES, ge=1, le=MOST_TEMPLATES)  # wordings of a kind; 4: all there are

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in self.ranges:
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} must be at most max_{name}, got {low} > {high}")
        return self


D = TypeVar("D", bound=SievedDifficulty)
S = TypeVar("S", bound=Instance)
V = TypeVar("V", bound=Solvable)


class SievedGenerator(Generator[D, S, V]):
    """Draws shapes and numbers until an instance is of the split, and hard where that was drawn."""

    shortcuts: ClassVar[Mapping[str, Callable[[Any], int | None]]]
    salt: ClassVar[int]  # divides the structures among the splits

    @abstractmethod
    def shape(self, rng: random.Random, difficulty: D) -> V | None:
        """A random instance with numbers that do not matter; None where the draw is of no use."""

    @abstractmethod
    def structure_of(self, shape: V) -> str:
        """Hexadecimal digits, equal for instances that differ in numbers, names and numbering only."""

    @abstractmethod
    def filled(self, rng: random.Random, shape: V, difficulty: D) -> V | None:
        """The same with random numbers; None where these are none of the difficulty."""

    @abstractmethod
    def named(self, rng: random.Random, view: V, difficulty: D) -> S:
        """The instance with names; most attempts need none."""

    @abstractmethod
    def features(self, view: V) -> tuple[int, Sequence[float]]:
        """A group, and the numbers of an instance without their order: what BAG is fitted to."""

    def battery(self, difficulty: D) -> Mapping[str, Callable[[V], int | None]]:
        return {**self.shortcuts, BAG: _bag(self, difficulty)}

    def fillings(
        self,
        rng: random.Random,
        shape: V,
        difficulty: D,
        shortcuts: Mapping[str, Callable[[V], int | None]],
    ) -> Iterator[V]:
        """What MOST_FILLINGS draws of numbers leave that are of the difficulty and that no shortcut solves."""
        for _ in range(MOST_FILLINGS):
            view = self.filled(rng, shape, difficulty)
            if view is not None and not is_solved(view, shortcuts):
                yield view

    def draw(self, rng: random.Random, difficulty: D, *, split: Split) -> S:
        part = part_of(split)
        is_hard = difficulty.hard_share > 0 and rng.random() < difficulty.hard_share
        shortcuts = self.battery(difficulty) if is_hard else {}
        by_structure = difficulty.split_by == "structure"
        for _ in range(MAX_DRAWS):
            shape = self.shape(rng, difficulty)
            if shape is None or (by_structure and part_of_key(self.structure_of(shape), self.salt) != part):
                continue
            for view in self.fillings(rng, shape, difficulty, shortcuts):
                instance = self.named(rng, view, difficulty)
                if by_structure or part_of_key(instance.key) == part:
                    return instance
        asked = "that no shortcut solves " if is_hard else ""
        raise DataError(
            f"the difficulty must allow {self.name} tasks {asked}for the {part} split, got none in {MAX_DRAWS} draws "
            f"with {difficulty}; allow larger ones, or more different numbers"
        )


def is_solved(view: V, shortcuts: Mapping[str, Callable[[V], int | None]]) -> bool:
    """Whether any of the shortcuts answers it rightly."""
    total = view.total
    return any(answer(view) == total for answer in shortcuts.values())


@functools.lru_cache(maxsize=64)
def _bag(generator: SievedGenerator[Any, Any, Any], difficulty: Any) -> LinearBag[Any]:
    """Fitted to instances of all splits, which can only help it; ``hard_share`` of them solved by no other shortcut."""
    rng = random.Random(0)
    num_hard = round(NUM_FITTED * difficulty.hard_share)
    found: list[Any] = []
    for num, shortcuts in ((num_hard, generator.shortcuts), (NUM_FITTED - num_hard, {})):
        goal = len(found) + num
        for _ in range(MAX_DRAWS):
            if len(found) >= goal:
                break
            shape = generator.shape(rng, difficulty)
            if shape is not None:
                found += itertools.islice(generator.fillings(rng, shape, difficulty, shortcuts), 1)
    return LinearBag(found, generator.features)


def chosen(rng: random.Random, frames: Sequence[str], templates: int, *, is_kept: bool) -> str:
    """One of the frames kept for the test exam, or of the others: the first ``templates`` of them, or all of 4."""
    own = frames[:-KEPT]
    return rng.choice(frames[-KEPT:] if is_kept else own if templates == MOST_TEMPLATES else own[:templates])
