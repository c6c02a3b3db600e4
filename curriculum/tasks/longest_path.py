"""Longest paths of a directed acyclic graph of steps, and how one is worked out in writing.

Steps are 0 .. n-1; ``predecessors[j]`` are the steps that must be finished before step j starts.
Amounts are durations in one common unit (int, or Decimal where the data has fractions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Amount = int | Decimal
Predecessors = Sequence[Sequence[int]]
Style = Literal["compact", "sentences"]


def topological_order(predecessors: Predecessors) -> list[int]:
    """Every step after its predecessors; among those that could come next, the lowest number first.

    Raises:
        ValueError: the graph has a cycle.
    """
    order: list[int] = []
    left = set(range(len(predecessors)))
    while left:
        ready = min((j for j in left if left.isdisjoint(predecessors[j])), default=None)
        if ready is None:
            raise ValueError(f"steps must not wait for each other in a circle, got one among {sorted(left)}")
        order.append(ready)
        left.remove(ready)
    return order


def finish_times(amounts: Sequence[Amount], predecessors: Predecessors) -> list[Amount]:
    """When each step is finished if it starts as soon as it may; the maximum is the longest path."""
    finish: dict[int, Amount] = {}
    for j in topological_order(predecessors):
        finish[j] = max((finish[i] for i in predecessors[j]), default=0) + amounts[j]
    return [finish[j] for j in range(len(amounts))]


def sequential_finish_times(amounts: Sequence[Amount], predecessors: Predecessors) -> list[Amount]:
    """When each step is finished if they are done one after the other; the maximum is the sum."""
    finish: dict[int, Amount] = {}
    clock: Amount = 0
    for j in topological_order(predecessors):
        clock = clock + amounts[j]
        finish[j] = clock
    return [finish[j] for j in range(len(amounts))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """All that a worked solution speaks of."""

    names: Sequence[str]  # of the steps, as the question calls them
    amounts: Sequence[Amount]
    written: Sequence[str | None]  # the duration as the question has it, where that is not the amount itself
    predecessors: Predecessors
    unit: str  # of the amounts; "" for bare numbers
    noun: str  # "step" or "node"


def worked_solution(working: Working, *, style: Style, naive: bool) -> str:
    """A response: each step's start and finish, then the total in <answer>..</answer>.

    ``naive`` lists the same predecessors, but starts every step only when the one before it is finished.
    """
    times = sequential_finish_times if naive else finish_times
    finish = times(working.amounts, working.predecessors)
    lines = []
    write = _compact_line if style == "compact" else _sentence
    for j in topological_order(working.predecessors):
        lines.append(write(working, finish, j))
    answer = f"<answer>{with_unit(max(finish), working.unit)}</answer>"
    if style == "compact":
        return f"<think>{'; '.join(lines)}</think> {answer}"
    last = f"The last {working.noun} is finished at {with_unit(max(finish), working.unit)}."
    return "\n".join([*lines, last, answer])


def with_unit(amount: Amount, unit: str) -> str:
    """``1 hour``, ``2 hours``, ``20 min``, or the bare number where there is no unit."""
    plural = "s" if amount != 1 and unit not in ("", "sec", "min") else ""
    return f"{amount} {unit}{plural}".rstrip()


def _compact_line(working: Working, finish: Sequence[Amount], j: int) -> str:
    amount, written = working.amounts[j], working.written[j]
    known = " ".join(f"{working.names[i]} {finish[i]}" for i in working.predecessors[j])
    conversion = f"{written} = {amount}, " if written else ""
    arrow = f"{known} > " if known else ""
    return f"{working.names[j]}: {conversion}{arrow}{finish[j] - amount} + {amount} = {finish[j]}"


def _sentence(working: Working, finish: Sequence[Amount], j: int) -> str:
    amount, written, noun = working.amounts[j], working.written[j], working.noun
    name = f"{noun.capitalize()} {working.names[j]}"
    takes = f"{written} = {with_unit(amount, working.unit)}" if written else with_unit(amount, working.unit)
    known = " and ".join(
        f"{noun} {working.names[i]} (finished at {finish[i]})" for i in working.predecessors[j]
    )
    after = f"comes after {known}" if known else f"comes after no other {noun}"
    start = finish[j] - amount
    total = f"{start} + {amount} = {with_unit(finish[j], working.unit)}"
    return f"{name} takes {takes} and {after}: it starts at {start} and is finished at {total}."
