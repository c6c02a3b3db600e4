"""A reward that fails on one response of a thousand: what is said of it, what is counted, and what a run keeps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rewards_run import RECIPE
from tiny_runs import run, summary_of, write_rows

from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rewards.table_judge import Source, TableJudge
from isomorph.curriculum.rows.dataset import Dataset
from isomorph.curriculum.rows.spec import RowsData
from isomorph.engine.record.runlog import read_steps
from isomorph.engine.types import Prompt, Rollout, RunFailed

NUM, BAD = 1_000, 999
FORMS = """import asyncio
def check(row):
    if row["n"] == 999:
        raise KeyError("row 999")  # in check
    return 1.0

def ours(answer):
    return check(answer.row)

async def ours_async(answer):
    return check(answer.row)

async def ours_exits(answer):
    if answer.row["n"] == 999:
        raise SystemExit("row 999")  # in ours_exits
    return 1.0

async def ours_cancels(answer):
    if answer.row["n"] == 999:
        raise asyncio.CancelledError("row 999")  # in ours_cancels
    return 1.0

def ours_batch(answers):
    return [check(answers[0].row) for _ in answers]

def trl(completions, n):
    return [check({"n": number}) for number in n]

async def trl_async(completions, n):
    return [check({"n": number}) for number in n]

def verl(data_source, solution_str, ground_truth, extra_info):
    return check(extra_info)

def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [check(info) for info in extra_infos]

calls = []

def thousandth(answer):
    calls.append(answer)
    if len(calls) == 1000:
        raise KeyError("row 999")  # in thousandth
    return 1.0
"""
NAMES = [name for name in re.findall(r"def (\w+)", FORMS) if name != "check"]


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), start=1) if part in line)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """A prompt for each of a thousand rows, in the order of a run; the bad row stands in line 1,000."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file, ({"n": n, "question": f"Say {n}"} for n in range(NUM)))
    data = RowsData.model_validate({"kind": "rows", "path": str(file), "prompt": "question", "eval_share": 0.001})
    side = Dataset(data, "sums").side
    return [
        Prompt(prompt_id=i, token_ids=(1,), task="rows", representation="natural", payload=side.task(i))
        for i in range(NUM)
    ]


def test_an_exception_at_row_1000_names_file_line_function_and_row(prompts: list[Prompt], tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(FORMS)
    said: list[str] = []

    def judge(names: list[str], **keys: Any) -> TableJudge:
        table = RewardTable(rewards=tuple(RewardEntry(function=f"{file}:{name}") for name in names), **keys)
        source = Source(table=table, columns=frozenset({"n", "question"}))
        return TableJudge({"sums": source}, RewardPool(), say=said.append, max_workers=1)

    rollouts = [
        Rollout(prompt_id=i, sample=0, token_ids=torch.ones(2), sampler_logprob=None, finish="stop", policy_version=0)
        for i in range(NUM)
    ]
    with judge(NAMES) as judging:
        judging.start()
        scores = judging.score(prompts, ["x"] * NUM, rollouts)
    assert prompts[BAD].payload.place.endswith("rows.jsonl, line 1000")
    assert len(said) == len(NAMES)  # the first of each; this one is the only one
    for name, sentence in zip(NAMES, said, strict=True):
        assert [i for i, reward in enumerate(scores.parts[name]) if reward != 1.0] == [BAD], name
        assert judging.counts.by_name[name] == {"error": 1}
        raised_in = name if f"# in {name}\n" in FORMS else "check"
        where = f"{file}, line {line_of(FORMS, f'# in {raised_in}')}, in {raised_in}: "
        assert f"reward {name} of data.sums on {prompts[BAD].payload.place}: {where}" in sentence, sentence
        assert "row 999" in sentence
    with judge(["ours"], on_error="stop") as judging:
        judging.start()
        with pytest.raises(RunFailed, match="rows.jsonl, line 1000: .*rewards.py, line 4, in check: KeyError"):
            judging.score(prompts, ["x"] * NUM, rollouts)


WRONG = """
def reward(answer):
    if answer.row["question"] == "4 plus 3 is":
        raise ValueError("no such sum")
    return len(answer.text) / 10
"""


def recipe_of(folder: Path, on_error: str) -> Path:
    folder.mkdir()
    sums = [(a, b) for a in range(5) for b in range(4)]
    write_rows(folder / "rows.jsonl", ({"question": f"{a} plus {b} is", "answer": a + b} for a, b in sums))
    (folder / "rewards.py").write_text(WRONG)
    text = RECIPE.replace("REWARDS", '{ function = "rewards.py:reward" }').replace("steps = 3", "steps = 4")
    (folder / "recipe.toml").write_text(text.replace("[sampling]", f'on_error = "{on_error}"\n[sampling]', 1))
    return folder / "recipe.toml"


def test_a_run_goes_on_or_stops_and_goes_on_when_its_reward_is_mended(tmp_path: Path) -> None:
    """The run that stopped and was mended ends in the weights of the one that went on."""
    goes_on, printed = run(recipe_of(tmp_path / "zero", "zero"))
    failed = [row["reward/reward/errors"] for row in read_steps(goes_on)]
    assert sorted(failed) == [0, 0, 0, 4]  # the group of one row, once in this epoch
    assert summary_of(goes_on)["judge"]["reward/error"] == 4
    assert printed.count("warning: reward reward of data.gsm on ") == 1 and "rows.jsonl, line 20: " in printed

    recipe = recipe_of(tmp_path / "stop", "stop")
    sentence = "rows.jsonl, line 20: .*rewards.py, line 4, in reward: ValueError: no such sum"
    with pytest.raises(RunFailed, match=sentence):
        run(recipe)
    done = failed.index(4)
    newest = max((recipe.parent / "run" / "checkpoints").iterdir())
    assert len(read_steps(recipe.parent / "run")) == done and newest.name == f"step-{done:08d}"
    (recipe.parent / "rewards.py").write_text(WRONG.replace('raise ValueError("no such sum")', "return 0.0"))
    resumed, printed = run(recipe, resume=True)
    assert "rewards.py has changed since the run began" in printed
    assert summary_of(resumed)["weights_sha256"] == summary_of(goes_on)["weights_sha256"]
    shown = [{row["step"]: row["reward/mean"] for row in read_steps(folder)} for folder in (resumed, goes_on)]
    assert shown[0] == shown[1] and len(shown[0]) == 4
