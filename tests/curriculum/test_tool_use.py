"""Whole runs of several turns: the example that gains from its tool, an environment, failures, a kill and a resume."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY, completions, run, summary_of, write_rows

from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import read_steps

EXAMPLES = Path(__file__).parents[2] / "examples"
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
environment_arguments = { kinds = 3 }
turn_deadline_s = 2.0
max_turns = 4
[sampling]
max_new_tok = 40
samples_per_prompt = 4
[[stage]]
name = "rl"
steps = 3
objective.name = "dr_grpo"
batch = { prompts = 4, micro_batch_tok = 256 }
optim.lr = 1e-2
mixture = [{ data = "game" }]
[eval]
data = "game"
representations = ["natural"]
prompts = 2
max_new_tok = 8
[run]
threads = 1
checkpoint_every = 1
completions_every = 1
"""
)
GAME = '''
import os, random, signal
from pathlib import Path
from isomorph.curriculum.environments.done import Done

HERE = Path(__file__).parent

class Game:
    """Worth what a random number and the words of all turns are; some turns fail."""

    def __init__(self, kinds):
        self.kinds, self.worth, self.turn = kinds, 0.0, 0

    def reset(self, row, seed):
        if row["n"].endswith("none"):
            raise ValueError("no game")
        self.random = random.Random(seed)
        return f"{row['n']} {self.random.randrange(self.kinds)}"

    def step(self, text):
        self.turn += 1
        self.worth += len(set(text.split())) / 10 + self.random.random() / 10
        print("step", self.turn)
        if (HERE / "kill").exists() and self.turn == 2 and (HERE / "run" / "checkpoints" / "step-00000001").exists():
            (HERE / "kill").unlink()
            os.kill(os.getppid(), signal.SIGKILL)
        if len(text.split()) % 7 == 6:
            raise KeyError("six words")
        return Done(self.worth) if self.turn == 3 else f"one {random.randrange(3)}"
'''


def write(folder: Path, recipe: str = RECIPE) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"n": " ".join(words)} for words in (f"{a} {b}".split() for a in "012" for b in ("one", "two", "none"))]
    write_rows(folder / "rows.jsonl", rows)
    (folder / "game.py").write_text(GAME)
    (folder / "recipe.toml").write_text(recipe)
    return folder / "recipe.toml"


def test_a_tiny_model_learns_to_ask_a_tool(tmp_path: Path) -> None:
    for name in ("tool_use.py", "tool_use.toml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    runpy.run_path(str(tmp_path / "tool_use.py"), run_name="__main__")
    folder, _ = run(tmp_path / "tool_use.toml")
    rewards = [row["reward/mean"] for row in read_steps(folder) if row["stage"] == "tool"]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.25, rewards
    accuracy = summary_of(folder)["accuracy"]
    assert accuracy["before"]["natural"] < 0.5 < 0.9 < accuracy["after"]["natural"]  # of keys that RL has not seen
    last = max((folder / "completions").glob("step-*.jsonl"))
    asked = [row for row in map(json.loads, last.read_text().splitlines()) if row.get("turns") == 2]
    assert asked and all("<result>" in row["conversation"] and "<result>" not in row["text"] for row in asked)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run(write(tmp_path_factory.mktemp("whole")))


def test_an_environment_gives_the_reward_and_costs_its_own_rollouts(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    steps = read_steps(folder)
    assert [step["updates"] for step in steps] == [1, 1, 1]
    for step in steps:
        assert step["response/turns"] > 1.2 and step["tok/context"] > 0
        assert step["tok/loss"] + step["tok/dropped"] <= step["tok/response"] and step["tok/dropped"] == 0
        assert step["drift/max"] < 1e-4
    rows = completions(folder)
    assert all(row["reward"] == row.get("environment_reward", 0.0) for row in rows)
    assert len({row["reward"] for row in rows}) > 5
    counts = summary_of(folder)["environments"]
    assert 0 < sum(step["environment/errors"] for step in steps) <= counts["errors"]
    assert all(step[f"environment/{kind}"] == 0 for step in steps for kind in ("timeouts", "crashes", "out_of_turns"))
    told = [step["environment/errors"] for step in steps if step["environment/errors"]]
    lines = re.findall(r"environment/errors (\d+)", printed)  # of some steps
    assert lines and set(lines) <= set(map(str, told)) and "environment/cra" not in printed
    assert counts["errors"] > 0 and counts["timeouts"] == counts["crashes"] == 0 and counts["rows_skipped"] > 0
    assert sum(row["reward"] == 0 for row in rows) >= counts["errors"] - 4
    line = next(i for i, text in enumerate(GAME.splitlines(), start=1) if "raise KeyError" in text)
    assert re.search(r"does not begin on .*rows.jsonl, line (3|6|9): ValueError: no game", printed)
    assert f"game.py:{line}" in printed and "KeyError: 'six words'" in printed
    assert "step 3" in (folder / "environments.log").read_text()


def test_a_run_killed_in_the_middle_of_turns_resumes_bit_for_bit(whole: tuple[Path, str], tmp_path: Path) -> None:
    recipe = write(tmp_path)
    (tmp_path / "kill").touch()
    command = "from isomorph.curriculum.cli import main; main()"
    arguments = [sys.executable, "-P", "-c", command, "train", str(recipe), "--run", str(tmp_path / "run")]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert not (tmp_path / "run" / "checkpoints" / "step-00000003").exists()
    folder, printed = run(recipe, resume=True)
    assert "resuming after step" in printed
    assert summary_of(whole[0])["weights_sha256"] == summary_of(folder)["weights_sha256"]
    assert summary_of(whole[0])["environments"] == summary_of(folder)["environments"]  # of the steps before, too


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (('"game.py:Game"', '"gme.py:Game"'), r"data.game: .*gme.py:Game cannot be used: .*there is no such file"),
        (('"game.py:Game"', '"game"'), 'environment must be "file.py:NAME" or "package.module:NAME"'),
        (
            ('environment = "game.py:Game"', 'rewards = [{ function = "exact" }]'),
            "environment_arguments.*no environment",
        ),
        (("turn_deadline_s = 2.0", 'turn_deadline_s = 2.0\ntools = ["game.py:Gone"]'), "it has no 'Gone'; it has"),
        (
            ("environment_arguments = { kinds = 3 }", "environment_arguments = { knds = 3 }"),
            r"\[eval\] natural: its environment begins on none",
        ),
    ],
)
def test_bad_input_is_said(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(write(tmp_path, RECIPE.replace(*change)))
