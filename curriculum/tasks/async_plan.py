"""Generated async-planning tasks: how long a procedure takes whose steps may overlap, the longest path of a DAG."""

import functools
import random
import re
from typing import Any

from isomorph.curriculum.rewards.families import ASYNC_PLAN
from isomorph.curriculum.tasks import wording
from isomorph.curriculum.tasks.draw import draw, part_of
from isomorph.curriculum.tasks.facts import facts_of
from isomorph.curriculum.tasks.longest_path import (
    Working,
    finish_times,
    with_unit,
    worked_solution,
)
from isomorph.curriculum.tasks.procedure import SECONDS, Difficulty, Part, Procedure
from isomorph.curriculum.tasks.render import (
    HELD_OUT,
    REPRESENTATIONS,
    TERSE_SYNTAX,
    TERSE_SYNTAX_OF_UNITS,
    TRAINED,
    check_representation,
    render,
    spelled,
)
from isomorph.curriculum.tasks.task import DataError, Split, Task

__all__ = [
    "HELD_OUT",
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
KEPT_SHARE = 0.5  # of the test exam's questions whose wordings are used nowhere else
MOST_REPEATS = 300  # draws of procedures that the exam has already, for one question
TOKEN = re.compile(r"</?[a-z]+>|[A-Za-z]+|\d+|[^\sA-Za-z\d]")


def solve(procedure: Procedure) -> tuple[str, list[int]]:
    """The least total time, such as ``20 min``, and each step's finish time in ``procedure.unit``."""
    finish = finish_times(procedure.amounts, procedure.predecessors)
    return with_unit(max(finish), procedure.unit), [int(f) for f in finish]


def sequential_sum(procedure: Procedure) -> str:
    """The sum of all durations: the sequential answer, right only where no steps overlap."""
    return with_unit(sum(procedure.amounts), procedure.unit)


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
    if not 0 <= sequential_rate <= 1:
        raise ValueError(f"sequential_rate must be in 0..1, got {sequential_rate}")
    procedure = draw(rng, difficulty, split=split)
    return _task(rng, procedure, difficulty, representation, split=split, sequential_rate=sequential_rate)


def _task(
    rng: random.Random,
    procedure: Procedure,
    difficulty: Difficulty,
    representation: str,
    *,
    split: Split,
    sequential_rate: float,
) -> Task:
    is_kept = split == "test" and rng.random() < KEPT_SHARE
    question = render(procedure, representation, rng, difficulty, is_kept=is_kept)
    is_sequential = rng.random() < sequential_rate
    return Task(
        family=ASYNC_PLAN.name,
        representation=representation,
        question=question,
        answer=solve(procedure)[0],
        demonstration=demonstration(procedure, representation, difficulty, sequential=is_sequential),
        sequential_answer=sequential_sum(procedure),
        key=procedure.key,
        difficulty=difficulty.model_dump(mode="json"),
        row={**facts_of(procedure), "wording": "kept" if is_kept else "trained"},
    )


def draw_tasks(difficulty: Difficulty, representation: str, num_tasks: int, *, seed: int, split: Split) -> list[Task]:
    """``num_tasks`` tasks; task i is the same procedure in every representation.

    In an exam ("dev" or "test") no two tasks are of one procedure. Raises DataError where there are too few.
    """
    if part_of(split) == "train":
        rngs = (random.Random(f"{seed}:{i}") for i in range(num_tasks))
        return [make_task(rng, difficulty, representation, split=split) for rng in rngs]
    tasks = []
    for procedure, state in _exam(difficulty, num_tasks, seed, part_of(split)):
        rng = random.Random()
        rng.setstate(state)
        tasks.append(_task(rng, procedure, difficulty, representation, split=split, sequential_rate=0.0))
    return tasks


@functools.lru_cache(maxsize=8)
def _exam(difficulty: Difficulty, num_tasks: int, seed: int, part: Part) -> list[tuple[Procedure, Any]]:
    """Different procedures, each with the state of the generator that its wording is drawn by."""
    prefix = "" if part == "dev" else "test:"  # other seeds
    found: list[tuple[Procedure, Any]] = []
    seen: set[str] = set()
    for i in range(num_tasks):
        for attempt in range(MOST_REPEATS):
            rng = random.Random(f"{prefix}{seed}:{i}" + (f":{attempt}" if attempt else ""))
            procedure = draw(rng, difficulty, split=part)
            if procedure.key not in seen:
                break
        else:
            raise DataError(
                f"the {part} exam has hardly more than {len(found)} different procedures, {num_tasks} are asked for: "
                "ask for fewer, or raise max_steps or max_duration"
            )
        seen.add(procedure.key)
        found.append((procedure, rng.getstate()))
    return found


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
    text = re.sub(r"\{[a-z]+\}", " ", " ".join(patterns))
    return {token for token in TOKEN.findall(text) if not token.isdigit()}
