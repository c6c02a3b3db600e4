"""Evaluations within stages: they change nothing, are made once, are written everywhere, and choose the best model."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from tiny_runs import summary_of

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.evaluation import evaluation_keys
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.page import write_report
from isomorph.curriculum.report.run_record import read_run
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import check_tables, load_recipe
from isomorph.engine.record.checkpoint import load_checkpoint
from isomorph.engine.record.runlog import read_steps

SMOKE = Path(__file__).parents[2] / "curriculum" / "recipes" / "smoke.toml"
SHORT = ("stage.0.steps=5", "stage.1.steps=3", "stage.2.steps=3", "run.checkpoint_every=4", "run.keep_checkpoints=1")
SETS = [
    {"data": "plans", "representations": ["natural", "graph"], "prompts": 3},
    {"data": "plans", "representations": ["table"], "prompts": 4, "name": "tables"},
]
EVERY: dict[str, Any] = {"every": 2, "samples": 4, "temperature": 0.8, "max_new_tok": 24}
LABELS = ["step-00000002", "step-00000004", "warm-up", "step-00000006", "symbols", "step-00000010", "words"]


def recipe_with(evaluation: dict[str, Any]) -> Recipe:
    tables = load_recipe(SMOKE, list(SHORT), Recipe).model_dump(mode="json", exclude={"eval"}, exclude_unset=True)
    return check_tables({**tables, "eval": evaluation}, Recipe, where="test")


def run(folder: Path, recipe: Recipe, stop: Callable[[], bool] = lambda: False, *, resume: bool = False) -> str:
    """What it prints."""
    folder.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    console = Console(file=io.StringIO(), width=200)
    try:
        run_recipe(recipe, folder, console, stop, ALONE, resume=resume)
    finally:
        torch.set_num_threads(threads)  # the recipe asks for one
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run with two sets, evaluated every two steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "evaluated"
    return folder, run(folder, recipe_with({**EVERY, "sets": SETS, "keep_best": "plans"}))


def test_training_is_bit_for_bit_that_without_evaluations(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = evaluated
    run(tmp_path / "plain", recipe_with({"data": "plans", "representations": ["code"], "prompts": 1}))
    with_, without = summary_of(folder), summary_of(tmp_path / "plain")
    assert with_["weights_sha256"] == without["weights_sha256"] and with_["tokens"] == without["tokens"]
    same = ("reward/mean", "loss", "grad_norm", "entropy", "drift/mean", "response/tok_mean", "policy_version")
    for one, other in zip(read_steps(folder), read_steps(tmp_path / "plain"), strict=True):
        assert {key: one[key] for key in same} == {key: other[key] for key in same}


def test_evaluations_fall_every_so_many_steps_and_at_the_boundaries_once(evaluated: tuple[Path, str]) -> None:
    folder, printed = evaluated
    done = summary_of(folder)["exams"]
    assert [(one["label"], one["step"]) for one in done] == list(zip(LABELS, [2, 4, 5, 6, 8, 10, 11], strict=True))
    assert printed.count("eval after ") == 7 and "eval after step 6: plans:natural " in printed
    names = sorted(path.stem for path in (folder / "completions").glob("exam-*.jsonl"))
    assert names == sorted(f"exam-{label}" for label in LABELS)


def test_a_row_has_the_numbers_of_the_evaluation_after_its_step(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    rows = {row["step"]: row for row in read_steps(folder)}
    exam = [key for key in rows[1] if key.startswith("exam/")]
    assert "exam/plans/natural/avg@4" in exam and "exam/tables/table/pass@2" in exam and "exam/plans/accuracy" in exam
    assert list(rows) == list(range(1, 12))
    by_step = {one["step"]: one for one in summary_of(folder)["exams"]}
    for step, row in rows.items():
        assert [key for key in row if key.startswith("exam/")] == exam
        if step not in by_step:
            assert all(row[key] is None for key in exam)
            continue
        assert row["exam/plans/graph/accuracy"] == by_step[step]["accuracy"]["plans:graph"]["rate"]
        assert row["exam/tables/table/pass@4"] == by_step[step]["sampled"]["tables"]["pass@4"]["rate"]
        assert row["exam/plans/accuracy"] == by_step[step]["sets"]["plans"]["rate"]
        assert row["exam/plans/natural/reward"] == by_step[step]["reward"]["plans:natural"]


def test_results_are_those_of_the_responses_that_were_written(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    (last,) = [one for one in summary_of(folder)["exams"] if one["label"] == "words"]
    rows = [json.loads(line) for line in (folder / "completions" / "exam-words.jsonl").read_text().splitlines()]
    for key, num in (("plans:natural", 3), ("plans:graph", 3), ("tables", 4)):
        own = [row for row in rows if row["representation"] == key]
        greedy = [row["correct"] for row in own if row["sample"] is None]
        drawn = [row["correct"] for row in own if row["sample"] is not None]
        assert (len(greedy), len(drawn)) == (num, 4 * num)
        assert last["accuracy"][key]["correct"] == sum(greedy)
        assert last["sampled"][key]["avg@4"]["rate"] == pytest.approx(sum(drawn) / len(drawn))
        solved = [any(drawn[i : i + 4]) for i in range(0, len(drawn), 4)]
        assert last["sampled"][key]["pass@4"]["rate"] == pytest.approx(sum(solved) / num)
    texts = {row["text"] for row in rows if row["representation"] == "plans:natural" and row["sample"] is not None}
    assert len(texts) > 3  # sampled, not greedy


def test_tensorboard_gets_the_evaluations(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    (file,) = (folder / "tensorboard").iterdir()
    found = {}
    for event in events(file):
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
    rows = {row["step"]: row for row in read_steps(folder)}
    for step, row in rows.items():
        known = row["exam/plans/natural/accuracy"]
        assert found.get((step, "exam/plans/natural/accuracy")) == (None if known is None else pytest.approx(known))


def events(file: Path) -> list[Event]:
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):  # TFRecord: length, its checksum, the message, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 16 + size
    return found


def test_the_best_model_is_the_first_with_the_highest_accuracy(evaluated: tuple[Path, str]) -> None:
    folder, printed = evaluated
    summary = summary_of(folder)
    rates = [one["sets"]["plans"]["rate"] for one in summary["exams"]]
    first = summary["exams"][rates.index(max(rates))]
    best = {key: summary["best"][key] for key in ("set", "label", "step", "score")}
    assert best == {"set": "plans", "label": first["label"], "step": first["step"], "score": max(rates)}
    assert summary["best"]["folder"] == str(folder / "best") and "best so far by plans: " in printed
    state, weights, _ = load_checkpoint(folder / "best" / "checkpoint")
    assert state.step == first["step"] and state.source["exams"][-1]["label"] == first["label"]
    model = load_file(folder / "best" / "model" / "model.safetensors")
    assert model.keys() == weights.keys() and all(torch.equal(weights[name], model[name]) for name in model)
    assert sorted(path.name for path in (folder / "best").iterdir()) == ["best.json", "checkpoint", "model"]
    assert not [path for path in folder.iterdir() if path.name.startswith((".best", ".replaced"))]


def test_checkpoints_at_the_ends_of_stages_are_kept(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["stage-symbols", "stage-warm-up", "stage-words", "step-00000011"]
    for name, step in (("warm-up", 5), ("symbols", 8), ("words", 11)):
        state, weights, learner = load_checkpoint(folder / "checkpoints" / f"stage-{name}")
        assert (state.step, state.stage) == (step, name) and weights and learner
        assert state.source["exams"][-1]["label"] == name


def test_a_run_that_is_stopped_within_an_evaluation_and_resumed_makes_each_once(
    evaluated: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = evaluated
    recipe = recipe_with({**EVERY, "sets": SETS, "keep_best": "plans"})
    asked = 0

    def stop() -> bool:
        """While the evaluation after step 6 samples: its step is written, and it is not."""
        nonlocal asked
        steps = tmp_path / "run" / "steps.jsonl"
        asked += steps.exists() and len(steps.read_text().splitlines()) == 6
        return asked > 10

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", recipe, stop)
    assert not (tmp_path / "run" / "completions" / "exam-step-00000006.jsonl").exists()
    assert not (tmp_path / "run" / "evaluations" / "step-00000006.jsonl").exists()
    run(tmp_path / "run", recipe, resume=True)
    one, other = summary_of(folder), summary_of(tmp_path / "run")
    assert one["weights_sha256"] == other["weights_sha256"] and one["exams"] == other["exams"]
    assert {**one["best"], "folder": ""} == {**other["best"], "folder": ""}
    exam = {row["step"]: {k: v for k, v in row.items() if k.startswith("exam/")} for row in read_steps(folder)}
    resumed = read_steps(tmp_path / "run")
    assert {row["step"]: {k: v for k, v in row.items() if k.startswith("exam/")} for row in resumed} == exam
    for name in ("stage-symbols", "stage-warm-up", "stage-words"):
        paths = [at / "checkpoints" / name / "weights.safetensors" for at in (folder, tmp_path / "run")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_report_shows_accuracy_over_the_steps(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = evaluated
    record = read_run(folder)
    assert [(done.label, done.step) for done in record.evaluations] == list(
        zip(LABELS, [2, 4, 5, 6, 8, 10, 11], strict=True)
    )
    assert [done.label for done in record.boundaries] == ["warm-up", "symbols", "words"]
    page = write_report([folder], tmp_path / "report").read_text()
    for part in ("Accuracy on held-out questions over the steps", "pass@4", "plans:graph", "The best model by plans"):
        assert part in page


def test_a_resumed_run_drops_evaluations_after_its_checkpoint(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    from isomorph.engine.record.runlog import RunLog

    copy = Path(shutil.copytree(evaluated[0], tmp_path / "copy"))
    RunLog(copy, Console(file=io.StringIO())).cut_after(8)
    names = {path.stem for path in (copy / "completions").glob("exam-step-*.jsonl")}
    assert names == {"exam-step-00000002", "exam-step-00000004", "exam-step-00000006"}
    items = {path.stem for path in (copy / "evaluations").glob("step-*.jsonl")}
    assert items == {"step-00000002", "step-00000004", "step-00000006"}


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, r"exactly one of eval.data and eval.sets"),
        ({"data": "plans", "sets": SETS}, "exactly one of eval.data and eval.sets"),
        ({"sets": SETS[:1] * 2}, r"two of eval.sets are called plans: give each a name"),
        ({"sets": SETS, "representations": ["graph"]}, "in the tables of eval.sets"),
        ({"data": "plans", "keep_best": "other"}, "keep_best must name one of the sets, plans; got 'other'"),
        ({"data": "other"}, r"no \[data.other\]; there is plans"),
        ({"sets": [{"data": "plans", "representations": ["prose"]}]}, "has no representation 'prose'"),
        ({"data": "plans", "every": -1}, "greater than or equal to 0"),
        ({"data": "plans", "samples": 2, "temperature": 0}, "greater than 0"),
    ],
)
def test_an_impossible_evaluation_is_refused(evaluation: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        recipe_with(evaluation)


@pytest.mark.parametrize("name", ["start", "step-00000007"])
def test_a_stage_is_not_called_as_an_evaluation_is(name: str) -> None:
    with pytest.raises(UserError, match=f"must not be called '{name}'"):
        load_recipe(SMOKE, [*SHORT, f"stage.1.name={name}"], Recipe)


def test_a_temperature_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match="eval.temperature has no effect, because eval.samples is 0"):
        load_recipe(SMOKE, [*SHORT, "eval.temperature=0.5"], Recipe)


def test_without_representations_all_of_the_data_are_evaluated() -> None:
    recipe = recipe_with({"data": "plans"})
    held_out = ["table", "paraphrase", "dialect"]
    assert list(evaluation_keys(recipe, {})) == ["natural", "graph", "code", *held_out]
    assert list(evaluation_keys(recipe_with({"sets": SETS}), {})) == ["plans:natural", "plans:graph", "tables"]
