"""What is reached without the procedure: shortcuts worked out by hand, the standard exam, and what it leaves out."""

import random
from pathlib import Path
from typing import Any

import pytest

from isomorph.curriculum.judge import judge
from isomorph.curriculum.named_recipes import FOLDER
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.tasks.async_plan import draw_tasks, make_task, path_length
from isomorph.curriculum.tasks.battery import BAG
from isomorph.curriculum.tasks.canonical import canonical_key
from isomorph.curriculum.tasks.draw import bag_of_numbers, draw
from isomorph.curriculum.tasks.facts import error_of, item_record, rates_of, view_of
from isomorph.curriculum.tasks.longest_path import with_unit
from isomorph.curriculum.tasks.procedure import Difficulty
from isomorph.curriculum.tasks.shortcuts import SHORTCUTS, StepGraph, is_solved, shortcut_rates
from isomorph.curriculum.tasks.task import DataError, Split, Task
from isomorph.engine.recipe_file import load_recipe

# 0 (5) and 1 (2) wait for nothing; 2 (3) for both; 3 (4) for 1 and 2; 4 (1) for 0. Longest path 0, 2, 3: 12.
BRANCHED = StepGraph.of([5, 2, 3, 4, 1], [(), (), (0, 1), (1, 2), (0,)])
QUICKSTART = Difficulty(form="terse", demonstration="compact", max_predecessors=2)


@pytest.fixture(scope="module")
def standard() -> Difficulty:
    """The difficulty of the standard exam."""
    data = load_recipe(Path(FOLDER) / "exam.toml", [], Recipe).data["plans"]
    assert isinstance(data, GeneratedData)
    return data.difficulty


@pytest.fixture(scope="module")
def exams(standard: Difficulty) -> dict[Split, list[Task]]:
    return {part: draw_tasks(standard, "graph", 150, seed=999, split=part) for part in ("dev", "test")}


def test_each_shortcut_on_a_procedure_worked_out_by_hand() -> None:
    assert {name: answer(BRANCHED) for name, answer in SHORTCUTS.items()} == {
        "sum_of_all": 15,
        "longest_step": 5,
        "finish_of_last_numbered": 6,  # step 4: 5 + 1
        "back_along_last_listed": 9,  # step 2 waits for 1 alone: 2 + 3, then 4
        "back_along_first_listed": 8,  # step 2: 5 + 3; step 3 waits for 1 alone: 2 + 4
        "back_along_longest": 12,  # step 3: 2 (3) rather than 1 (2); step 2: 0 (5) rather than 1
        "forward_along_longest": 12,  # 0, then 2 rather than 4, then 3
        "most_steps": 12,  # 0, 2, 3 and 1, 2, 3 have three; 0 comes first
        "in_number_order": 12,  # every predecessor has a lower number
    }
    assert BRANCHED.total == 12


def test_numbers_against_the_order_mislead_a_pass_by_number() -> None:
    # 2 (4) before 0 (5) before 1 (1): 10; by number 0 is finished at 5, 1 at 6, 2 at 4
    assert SHORTCUTS["in_number_order"](StepGraph.of([5, 1, 4], [(2,), (0,), ()])) == 6


def test_of_equally_many_steps_the_path_that_comes_first_is_taken() -> None:
    # 0 (1) and 1 (9) before 2 (1): two paths of two steps, the first of which is short
    assert SHORTCUTS["most_steps"](StepGraph.of([1, 9, 1], [(), (), (0, 1)])) == 2


def test_on_a_chain_most_shortcuts_are_right() -> None:
    rates = shortcut_rates([StepGraph.of([1, 2, 3], [(), (0,), (1,)])])
    assert {name for name, rate in rates.items() if rate == 1.0} == set(SHORTCUTS) - {"longest_step"}


def test_a_shortcut_reaches_a_high_accuracy_in_the_quickstarts_evaluation() -> None:
    """Recorded so that no reader takes its accuracies for planning: one shortcut answers nine in ten, another all."""
    graphs = [draw(random.Random(f"999:{i}"), QUICKSTART, split="dev").graph for i in range(300)]
    rates = shortcut_rates(graphs)
    assert rates["back_along_last_listed"] == pytest.approx(0.913, abs=0.001)
    assert rates["sum_of_all"] == pytest.approx(0.16)
    assert rates["in_number_order"] == 1.0  # numbered in a feasible order


def test_no_procedure_is_no_rate() -> None:
    with pytest.raises(ValueError, match="at least one procedure"):
        shortcut_rates([])


@pytest.mark.parametrize("part", ["dev", "test"])
def test_no_shortcut_solves_more_than_35_percent_of_the_standard_exam(
    exams: dict[Split, list[Task]], part: Split
) -> None:
    rates = rates_of(exams[part])
    assert set(rates) == {*SHORTCUTS, BAG}
    assert max(rates.values()) <= 0.35
    graphs = [graph for task in exams[part] if (graph := view_of(task))]
    assert sum(not is_solved(graph) for graph in graphs) >= 75  # the hard half


def test_no_shortcut_solves_a_hard_procedure_and_the_bag_of_numbers_none(standard: Difficulty) -> None:
    hard = standard.model_copy(update={"hard_share": 1.0})
    rates = rates_of(draw_tasks(hard, "graph", 25, seed=0, split="train"))
    assert rates == dict.fromkeys([*SHORTCUTS, BAG], 0.0)


