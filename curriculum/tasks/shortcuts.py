"""Answers to a planning question that need no planning: what a model could reach without the procedure.

An accuracy says that the procedure was carried out only as far as it lies above the best of these.
"""

from collections.abc import Callable, Iterable, Mapping

from isomorph.curriculum.tasks.longest_path import finish_times, topological_order
from isomorph.curriculum.tasks.procedure import Procedure


def sum_of_all(procedure: Procedure) -> int:
    """One step after the other."""
    return sum(procedure.amounts)


def longest_step(procedure: Procedure) -> int:
    return max(procedure.amounts)


def finish_of_last_numbered(procedure: Procedure) -> int:
    """The finish time of the step with the highest number, whatever ends later."""
    return int(finish_times(procedure.amounts, procedure.predecessors)[-1])


def back_along_last_listed(procedure: Procedure) -> int:
    """Of each step's predecessors only the last-listed one is waited for."""
    return max(_along_one_predecessor(procedure, -1))


def back_along_first_listed(procedure: Procedure) -> int:
    """Of each step's predecessors only the first-listed one is waited for."""
    return max(_along_one_predecessor(procedure, 0))


def forward_along_longest(procedure: Procedure) -> int:
    """From a step that waits for nothing on to the longest step that waits for it, and so on; from the best start."""
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
    """Share of the procedures whose least total time each shortcut gives. Raises ValueError where there are none."""
    asked = list(procedures)
    if not asked:
        raise ValueError("at least one procedure is needed, got none")
    right = [int(max(finish_times(p.amounts, p.predecessors))) for p in asked]
    return {
        name: sum(answer(p) == total for p, total in zip(asked, right, strict=True)) / len(asked)
        for name, answer in SHORTCUTS.items()
    }
