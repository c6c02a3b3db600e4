"""Faults that a run goes on with, planted in a real run: each is warned of once, by step, cause and what to look at."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import one_thread  # noqa: F401
from toy_run import console, gold, make_components, make_stage

from isomorph.engine.components import Components
from isomorph.engine.config import SamplerConfig
from isomorph.engine.loop import train
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.telemetry import NUM_GROWING, WINDOW
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Group, Prompt, Rollout, RunState, Sampling, StepDrift, StepStats
from isomorph.engine.watch import COLLAPSE_STEPS, FALSE_ALARM, FLAT_STEPS, RUN_STEPS, Watch, share_of_equal_pairs


def warnings_of(components: Components) -> list[str]:
    train(components, RunState())
    return [line for line in console(components).splitlines() if line.startswith("warning")]


def test_rewards_that_are_all_equal_are_warned_of_once(tmp_path: Path) -> None:
    stage = make_stage(steps=FLAT_STEPS + 3)
    stage = stage.model_copy(update={"batch": stage.batch.model_copy(update={"prompts": 2})})
    (told,) = warnings_of(make_components(tmp_path, stage, judge=lambda prompts, texts: [0.25] * len(texts)))
    assert f"step {FLAT_STEPS}, stage words: in each of the last {FLAT_STEPS} steps" in told
    assert "every reward was 0.25" in told and "mend the reward" in told


def certain(policy: Policy) -> BuiltinSampler:
    with torch.no_grad():
        policy.unembedding.mul_(400)
    return BuiltinSampler(policy, SamplerConfig())


def test_a_policy_that_collapses_to_one_wrong_response_is_warned_of_once(tmp_path: Path) -> None:
    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [0.5 * reward for reward in gold(prompts, texts)]  # 1 is right

    (told,) = warnings_of(make_components(tmp_path, make_stage(steps=6), sampler_of=certain, judge=judge))
    assert "stage words: two responses to a prompt that is not solved are equal with probability" in told
    assert "entropy" in told and "sampling.temperature" in told


def test_a_policy_that_is_certain_of_right_responses_has_not_collapsed(tmp_path: Path) -> None:
    right = make_components(
        tmp_path, make_stage(steps=6), sampler_of=certain, judge=lambda prompts, texts: [1.0] * len(texts)
    )
    assert warnings_of(right) == []


def test_variance_in_between_begins_the_count_anew() -> None:
    watch, told = Watch(), []
    for step in range(10 * FLAT_STEPS):
        has_variance = step % FLAT_STEPS == 0
        told += watch.observe(step, "s", [group_of(2, 3, 1 if has_variance else 4)] * 3, [False] * 3, STATS)
    assert told == []


def test_a_stage_that_is_solved_is_said_to_be() -> None:
    watch = Watch()
    told = [
        line for step in range(2 * FLAT_STEPS) for line in watch.observe(step, "s", [group_of(1, 1)], [True], STATS)
    ]
    assert len(told) == 1 and "every reward was 1, so that" in told[0] and "nothing left to teach" in told[0]


class Infinite(BuiltinSampler):
    """Gives the second token of every response no probability, except in a probe."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, *given)
        if len(prompts) == 1:
            return rollouts
        for rollout in rollouts:
            assert rollout.sampler_logprob is not None
            rollout.sampler_logprob[1:2] = -math.inf
        return rollouts


def test_tokens_without_a_finite_log_probability_are_warned_of_once(tmp_path: Path) -> None:
    stage = make_stage(steps=3, objective="grpo")
    components = make_components(tmp_path, stage, sampler_of=lambda policy: Infinite(policy, SamplerConfig()))
    (told,) = warnings_of(components)
    assert "step 1, stage words: the sampler gave no finite log-probability for 4" in told
    assert "tok/dropped" in told


def test_a_leak_is_warned_of_once_by_its_step(tmp_path: Path) -> None:
    """A step's memory as ``RunLog.write_step`` is told it: a real leak of this size would slow the tests."""
    components = make_components(tmp_path, make_stage())
    for step in range(1, 2 * (NUM_GROWING + 1) * WINDOW):
        components.log.write_step({"step": step, "stage": "words", "mem/rss_gib": 1 + 0.001 * step}, "")
    (told,) = [line for line in console(components).splitlines() if line.startswith("warning")]
    assert f"step {(NUM_GROWING + 1) * WINDOW}: resident memory grew" in told and "reward functions" in told


# -- the statistics
def group_of(*responses: int) -> Group:
    prompt = Prompt(prompt_id=0, token_ids=(1,), task="t", representation="r", payload=None)
    rollouts = tuple(
        Rollout(
            prompt_id=0,
            sample=i,
            token_ids=torch.tensor([response]),
            sampler_logprob=torch.zeros(1),
            finish="stop",
            policy_version=0,
        )
        for i, response in enumerate(responses)
    )
    rewards = tuple(float(response == 1) for response in responses)
    return Group(prompt=prompt, rollouts=rollouts, rewards=rewards, advantages=(0.0,) * len(rollouts))


STATS = StepStats(
    loss=0.0, grad_norm=0.0, lr=0.0, clip_frac=0.0, entropy=0.1, kl=0.0, drift=StepDrift(), num_updates=1,
    num_loss_tok=1, num_forward_tok=1, num_dropped_tok=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("responses", "share"), [((1, 2, 3), 0), ((1, 1, 2), 1 / 3), ((1, 1, 2, 2), 1 / 3), ((4,) * 5, 1)]
)
def test_equal_pairs_are_counted(responses: tuple[int, ...], share: float) -> None:
    assert share_of_equal_pairs(group_of(*responses)) == pytest.approx(share)


def test_two_responses_to_choose_from_give_fewer_false_alarms_than_stated() -> None:
    """At the limit, a policy that draws one of two wrong responses evenly: sum p^2 is 1/2."""
    coin, alarms = random.Random(0), 0
    for _ in range(20):
        watch = Watch()
        for step in range(RUN_STEPS // 10):
            groups = [group_of(*(coin.choice((2, 3)) for _ in range(4))) for _ in range(4)]
            alarms += any("collapsed" in told for told in watch.observe(step, "s", groups, (False,) * 4, STATS))
    assert alarms == 0  # 2 runs: 2e-3 expected at most


def test_a_half_of_steps_without_variance_gives_fewer_false_alarms_than_stated() -> None:
    """Exactly: the probability of FLAT_STEPS heads in a row in RUN_STEPS throws of a fair coin."""
    of_streak = [1.0] + [0.0] * (FLAT_STEPS - 1)
    for _ in range(RUN_STEPS):
        of_streak = [sum(of_streak) / 2, *(p / 2 for p in of_streak[:-1])]
    assert FALSE_ALARM / 10 < 1 - sum(of_streak) < FALSE_ALARM
    assert COLLAPSE_STEPS <= FLAT_STEPS
