"""Accuracy of runs and models, and their comparison."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from isomorph.curriculum.assemble import open_policy
from isomorph.curriculum.candidates import find_candidate
from isomorph.curriculum.commands.evaluate import Options, evaluate_targets
from isomorph.curriculum.commands.evaluate_tables import show_comparison, show_scores
from isomorph.curriculum.questions import open_exam
from isomorph.engine.config import UserError


def quiet(line: str) -> None:
    """Nobody listens."""


def evaluated(target: Path | str, say: Any = quiet, **options: Any) -> dict[str, Any]:
    """The results of one model."""
    result: dict[str, Any] = evaluate_targets([str(target)], Options(**options), say=say)["models"][0]
    return result


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
    result = evaluated(finished_run, lines.append)
    got = {score["representation"]: score for score in result["results"]}
    assert list(got) == ["natural", "graph", "code", "table"] and len(lines) == 4
    for name, known in summary["intervals"]["after"].items():
        assert {key: got[name][key] for key in known} == known
        assert got[name]["floor"] == summary["floor"][name]
        assert got[name]["shortcuts"] == summary["shortcuts"][name] and "in_number_order" in got[name]["shortcuts"]
        assert f"shortcut {max(summary['shortcuts'][name].values()):.1%}" in lines[list(got).index(name)]
        assert got[name]["no_answer"] == summary["no_answer"]["after"][name]
        assert 0 < got[name]["tokens"] <= 16 * result["max_new_tok"]
    assert sum(score["correct"] for score in got.values()) > 0  # else equal scores would mean little
    assert result["weights"] == str(finished_run / "model") and result["max_new_tok"] == 48


def test_every_evaluation_leaves_a_row_for_each_question_as_eval_writes_it(finished_run: Path, tmp_path: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    files = sorted(path.stem for path in (finished_run / "evaluations").iterdir())
    assert files == sorted(done["label"] for done in summary["exams"])
    items = [json.loads(line) for line in (finished_run / "evaluations" / "words.jsonl").read_text().splitlines()]
    assert len(items) == 4 * 16 == len({(item["representation"], item["key"]) for item in items})
    for name, known in summary["intervals"]["after"].items():
        own = [item for item in items if item["representation"] == name]
        assert sum(item["correct"] for item in own) == known["correct"]
        assert all((item["error"] == "none") == item["correct"] for item in own)
        assert all(2 <= item["steps"] <= 3 and 1 <= item["path_len"] <= item["steps"] for item in own)
    evaluated(finished_run, out=tmp_path / "rows.jsonl")
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    columns = items[0].keys() - {"set"}
    assert [{name: row[name] for name in columns} for row in written] == [
        {name: item[name] for name in columns} for item in items
    ]


def test_the_test_exam_has_other_questions(finished_run: Path, tmp_path: Path) -> None:
    keys = {}
    for split in (None, "test"):
        out = tmp_path / f"{split}.jsonl"
        evaluated(finished_run, wanted=("plans:graph",), prompts=8, split=split, out=out)
        keys[split] = {json.loads(line)["key"] for line in out.read_text().splitlines()}
    assert len(keys[None]) == len(keys["test"]) == 8 and keys[None].isdisjoint(keys["test"])


def test_a_finished_run_is_read_with_the_words_it_was_trained_on(finished_run: Path) -> None:
    candidate = find_candidate(str(finished_run))
    assert candidate.recipe is not None
    trained = open_policy(candidate.recipe)
    question = "Step 1 . wash rice , 3 minutes . graph = { 1 : [ 2 ] }"
    assert candidate.load().text.encode_prompt(question) == trained.text.encode_prompt(question)


def test_an_unfinished_run_is_evaluated_from_its_newest_checkpoint(unfinished: Path) -> None:
    candidate = find_candidate(str(unfinished))
    newest = unfinished / "checkpoints" / "step-00000081"
    assert candidate.source == str(newest)
    saved = load_file(newest / "weights.safetensors")
    for name, parameter in candidate.load().named_parameters().items():
        assert torch.equal(parameter, saved[name])


def test_a_checkpoint_of_another_model_is_refused(unfinished: Path) -> None:
    described = json.loads((unfinished / "run.json").read_text())
    described["recipe"]["model"]["tiny"]["hidden_size"] = 16
    (unfinished / "run.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="do not fit the recipe's model"):
        find_candidate(str(unfinished)).load()


def test_a_run_without_weights_is_refused(unfinished: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UserError, match="neither a finished model nor a checkpoint"):
        find_candidate(str(unfinished))


def test_a_file_of_a_form_that_is_only_evaluated_on_needs_no_solver(tmp_path: Path) -> None:
    """Questions in a dialect, which have no worked solution, as ``eval_files`` of a recipe may have them."""
    file = tmp_path / "dialect.jsonl"
    file.write_text(json.dumps({"question": "How long it take if it's one hour?", "answer": "1 hour"}) + "\n")
    wanted = [f"async_plan:dialect={file}"]
    with open_exam(cast(Any, None), None, wanted, prompts=None, max_new_tok=8, say=print) as exam:
        (asked,) = exam.asked
    assert asked.tasks[0].answer == "1 hour" and asked.tasks[0].demonstration is None


def test_data_prompts_and_length_are_the_users_choice(finished_run: Path) -> None:
    result = evaluated(finished_run, wanted=("async_plan:table", "async_plan:code"), prompts=3, max_new_tok=2)
    assert [(s["representation"], s["n"]) for s in result["results"]] == [("table", 3), ("code", 3)]
    assert all(score["tokens"] <= 6 for score in result["results"])


def test_questions_beyond_the_vocabulary_are_refused(finished_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Whither the albatross, O mariner?", "answer": "7"}) + "\n")
    with pytest.raises(UserError, match="does not know .* of the natural questions' words"):
        evaluated(finished_run, wanted=(f"math:natural={file}",), prompts=1, max_new_tok=4)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("graph", r"must name a set or data of the recipe \(plans\), or read FAMILY:REPRESENTATION"),
        ("plans:poem", "the set has no 'poem', only natural, graph, code, table"),
        ("poetry:natural", "or read FAMILY:REPRESENTATION"),
        ("async_plan:natural=", "or read FAMILY:REPRESENTATION"),
        ("async_plan:poem", "must be one of natural, graph, code, table"),
        ("math:natural", "name a file: math:natural=FILE"),
        ("math:natural=/nowhere.jsonl", "/nowhere.jsonl: must be a readable file"),
    ],
)
def test_data_that_does_not_exist_is_refused(wanted: str, expected: str, finished_run: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        evaluated(finished_run, wanted=(wanted,), prompts=1, max_new_tok=4)


def test_targets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run folder .* or a model folder .* it holds nothing"):
        find_candidate(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        find_candidate(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompts": 0}, "--prompts must be at least 1"),
        ({"max_new_tok": 0}, "--max-new-tok must be at least 1"),
        ({"samples": -1}, "--samples must not be negative"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"split": "train"}, "--split must be dev or test, got 'train'"),
        ({"sampler": "dice"}, "--sampler must be one of builtin, vllm, got 'dice'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        evaluated(tmp_path, **options)


def test_the_table_shows_every_score() -> None:
    score: dict[str, Any] = {"data": "async_plan:code", "correct": 3, "n": 10, "rate": 0.3, "reward": 0.3}
    score |= {
        "low": 0.108,
        "high": 0.603,
        "floor": None,
        "shortcuts": {"most_steps": 0.285},
        "stopped": 1.0,
        "no_answer": 0.25,
        "tokens": 200,
        "generate_s": 0.5,
    }
    out = io.StringIO()
    show_scores({"weights": "here", "max_new_tok": 9, "results": [score]}, Console(file=out, width=120))
    for part in (
        "async_plan:code",
        "30.0%",
        "25.0%",
        "28.5%",
        "10.8% to 60.3%",
        "400 tokens/s",
        "at most 9 new tokens",
    ):
        assert part in out.getvalue()


def test_names_in_brackets_are_no_markup_and_escapes_are_written_out() -> None:
    score: dict[str, Any] = {"data": "async_plan:[red]a", "correct": 3, "n": 10, "rate": 0.3, "reward": 0.3}
    score |= {
        "low": 0.1,
        "high": 0.6,
        "floor": None,
        "shortcuts": {},
        "stopped": 1.0,
        "no_answer": 0.0,
        "tokens": 20,
        "generate_s": 0.5,
    }
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
    result = evaluated(smollm2_folder, wanted=("async_plan:natural",), prompts=2, max_new_tok=8)
    (score,) = result["results"]
    assert score["n"] == 2 and 0 < score["tokens"] <= 16 and result["weights"] == str(smollm2_folder)


def test_samples_come_beside_the_greedy_responses_and_all_are_written(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"
    result = evaluated(finished_run, wanted=("plans:graph",), prompts=5, samples=4, temperature=0.7, out=out)
    (score,) = result["results"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 * (1 + 4)
    assert {"model", "prompt", "text", "gold", "reward", "label"} <= rows[0].keys() and rows[0]["label"] == "graph"
    greedy = [row for row in rows if row["sample"] is None]
    assert score["correct"] == sum(row["correct"] for row in greedy) and score["n"] == 5
    drawn = [row["correct"] for row in rows if row["sample"] is not None]
    assert score["avg@4"]["rate"] == pytest.approx(sum(drawn) / 20)
    solved = sum(any(drawn[i : i + 4]) for i in range(0, 20, 4))
    assert score["pass@4"]["rate"] == pytest.approx(solved / 5)
    assert (result["samples"], result["sample_temperature"], result["temperature"]) == (4, 0.7, 0.0)
    with pytest.raises(UserError, match="exists: name another file"):
        evaluated(finished_run, out=out)


def test_a_stop_string_ends_responses(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"
    result = evaluated(finished_run, wanted=("plans:graph",), prompts=3, stop=("<answer>",), out=out)
    assert result["stop"] == ["<answer>"] and result["results"][0]["stopped"] == 1
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert all(text.endswith("<answer>") for text in texts if "<answer>" in text)


def test_a_checkpoint_of_a_run_is_evaluated_by_its_name(finished_run: Path) -> None:
    newest = finished_run / "checkpoints" / "step-00000083"
    by_run, by_checkpoint = (
        evaluated(target, wanted=("plans",), prompts=4)["results"] for target in (finished_run, newest)
    )
    assert [score["representation"] for score in by_checkpoint] == ["natural", "graph", "code", "table"]
    assert [score["correct"] for score in by_run] == [score["correct"] for score in by_checkpoint]
    loose = shutil.copytree(newest, finished_run.parent / "loose")
    with pytest.raises(UserError, match=r"must lie in its run folder"):
        find_candidate(str(loose))


def test_a_run_without_a_best_model_says_what_it_needs(finished_run: Path) -> None:
    with pytest.raises(UserError, match="its recipe needs eval.keep_best"):
        find_candidate(str(finished_run / "best"))


def test_several_models_are_compared_on_the_same_questions(finished_run: Path) -> None:
    warm_up = finished_run / "checkpoints" / "stage-warm-up"
    targets = [str(warm_up), str(finished_run)]
    found = evaluate_targets(targets, Options(wanted=("plans:graph",), samples=2), say=quiet)
    (one,), (other,) = (model["results"] for model in found["models"])
    (comparison,) = found["comparisons"]
    (row,) = comparison["results"]
    assert (comparison["first"], comparison["second"]) == tuple(targets)
    assert row["only_second"] - row["only_first"] == other["correct"] - one["correct"]
    assert row["accuracy"]["difference"] == pytest.approx(other["rate"] - one["rate"])
    assert row["accuracy"]["low"] <= row["accuracy"]["difference"] <= row["accuracy"]["high"] and 0 < row["p"] <= 1
    assert row["avg@2"]["difference"] == pytest.approx(other["avg@2"]["rate"] - one["avg@2"]["rate"])
    out = io.StringIO()
    show_comparison(found, Console(file=out, width=220))
    parts = ("2 models, greedy, 2 samples at 1", "difference, points", "exact McNemar", "plans:graph", "stage-warm-up")
    assert [part for part in parts if part not in out.getvalue()] == []
    narrow = io.StringIO()
    show_comparison(found, Console(file=narrow, width=70))
    assert "…" not in narrow.getvalue().replace("┃", "").split("┡")[1]  # no model's name is cut


def test_a_recipe_says_what_a_model_is_asked(finished_run: Path) -> None:
    recipe = Path(__file__).parents[2] / "curriculum" / "recipes" / "smoke.toml"
    result = evaluated(finished_run, recipe=recipe, prompts=2, max_new_tok=4)
    assert [(score["data"], score["n"]) for score in result["results"]] == [
        ("natural", 2),
        ("graph", 2),
        ("code", 2),
        ("table", 2),
    ]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.model
def test_vllm_answers_as_the_builtin_sampler_does(smollm2_folder: Path, tmp_path: Path) -> None:
    """Greedy, float32: the same responses."""
    asked: dict[str, Any] = {"wanted": ("async_plan:natural",), "prompts": 2, "max_new_tok": 8}
    for sampler in ("builtin", "vllm"):
        assert evaluated(smollm2_folder, **asked, sampler=sampler, out=tmp_path / sampler)["sampler"] == sampler
    assert (tmp_path / "builtin").read_text() == (tmp_path / "vllm").read_text()
