"""Greedy accuracy of runs and models."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from isomorph.curriculum.assemble import open_policy
from isomorph.curriculum.commands.evaluate import evaluate_target, open_candidate, show_scores
from isomorph.engine.config import UserError


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture
def unfinished(finished_run: Path, tmp_path: Path) -> Path:
    """Stopped inside the stage "symbols", before its last checkpoint."""
    run = Path(shutil.copytree(finished_run, tmp_path / "unfinished"))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000083")
    return run


def test_a_run_scores_as_in_its_last_evaluation(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    lines: list[str] = []
    result = evaluate_target(str(finished_run), [], prompts=None, max_new_tok=None, say=lines.append)
    got = {score["representation"]: score for score in result["results"]}
    assert list(got) == ["natural", "graph", "code", "table"] and len(lines) == 4
    for name, known in summary["intervals"]["after"].items():
        assert {key: got[name][key] for key in known} == known
        assert got[name]["floor"] == summary["floor"][name]
        assert got[name]["no_answer"] == summary["no_answer"]["after"][name]
        assert 0 < got[name]["tokens"] <= 16 * result["max_new_tok"]
    assert sum(score["correct"] for score in got.values()) > 0  # else equal scores would mean little
    assert result["weights"] == str(finished_run / "model") and result["max_new_tok"] == 48


def test_a_finished_run_is_read_with_the_words_it_was_trained_on(finished_run: Path) -> None:
    candidate = open_candidate(str(finished_run))
    assert candidate.recipe is not None
    trained = open_policy(candidate.recipe)
    question = "Step 1 . wash rice , 3 minutes . graph = { 1 : [ 2 ] }"
    assert candidate.policy.text.encode_prompt(question) == trained.text.encode_prompt(question)


def test_an_unfinished_run_is_evaluated_from_its_newest_checkpoint(unfinished: Path) -> None:
    candidate = open_candidate(str(unfinished))
    newest = unfinished / "checkpoints" / "step-00000081"
    assert candidate.source == str(newest)
    saved = load_file(newest / "weights.safetensors")
    for name, parameter in candidate.policy.named_parameters().items():
        assert torch.equal(parameter, saved[name])


def test_a_checkpoint_of_another_model_is_refused(unfinished: Path) -> None:
    described = json.loads((unfinished / "run.json").read_text())
    described["recipe"]["model"]["tiny"]["hidden_size"] = 16
    (unfinished / "run.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="do not fit the recipe's model"):
        open_candidate(str(unfinished))


def test_a_run_without_weights_is_refused(unfinished: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UserError, match="neither a finished model nor a checkpoint"):
        open_candidate(str(unfinished))


def test_data_prompts_and_length_are_the_users_choice(finished_run: Path) -> None:
    result = evaluate_target(
        str(finished_run), ["async_plan:table", "async_plan:code"], prompts=3, max_new_tok=2, say=quiet
    )
    assert [(s["representation"], s["n"]) for s in result["results"]] == [("table", 3), ("code", 3)]
    assert all(score["tokens"] <= 6 for score in result["results"])


def test_questions_beyond_the_vocabulary_are_refused(finished_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Whither the albatross, O mariner?", "answer": "7"}) + "\n")
    with pytest.raises(UserError, match="does not know .* of the natural questions' words"):
        evaluate_target(str(finished_run), [f"math:natural={file}"], prompts=1, max_new_tok=4, say=quiet)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("graph", "must read FAMILY:REPRESENTATION"),
        ("poetry:natural", "must read FAMILY:REPRESENTATION"),
        ("async_plan:natural=", "must read FAMILY:REPRESENTATION"),
        ("async_plan:poem", "must be one of natural, graph, code, table"),
        ("math:natural", "name a file: math:natural=FILE"),
        ("math:natural=/nowhere.jsonl", "/nowhere.jsonl: must be a readable file"),
    ],
)
def test_data_that_does_not_exist_is_refused(wanted: str, expected: str, finished_run: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        evaluate_target(str(finished_run), [wanted], prompts=1, max_new_tok=4, say=quiet)


def test_targets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run folder .* or a model folder"):
        open_candidate(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        open_candidate(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--prompts must be at least 1"):
        evaluate_target(str(tmp_path), [], prompts=0, max_new_tok=None, say=quiet)
    with pytest.raises(UserError, match="--max-new-tok must be at least 1"):
        evaluate_target(str(tmp_path), [], prompts=None, max_new_tok=0, say=quiet)


def test_the_table_shows_every_score() -> None:
    score: dict[str, Any] = {"family": "async_plan", "representation": "code", "correct": 3, "n": 10, "rate": 0.3}
    score |= {
        "low": 0.108,
        "high": 0.603,
        "floor": None,
        "stopped": 1.0,
        "no_answer": 0.25,
        "tokens": 200,
        "generate_s": 0.5,
    }
    out = io.StringIO()
    show_scores({"weights": "here", "max_new_tok": 9, "results": [score]}, Console(file=out, width=120))
    for part in ("async_plan:code", "30.0%", "25.0%", "10.8% to 60.3%", "400 tokens/s", "at most 9 new tokens"):
        assert part in out.getvalue()


@pytest.mark.slow
def test_names_in_brackets_are_no_markup_and_escapes_are_written_out() -> None:
    score: dict[str, Any] = {"family": "async_plan", "representation": "[red]a", "correct": 3, "n": 10, "rate": 0.3}
    score |= {"low": 0.1, "high": 0.6, "floor": None, "stopped": 1.0, "no_answer": 0.0, "tokens": 20, "generate_s": 0.5}
    for console in (Console(file=io.StringIO(), width=120), Console(file=io.StringIO(), width=120, markup=False)):
        show_scores({"weights": "models/[v2]\x1b[2J:cat:", "max_new_tok": 9, "results": [score]}, console)
        assert isinstance(console.file, io.StringIO)
        assert "models/[v2]\\x1b[2J:cat:" in console.file.getvalue() and "async_plan:[red]a" in console.file.getvalue()


def test_json_is_one_object_on_the_standard_output(finished_run: Path, warm_isomorph: list[str]) -> None:
    command = [*warm_isomorph, "eval", str(finished_run)]
    options = ["--data", "async_plan:graph", "--prompts", "2", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["results"][0]["n"] == 2 and result["temperature"] == 0.0
    assert "async_plan:graph" in done.stderr  # each result as it comes


@pytest.mark.slow
@pytest.mark.model
def test_a_model_folder_is_asked_full_questions(smollm2_folder: Path) -> None:
    result = evaluate_target(str(smollm2_folder), ["async_plan:natural"], prompts=2, max_new_tok=8, say=quiet)
    (score,) = result["results"]
    assert score["n"] == 2 and 0 < score["tokens"] <= 16 and result["weights"] == str(smollm2_folder)
