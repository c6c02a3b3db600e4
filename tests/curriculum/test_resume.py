"""What a run that has begun may change, and what it may not."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.candidates import find_candidate
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import depends_on_steps, resumed_recipe
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.record.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def stopped(finished_run: Path, tmp_path: Path) -> Path:
    """Within the stage "symbols", which is number 1: one of its two steps is done."""
    run = Path(shutil.copytree(finished_run, tmp_path / "stopped"))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000083")
    return run


def changes_of(run: Path, *overrides: str) -> dict[str, Any]:
    return resumed_recipe(read_run_json(run), overrides, run)[1]


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("stage.1.steps=9", {"stage.1.steps": [2, 9]}),
        ("stage.2.steps=1", {}),  # as it was
        ("stage.2.optim.lr=1e-5", {"stage.2.optim.lr": [1e-4, 1e-5]}),
        ("stage.1.batch.micro_batch_tok=2000", {"stage.1.batch.micro_batch_tok": [1024, 2000]}),
        ("sampler.max_seqs=7", {"sampler.max_seqs": [256, 7]}),
        ("log.tensorboard=false", {"log.tensorboard": [True, False]}),
        ("run.checkpoint_every=3", {"run.checkpoint_every": [81, 3]}),
    ],
)
def test_what_may_change_is_told_with_its_value_before(stopped: Path, override: str, change: dict[str, Any]) -> None:
    assert changes_of(stopped, override) == change


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=7", "run.seed cannot be changed by --resume"),
        ("stage.2.objective.kl_coef=0.5", "stage.2.objective.kl_coef"),
        ("stage.2.sampling.temperature=0.5", "stage.2.sampling.temperature cannot be changed"),
        ("eval.prompts=5", "eval.prompts cannot be changed"),
        ("data.plans.difficulty.max_steps=5", "data.plans.difficulty.max_steps cannot be changed"),
        ("model.tiny.num_layers=3", "model.tiny.num_layers cannot be changed"),
        ("optim.lr=1e-5", "write stage.0.optim.lr=1e-5"),
        ("stage.0.steps=90", "stage 0 had ended"),
        ("stage.1.steps=1", "must be more than the 1 steps that are done"),
        ("sampler.publish=copy", "no effect"),
        ("run.sede=7", "did you mean 'seed'"),
    ],
)
def test_what_may_not_is_refused_by_name(stopped: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        changes_of(stopped, override)
    assert expected in str(refused.value)


def test_in_the_midst_of_a_step_its_batches_are_cut_already(stopped: Path) -> None:
    state = stopped / "checkpoints" / "step-00000081" / "state.json"
    fields = json.loads(state.read_text())
    state.write_text(json.dumps({**fields, "draws": [{}]}))
    with pytest.raises(UserError, match="cannot change within a step"):
        changes_of(stopped, "stage.1.batch.micro_batch_tok=2000")
    assert changes_of(stopped, "stage.2.batch.micro_batch_tok=2000")


# -- damaged checkpoints
def test_a_run_whose_newest_checkpoints_are_damaged_or_foreign_goes_on_from_the_one_before(
    finished_run: Path, tmp_path: Path
) -> None:
    """A bit of the newest is flipped; after it lie one of another model and one of another recipe's stages."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "summary.json").unlink()
    folder = run / "checkpoints"
    state, weights, tensors = load_checkpoint(folder / "step-00000083")
    before = {**state.source, "stage_index": 9}
    save_checkpoint(folder, replace(state, step=84, source=before), weights, tensors, keep=9)
    save_checkpoint(folder, replace(state, step=85), {"model.w": torch.ones(1)}, {}, keep=9)
    file = folder / "step-00000083" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for named in (folder / "step-00000083", folder / "step-00000085"):  # named by the user it is refused, and stays
        with pytest.raises(UserError, match=named.name):
            find_candidate(str(named)).load() if named.name.endswith("5") else load_checkpoint(named)
    said = [line for line in resume(run).splitlines() if "step-000000" in line and "eval" not in line]
    assert [line.split(": ", 2)[1].rpartition("/")[2] for line in said[:3]] == [f"step-000000{i}" for i in (85, 84, 83)]
    for line, why in zip(said[:3], ("of the recipe's model", "it is in stage 10 of 3", "CRC-32 differs"), strict=True):
        assert line.startswith("warning: ") and why in line
        assert line.endswith(f"and {folder / 'step-00000081'} is used instead")
    assert said[3] == f"resuming after step 81 from {folder / 'step-00000081'}"
    one, other = (json.loads((of / "summary.json").read_text()) for of in (run, finished_run))
    assert one["weights_sha256"] == other["weights_sha256"] and one["exams"] == other["exams"]
    assert rows_of(run) == rows_of(finished_run)
    assert sorted(path.name for path in folder.glob("damaged-*")) == [f"damaged-step-000000{i}" for i in (83, 84, 85)]


