"""The table of reward families: its entries can be called, and a family added to it needs no other change."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from isomorph.curriculum.commands.data import inspect_file
from isomorph.curriculum.evaluation import sequential_baseline
from isomorph.curriculum.evaluation_results import Result
from isomorph.curriculum.judge import judge
from isomorph.curriculum.recipe import JsonlData
from isomorph.curriculum.rewards import families
from isomorph.curriculum.rewards.families import ASYNC_PLAN, FAMILIES, RewardFamily, function, missing_packages
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.types import Answers


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_path_names_a_function(family: RewardFamily) -> None:
    assert FAMILIES[family.name] is family
    assert bool(family.paper) != bool(family.why_no_paper)
    assert callable(function(family.check_answer))
    if missing_packages(family):
        pytest.skip(f"needs the extra {family.extra}")
    for path in (family.function, family.paper, family.why_unreadable):
        assert not path or callable(function(path))


def share_of_letters(stated: str, accepted: str) -> float:
    """A reward with partial credit."""
    return sum(a == b for a, b in zip(stated, accepted, strict=False)) / len(accepted)


@pytest.fixture
def spelling(monkeypatch: pytest.MonkeyPatch) -> RewardFamily:
    family = RewardFamily(name="spelling", function="tests.spelling:share_of_letters", why_no_paper="not in it")
    monkeypatch.setattr(families, "FAMILIES", {**FAMILIES, family.name: family})
    monkeypatch.setattr(families, "function", lambda path: share_of_letters if "spelling" in path else function(path))
    monkeypatch.setattr("isomorph.curriculum.rewards.pool.function", families.function)
    return family


def test_a_family_with_partial_rewards_is_an_entry_of_the_table(spelling: RewardFamily, tmp_path: Path) -> None:
    assert judge("spelling", "<answer>cot</answer>", "cat") == pytest.approx(2 / 3)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Spell cat.", "answer": "cat"}) + "\n")
    (task,) = read_rows(file, "spelling", "natural")
    with RewardPool() as score:
        assert score([SimpleNamespace(payload=task)], ["<answer>car</answer>"]) == [pytest.approx(2 / 3)]
    assert JsonlData(kind="jsonl", family="spelling", files={"natural": str(file)}).family == "spelling"
    with pytest.raises(ValueError, match="spelling has no reward .paper.: not in it"):
        JsonlData(kind="jsonl", family="spelling", files={"natural": str(file)}, reward="paper")


def test_partial_rewards_are_no_right_answers(spelling: RewardFamily, tmp_path: Path) -> None:
    words = [("cat", "cat"), ("dog", "dot"), ("cow", "now")]
    tasks = [
        Task(family="spelling", representation="natural", question="?", answer=right, key=right, sequential_answer=said)
        for right, said in words
    ]
    assert sequential_baseline(tasks) == pytest.approx(1 / 3)
    rewards = (1.0, 2 / 3, 2 / 3)
    correct = tuple(task.is_correct(reward) for task, reward in zip(tasks, rewards, strict=True))
    result = Result.of(range(3), Answers(texts=("",) * 3, rewards=rewards, correct=correct, found=None), None)
    assert (result.accuracy.correct, result.accuracy.n, result.no_answer) == (1, 3, None)
    assert result.reward == pytest.approx(7 / 9)


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    names = ", ".join(FAMILIES)
    with pytest.raises(ValueError, match=f"family must be one of {names}, got .chess."):
        JsonlData(kind="jsonl", family="chess", files={"natural": "x"})
    with pytest.raises(ValueError, match=f"--family must be one of {names}"):
        inspect_file(tmp_path / "rows.jsonl", "chess", "natural")


def test_the_papers_mathematics_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with RewardPool() as pool:
        pool.start_worker("math", "paper")
        pool.start_worker(ASYNC_PLAN.name, "strict")
        with pytest.raises(ImportError, match=r"isomorph\[math\]"):
            pool.start_worker("math", "strict")
