"""Faults that no run can see, planted in the code of an optimizer step: the self-check before a run names each."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crowd import Crowd
from small_world import one_thread  # noqa: F401
from torch import Tensor

from isomorph.curriculum.commands.doctor import examine
from isomorph.engine import packed_batch
from isomorph.engine.config import PRESETS, ObjectiveConfig
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.model import scoring
from isomorph.engine.types import PackedBatch, RunFailed
from isomorph.engine.update import learner, micro_batches, score
from isomorph.engine.update.objective import loss_of_tokens, token_weight
from isomorph.engine.update.self_check import check_learning
from isomorph.kernels.advantage import group_advantage
from isomorph.kernels.packed_layout import PackedLayout

SAMPLED = [name for name in PRESETS if name not in ("sft", "rft")]


@pytest.mark.parametrize("name", PRESETS)
def test_every_objective_passes(name: Any) -> None:
    check_learning(ObjectiveConfig(name=name))


@pytest.mark.parametrize(
    "choices",
    [
        dict(kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01),
        dict(reward_kl_coef=0.1, importance_sampling="sequence"),
        dict(old_logprob="sampler", aggregation="constant", clip_dual=3.0),
        dict(old_logprob="sampler", clip_low=1e-9, clip_high=1e-9),
        dict(importance_sampling="token", importance_sampling_mode="mask", importance_sampling_cap=1.0),
        dict(importance_sampling="sequence", importance_sampling_floor=1.5, importance_sampling_cap=1.5),
    ],
)
def test_options_that_add_terms_or_bounds_pass(choices: dict[str, Any]) -> None:
    check_learning(ObjectiveConfig(name="dapo", **choices), temperature=0.7)


@pytest.mark.parametrize("temperature", [1e-3, 100.0])
def test_extreme_temperatures_pass(temperature: float) -> None:
    check_learning(ObjectiveConfig(name="gspo"), temperature)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_sign_of_the_advantage(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "group_advantage", lambda *given, **named: -group_advantage(*given, **named))
    with pytest.raises(RunFailed, match=f"objective '{name}' must raise .* a sign is wrong"):
        check_learning(ObjectiveConfig(name=name))


def test_the_sign_of_a_loss_of_ones_own() -> None:
    def negated(*given: Any) -> Any:
        found = loss_of_tokens(*given)
        return dataclasses.replace(found, loss=-found.loss)

    for name in ("gspo", "sft"):
        with pytest.raises(RunFailed, match="a sign is wrong"):
            check_learning(ObjectiveConfig(name=name), loss_function=negated)  # type: ignore[arg-type]


def test_the_sign_of_the_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", ascend)
    with pytest.raises(RunFailed, match="a sign is wrong"):
        check_learning(ObjectiveConfig(name="grpo"))


ADAM_STEP = torch.optim.AdamW.step


def ascend(adamw: torch.optim.AdamW) -> None:
    for group in adamw.param_groups:
        for p in group["params"]:
            p.grad = -p.grad
    ADAM_STEP(adamw)


Pack = Callable[[Sequence[packed_batch.Part], torch.device], PackedBatch]


def planted_in_pack(monkeypatch: pytest.MonkeyPatch, change: Callable[[PackedBatch], dict[str, Any]]) -> None:
    """In all that scores and trains: trainer and sampler then agree on what is wrong, and no run sees it."""
    pack_parts = packed_batch.pack_parts

    def changed(parts: Sequence[packed_batch.Part], device: torch.device) -> PackedBatch:
        batch = pack_parts(parts, device)
        return dataclasses.replace(batch, **change(batch))

    for module in (scoring, micro_batches):
        monkeypatch.setattr(module, "pack_parts", changed)


@pytest.mark.parametrize("by", [1, -1])
def test_tokens_that_are_off_by_one_against_their_targets(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planted_in_pack(monkeypatch, lambda b: {"row_index": (b.row_index + by).clamp(0, len(b.token_ids) - 1)})
    with pytest.raises(RunFailed, match="tokens and targets, positions or the attention mask are shifted"):
        check_learning(ObjectiveConfig(name="grpo"))


def test_an_attention_mask_that_is_shifted_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's last token counts as the first response's: the other responses do not see it."""
    from_groups = PackedLayout.from_groups

    def shifted(prompt_lens: list[int], response_lens: list[list[int]]) -> PackedLayout:
        moved = [[lens[0] + 1, *lens[1:]] for lens in response_lens]
        return from_groups([n - 1 for n in prompt_lens], moved)

    monkeypatch.setattr(PackedLayout, "from_groups", staticmethod(shifted))
    with pytest.raises(RunFailed, match="positions or the attention mask are shifted"):
        check_learning(ObjectiveConfig(name="grpo"))


def test_a_denominator_that_a_split_into_micro_batches_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_batch(objective: ObjectiveConfig, seq_id: Tensor, num_seqs: int, **named: Any) -> Tensor:
        return token_weight(
            objective, seq_id, num_seqs, **{**named, "num_loss_tok": len(seq_id), "num_step_seqs": num_seqs}
        )

    monkeypatch.setattr(learner, "token_weight", of_batch)
    for name in ("dapo", "grpo", "dr_grpo"):  # per token, per sequence, constant
        with pytest.raises(RunFailed, match=r"in micro-batches of 14 tokens differs by \d.*a denominator is not that"):
            check_learning(ObjectiveConfig(name=name))  # type: ignore[arg-type]


def checked_with_a_mean_over_ranks(ranks: Ranks, is_planted: bool) -> str:
    """What the check says where ranks average what they should sum."""
    real = dist.all_reduce

    def mean(tensor: Tensor, **named: Any) -> Any:
        work = real(tensor, async_op=True)
        work.wait()
        tensor /= ranks.size
        return work

    dist.all_reduce = mean if is_planted else real
    try:
        check_learning(ObjectiveConfig(name="grpo"), ranks=ranks)
    except RunFailed as error:
        return str(error)
    finally:
        dist.all_reduce = real
    return ""


def test_a_loss_that_is_divided_per_rank() -> None:
    crowd = Crowd(2)
    try:
        assert crowd.ask(checked_with_a_mean_over_ranks, False) == ["", ""]
        for said in crowd.ask(checked_with_a_mean_over_ranks, True):
            assert re.search(r"over 2 ranks differs by 50.0% .*a denominator is not that", said), said
    finally:
        crowd.close()


def test_a_run_ends_before_its_first_step_and_doctor_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from isomorph.curriculum.assemble import run_recipe
    from isomorph.curriculum.recipe import Recipe
    from isomorph.engine.distributed.ranks import ALONE
    from isomorph.engine.recipe_file import load_recipe

    monkeypatch.setattr(score, "group_advantage", lambda *given, **named: -group_advantage(*given, **named))
    smoke = Path(__file__).parents[2] / "curriculum" / "recipes" / "smoke.toml"
    recipe = load_recipe(smoke, ["sampling.temperature=0.97"], Recipe)  # no other test's: each is checked once
    with pytest.raises(RunFailed, match="self-check: a step with objective 'grpo' must raise"):
        run_recipe(recipe, tmp_path, Console(quiet=True), lambda: False, ALONE, resume=False)
    assert not list(tmp_path.iterdir())
    (finding,) = [f for f in examine() if f.name == "optimizer step"]
    assert finding.state == "problem" and finding.required and "a sign is wrong" in finding.found
