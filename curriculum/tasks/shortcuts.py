"""Baselines that answer a planning question without the longest path.

Only an accuracy above the best of them shows that a model plans.
"""

from collections.abc import Callable, Iterable, Mapping

from isomorph.curriculum.tasks.longest_path import finish_times, topological_order
from isomorph.curriculum.tasks.procedure import Procedure


def sum_of_all(procedure: Procedure) -> int:
    """The sequential answer."""
    return sum(procedure.amounts)


def longest_step(procedure: Procedure) -> int:
    return max(procedure.amounts)


def finish_of_last_numbered(procedure: Procedure) -> int:
    """The finish time of the step with the highest number, even if others end later."""
    return int(finish_times(procedure.amounts, procedure.predecessors)[-1])


def back_along_last_listed(procedure: Procedure) -> int:
    """The longest path where each step keeps only its last-listed predecessor."""
    return max(_along_one_predecessor(procedure, -1))


def back_along_first_listed(procedure: Procedure) -> int:
    """The longest path where each step keeps only its first-listed predecessor."""
    return max(_along_one_predecessor(procedure, 0))


def forward_along_longest(procedure: Procedure) -> int:
    """From a step without predecessors repeatedly to its longest successor; the best start counts."""
    starts = (j for j in range(procedure.num_steps) if not procedure.predecessors[j])
    return max(_forward_from(procedure, j) for j in starts)


def _forward_from(procedure: Procedure, step: int) -> int:
    amounts, successors = procedure.amounts, procedure.successors
    total = amounts[step]
    while successors[step]:
        step = max(successors[step], key=amounts.__getitem__)
        total += amounts[step]
    return total


def _along_one_predecessor(procedure: Procedure, which: int) -> list[int]:
    finish: dict[int, int] = {}
    for j in topological_order(procedure.predecessors):
        before = procedure.predecessors[j]
        finish[j] = procedure.amounts[j] + (finish[before[which]] if before else 0)
    return [finish[j] for j in range(procedure.num_steps)]


SHORTCUTS: Mapping[str, Callable[[Procedure], int]] = {
    function.__name__: function
    for function in (
        sum_of_all,
        longest_step,
        finish_of_last_numbered,
        back_along_last_listed,
        back_along_first_listed,
        forward_along_longest,
    )
}


def shortcut_rates(procedures: Iterable[Procedure]) -> dict[str, float]:
    """Shortcut -> share of the procedures that it answers rightly. Raises ValueError without procedures."""
    known = list(procedures)
    if not known:
        raise ValueError("at least one procedure is needed, got none")
    right = [int(max(finish_times(p.amounts, p.predecessors))) for p in known]
    return {
        name: sum(answer(p) == total for p, total in zip(known, right, strict=True)) / len(known)
        for name, answer in SHORTCUTS.items()
    }
