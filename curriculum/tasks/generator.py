"""``Generator``: a kind of generated task. Its instances, their renderings, its shortcuts; tasks of a split from these.

One instance has many representations, rendered from the same object. Training and the exams never share an instance.
"""

import functools
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel

from isomorph.curriculum.rewards.families import RewardFamily
from isomorph.curriculum.tasks.battery import Solvable
from isomorph.curriculum.tasks.split import Part, part_of
from isomorph.curriculum.tasks.task import DataError, Split, Task

KEPT_SHARE = 0.5  # of the test exam's questions whose wordings are used nowhere else
MOST_REPEATS = 300  # draws of instances that the exam has already, for one question
TOKEN = re.compile(r"</?[a-z]+>|[A-Za-z]+|\d+|[^\sA-Za-z\d]")  # of a tiny model that reads words


class Instance(Protocol):
    """What all representations of a task are rendered from."""

    @property
    def key(self) -> str:
        """Equal for instances that differ in names and numbering only."""
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """An instance in one representation."""

    question: str
    demonstrate: Callable[[bool], str]  # a worked response; True: with the sequential answer in place of the right one


D = TypeVar("D", bound=BaseModel)
I = TypeVar("I", bound=Instance)  # noqa: E741 - instance
V = TypeVar("V", bound=Solvable)


