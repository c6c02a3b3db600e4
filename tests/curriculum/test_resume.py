"""What a run that has begun may change, and what it may not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import resumed_recipe
from isomorph.engine.config import UserError


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
