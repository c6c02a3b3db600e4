"""Estimates of a recipe before it runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import CPU, TINY, WORDS, make_groups, updates_of

from isomorph.curriculum import estimate
from isomorph.curriculum.estimate import checkpoint_bytes, plan_recipe, short_of_disk
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import ObjectiveConfig, UserError
from isomorph.engine.model.load import build_tiny
from isomorph.engine.recipe_file import check_tables
from isomorph.engine.update.learner import Learner

SEVEN_B = Path(__file__).parents[2] / "curriculum" / "recipes" / "shapes" / "qwen2.5-7b"


def recipe(
    model: dict[str, Any],
    form: str = "graph",
    *,
    tables: dict[str, Any] | None = None,
    stage: dict[str, Any] | None = None,
    **data: Any,
) -> Recipe:
    """``tables``: further ones; ``stage``: further keys of the one stage; ``data``: of its data."""
    tables = {
        "model": model,
        "data": {"plans": {"kind": "async_plan", **data}},
        "stage": [{"name": "rl", "steps": 1, "mixture": [{"data": "plans", "representation": form}], **(stage or {})}],
        "eval": {"data": "plans", "representations": [form]},
        **(tables or {}),
    }
    return check_tables(tables, Recipe, where="test")


def test_a_loaded_model_is_estimated_on_tasks_without_a_closed_vocabulary() -> None:
    planned = plan_recipe(recipe({"path": str(SEVEN_B)}), "h200", None, 1)
    assert planned["stages"][0]["tok"]["prompt"] > 50 and planned["model"]["num_parameters"] > 7e9


def test_a_tiny_model_is_not_estimated_on_data_that_it_cannot_read() -> None:
    tables = recipe({"tiny": {}}, difficulty={"form": "terse", "demonstration": "compact"})
    planned = plan_recipe(tables, "h200", None, 1)
    assert planned["model"]["num_parameters"] < 1e8
    pytest.importorskip("reasoning_gym")
    rows = {"kind": "reasoning_gym", "tasks": {"chain_sum": {}}}
    with pytest.raises(UserError, match="words of data.plans are not known before they are generated: set model.tiny"):
        plan_recipe(recipe({"tiny": {}}, "chain_sum", **rows), "h200", None, 1)


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_checkpoint_are_those_of_its_tensors(dtype: torch.dtype, kl_coef: float) -> None:
    policy, asked = build_tiny(TINY, WORDS, seed=0, dtype=dtype, device=CPU), recipe({"tiny": {}})
    stage = asked.stage[0].model_copy(update={"objective": ObjectiveConfig(kl_coef=kl_coef)})
    learner = Learner(policy)
    learner.enter(stage)
    learner.update(updates_of(make_groups(), stage), stage, 0)
    trained = policy.named_parameters()
    stored = sum(x.nbytes for x in (*trained.values(), *learner.state_tensors().values()))
    counters = 4 * len(trained)  # AdamW's number of steps, for each parameter
    assert stored - counters == checkpoint_bytes(asked.model_copy(update={"stage": [stage]}), policy)


def test_a_disk_that_is_too_small_for_the_checkpoints_is_told_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, asked = build_tiny(TINY, WORDS, seed=0, dtype=torch.float32, device=CPU), recipe({"tiny": {}})
    kept = asked.run.keep_checkpoints + 1  # and that of the stage's end
    needed = (kept + 1) * checkpoint_bytes(asked, policy)  # while one more is being written
    usage = estimate.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    assert short_of_disk(asked, policy, tmp_path) is None
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    told = short_of_disk(asked, policy, tmp_path)
    assert told is not None and f"keeps up to {kept} checkpoints" in told and "lower run.keep_checkpoints" in told


def test_the_models_path_may_name_a_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe({"path": "$SHAPES_OF_A_TEST/qwen2.5-7b"})
    with pytest.raises(UserError, match="set the environment variable"):
        plan_recipe(asked, "h200", None, 1)
    monkeypatch.setenv("SHAPES_OF_A_TEST", str(SEVEN_B.parent))
    assert plan_recipe(asked, "h200", None, 1)["model"]["num_parameters"] == 7_615_616_512


def test_a_stage_in_rounds_is_estimated_with_its_sampling() -> None:
    stage = {"objective": {"name": "sft"}, "sampling": {"samples_per_prompt": 1, "max_new_tok": 64}}
    sft = plan_recipe(recipe({"path": str(SEVEN_B)}, stage=stage), "h200", None, 1)["stages"][0]
    assert "KV cache" not in sft["arenas_gib"] and sft["largest_kv_tok"] is None
    rounds = {"star": {"prompts": 32, "samples": 4, "start_from": "start"}}
    star = plan_recipe(recipe({"path": str(SEVEN_B)}, stage=stage | rounds), "h200", None, 1)["stages"][0]
    assert star["arenas_gib"]["KV cache"] > 0 and star["seconds"]["generate"] > 0
    assert star["seconds"]["update"] == sft["seconds"]["update"]
    assert star["arenas_gib"]["weights at the start"] == pytest.approx(4 * 7_615_616_512 / 2**30)  # float32
    assert star["peak_gib"]["generate"] > sft["peak_gib"]["generate"]


def test_every_plan_has_the_peaks_on_more_ranks_and_says_what_is_refused() -> None:
    model = {"path": str(SEVEN_B), "dtype": "bfloat16"}
    ranks = plan_recipe(recipe(model), "h200", None, 1)["ranks"]
    peaks = {(row["ranks"], row["kind"]): row["peak_gib"] for row in ranks}
    assert list(peaks) == [(1, "data"), *((n, kind) for n in (2, 4, 8) for kind in ("data", "fsdp"))]
    cut = plan_recipe(recipe(model, tables={"parallel": {"kind": "fsdp"}}), "h200", None, 4)["stages"][0]
    assert peaks[4, "fsdp"] == [max(cut["peak_gib"].values())]
    assert peaks[8, "fsdp"] < peaks[4, "fsdp"] < peaks[2, "fsdp"] < peaks[2, "data"]
    refused = plan_recipe(recipe(model, tables={"lora": {}}), "h200", None, 1)["ranks"][2]
    assert refused["kind"] == "fsdp" and refused["peak_gib"] == [] and "[lora]" in refused["refused"]
