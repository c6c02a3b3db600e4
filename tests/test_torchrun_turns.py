"""Environments and users' rewards on two real ranks: the run on two ranks is the run on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, run, summary_of, write_rows

from isomorph.engine.record.runlog import read_steps

pytestmark = pytest.mark.slow
RECIPE = (
    TINY
    + """\
max_model_len = 64
[data.game]
kind = "rows"
path = "rows.jsonl"
prompt = "{n}"
eval_share = 0.2
environment = "game.py:Game"
rewards = [{ function = "game.py:short", weight = 0.5 }]
[sampling]
max_new_tok = 32
samples_per_prompt = 4
[[stage]]
name = "rl"
steps = 2
objective.name = "dr_grpo"
batch = { prompts = 6, micro_batch_tok = 256 }
optim.lr = 1e-3
mixture = [{ data = "game" }]
[eval]
data = "game"
representations = ["natural"]
prompts = 2
max_new_tok = 8
[run]
threads = 1
completions_every = 1
"""
)
GAME = """
import random

from isomorph.curriculum.environments import Done
from isomorph.curriculum.rewards import Answer


def short(answer: Answer) -> float:
    if len(answer.text.split()) % 9 == 8:
        raise ValueError("eight words")
    return 1 / (1 + answer.num_tok)


class Game:
    def reset(self, row, seed):
        if row["n"].endswith("none"):
            raise ValueError("no game")
        self.random, self.turn = random.Random(seed), 0
        return f"{row['n']} {self.random.randrange(3)}"

    def step(self, text):
        self.turn += 1
        if len(text.split()) % 7 == 6:
            raise KeyError("six words")
        return Done(len(text) / 10 + self.random.random()) if self.turn == 2 else f"one {random.randrange(3)}"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"n": f"{a} {b}"} for a in "012" for b in ("one", "two", "none")]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def completions_of(folder: Path, step: int) -> list[dict[str, Any]]:
    file = folder / "completions" / f"step-{step:08d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_environments_and_rewards_on_two_ranks_are_those_of_one(recipe: Path, warm_script: Path) -> None:
    folder = recipe.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks = subprocess.run(
        [*command, "--", str(warm_script), "train", str(recipe), "--run", "two"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ranks.returncode == 0, ranks.stderr
    run(recipe, "one")
    one, two = summary_of(folder / "one"), summary_of(folder / "two")
    assert json.loads((folder / "two" / "run.json").read_text())["ranks"] == 2
    assert completions_of(folder / "two", 1) == completions_of(folder / "one", 1)  # from the same weights: every bit
    rows_of_one, rows_of_two = read_steps(folder / "one"), read_steps(folder / "two")

    def told(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key.startswith(kinds)}

    kinds = ("environment/", "reward/", "response/", "tok/context", "tok/response", "groups/")
    for a, b in zip(rows_of_one, rows_of_two, strict=True):
        assert told(a) == told(b)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
    assert sum(row["environment/errors"] for row in rows_of_one) > 0
    assert one["environments"] == two["environments"] and one["environments"]["rows_skipped"] > 0
    assert one["judge"] == two["judge"]
