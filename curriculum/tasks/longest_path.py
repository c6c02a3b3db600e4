"""Longest paths of a directed acyclic graph of steps, and worked solutions as text.

Steps are 0 .. n-1; ``predecessors[j]`` are the steps that must be finished before step j starts.
Amounts are durations in one common unit (int, or Decimal where the data has fractions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any, Literal, TypeVar

Amount = TypeVar("Amount", int, Decimal, Fraction)
Predecessors = Sequence[Sequence[int]]
Style = Literal["compact", "listed", "sentences"]  # listed: what precedes each step, by number, then as compact


def topological_order(predecessors: Predecessors) -> list[int]:
    """The steps, each after its predecessors; the lowest number first where several are possible.

    Raises:
        ValueError: the graph has a cycle.
    """
    left = [len(before) for before in predecessors]
    after: list[list[int]] = [[] for _ in predecessors]
    for j, before in enumerate(predecessors):
        for i in before:
            after[i].append(j)
    ready = [j for j, n in enumerate(left) if n == 0]  # ascending, so it is a heap
    order: list[int] = []
    while ready:
        order.append(heappop(ready))
        for j in after[order[-1]]:
            left[j] -= 1
            if left[j] == 0:
                heappush(ready, j)
    if len(order) < len(left):
        circle = sorted(set(range(len(left))) - set(order))
        raise ValueError(f"the order of steps must have no cycle, got one among steps {circle[:20]}")
    return order


def finish_times(amounts: Sequence[Amount], predecessors: Predecessors) -> list[Amount]:
    """Finish time of each step when it starts as early as possible; the maximum is the longest path."""
    finish: dict[int, Amount] = {}
    for j in topological_order(predecessors):
        before = [finish[i] for i in predecessors[j]]
        finish[j] = max(before) + amounts[j] if before else amounts[j]
    return [finish[j] for j in range(len(amounts))]


def sequential_finish_times(amounts: Sequence[Amount], predecessors: Predecessors) -> list[Amount]:
    """Finish time of each step when no two overlap; the maximum is the sum."""
    order = topological_order(predecessors)
    finish = dict(zip(order, accumulate(amounts[j] for j in order), strict=True))
    return [finish[j] for j in range(len(amounts))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """The input of ``worked_solution``."""

    names: Sequence[str]  # of the steps, as in the question
    amounts: Sequence[int] | Sequence[Decimal]
    written: Sequence[str | None]  # the duration as in the question, where its unit differs from ``unit``; else None
    predecessors: Predecessors
    unit: str  # of the amounts; "" for bare numbers
    noun: str  # "step" or "node"


def worked_solution(working: Working, *, style: Style, sequential: bool) -> str:
    """A response: each step's start and finish, then the total in <answer>..</answer>.

    ``sequential``: with the same predecessors, but every step starts when the previous one is finished.
    """
    times = sequential_finish_times if sequential else finish_times
    finish: list[Any] = times(working.amounts, working.predecessors)
    write = _sentence if style == "sentences" else _compact_line
    lines = [write(working, finish, j) for j in topological_order(working.predecessors)]
    answer = f"<answer>{with_unit(max(finish), working.unit)}</answer>"
    if style != "sentences":
        listed = f"{_listed(working)}. " if style == "listed" else ""
        return f"<think>{listed}{'; '.join(lines)}</think> {answer}"
    last = f"The last {working.noun} is finished at {with_unit(max(finish), working.unit)}."
    return "\n".join([*lines, last, answer])


def with_unit(amount: int | Decimal, unit: str) -> str:
    """``1 hour``, ``2 hours``, ``20 min``, or the bare number without a unit."""
    plural = "s" if amount != 1 and unit not in ("", "sec", "min") else ""
    return f"{_shown(amount)} {unit}{plural}".rstrip()


def _shown(amount: int | Decimal) -> str:
    """Without an exponent or trailing zeros: 518400, 4.5."""
    return str(amount) if isinstance(amount, int) else f"{amount.normalize():f}"


def _compact_line(working: Working, finish: Sequence[Any], j: int) -> str:
    amount, written = working.amounts[j], working.written[j]
    known = " ".join(f"{working.names[i]} {_shown(finish[i])}" for i in working.predecessors[j])
    conversion = f"{written} = {_shown(amount)}, " if written else ""
    arrow = f"{known} > " if known else ""
    return f"{working.names[j]}: {conversion}{arrow}{_addition(amount, finish[j])}{_shown(finish[j])}"


def _listed(working: Working) -> str:
    """``1: 3; 2: 1 4; 3: 0; 4: 0``: the direct predecessors of each step, 0 where it has none."""
    names = working.names
    return "; ".join(
        f"{name}: {' '.join(names[i] for i in before) or '0'}"
        for name, before in zip(names, working.predecessors, strict=True)
    )


def _sentence(working: Working, finish: Sequence[Any], j: int) -> str:
    noun, unit = working.noun, working.unit
    takes = with_unit(working.amounts[j], unit)
    if working.written[j]:
        takes = f"{working.written[j]} = {takes}"
    names = [f"{noun} {working.names[i]} (finished at {_shown(finish[i])})" for i in working.predecessors[j]]
    after = " and ".join(names) or f"no other {noun}"
    start = _shown(finish[j] - working.amounts[j])
    total = f"{_addition(working.amounts[j], finish[j])}{with_unit(finish[j], unit)}"
    return (
        f"{noun.capitalize()} {working.names[j]} takes {takes} and comes after {after}: "
        f"it starts at {start} and is finished at {total}."
    )


def _addition(amount: Any, finish: Any) -> str:
    return f"{_shown(finish - amount)} + {_shown(amount)} = "
