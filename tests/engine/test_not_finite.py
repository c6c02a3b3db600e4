"""NaN and infinity, planted in one tensor at a time: the run stops, and names the tensor in which they came first."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import CPU, TINY, WORDS, make_groups, one_thread  # noqa: F401
from torch import Tensor
from toy_run import gold, make_components, make_stage, source_of

from isomorph.engine.loop import train
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import Group, Prompt, RunFailed, RunState
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.not_finite import origin_in_gradient
from isomorph.engine.update.objective import loss_of_tokens

STAGE = make_stage(objective="grpo", objective_choices={"kl_coef": 0.0})


def make_policy() -> Policy:
    return build_tiny(TINY, WORDS, seed=0, dtype=torch.float32, device=CPU)


def one_step(policy: Policy, learner: Learner | None = None, groups: list[Group] | None = None) -> None:
    learner = learner or Learner(policy)
    learner.enter(STAGE)
    device = policy.device
    updates = pack(
        groups or make_groups(), micro_batch_tok=99, prompts_per_update=None, objective=STAGE.objective, device=device
    )
    learner.update(updates, STAGE, 0)


def test_the_first_weight_that_is_not_finite_is_named() -> None:
    for name in make_policy().named_parameters():
        policy = make_policy()
        with torch.no_grad():
            policy.named_parameters()[name].fill_(math.nan)
        with pytest.raises(RunFailed, match=f"the weight {re.escape(name)} holds numbers that are not finite"):
            one_step(policy)


@pytest.mark.parametrize("place", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.norm"])
def test_the_first_output_that_is_not_finite_is_named(place: str) -> None:
    """The weights are finite: it is an overflow, as in float16 or of an input that is too large."""
    policy = make_policy()
    policy.model.get_submodule(place).register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(RunFailed, match=f"the first output that is not is that of {re.escape(place)};"):
        one_step(policy)


def test_the_gradient_that_came_first_in_the_backward_pass_is_named() -> None:
    policy = make_policy()
    before = policy.snapshot()
    spoiled = policy.named_parameters()["model.layers.0.mlp.up_proj.weight"]
    spoiled.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunFailed, match=r"that of model.layers.0.mlp.up_proj.weight \(1 of \d+ are\)"):
        one_step(policy)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.snapshot(), strict=True))
    weights = [torch.zeros(2), torch.zeros(2)]
    weights[0].grad, weights[1].grad = torch.tensor([math.nan, 0.0]), torch.tensor([1.0, math.inf])
    assert "that of later (2 of 2 are)" in origin_in_gradient(dict(zip(("earlier", "later"), weights, strict=True)))


def test_a_sum_of_squares_that_overflows_names_the_largest_gradient() -> None:
    policy = make_policy()
    policy.named_parameters()["model.norm.weight"].register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    with pytest.raises(RunFailed, match=r"the largest is 3.0e\+38 in model.norm.weight"):
        one_step(policy)


def test_a_loss_that_is_not_finite_is_told_from_log_probabilities() -> None:
    def spoiled(*given: Any) -> Any:
        found = loss_of_tokens(*given)
        return dataclasses.replace(found, loss=found.loss + math.inf)

    policy = make_policy()
    before = policy.snapshot()
    with pytest.raises(
        RunFailed, match=r"the loss is inf, and all \d+ log-probabilities are finite.*if it is your own"
    ):
        one_step(policy, Learner(policy, loss_function=spoiled))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.snapshot(), strict=True))


def test_a_run_says_after_which_step_and_what_to_do(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=4), checkpoint_every=1)

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if len(source_of(components).observed) == 2:
            norm = components.policy.model.model.norm
            norm.register_forward_hook(lambda module, inputs, output: overflowing(output))
        return gold(prompts, texts)

    def overflowing(output: Tensor) -> Tensor:
        return output * math.inf

    components = dataclasses.replace(components, judge=judge)
    with pytest.raises(RunFailed) as failed:
        train(components, RunState())
    told = str(failed.value)
    assert told.startswith("after step 2, in stage words: ") and "log-probabilities are not finite" in told
    assert "is that of model.norm;" in told and "lower optim.lr" in told and "--resume" in told