class Generator(ABC, Generic[D, I, V]):
    """D: the difficulty's keys, I: an instance, V: what shortcuts see of it."""

    family: ClassVar[RewardFamily]  # how responses are scored; its name is also the ``kind`` of a [data.NAME]
    trained: ClassVar[tuple[str, ...]]  # representations
    held_out: ClassVar[tuple[str, ...]]  # representations that stages refuse
    difficulty: ClassVar[type[BaseModel]]
    wrong: ClassVar[str]  # what a wrong answer is called that shows nothing more special

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def representations(self) -> tuple[str, ...]:
        return self.trained + self.held_out

    def check_representation(self, representation: str) -> None:
        """Raises ValueError for a name that is none of ``representations``."""
        if representation not in self.representations:
            raise ValueError(f"representation must be one of {self.representations}, got {representation!r}")

    @abstractmethod
    def draw(self, rng: random.Random, difficulty: D, *, split: Split) -> I:
        """A random instance of ``split``. Raises ValueError, DataError."""

    @abstractmethod
    def write(
        self, rng: random.Random, instance: I, difficulty: D, representation: str, *, is_kept: bool = False
    ) -> Written:
        """``is_kept``: in wordings that are kept for the test exam. Raises ValueError for an unknown representation."""

    def has_kept_wordings(self, difficulty: D, representation: str) -> bool:
        """Whether ``write`` has wordings that are kept for the test exam."""
        return representation == "natural"

    @abstractmethod
    def answer(self, instance: I) -> str: ...

    @abstractmethod
    def sequential_answer(self, instance: I) -> str:
        """What a demonstration answers that is drawn with ``sequential_rate``; often wrong."""

    @abstractmethod
    def facts(self, instance: I) -> dict[str, Any]:
        """What ``Task.row`` holds of it, JSON-able."""

    @abstractmethod
    def view(self, row: Mapping[str, Any]) -> V | None:
        """What shortcuts see, by a task's ``row``; None where the row has no facts of this kind."""

    @abstractmethod
    def battery(self, difficulty: D) -> Mapping[str, Callable[[V], int | None]]:
        """All shortcuts by name, with those that are fitted to the difficulty."""

    @abstractmethod
    def sizes(self, view: V, row: Mapping[str, Any]) -> dict[str, Any]:
        """steps, width and path_len of an evaluation's item; None where the kind has no such number."""

    @abstractmethod
    def stated(self, row: Mapping[str, Any], answer: str) -> tuple[Fraction, Fraction] | None:
        """The lowest and the highest number that ``answer`` may mean, in the task's unit; None where it states none."""

    @abstractmethod
    def longest(self, difficulty: D) -> D:
        """The difficulty that gives the longest questions among those that ``difficulty`` gives."""

    @abstractmethod
    def vocabulary(self, difficulty: D) -> list[str]:
        """All tokens of questions and demonstrations, sorted. Raises DataError where they are not a closed set."""

    def task(
        self,
        rng: random.Random,
        difficulty: D,
        representation: str,
        *,
        split: Split,
        sequential_rate: float = 0.0,
    ) -> Task:
        """A random task of ``split``; its demonstration is the sequential one with probability ``sequential_rate``.

        Raises:
            ValueError: an unknown representation or split, or a rate outside 0..1.
            DataError: the difficulty allows no instance.
        """
        if not 0 <= sequential_rate <= 1:
            raise ValueError(f"sequential_rate must be in 0..1, got {sequential_rate}")
        instance = self.draw(rng, difficulty, split=split)
        return self._task(rng, instance, difficulty, representation, split=split, sequential_rate=sequential_rate)

    def tasks(self, difficulty: D, representation: str, num_tasks: int, *, seed: int, split: Split) -> list[Task]:
        """``num_tasks`` tasks; task i is the same instance in every representation.

        In an exam ("dev" or "test") no two tasks are of one instance. Raises DataError where there are too few.
        """
        if part_of(split) == "train":
            rngs = (random.Random(f"{seed}:{i}") for i in range(num_tasks))
            return [self.task(rng, difficulty, representation, split=split) for rng in rngs]
        found = []
        for instance, state in _exam(self, difficulty, num_tasks, seed, part_of(split)):
            rng = random.Random()
            rng.setstate(state)
            found.append(self._task(rng, instance, difficulty, representation, split=split, sequential_rate=0.0))
        return found

    def _task(
        self,
        rng: random.Random,
        instance: I,
        difficulty: D,
        representation: str,
        *,
        split: Split,
        sequential_rate: float,
    ) -> Task:
        is_kept = split == "test" and rng.random() < KEPT_SHARE
        written = self.write(rng, instance, difficulty, representation, is_kept=is_kept)
        wording = "kept" if is_kept and self.has_kept_wordings(difficulty, representation) else "trained"
        is_sequential = rng.random() < sequential_rate
        return Task(
            family=self.name,
            representation=representation,
            question=written.question,
            answer=self.answer(instance),
            demonstration=written.demonstrate(is_sequential),
            sequential_answer=self.sequential_answer(instance),
            key=instance.key,
            difficulty=difficulty.model_dump(mode="json"),
            row={**self.facts(instance), "wording": wording},
        )


@functools.lru_cache(maxsize=8)
def _exam(
    generator: Generator[Any, Any, Any], difficulty: BaseModel, num_tasks: int, seed: int, part: Part
) -> list[tuple[Any, Any]]:
    """Different instances, each with the state of the generator that its wording is drawn by."""
    prefix = "" if part == "dev" else "test:"  # other seeds
    found: list[tuple[Any, Any]] = []
    seen: set[str] = set()
    for i in range(num_tasks):
        for attempt in range(MOST_REPEATS):
            rng = random.Random(f"{prefix}{seed}:{i}" + (f":{attempt}" if attempt else ""))
            instance = generator.draw(rng, difficulty, split=part)
            if instance.key not in seen:
                break
        else:
            raise DataError(
                f"the {part} exam has hardly more than {len(found)} different procedures, {num_tasks} are asked for: "
                "ask for fewer, or raise the difficulty's sizes or numbers"
            )
        seen.add(instance.key)
        found.append((instance, rng.getstate()))
    return found


def words_of(*texts: str) -> set[str]:
    """The tokens of patterns and words, without placeholders and numbers."""
    text = re.sub(r"\{[a-z]+\}", " ", " ".join(texts))
    return {token for token in TOKEN.findall(text) if not token.isdigit()}
