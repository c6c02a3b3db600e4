"""Evaluations of rows with users' rewards and tools, in a run and by ``isomorph eval``."""

import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import TINY, run, summary_of, write_rows

from isomorph.curriculum.commands.evaluate import Options, evaluate_targets

EXAMPLES = Path(__file__).parents[2] / "examples"
REWARDS = """
def right(answer):
    return 1.0 if (len(answer.text) + int(answer.gold) // 2) % 2 else 0.25

def short(answer):
    return float(answer.num_tok < 4)
"""
RECIPE = (
    TINY
    + """\
tokenizer = "bytes"

[run]
threads = 1

[data.sums]
kind = "rows"
path = "rows.jsonl"
prompt = "{question}"
answer = "{answer}"
representation_column = "size"
rewards = [{ function = "rewards.py:right" }, { function = "rewards.py:short", weight = 0.5 }]

[[stage]]
name = "rl"
steps = 3
objective.name = "grpo"
optim.lr = 1e-3
batch = { prompts = 2, micro_batch_tok = 512 }
sampling = { max_new_tok = 5, samples_per_prompt = 4 }
mixture = [{ data = "sums", representation = "small" }]

[eval]
every = 2
samples = 2
max_new_tok = 5
sets = [{ data = "sums", prompts = 4 }, { data = "sums", name = "hard", representations = ["large"], prompts = 2 }]
"""
)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run folder on rows with two labels, and its summary."""
    place = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n), "size": "large" if n > 30 else "small"} for n in range(60)]
    write_rows(place / "rows.jsonl", rows)
    (place / "rewards.py").write_text(REWARDS)
    (place / "rows.toml").write_text(RECIPE)
    folder, _ = run(place / "rows.toml")
    return folder, summary_of(folder)


def test_accuracy_is_by_the_first_reward_and_the_mean_reward_by_all(summary: tuple[Path, dict[str, Any]]) -> None:
    folder, told = summary
    rewards = runpy.run_path(str(folder.parent / "rewards.py"))
    assert [done["label"] for done in told["exams"]] == ["start", "step-00000002", "rl"]
    for done in told["exams"]:
        lines = (folder / "completions" / f"exam-{done['label']}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert (
            set(done["accuracy"]) == {row["representation"] for row in answers} == {"sums:small", "sums:large", "hard"}
        )
        for key, result in done["accuracy"].items():
            greedy = [row for row in answers if row["representation"] == key and row["sample"] is None]
            golds = [2 * int(re.search(r"(\d+)\+", row["prompt"])[1]) for row in greedy]  # type: ignore[index]
            first = [
                rewards["right"](SimpleNamespace(text=row["text"], gold=gold))
                for row, gold in zip(greedy, golds, strict=True)
            ]
            assert (result["correct"], result["n"]) == (first.count(1.0), len(greedy))
            seconds = {round(row["reward"] - value, 6) for row, value in zip(greedy, first, strict=True)}
            assert seconds <= {0.0, 0.5}  # half of what ``short`` gives
            assert done["reward"][key] == pytest.approx(sum(row["reward"] for row in greedy) / len(greedy))
        assert done["no_answer"] == {}  # what an answer is, only the rewards know
    assert any(value not in (0.0, 1.0) for done in told["exams"] for value in done["reward"].values())


def test_a_run_on_rows_is_evaluated_as_it_was_in_training(summary: tuple[Path, dict[str, Any]]) -> None:
    folder, told = summary
    (model,) = evaluate_targets([str(folder)], Options(samples=2), say=lambda line: None)["models"]
    last = told["exams"][-1]
    assert [score["data"] for score in model["results"]] == list(last["accuracy"])
    for score in model["results"]:
        assert score["correct"] == last["accuracy"][score["data"]]["correct"]
        assert score["avg@2"] == last["sampled"][score["data"]]["avg@2"]
        assert score["reward"] == pytest.approx(last["reward"][score["data"]]) and score["no_answer"] is None
    chosen = evaluate_targets([str(folder)], Options(wanted=("hard", "sums:small")), say=lambda line: None)["models"]
    assert [score["data"] for score in chosen[0]["results"]] == ["hard:large", "sums:small"]


def test_tools_are_asked_in_an_evaluation_as_in_training(tmp_path: Path) -> None:
    for name in ("tool_use.py", "tool_use.toml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    runpy.run_path(str(tmp_path / "tool_use.py"), run_name="__main__")
    short = ["stage.0.steps=40", "stage.1.steps=1", "eval.prompts=12", "stage.0.batch.prompts=8"]
    told = summary_of(run(tmp_path / "tool_use.toml", "run", *short)[0])
    out = tmp_path / "responses.jsonl"
    (model,) = evaluate_targets([str(tmp_path / "run")], Options(out=out), say=lambda line: None)["models"]
    lines = (tmp_path / "run" / "completions" / "exam-tool.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [json.loads(x)["text"] for x in out.read_text().splitlines()]
    assert model["results"][0]["correct"] == told["exams"][-1]["accuracy"]["natural"]["correct"]
