"""Shortcuts: answers to a planning question without the longest path.

Only an accuracy above the best of them shows that a model plans. Each shortcut follows one path or makes one pass;
none compares the totals of paths that meet in a step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from isomorph.curriculum.tasks.battery import rates
from isomorph.curriculum.tasks.longest_path import Predecessors, finish_times, topological_order


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A procedure as its shortcuts see it. Steps are 0 .. n-1, numbered and listed as in the question."""

    amounts: Sequence[int]  # in one unit
    predecessors: Predecessors  # ascending
    order: Sequence[int]  # topological

    @classmethod
    def of(cls, amounts: Sequence[int], predecessors: Predecessors) -> Self:
        """Raises ValueError where the graph has a cycle."""
        return cls(amounts, predecessors, topological_order(predecessors))

    @property
    def total(self) -> int:
        """The longest path: the right answer."""
        finish = list(self.amounts)
        for j in self.order:
            if before := self.predecessors[j]:
                finish[j] += max([finish[i] for i in before])
        return max(finish)

    @property
    def successors(self) -> list[list[int]]:
        after: list[list[int]] = [[] for _ in self.amounts]
        for j, before in enumerate(self.predecessors):
            for i in before:
                after[i].append(j)
        return after

    @property
    def starts(self) -> list[int]:
        return [j for j, before in enumerate(self.predecessors) if not before]

    @property
    def ends(self) -> list[int]:
        return [j for j, after in enumerate(self.successors) if not after]


Shortcut = Callable[[StepGraph], int]


def sum_of_all(graph: StepGraph) -> int:
    """The sequential answer."""
    return sum(graph.amounts)


def longest_step(graph: StepGraph) -> int:
    return max(graph.amounts)


def finish_of_last_numbered(graph: StepGraph) -> int:
    """The finish time of the step with the highest number, even if others end later."""
    return int(finish_times(graph.amounts, graph.predecessors)[-1])


def back_along_last_listed(graph: StepGraph) -> int:
    """The longest path where each step keeps only its last-listed predecessor."""
    return _along_one_predecessor(graph, lambda before: before[-1])


def back_along_first_listed(graph: StepGraph) -> int:
    """The longest path where each step keeps only its first-listed predecessor."""
    return _along_one_predecessor(graph, lambda before: before[0])


def back_along_longest(graph: StepGraph) -> int:
    """The longest path where each step keeps only the predecessor that takes longest."""
    return _along_one_predecessor(graph, lambda before: max(before, key=graph.amounts.__getitem__))


def forward_along_longest(graph: StepGraph) -> int:
    """From a step without predecessors repeatedly to its longest successor; the best start counts."""
    total, successors = list(graph.amounts), graph.successors
    for j in reversed(graph.order):
        if successors[j]:
            total[j] += total[max(successors[j], key=graph.amounts.__getitem__)]
    return max(total[j] for j in graph.starts)


def most_steps(graph: StepGraph) -> int:
    """The total of the path with the most steps; of several the one that comes first by number, from its end back."""
    count, total = [1] * len(graph.amounts), list(graph.amounts)
    for j in graph.order:
        if graph.predecessors[j]:
            before = max(graph.predecessors[j], key=count.__getitem__)  # the first of equal ones
            count[j] += count[before]
            total[j] += total[before]
    return total[max(range(len(total)), key=count.__getitem__)]


def in_number_order(graph: StepGraph) -> int:
    """Finish times in one pass by number: a predecessor with a higher number is not known yet, and counts 0."""
    finish: list[int] = []
    for j, before in enumerate(graph.predecessors):
        finish.append(graph.amounts[j] + max((finish[i] for i in before if i < j), default=0))
    return max(finish)


def _along_one_predecessor(graph: StepGraph, choose: Callable[[Sequence[int]], int]) -> int:
    total = list(graph.amounts)
    for j in graph.order:
        if graph.predecessors[j]:
            total[j] += total[choose(graph.predecessors[j])]
    return max(total)


SHORTCUTS: Mapping[str, Shortcut] = {
    function.__name__: function
    for function in (
        sum_of_all,
        longest_step,
        finish_of_last_numbered,
        back_along_last_listed,
        back_along_first_listed,
        back_along_longest,
        forward_along_longest,
        most_steps,
        in_number_order,
    )
}
# cheapest sieve first: most procedures are solved by one of the first three
_SIEVE = (most_steps, in_number_order, back_along_longest, forward_along_longest, *SHORTCUTS.values())


def is_solved(graph: StepGraph) -> bool:
    """Whether any of SHORTCUTS answers it rightly."""
    total = graph.total
    return any(answer(graph) == total for answer in _SIEVE)


class BagOfNumbers:
    """A linear function of the durations without their order, and of counts, for each number of steps.

    Features: 1, the durations from longest to shortest, the numbers of edges, of steps that wait for none, and of steps
    that none waits for. Its value is rounded to whole units.
    """

    def __init__(self, weights: Mapping[int, NDArray[np.float64]]) -> None:
        """``weights``: number of steps -> a weight for each feature, as ``batch.fitted_weights`` fits them."""
        self.weights = dict(weights)

    def __call__(self, graph: StepGraph) -> int:
        """0, which is never right, for a number of steps that there are no weights for."""
        weights = self.weights.get(len(graph.amounts))
        return 0 if weights is None else round(float(np.dot(_features(graph), weights)))


def _features(graph: StepGraph) -> list[float]:
    counts = (sum(map(len, graph.predecessors)), len(graph.starts), len(graph.ends))
    return [1.0, *sorted(graph.amounts, reverse=True), *counts]


def shortcut_rates(graphs: Iterable[StepGraph], shortcuts: Mapping[str, Shortcut] = SHORTCUTS) -> dict[str, float]:
    """Shortcut -> share of the graphs that it answers rightly. Raises ValueError without graphs."""
    return rates(graphs, shortcuts)