def test_no_procedure_comes_twice_and_none_has_a_training_twin(
    standard: Difficulty, exams: dict[Split, list[Task]]
) -> None:
    """A twin has the same structure: whatever its durations are, it belongs to the same split."""
    keys = [task.key for part in exams.values() for task in part]
    assert len(set(keys)) == len(keys) == 300
    rng = random.Random(5)
    structures = {
        part: {draw(rng, standard, split=part).structure for _ in range(40)} for part in ("train", "dev", "test")
    }
    for part, others in (("train", ("dev", "test")), ("dev", ("test",))):
        for other in others:
            assert structures[part].isdisjoint(structures[other])
    asked = {part: {_structure(task) for task in found} for part, found in exams.items()}
    assert all(len(found) >= 20 for found in asked.values())
    assert asked["dev"].isdisjoint(asked["test"] | structures["train"])


def _structure(task: Task) -> str:
    return canonical_key([0] * len(task.row["amounts"]), task.row["predecessors"])


def test_an_exam_that_has_too_few_procedures_is_refused() -> None:
    few = Difficulty(min_steps=2, max_steps=2, max_duration=3)
    with pytest.raises(DataError, match="different procedures, 50 are asked for"):
        draw_tasks(few, "graph", 50, seed=0, split="dev")


def test_the_bag_of_numbers_stands_above_a_constant_answer(
    exams: dict[Split, list[Task]], standard: Difficulty
) -> None:
    graphs = [graph for task in exams["dev"] if (graph := view_of(task))]
    bag = bag_of_numbers(standard)
    miss = sum(abs(bag(graph) - graph.total) for graph in graphs) / len(graphs)
    middle = sorted(graph.total for graph in graphs)[75]
    assert miss < 0.75 * sum(abs(middle - graph.total) for graph in graphs) / len(graphs)


def _task(amounts: list[int], predecessors: list[list[int]]) -> Task:
    task = make_task(random.Random(0), QUICKSTART, "graph", split="train")
    facts: dict[str, Any] = {"amounts": amounts, "predecessors": predecessors, "unit": "min", "width": 2}
    total = StepGraph.of(amounts, predecessors).total
    kept = {name: getattr(task, name) for name in ("family", "representation", "question", "key", "difficulty")}
    return Task(**kept, answer=with_unit(total, "min"), row={**facts, "wording": "trained"})


def test_a_wrong_response_is_of_the_kind_that_it_shows() -> None:
    # 1 (3) and 2 (5) before 3 (4); 4 (2) alone: 9 minutes
    task = _task([3, 5, 4, 2], [[], [], [0, 1], []])
    true_sums = ("1.5 + 2 = 3.5", "-3 + 5 = 2", "1,000 + 5 = 1,005", "10 / 2 + 3 = 8", "2 + 3 + 4 = 9", "2 * 2 = 4.0")
    for text, kind in (
        ("<think>1: 0 + 3 = 3</think>", "format"),
        ("<answer>soon</answer>", "format"),
        ("<answer>9</answer>", "format"),  # no unit
        ("<think>1: 0 + 3 = 4; 3: 1 4 > 4 + 4 = 8</think> <answer>8 min</answer>", "arithmetic"),
        ("<think>1: 0 + 3 = 3; 3: 3 + 4 = 7</think> <answer>7 min</answer>", "shortcut:back_along_first_listed"),
        ("<answer>14 min</answer>", "shortcut:sum_of_all"),
        ("<answer>840 sec</answer>", "shortcut:sum_of_all"),
        ("<answer>11 min</answer>", "wrong path"),
        *((f"<think>{true}</think> <answer>11 min</answer>", "wrong path") for true in true_sums),
        ("<think>2 + 3 = 4.</think> <answer>11 min</answer>", "arithmetic"),
        ("<think>(2 + 3 = 4)</think> <answer>11 min</answer>", "arithmetic"),
        ("<think>2 + 3 = 4, so 4</think> <answer>11 min</answer>", "arithmetic"),
    ):
        assert judge("async_plan", text, task.answer) == 0.0
        graph = view_of(task)
        assert graph is not None and error_of(task, graph, text) == kind
        record = item_record(task, text, is_correct=False, has_answer=None)
        assert record["error"] == kind and record["gold"] == "9 min" and record["steps"] == 4
    right = item_record(task, "<answer>9 min</answer>", is_correct=True, has_answer=True)
    assert right["hard"] is False and right["error"] == "none" and right["answer"] == "9 min" and right["path_len"] == 2


def test_of_other_data_what_is_known_is_kept() -> None:
    task = Task(family="math", representation="words", question="1 + 1?", answer="2", key="k")
    assert rates_of([task]) == {}
    record = item_record(task, "two", is_correct=False, has_answer=False)
    assert record["error"] == "format" and record["steps"] is None and record["key"] == "k"
    assert item_record(task, "<answer>3</answer>", is_correct=False, has_answer=True)["error"] is None


def test_the_path_length_counts_the_steps_of_the_longest_path() -> None:
    assert path_length(BRANCHED) == 3
    assert path_length(StepGraph.of([2, 2, 4], [(), (0,), ()])) == 1  # 0, 1 takes as long as 2 alone: the fewest
