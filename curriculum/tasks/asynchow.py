"""Parses the questions of the paper's AsyncHow files into plans, solves them, and writes demonstrations.

The paper: "Can Large Language Models Generalize Procedures Across Representations?" (arXiv 2602.03542).
"""

import ast
import functools
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from isomorph.curriculum.rewards.duration import UNIT_OF_WORD, Interval, parse_duration
from isomorph.curriculum.tasks.canonical import canonical_key
from isomorph.curriculum.tasks.longest_path import (
    Style,
    Working,
    finish_times,
    topological_order,
    with_unit,
    worked_solution,
)
from isomorph.curriculum.tasks.task import DataError

MAX_CHARS = 100_000

# demonstrations count a month as 30 days and a year as 365, within the intervals that the reward accepts
_DAY = 86_400
_NOMINAL = {
    "sec": 1,
    "min": 60,
    "hour": 3_600,
    "day": _DAY,
    "week": 7 * _DAY,
    "month": 30 * _DAY,
    "year": 365 * _DAY,
}
_SHORT = {"second": "sec", "minute": "min"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The steps, durations and order of a question."""

    names: tuple[str, ...]
    durations: tuple[str, ...]  # such as "2 hours"; bare numbers where unitless
    predecessors: tuple[tuple[int, ...], ...]
    unitless: bool
    noun: str


def solve_question(question: str, representation: str) -> Interval | Decimal:
    """The longest path: an interval of seconds (natural, graph) or a bare number (code).

    Raises:
        DataError: the question is not of the paper's form.
    """
    plan = parse_question(question, representation)
    if plan.unitless:
        return max(finish_times(_numbers(plan), plan.predecessors))
    intervals = [_interval(text) for text in plan.durations]
    low, high = (max(finish_times([interval[end] for interval in intervals], plan.predecessors)) for end in (0, 1))
    return Interval(low, high)


def demonstrate_question(question: str, representation: str, *, style: Style = "sentences") -> str:
    """A worked response to a question of the paper, that ends in ``<answer>..</answer>``.

    Raises:
        DataError: the question is not of the paper's form.
    """
    return demonstrate_plan(parse_question(question, representation), style=style)


def demonstrate_plan(plan: Plan, *, style: Style = "sentences") -> str:
    """A worked response that ends in ``<answer>..</answer>``."""
    return worked_solution(_working(plan), style=style, sequential=False)


def sequential_total(plan: Plan) -> str:
    """The sequential answer: the sum of all durations."""
    working = _working(plan)
    return with_unit(sum(working.amounts), working.unit)


def plan_key(plan: Plan) -> str:
    """The same for plans that differ only in the names of their steps; comparable within one representation."""
    if plan.unitless:
        return canonical_key([str(number.normalize()) for number in _numbers(plan)], plan.predecessors)
    return canonical_key([_interval(text) for text in plan.durations], plan.predecessors)


def parse_question(question: str, representation: str) -> Plan:
    """The plan of a question in one of the paper's three forms.

    Raises:
        DataError: the question is not of that form, or the order of its steps has a cycle.
    """
    if representation not in _READERS:
        raise DataError(f"representation must be one of {tuple(_READERS)}, got {representation!r}")
    if len(question) > MAX_CHARS:
        raise DataError(f"a question has at most {MAX_CHARS} characters, got {len(question)}")
    plan = _READERS[representation](question)
    try:
        topological_order(plan.predecessors)
    except ValueError as error:
        raise DataError(str(error)) from error
    return plan


_STEP = re.compile(r"Step (\d{1,4})\. .*\(([^()]*)\)")
_EDGE = re.compile(r"Step (\d{1,4}) must precede step (\d+(?:(?:, | and |, and )\d+)*)\.")
_HEADING = "These ordering constraints need to be obeyed"


def _read_natural(question: str) -> Plan:
    """Raises DataError for any unknown line between the first step and the question: it may be a constraint."""
    lines = [line.strip() for line in question.partition("\nQuestion:")[0].split("\n")]
    first = next((k for k, line in enumerate(lines) if _STEP.fullmatch(line)), None)
    if first is None:
        raise DataError("must list steps such as 'Step 1. Boil water (5 min)', found none")
    durations: dict[str, str] = {}
    after: dict[str, list[str]] = {}
    for k, line in enumerate(lines):
        if k < first and not line.startswith(("Step ", _HEADING)):  # the introduction
            continue
        if step := _STEP.fullmatch(line):
            if step[1] in durations:
                raise DataError(f"must list every step once, got step {step[1]} twice")
            durations[step[1]] = step[2]
        elif edge := _EDGE.fullmatch(line):
            after.setdefault(edge[1], []).extend(re.findall(r"\d+", edge[2]))
        elif line and not line.startswith(_HEADING):
            raise DataError(
                "must have steps such as 'Step 1. Boil water (5 min)' and constraints such as 'Step 1 must precede "
                f"step 2 and 3.', one a line, up to 'Question:'; got {line[:80]!r}"
            )
    if not after and len(durations) > 1 and not any(line.startswith(_HEADING) for line in lines):
        raise DataError(f"must have constraints, or '{_HEADING} ...' with none below it; found neither")
    for name in after:
        _known(name, durations)
    return _plan(durations, after, noun="step")


def _read_graph(question: str) -> Plan:
    literals = re.findall(r"^\{.*\}$", question, re.MULTILINE)
    if len(literals) != 2:
        raise DataError(f"must hold an adjacency list and durations, each on a line, found {len(literals)}")
    after, durations = (_literal(text) for text in literals)
    if not {"START", "END"} <= after.keys():
        raise DataError(f"must have nodes START and END, got {sorted(after)[:20]}")
    _check_texts(after, durations)
    on_path = _between(after, "START", "END") - {"START", "END"}
    kept = {name: durations[_known(name, durations)] for name in after if name in on_path}
    if not kept:
        raise DataError("must have a node between START and END, found none")
    return _plan(kept, {name: [t for t in after[name] if t in on_path] for name in kept}, noun="node")


def _check_texts(after: dict[Any, Any], durations: dict[Any, Any]) -> None:
    targets = [target for row in after.values() if isinstance(row, list) for target in row]
    lists = all(isinstance(row, list) for row in after.values())
    if not lists or not all(isinstance(text, str) for text in (*after, *targets, *durations, *durations.values())):
        raise DataError("must map node names to lists of node names, and node names to durations")


_INPUT = r"^{} *= *(.+)$"


def _read_code(question: str) -> Plan:
    edges, source, target = (_input(question, name) for name in ("adj_list", "source", "target"))
    weights = _weights(edges)
    after = {name: [to for to, _ in row] for name, row in edges.items()}
    on_path = _between(after, source, target)
    _known(source, after)  # which may be the target
    kept = {name: weights.get(name, "0") for name in edges if name in on_path}
    kept[source] = "0"
    return _plan(kept, {name: [to for to in after[name] if to in on_path] for name in kept}, noun="node", unitless=True)


def _input(question: str, name: str) -> Any:
    found = re.findall(_INPUT.format(name), question, re.MULTILINE)
    if len(found) != 1:
        raise DataError(f"must set {name} once, found {len(found)} times")
    return _literal(found[0].strip(), dict if name == "adj_list" else int)


def _weights(edges: dict[Any, Any]) -> dict[Any, str]:
    """Node -> weight of all edges into it, which is the duration of the step they lead to."""
    weights: dict[Any, str] = {}
    for row in edges.values():
        for edge in row if isinstance(row, list) else [None]:
            match edge:
                case (int() as to, int() | float() as weight) if 0 <= weight < math.inf and weight is not True:
                    exact = repr(weight)
                case _:
                    raise DataError(f"adj_list must map nodes to lists of (node, weight >= 0), got {edge!r}")
            if weights.setdefault(to, exact) != exact:
                raise DataError(f"all edges into one node must have one weight, got {weights[to]} and {exact}")
    return weights


_READERS = {"natural": _read_natural, "graph": _read_graph, "code": _read_code}
FORMS = tuple(_READERS)  # whose questions ``parse_question`` reads


def _literal(text: str, kind: type = dict) -> Any:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise DataError(f"must be a Python literal, got {text[:80]!r}: {error}") from error
    if type(value) is not kind:
        raise DataError(f"must be a {kind.__name__}, got {text[:80]!r}")
    return value


def _between(after: Mapping[Any, Sequence[Any]], source: Hashable, target: Hashable) -> set[Any]:
    """Nodes on some path from source to target."""
    before: dict[Any, list[Any]] = {}
    for name, targets in after.items():
        for to in targets:
            before.setdefault(_known(to, after), []).append(name)
    found = _reached(after, source) & _reached(before, target)
    if target not in found:
        raise DataError(f"there must be a path from {source!r} to {target!r}")
    return found


def _reached(after: Mapping[Any, Sequence[Any]], start: Hashable) -> set[Any]:
    seen, waiting = {start}, [start]
    while waiting:
        new = set(after.get(waiting.pop(), ())) - seen
        seen |= new
        waiting += new
    return seen


def _known(name: Any, known: Iterable[Any]) -> Any:
    if name not in known:
        raise DataError(f"node {name!r} is named, but not listed")
    return name


def _plan(
    durations: Mapping[Any, Any], after: Mapping[Any, Sequence[Any]], *, noun: str, unitless: bool = False
) -> Plan:
    index = {name: i for i, name in enumerate(durations)}
    predecessors: list[set[int]] = [set() for _ in index]
    for name, targets in after.items():
        for to in targets:
            predecessors[index[_known(to, index)]].add(index[name])
    return Plan(
        names=tuple(map(str, durations)),
        durations=tuple(durations.values()),
        predecessors=tuple(tuple(sorted(p)) for p in predecessors),
        unitless=unitless,
        noun=noun,
    )


@functools.lru_cache(maxsize=4096)
def _interval(text: str) -> Interval:
    interval = parse_duration(text)
    if interval is None:
        raise DataError(f"must be a duration such as '2 hours', got {text!r}")
    return interval


def _numbers(plan: Plan) -> list[Decimal]:
    return [Decimal(text) for text in plan.durations]


def _working(plan: Plan) -> Working:
    amounts, written, unit = _unitless(plan) if plan.unitless else _in_one_unit(plan.durations)
    return Working(
        names=plan.names,
        amounts=amounts,
        written=written,
        predecessors=plan.predecessors,
        unit=unit,
        noun=plan.noun,
    )


_Amounts = tuple[list[int] | list[Decimal], list[str | None], str]


def _unitless(plan: Plan) -> _Amounts:
    return _numbers(plan), [None] * len(plan.names), ""


_PART = re.compile(r"(\d{1,9}) ([a-z]+)")
_PARTS = re.compile(rf"{_PART.pattern}(?: {_PART.pattern})*")


def _in_one_unit(durations: Sequence[str]) -> _Amounts:
    """Whole amounts in the largest common unit, the text of durations in another unit, and the unit."""
    parts = [[(int(n), _short_unit(word)) for n, word in _PART.findall(text)] for text in durations]
    if not all(map(_PARTS.fullmatch, durations)):
        raise DataError(f"durations must be such as '2 hours' or '8 days 8 hours', got {list(durations)}")
    seconds = [sum(n * _NOMINAL[unit] for n, unit in row) for row in parts]
    smallest = min(_NOMINAL[unit] for row in parts for _, unit in row)
    unit = max(
        (u for u, s in _NOMINAL.items() if s <= smallest and not any(total % s for total in seconds)),
        key=_NOMINAL.__getitem__,
    )
    written = [None if [u for _, u in row] == [unit] else text for row, text in zip(parts, durations, strict=True)]
    return [total // _NOMINAL[unit] for total in seconds], written, unit


def _short_unit(word: str) -> str:
    if word not in UNIT_OF_WORD:
        raise DataError(f"{word!r} is not a unit of time")
    return _SHORT.get(UNIT_OF_WORD[word], UNIT_OF_WORD[word])
