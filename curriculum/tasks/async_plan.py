"""Generated async-planning tasks: how long a procedure takes whose steps may overlap, the longest path of a DAG."""

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from isomorph.curriculum.rewards.duration import parse_duration
from isomorph.curriculum.rewards.families import ASYNC_PLAN
from isomorph.curriculum.tasks import wording
from isomorph.curriculum.tasks.draw import battery, draw
from isomorph.curriculum.tasks.generator import Generator, Written, words_of
from isomorph.curriculum.tasks.longest_path import (
    Working,
    finish_times,
    with_unit,
    worked_solution,
)
from isomorph.curriculum.tasks.procedure import SECONDS, Difficulty, Procedure
from isomorph.curriculum.tasks.render import (
    HELD_OUT,
    REPRESENTATIONS,
    TERSE_SYNTAX,
    TERSE_SYNTAX_OF_UNITS,
    TRAINED,
    check_representation,
    has_kept_wordings,
    render,
    spelled,
)
from isomorph.curriculum.tasks.shortcuts import StepGraph
from isomorph.curriculum.tasks.task import DataError, Split, Task

__all__ = [
    "HELD_OUT",
    "PLANS",
    "REPRESENTATIONS",
    "TRAINED",
    "Difficulty",
    "Procedure",
    "demonstration",
    "draw",
    "draw_tasks",
    "make_task",
    "sequential_sum",
    "render",
    "solve",
    "vocabulary",
]

MAX_NUMBERS = 100_000


def solve(procedure: Procedure) -> tuple[str, list[int]]:
    """The least total time, such as ``20 min``, and each step's finish time in ``procedure.unit``."""
    finish = finish_times(procedure.amounts, procedure.predecessors)
    return with_unit(max(finish), procedure.unit), [int(f) for f in finish]


def sequential_sum(procedure: Procedure) -> str:
    """The sum of all durations: the sequential answer, right only where no steps overlap."""
    return with_unit(sum(procedure.amounts), procedure.unit)


