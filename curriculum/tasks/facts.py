"""What is known of a generated task besides its texts: the procedure, in ``Task.row``; what a wrong answer shows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from isomorph.curriculum.rewards.answer import last_answer
from isomorph.curriculum.rewards.duration import parse_duration
from isomorph.curriculum.tasks.draw import battery
from isomorph.curriculum.tasks.procedure import SECONDS, Difficulty, Procedure
from isomorph.curriculum.tasks.shortcuts import BAG, Shortcut, StepGraph, shortcut_rates
from isomorph.curriculum.tasks.task import Task

_SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")


def facts_of(procedure: Procedure) -> dict[str, Any]:
    """JSON-able: the durations in ``unit``, and the predecessors of each step, 0-based."""
    return {
        "amounts": procedure.amounts,
        "predecessors": [list(before) for before in procedure.predecessors],
        "unit": procedure.unit,
        "width": procedure.width,
    }


def graph_of(task: Task) -> StepGraph | None:
    """The procedure of a generated task; None of another task."""
    facts = task.row
    if not task.difficulty or "amounts" not in facts or "predecessors" not in facts:
        return None
    return StepGraph.of(facts["amounts"], facts["predecessors"])


def rates_of(tasks: Sequence[Task]) -> dict[str, float]:
    """Shortcut -> share of the generated ones among ``tasks`` that it solves; {} without any."""
    by_difficulty: dict[Difficulty, list[StepGraph]] = {}
    for task in tasks:
        graph = graph_of(task)
        if graph is not None:
            by_difficulty.setdefault(Difficulty.model_validate(task.difficulty), []).append(graph)
    total = sum(map(len, by_difficulty.values()))
    rates: dict[str, float] = {}
    for difficulty, graphs in by_difficulty.items():
        for name, rate in shortcut_rates(graphs, battery(difficulty)).items():
            rates[name] = rates.get(name, 0.0) + rate * len(graphs) / total
    return rates


def shortcuts_of(task: Task) -> Mapping[str, Shortcut]:
    """The battery of a generated task's difficulty."""
    return battery(Difficulty.model_validate(task.difficulty))


def item_record(task: Task, text: str, *, is_correct: bool, has_answer: bool | None) -> dict[str, Any]:
    """What is kept of the response to one question of an evaluation; None where it is not known.

    ``error``: what a wrong response shows. "format": it states no duration; "arithmetic": one of its
    sums is wrong; "shortcut:NAME": its answer is that of a shortcut; "wrong path": another answer. "none": it is right.
    ``hard``: no shortcut solves the question. ``wording``: "kept" where its wordings are the test exam's own.
    ``path_len``: steps on the longest path, the fewest where several are longest.
    """
    answer = last_answer(text)
    graph = graph_of(task)
    known: dict[str, Any] = dict.fromkeys(("steps", "width", "path_len", "hard", "wording"))
    error = None
    if graph is not None:
        known = {
            "steps": len(graph.amounts),
            "width": task.row["width"],
            "path_len": path_length(graph),
            "hard": not any(answer(graph) == graph.total for answer in shortcuts_of(task).values()),
            "wording": task.row["wording"],
        }
        error = "none" if is_correct else error_of(task, graph, text)
    elif is_correct:
        error = "none"
    elif has_answer is False:
        error = "format"
    return {
        "representation": task.representation,
        "key": task.key,
        **known,
        "gold": task.answer,
        "answer": answer,
        "correct": is_correct,
        "error": error,
    }


def path_length(graph: StepGraph) -> int:
    """Steps on the longest path; the fewest where several paths are longest."""
    best: dict[int, tuple[int, int]] = {}  # finish, minus number of steps
    for j in graph.order:
        finish, steps = max((best[i] for i in graph.predecessors[j]), default=(0, 0))
        best[j] = finish + graph.amounts[j], steps - 1
    return -max(best.values())[1]


def error_of(task: Task, graph: StepGraph, text: str) -> str:
    """The kind of a wrong response; see ``item_record``."""
    stated = parse_duration(last_answer(text) or "")
    if stated is None:
        return "format"
    if any(int(a) + int(b) != int(c) for a, b, c in _SUM.findall(text)):
        return "arithmetic"
    ratio = SECONDS[task.row["unit"]]
    for name, answer in shortcuts_of(task).items():
        if name != BAG and answer(graph) * ratio == stated.low == stated.high:
            return f"shortcut:{name}"
    return "wrong path"
