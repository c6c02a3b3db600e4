"""What a run records about its ops; a run of adapters. The rest is tested through the command line."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from isomorph.curriculum import assemble, environment, estimate
from isomorph.curriculum.candidates import find_candidate
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import resumed_recipe
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.table_judge import TableJudge
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.recipe_file import check_tables, load_recipe
from isomorph.kernels import backend

QUICKSTART = Path(__file__).parents[2] / "curriculum" / "recipes" / "quickstart.toml"


def a_policy(head_dim: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=head_dim)


@pytest.fixture
def h100_without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "native_available", lambda: True)
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    monkeypatch.setattr(backend, "flash_reason", lambda: "flash is not here")


@pytest.mark.usefixtures("h100_without_flash")
def test_attention_that_makes_all_scores_is_a_fallback_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert environment.fallbacks(a_policy(128)) == []
    (fallback,) = environment.fallbacks(a_policy(256))
    assert "tokens x tokens" in fallback and "flash is not here" in fallback
    monkeypatch.setenv(backend.ENVIRONMENT, "packed_attention=reference")
    assert environment.fallbacks(a_policy(256)) == []


@pytest.mark.usefixtures("h100_without_flash")
def test_a_gpu_without_triton_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_reason", lambda: "triton is not installed")
    assert any(
        "PyTorch implementations on the GPU: triton is not installed" in x for x in environment.fallbacks(a_policy(128))
    )


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_without_avx512_is_a_fallback(monkeypatch: pytest.MonkeyPatch, *, has_bfloat16: bool) -> None:
    monkeypatch.setattr(environment, "onednn_has_bfloat16", lambda: has_bfloat16)
    given = {"device": torch.device("cpu"), "head_dim": 64}
    found = environment.fallbacks(SimpleNamespace(dtype=torch.bfloat16, **given))
    assert [text for text in found if 'model.dtype = "float32"' in text] == found[: not has_bfloat16]
    assert environment.fallbacks(SimpleNamespace(dtype=torch.float32, **given)) == []


def test_what_could_not_be_judged_is_summed_over_the_ranks() -> None:
    class Two(Ranks):
        def gather(self, own: Any) -> list[Any]:
            return [own, {"timeouts": 1, "crashes": 0, "errors": 4, "right/deadline": 2, "short/nan": 1}]

    with RewardPool() as judges:
        judges.num_timeouts, judges.num_crashes = 2, 3
        judge = TableJudge({}, judges)
        judge.counts.add("right", "deadline")
        found = judge.failures(Two(0, 2))
    assert found == {"timeouts": 3, "crashes": 3, "errors": 4, "right/deadline": 3, "short/nan": 1}


# -- a run of adapters
SMOKE = Path(__file__).parents[2] / "curriculum" / "recipes" / "smoke.toml"
ADAPTERS = ("lora.rank=4", "stage.0.steps=6", "stage.1.steps=2", "stage.2.steps=1", "eval.prompts=2")


def run(folder: Path, recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return assemble.run_recipe(recipe, folder, Console(file=io.StringIO()), lambda: False, ALONE, resume=resume)
    finally:
        torch.set_num_threads(threads)  # the recipe asks for one


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapters"
    folder.mkdir()
    overrides = [*ADAPTERS, "run.checkpoint_every=4", "run.keep_checkpoints=9"]
    run(folder, load_recipe(SMOKE, overrides, Recipe))
    return folder


@pytest.fixture
def killed(adapter_run: Path, tmp_path: Path) -> Path:
    """The run as if it had been killed after step 4, in the middle of the warm-up."""
    folder = tmp_path / "killed"
    shutil.copytree(adapter_run, folder)
    for later in ("step-00000008", "step-00000009"):
        shutil.rmtree(folder / "checkpoints" / later)
    (folder / "summary.json").unlink()
    for left in ("model", "adapter"):
        shutil.rmtree(folder / left)
    return folder


def reread(folder: Path) -> Recipe:
    return check_tables(read_run_json(folder)["recipe"], Recipe, where="run.json")


def test_a_killed_run_of_adapters_goes_on_bit_for_bit(adapter_run: Path, killed: Path) -> None:
    resumed = run(killed, reread(killed), resume=True)
    whole = json.loads((adapter_run / "summary.json").read_text())
    assert resumed["weights_sha256"] == whole["weights_sha256"] and resumed["steps"] == 9
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (killed / file).read_bytes() == (adapter_run / file).read_bytes()


def test_its_checkpoints_hold_adapters_alone_and_run_json_says_how_many(adapter_run: Path) -> None:
    for file in ("weights", "optimizer"):
        with safe_open(adapter_run / "checkpoints" / "step-00000004" / f"{file}.safetensors", "pt") as tensors:
            assert all(".lora_" in name for name in tensors.keys())  # noqa: SIM118 (not a dict)
    with safe_open(adapter_run / "model" / "model.safetensors", "pt") as tensors:
        assert not any("lora" in name or "base_layer" in name for name in tensors.keys())  # noqa: SIM118
    model = read_run_json(adapter_run)["model"]
    widths = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)  # in + out of q and o; k and v; the MLP
    assert model["trained"] == 2 * 4 * widths < model["parameters"]


def test_adapters_are_not_put_on_another_base(killed: Path) -> None:
    described = read_run_json(killed)
    described["recipe"]["run"]["seed"] = 1  # a tiny model's weights come from it
    (killed / "run.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="trained on weights with fingerprint .* restore the model"):
        run(killed, reread(killed), resume=True)
    with pytest.raises(UserError, match="trained on weights with fingerprint"):
        find_candidate(str(killed)).load()


def test_a_killed_run_of_adapters_is_evaluated_from_its_checkpoint(killed: Path) -> None:
    policy = find_candidate(str(killed)).load()
    assert policy.adapters is not None
    assert all(p.any() for p in policy.named_parameters().values())  # no B is 0 any more


def test_a_change_on_resume_is_kept_for_the_next_time(killed: Path) -> None:
    recipe, changes = resumed_recipe(read_run_json(killed), ["stage.1.optim.lr=2e-5", "stage.2.steps=3"], killed)
    threads = torch.get_num_threads()
    out = io.StringIO()
    try:
        summary = assemble.run_recipe(
            recipe, killed, Console(file=out, width=200), lambda: False, ALONE, resume=True, changes=changes
        )
    finally:
        torch.set_num_threads(threads)
    assert summary["steps"] == 11 and "changed: stage.1.optim.lr was 0.0001, is 2e-05 from here on" in out.getvalue()
    described = read_run_json(killed)
    assert described["changes"] == [
        {"after_step": 4, "changed": {"stage.1.optim.lr": [1e-4, 2e-5], "stage.2.steps": [1, 3]}}
    ]
    assert resumed_recipe(described, [], killed) == (recipe, {})
    rows = [json.loads(line) for line in (killed / "steps.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if row["stage"] == "symbols"] == [2e-5] * 2


def test_a_stage_that_does_not_fit_into_memory_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(QUICKSTART, ["model.tiny.max_model_len=8192", "stage.2.sampling.max_new_tok=8000"], Recipe)
    policy = assemble.open_policy(recipe)
    monkeypatch.setattr("isomorph.curriculum.estimate.machine.available_gib", lambda: 0.0)
    monkeypatch.setattr("isomorph.curriculum.estimate.process_memory_gib", lambda: (0.5, 0.5))
    (short,) = estimate.short_of_memory(recipe, policy, ALONE)
    assert short.startswith("stage words: generate needs up to ") and "this device has 512.0 MiB" in short
    monkeypatch.setattr("isomorph.curriculum.estimate.machine.available_gib", lambda: 64.0)
    assert estimate.short_of_memory(recipe, policy, ALONE) == []