class Plans(Generator[Difficulty, Procedure, StepGraph]):
    """The longest path of a DAG of steps."""

    family = ASYNC_PLAN
    trained = TRAINED
    held_out = HELD_OUT
    difficulty = Difficulty
    wrong = "wrong path"

    def draw(self, rng: random.Random, difficulty: Difficulty, *, split: Split) -> Procedure:
        return draw(rng, difficulty, split=split)

    def write(
        self,
        rng: random.Random,
        instance: Procedure,
        difficulty: Difficulty,
        representation: str,
        *,
        is_kept: bool = False,
    ) -> Written:
        return Written(
            render(instance, representation, rng, difficulty, is_kept=is_kept),
            lambda is_sequential: demonstration(instance, representation, difficulty, sequential=is_sequential),
        )

    def has_kept_wordings(self, difficulty: Difficulty, representation: str) -> bool:
        return representation == "natural" and has_kept_wordings(difficulty)

    def answer(self, instance: Procedure) -> str:
        return solve(instance)[0]

    def sequential_answer(self, instance: Procedure) -> str:
        return sequential_sum(instance)

    def facts(self, instance: Procedure) -> dict[str, Any]:
        """The durations in ``unit``, and the predecessors of each step, 0-based."""
        return {
            "amounts": instance.amounts,
            "predecessors": [list(before) for before in instance.predecessors],
            "unit": instance.unit,
            "width": instance.width,
        }

    def view(self, row: Mapping[str, Any]) -> StepGraph | None:
        if "amounts" not in row or "predecessors" not in row:
            return None
        return StepGraph.of(row["amounts"], row["predecessors"])

    def battery(self, difficulty: Difficulty) -> Mapping[str, Callable[[StepGraph], int | None]]:
        return battery(difficulty)

    def sizes(self, view: StepGraph, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": len(view.amounts), "width": row["width"], "path_len": path_length(view)}

    def stated(self, row: Mapping[str, Any], answer: str) -> tuple[Fraction, Fraction] | None:
        return amounts_stated(answer, row["unit"])

    def longest(self, difficulty: Difficulty) -> Difficulty:
        return difficulty.model_copy(update={"min_steps": difficulty.max_steps})

    def vocabulary(self, difficulty: Difficulty) -> list[str]:
        return vocabulary(difficulty)


PLANS = Plans()


def make_task(
    rng: random.Random,
    difficulty: Difficulty,
    representation: str,
    *,
    split: Split,
    sequential_rate: float = 0.0,
) -> Task:
    """A random task of ``split``; its demonstration gives the sequential answer with probability ``sequential_rate``.

    Raises:
        ValueError: an unknown representation or split, or a rate outside 0..1.
        DataError: the difficulty allows no procedure.
    """
    return PLANS.task(rng, difficulty, representation, split=split, sequential_rate=sequential_rate)


def draw_tasks(difficulty: Difficulty, representation: str, num_tasks: int, *, seed: int, split: Split) -> list[Task]:
    """``num_tasks`` tasks; task i is the same procedure in every representation.

    In an exam ("dev" or "test") no two tasks are of one procedure. Raises DataError where there are too few.
    """
    return PLANS.tasks(difficulty, representation, num_tasks, seed=seed, split=split)


def amounts_stated(answer: str, unit: str) -> tuple[Fraction, Fraction] | None:
    """The shortest and the longest duration that ``answer`` may mean, in ``unit``; None where it states none."""
    duration = parse_duration(answer)
    if duration is None:
        return None
    return Fraction(duration.low) / SECONDS[unit], Fraction(duration.high) / SECONDS[unit]


def path_length(graph: StepGraph) -> int:
    """Steps on the longest path; the fewest where several paths are longest."""
    best: dict[int, tuple[int, int]] = {}  # finish, minus number of steps
    for j in graph.order:
        finish, steps = max((best[i] for i in graph.predecessors[j]), default=(0, 0))
        best[j] = finish + graph.amounts[j], steps - 1
    return -max(best.values())[1]


def demonstration(procedure: Procedure, representation: str, difficulty: Difficulty, *, sequential: bool) -> str:
    """A worked response that ends in ``<answer>..</answer>``; ``sequential``: with the sequential answer.

    Raises:
        ValueError: an unknown representation.
    """
    check_representation(representation)
    working = Working(
        names=[str(j + 1) for j in range(procedure.num_steps)],
        amounts=procedure.amounts,
        written=[None if d.unit == procedure.unit else with_unit(d.value, d.unit) for d in procedure.durations],
        predecessors=procedure.predecessors,
        unit=procedure.unit,
        noun="node" if representation in ("graph", "code") else "step",
    )
    return worked_solution(working, style=difficulty.demonstration, sequential=sequential)


def vocabulary(difficulty: Difficulty) -> list[str]:
    """All tokens of terse questions and demonstrations of this difficulty, sorted.

    A token is a word, a number, one other character, or one of the tags ``<think>``, ``</think>``,
    ``<answer>``, ``</answer>``. Numbers go from 0 to the largest finish time that is possible.

    Raises:
        DataError: the form is not terse, or the units are so far apart that the numbers are too many.
    """
    if difficulty.form != "terse":
        raise DataError(f'only form = "terse" has a closed vocabulary, got form = "{difficulty.form}"')
    seconds = [SECONDS[u] for u in difficulty.units]
    top = difficulty.max_steps * difficulty.max_duration * max(seconds) // min(seconds)
    if top > MAX_NUMBERS:
        raise DataError(
            f"a vocabulary holds at most {MAX_NUMBERS} numbers, got finish times up to {top}; "
            "use units closer together, fewer steps or shorter durations"
        )
    return sorted({*_words(difficulty), *map(str, range(top + 1))})


def _words(difficulty: Difficulty) -> set[str]:
    k = difficulty.templates
    patterns = [
        *wording.TERSE_ACTIVITIES,
        *wording.TERSE_INTROS[:k],
        *wording.TERSE_STEPS[:k],
        *wording.TERSE_EDGES[:k],
        *wording.TERSE_QUESTIONS[:k],
        *wording.PARAPHRASE_TERSE.all,
        *wording.DIALECT_TERSE.all,
        *(write(n, unit) for n in (1, 2) for unit in difficulty.units for write in (with_unit, spelled)),
        TERSE_SYNTAX,
        TERSE_SYNTAX_OF_UNITS if len(difficulty.units) > 1 else "",
        "<think>1: 1 > 0 + 1 = 1; 2</think> <answer></answer>",
    ]
    return words_of(*patterns)