def test_what_may_change_is_asked_of_the_checkpoint_that_can_be_read(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    with pytest.raises(UserError, match="stage 1 had ended by step 83"):
        changes_of(run, "stage.1.steps=9")
    (run / "checkpoints" / "step-00000083" / "state.json").write_text("{")
    assert changes_of(run, "stage.1.steps=9") == {"stage.1.steps": [2, 9]}


# -- more steps
def resume(run: Path, *overrides: str) -> str:
    """Resumes ``run`` as the command does; returns what the console said."""
    recipe, changes = resumed_recipe(read_run_json(run), overrides, run)
    console, threads = Console(file=io.StringIO(), width=500), torch.get_num_threads()
    run_recipe(recipe, run, console, lambda: False, ALONE, resume=True, changes=changes)
    torch.set_num_threads(threads)  # the recipe asks for one
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("reward", "loss", "step", "grad", "lr"))} for row in rows]


def test_a_finished_run_goes_on_with_more_steps_bit_for_bit(stopped: Path, finished_run: Path, tmp_path: Path) -> None:
    """As the run that had the larger number from the start, which was stopped in the stage before."""
    extended = Path(shutil.copytree(finished_run, tmp_path / "extended"))
    assert "note: stage words" not in resume(extended, "stage.2.steps=3")
    resume(stopped, "stage.2.steps=3")
    one, other = (json.loads((run / "summary.json").read_text()) for run in (extended, stopped))
    assert one["status"] == "done" and one["steps"] == 85
    for key in ("weights_sha256", "exams", "stages", "tokens", "accuracy"):
        assert one[key] == other[key], key
    assert rows_of(extended) == rows_of(stopped) and len(rows_of(extended)) == 85


def test_where_the_learning_rate_depends_on_the_steps_it_is_said(finished_run: Path) -> None:
    overrides = ("stage.2.steps=4", "stage.2.optim.schedule=linear", "stage.2.optim.warmup_share=0.5")
    (sentence,) = depends_on_steps(*resumed_recipe(read_run_json(finished_run), overrides, finished_run))
    assert (
        'stage words goes on with the learning rate of 4 steps (optim.schedule = "linear", optim.warmup_share)'
        in sentence
    )
    assert depends_on_steps(*resumed_recipe(read_run_json(finished_run), overrides[:1], finished_run)) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage.1.steps=9", "stage 1 had ended by step 83.*only the last stage.*model.path=.*/model"),
        ("stage.2.steps=1", None),
        ("stage.2.optim.lr=1", "stage.2.optim.lr: stage 2 had ended"),
        ("stage.2.max_response_tok=5", "stage 2 had ended"),
    ],
)
def test_what_is_over_is_refused_with_what_to_do(finished_run: Path, override: str, expected: str | None) -> None:
    if expected is None:
        assert changes_of(finished_run, override) == {}  # as it was
        return
    with pytest.raises(UserError, match=expected):
        changes_of(finished_run, override)


def test_a_stage_that_did_not_end_by_its_steps_is_not_extended(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "mastered"))
    file = run / "checkpoints" / "step-00000083" / "state.json"
    state = json.loads(file.read_text())
    state["source"]["finished"][-1]["ended_by"] = "mastery"
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="ended after 1 steps by mastery; it goes on only where its steps ended it"):
        changes_of(run, "stage.2.steps=5")
    with pytest.raises(UserError, match="no other change than of optim"):
        changes_of(finished_run, "stage.2.steps=5", "stage.2.max_response_tok=9000")
