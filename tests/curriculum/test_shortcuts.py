"""What is reached without the procedure, on procedures worked out by hand."""

import random

import pytest

from isomorph.curriculum.tasks.procedure import Difficulty, Duration, Procedure, draw
from isomorph.curriculum.tasks.shortcuts import SHORTCUTS, shortcut_rates


def procedure(amounts: list[int], predecessors: list[tuple[int, ...]]) -> Procedure:
    return Procedure(
        goal="",
        activities=tuple(f"step {j}" for j in range(len(amounts))),
        durations=tuple(Duration(value=amount, unit="min") for amount in amounts),
        predecessors=tuple(predecessors),
    )


# 0 (5) and 1 (2) wait for nothing; 2 (3) for both; 3 (4) for 1 and 2; 4 (1) for 0. Longest path 0, 2, 3: 12.
BRANCHED = procedure([5, 2, 3, 4, 1], [(), (), (0, 1), (1, 2), (0,)])


def test_each_shortcut_on_a_procedure_worked_out_by_hand() -> None:
    assert {name: answer(BRANCHED) for name, answer in SHORTCUTS.items()} == {
        "sum_of_all": 15,
        "longest_step": 5,
        "finish_of_last_numbered": 6,  # step 4: 5 + 1
        "back_along_last_listed": 9,  # step 2 waits for 1 alone: 2 + 3, then 4
        "back_along_first_listed": 8,  # step 2: 5 + 3; step 3 waits for 1 alone: 2 + 4
        "forward_along_longest": 12,  # 0, then 2 rather than 4, then 3
    }
    assert shortcut_rates([BRANCHED]) == {name: float(name == "forward_along_longest") for name in SHORTCUTS}


def test_on_a_chain_most_shortcuts_are_right() -> None:
    rates = shortcut_rates([procedure([1, 2, 3], [(), (0,), (1,)])])
    assert {name for name, rate in rates.items() if rate == 1.0} == set(SHORTCUTS) - {"longest_step"}


def test_a_shortcut_reaches_a_high_accuracy_in_the_quickstarts_evaluation() -> None:
    """Recorded so that no reader takes its accuracies for planning: the best shortcut answers nine in ten."""
    difficulty = Difficulty(form="terse", demonstration="compact", max_predecessors=2)
    procedures = [draw(random.Random(f"999:{i}"), difficulty, split="eval") for i in range(300)]
    rates = shortcut_rates(procedures)
    assert max(rates, key=rates.__getitem__) == "back_along_last_listed"
    assert rates["back_along_last_listed"] == pytest.approx(0.913, abs=0.001)
    assert rates["sum_of_all"] == pytest.approx(0.16)


def test_no_procedure_is_no_rate() -> None:
    with pytest.raises(ValueError, match="at least one procedure"):
        shortcut_rates([])
