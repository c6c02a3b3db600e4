"""What analogy compares: a procedure's durations and its order, from a task in any representation."""

from collections.abc import Iterable
from dataclasses import dataclass

from isomorph.curriculum.analogy.trace import read_trace
from isomorph.curriculum.rewards.duration import parse_duration
from isomorph.curriculum.tasks.asynchow import FORMS, parse_question
from isomorph.curriculum.tasks.task import DataError, Task

Duration = tuple[float, float]  # seconds, lowest and highest: a month has 28 to 31 days


@dataclass(frozen=True, slots=True)
class Structure:
    """The steps of a procedure, without their names."""

    key: str
    durations: tuple[Duration, ...]
    predecessors: tuple[tuple[int, ...], ...]


def structures_of(tasks: Iterable[Task]) -> dict[str, Structure]:
    """Key -> structure, of tasks whose question or demonstration can be read. The first task of a key counts."""
    found: dict[str, Structure] = {}
    for task in tasks:
        if task.key not in found and (read := structure_of(task)) is not None:
            found[task.key] = read
    return found


def structure_of(task: Task) -> Structure | None:
    """From a question of the paper's form, else from the demonstration, which names predecessors; None without both."""
    if task.representation in FORMS:
        try:
            plan = parse_question(task.question, task.representation)
        except DataError:  # of another form
            pass
        else:
            durations = [_seconds(text) if plan.unitless else _duration(text) for text in plan.durations]
            return _without_ends(Structure(task.key, tuple(durations), plan.predecessors))
    return None if task.demonstration is None else _demonstrated(task, task.demonstration)


def _without_ends(one: Structure) -> Structure:
    """Without the start and the end of the paper's code: nodes of no duration before or after all others."""
    leads = {i for before in one.predecessors for i in before}
    kept = [j for j, before in enumerate(one.predecessors) if one.durations[j] != (0.0, 0.0) or (before and j in leads)]
    place = {j: k for k, j in enumerate(kept)}
    return Structure(
        one.key,
        tuple(one.durations[j] for j in kept),
        tuple(tuple(place[i] for i in one.predecessors[j] if i in place) for j in kept),
    )


def _demonstrated(task: Task, demonstration: str) -> Structure | None:
    steps = read_trace(demonstration)
    place = {name: i for i, name in enumerate(steps)}
    if not steps or any(step.duration is None for step in steps.values()):
        return None
    unit = task.answer.strip().lstrip("0123456789. ") or "sec"
    return Structure(
        task.key,
        tuple(_duration(f"{_digits(step.duration or 0.0)} {unit}") for step in steps.values()),
        tuple(tuple(sorted(place[name] for name in step.predecessors if name in place)) for step in steps.values()),
    )


def _digits(number: float) -> str:
    """All digits of a number that ``read_trace`` has read: it has no exponent and at most six decimals."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def _seconds(text: str) -> Duration:
    return float(text), float(text)


def _duration(text: str) -> Duration:
    interval = parse_duration(text)
    if interval is None:
        raise DataError(f"must be a duration such as '2 hours', got {text!r}")
    return float(interval.low), float(interval.high)
