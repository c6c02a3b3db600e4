"""Users' files of one name in several folders, beside modules of one name: each is loaded as itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from isomorph.curriculum.environments.calls import CallFormat
from isomorph.curriculum.environments.pool import EnvironmentPool
from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.environments.worker import EnvironmentSpec
from isomorph.curriculum.inputs import changed_rewards, describe_files, located
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rewards.table_judge import Source, TableJudge
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import check_tables
from isomorph.engine.types import Prompt, Rollout

FOLDERS = {"a": 0.25, "b": 0.5, "c": 1.0}
REWARDS = """
import helpers
from inner import deep

def right(answer):
    import lazily
    return helpers.WORTH + 10 * deep.WORTH + 100 * lazily.WORTH

async def later(answer):
    import lazily
    return lazily.WORTH

class Game:
    def reset(self, row):
        return f"worth {helpers.WORTH}"

    def step(self, text):
        import lazily
        return f"worth {lazily.WORTH}"
"""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, worth in FOLDERS.items():
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "rewards.py").write_text(REWARDS)
        for file in ("helpers.py", "lazily.py", "inner/__init__.py", "inner/deep.py"):
            (tmp_path / name / file).write_text(f"WORTH = {worth}\n")
    return tmp_path


def test_rewards_of_two_files_of_one_name_are_each_their_own(folders: Path) -> None:
    entries = [
        RewardEntry(function=f"{folders / n}/rewards.py:{f}", name=f"{n}_{f}")
        for f in ("right", "later")
        for n in FOLDERS
    ]
    table = RewardTable(rewards=tuple(entries))
    task = Task(family="rows", representation="natural", question="", answer="", key="0", data="sums")
    prompts = [Prompt(prompt_id=i, token_ids=(1,), task="rows", representation="natural", payload=task) for i in (1, 2)]
    rollouts = [
        Rollout(prompt_id=i, sample=0, token_ids=torch.ones(1), sampler_logprob=None, finish="stop", policy_version=0)
        for i in (1, 2)
    ]
    source = Source(table=table, columns=frozenset())
    with TableJudge({"sums": source}, RewardPool(), max_workers=1) as judge:
        judge.start()
        scores = judge.score(prompts, ["x", "y"], rollouts)
    for name, worth in FOLDERS.items():
        assert scores.parts[f"{name}_right"] == (111 * worth,) * 2
        assert scores.parts[f"{name}_later"] == (worth,) * 2


def test_environments_of_two_files_of_one_name_are_each_their_own(folders: Path) -> None:
    specs = {
        name: EnvironmentSpec(f"{folders / name}/rewards.py:Game", (), {}, deadline_s=5.0, calls=CallFormat())
        for name in FOLDERS
    }
    with EnvironmentPool(max_workers=1) as pool:
        for _ in range(2):
            for name, spec in specs.items():
                first = pool.reset(spec, {}, 0).messages
                assert [message["content"] for message in first] == [f"worth {FOLDERS[name]}"]


def recipe_of(folder: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Recipe:
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    tables = {
        "model": {"tiny": {"tokenizer": "bytes"}},
        "data": {
            name: {"kind": "rows", "path": "rows.jsonl", "rewards": rewards}
            for name, rewards in (("one", first), ("two", second))
        },
        "stage": [{"name": "only", "steps": 1, "mixture": [{"data": "one"}, {"data": "two"}]}],
        "eval": {"data": "one", "representations": ["natural"]},
    }
    return check_tables(tables, Recipe, where="recipe.toml", folder=folder)


def test_all_files_of_one_name_are_recorded_and_their_changes_said(folders: Path) -> None:
    here = [{"function": "a/rewards.py:right"}, {"function": "b/rewards.py:right", "name": "other"}]
    recipe = located(recipe_of(folders, here, [{"function": "c/rewards.py:right", "name": "third"}]))
    recorded = describe_files(recipe)
    found = {place: Path(file["path"]) for place, file in recorded.items() if "rewards" in place}
    assert found == {
        "data.one.rewards/a/rewards.py": folders / "a" / "rewards.py",
        "data.one.rewards/b/rewards.py": folders / "b" / "rewards.py",
        "data.two.rewards/rewards.py": folders / "c" / "rewards.py",
    }
    (folders / "b" / "rewards.py").write_text(REWARDS + "# mended\n")
    (sentence,) = changed_rewards(recorded, recipe)
    assert f"{folders / 'b' / 'rewards.py'} has changed since the run began" in sentence


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (
            [{"function": "a/rewards.py:right"}, {"function": "b/rewards.py:right"}],
            [{"function": "exact"}],
            r"two rewards would be logged as 'right': give one of them another name = \"...\" in rewards\[1\]",
        ),
        (
            [{"function": "a/rewards.py:right"}],
            [{"function": "b/rewards.py:right"}],
            "rewards of data.one and data.two would both be logged as 'right', and are different functions, "
            r'a/rewards.py:right and b/rewards.py:right: give one of them name = "..."',
        ),
        ([{"function": "exact"}], [{"function": "a/rewards.py:right", "name": "exact"}], "logged as 'exact'"),
    ],
)
def test_rewards_that_would_be_logged_as_one_are_refused(
    first: list[dict[str, Any]], second: list[dict[str, Any]], sentence: str, folders: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe_of(folders, first, second)
    with pytest.raises(ValueError, match="two of tools would be called 'look' by the model"):
        EnvironmentTable(tools=("a/tools.py:look", "b/tools.py:look"))


def test_one_function_in_two_tables_has_one_column(folders: Path) -> None:
    recipe_of(folders, [{"function": "a/rewards.py:right"}], [{"function": "./a/rewards.py:right"}])
