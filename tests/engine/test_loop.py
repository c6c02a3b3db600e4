"""The training loop with real parts: what is learned, what a run writes, and what ends it."""

import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import one_thread  # noqa: F401
from torch import Tensor
from toy_run import (
    WORDS,
    Questions,
    console,
    gold,
    gold_but_for_one,
    make_components,
    make_policy,
    make_stage,
    sha,
    source_of,
)

from isomorph.engine.components import Components
from isomorph.engine.config import (
    SamplerConfig,
)
from isomorph.engine.loop import train
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.record import step_record
from isomorph.engine.record.checkpoint import load_checkpoint, weights_sha256
from isomorph.engine.record.runlog import read_steps
from isomorph.engine.record.telemetry import MIN_GROWTH
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Group, Prompt, Publication, Rollout, RunFailed, RunState, Sampling
from isomorph.engine.update.micro_batches import Update, pack
from isomorph.kernels import backend


# -- learning
@pytest.mark.parametrize("objective", ["grpo", "gspo", "cispo"])
def test_reward_rises_within_twenty_steps(tmp_path: Path, objective: str) -> None:
    components = make_components(tmp_path, make_stage(objective=objective))
    train(components, RunState())
    rewards = [row["reward/mean"] for row in read_steps(tmp_path)]
    assert len(rewards) == 20
    before, after = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert before < 0.6
    assert after > before + 0.3


def test_fifty_steps_with_the_fast_bodies_follow_the_references(tmp_path: Path) -> None:
    """Reward and entropy: two bodies of one seed lie closer together than one body of two seeds."""

    def curves(name: str, seed: int, bodies: contextlib.AbstractContextManager[None]) -> Tensor:
        stage = make_stage(steps=50, objective="grpo", objective_choices=dict(kl_coef=0.01))  # keeps flat groups in
        with bodies:
            train(make_components(tmp_path / name, stage, seed=seed), RunState())
        return torch.tensor([[row["reward/mean"], row["entropy"]] for row in read_steps(tmp_path / name)])

    fast = curves("fast", 0, contextlib.nullcontext())
    ops = ("linear_loss", "linear_logprob", "packed_attention", "group_advantage")
    plain = curves("plain", 0, backend.using(",".join(f"{op}=reference" for op in ops)))
    other = curves("other", 1, contextlib.nullcontext())
    between_bodies, between_seeds = ((fast - curve).abs().mean(0) for curve in (plain, other))
    assert (between_bodies < between_seeds).all(), (between_bodies, between_seeds)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-6)  # before the first update only rounding differs


def test_a_run_is_the_same_bit_for_bit_when_run_again(tmp_path: Path) -> None:
    def once(name: str) -> tuple[str, list[dict[str, Any]]]:
        stages = (
            make_stage("a", 3, "sft"),
            make_stage("b", 4, objective_choices=dict(kl_coef=0.01, importance_sampling="token")),
        )
        components = make_components(tmp_path / name, *stages, evaluates=True)
        train(components, RunState())
        rows = [
            {k: v for k, v in row.items() if not k.startswith("mem/") and not k.endswith("_s")}
            for row in read_steps(tmp_path / name)
        ]
        return sha(components), rows

    assert once("first") == once("second")


def test_demonstrations_are_learned(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage("warm-up", 30, "sft"), evaluates=True)
    train(components, RunState())
    losses = [row["loss"] for row in read_steps(tmp_path)]
    assert losses[-1] < losses[0] / 2
    assert source_of(components).graded[-1] == ("warm-up", [1.0, 1.0, 1.0])


# -- what a run leaves
def test_every_step_leaves_a_row_whose_numbers_fit_together(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=3), completions_every=2)
    state = train(components, RunState())
    rows = read_steps(tmp_path)
    for number, (row, groups) in enumerate(zip(rows, source_of(components).observed, strict=True), start=1):
        rewards = [r for g in groups for r in g.rewards]
        natural = [r for g in groups if g.prompt.representation == "natural" for r in g.rewards]
        lens = [len(r.token_ids) for g in groups for r in g.rollouts]
        assert (row["step"], row["stage"], row["stage_step"], row["updates"]) == (number, "words", number, 1)
        assert row["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert row["reward/natural"] == pytest.approx(sum(natural) / len(natural))
        assert row["tok/response"] == sum(lens) == row["tok/loss"]
        assert row["tok/prompt"] == sum(len(g.prompt.token_ids) for g in groups)
        assert (row["groups/all"], row["groups/flat"]) == (6, sum(len(set(g.rewards)) == 1 for g in groups))
        assert 0 < row["entropy"] <= math.log(len(WORDS) + 4)
        assert row["clip_frac"] == 0 and row["drift/max"] < 1e-5 and row["tok/dropped"] == 0
        assert row["lr"] == 3e-3 and row["kl"] is None
        phases = ("ask", "publish", "generate", "judge", "exchange", "pack", "handover", "update", "record")
        assert 0 < sum(row[f"time/{phase}_s"] for phase in phases) <= row["time/step_s"]
        assert row["publish/probe_s"] is None  # the learner compares all that was drawn
        assert {r.policy_version for g in groups for r in g.rollouts} == {number - 1}
    assert [row["publish/fingerprint_s"] is None for row in rows] == [True, False, False]  # first before the step
    assert (state.step, state.num_updates, state.policy_version) == (3, 3, 3)
    assert state.totals["response_tok"] == sum(row["tok/response"] for row in rows)
    assert len([line for line in console(components).splitlines() if line.startswith("step ")]) == 3
    assert "  zero-variance groups " in console(components)
    described = set(re.findall(r"[\w/<>]+", step_record.__doc__ or ""))
    added = ("reward/natural", "reward/graph", "time/", "mem/", "gpu/", "energy/")  # under other words, or elsewhere
    assert {key for key in rows[0] if not key.startswith(added)} < described
    assert [p.name for p in (tmp_path / "completions").iterdir()] == ["step-00000002.jsonl"]


def test_a_first_step_or_an_evaluation_without_any_answer_is_warned_of_once(tmp_path: Path) -> None:
    stages = make_stage("first", steps=2), make_stage("second", steps=2)
    components = make_components(tmp_path, *stages, evaluates=True, completions_every=1)
    mute = {-1, -2, -3, *range(12)}  # the first evaluation and the first stage
    components = dataclasses.replace(components, finds_answer=lambda prompt, text: prompt.prompt_id not in mute)
    source_of(components).evaluates = True
    train(components, RunState())
    assert [row["judge/no_answer"] for row in read_steps(tmp_path)] == [1.0, 1.0, 0.0, 0.0]
    warnings = [line for line in console(components).splitlines() if "no answer was found" in line]
    assert ["step 1, the first of stage first" in line for line in warnings].count(True) == 1
    assert not any("of step 2" in line or "of step 3" in line for line in warnings)
    assert any("the evaluation after start" in line for line in warnings)
    assert source_of(components).found == (False,) * 3
    assert "no answer 100%" in console(components)
    answers = [json.loads(x) for x in (tmp_path / "completions" / "step-00000003.jsonl").read_text().splitlines()]
    assert all(row["answered"] is True for row in answers)


def test_completions_stand_beside_their_own_rewards(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=1), completions_every=1)
    train(components, RunState())
    lines = (tmp_path / "completions" / "step-00000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 48
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    assert all(row["reward"] == float("gold" in row["text"].split()) for row in rows)
    by_id = {g.prompt.prompt_id: g for g in source_of(components).observed[0]}
    assert all(row["advantage"] == by_id[row["prompt_id"]].advantages[row["sample"]] for row in rows)


def test_partial_credit_is_not_a_correct_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def graded(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [1.0 if "gold" in text.split() else 0.5 if "iron" in text.split() else -1.0 for text in texts]

    components = make_components(tmp_path, make_stage(steps=1), judge=graded, completions_every=1, evaluates=True)
    counted: list[int] = []
    end = components.log.telemetry.end
    monkeypatch.setattr(
        components.log.telemetry, "end", lambda **told: (counted.append(told["num_correct"]), end(**told))[1]
    )
    train(components, RunState())
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step-00000001.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in rows} == {1.0, 0.5, -1.0}
    assert all(row["correct"] is (row["reward"] == 1) for row in rows)
    assert counted == [sum(row["correct"] for row in rows)]
    evaluation = [json.loads(line) for line in (tmp_path / "completions" / "exam-words.jsonl").read_text().splitlines()]
    assert all(row["correct"] is (row["reward"] == 1) for row in evaluation)


def test_evaluations_run_before_between_and_after_the_stages_once(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage("a", 2), make_stage("b", 1), evaluates=True)
    train(components, RunState())
    assert [label for label, _ in source_of(components).graded] == ["start", "a", "b"]
    names = sorted(p.name for p in (tmp_path / "completions").iterdir())
    assert names == ["exam-a.jsonl", "exam-b.jsonl", "exam-start.jsonl"]
    assert "evaluation after a: " in console(components)


def test_the_sampler_sleeps_while_the_policy_learns_from_demonstrations_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = make_components(tmp_path, make_stage("warm-up", 1, "sft"), evaluates=True)
    assert isinstance(components.sampler, BuiltinSampler)
    caches: list[object] = []
    advance = components.learner.advance

    def spy(*given: Any) -> Any:
        caches.append(components.sampler._decoder)  # type: ignore[attr-defined]
        return advance(*given)

    monkeypatch.setattr(components.learner, "advance", spy)
    train(components, RunState())
    assert source_of(components).graded[0][0] == "start" and caches == [None]


# -- groups without variance
def undecided_on_one_and_two(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [0.5 if p.payload in ("one", "two") else float(i % 2) for i, p in enumerate(prompts)]


def learned_ids(components: Components, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Filled as the run goes: of each step the prompts whose groups were packed, in order."""
    seen: list[list[int]] = []

    def spy(groups: Sequence[Group], **options: Any) -> list[Update]:
        seen.append([g.prompt.prompt_id for g in groups])
        return pack(groups, **options)

    monkeypatch.setattr("isomorph.engine.loop.pack", spy)
    return seen


@pytest.mark.parametrize(
    ("refills", "learned", "drawn", "flat"),
    [
        (0, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [6, 6], [2, 2]),
        (1, [[6, 7, 2, 3, 4, 5], [8, 9, 10, 11, 14, 15]], [8, 8], [4, 2]),
        (3, [[8, 9, 2, 3, 4, 5], [10, 11, 16, 17, 14, 15]], [10, 8], [4, 2]),
    ],
)
def test_groups_without_variance_give_way_to_further_prompts_so_often_and_are_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refills: int,
    learned: list[list[int]],
    drawn: list[int],
    flat: list[int],
) -> None:
    components = make_components(tmp_path, make_stage(steps=2, refills=refills), judge=undecided_on_one_and_two)
    seen = learned_ids(components, monkeypatch)
    state = train(components, RunState())
    assert seen == learned  # words of number 0, 1, 6, 7, 12, 13 are "one" and "two"
    rows = read_steps(tmp_path)
    assert [row["groups/all"] for row in rows] == drawn
    assert [row["groups/refilled"] for row in rows] == [n - 6 for n in drawn]
    assert [row["groups/flat"] for row in rows] == flat
    assert [[g.prompt.prompt_id for g in groups] for groups in source_of(components).observed] == [
        list(range(drawn[0])),
        list(range(drawn[0], sum(drawn))),
    ]
    assert state.source["next_id"] == sum(drawn)
    assert state.totals["response_tok"] == sum(row["tok/response"] for row in rows)


@pytest.mark.parametrize("refills", [0, 1, 3])
def test_surprise_allows_for_each_group_that_is_left_out_for_its_rewards(tmp_path: Path, refills: int) -> None:
    stage = make_stage(steps=1, refills=refills)
    state = train(make_components(tmp_path, stage, judge=undecided_on_one_and_two), RunState())
    (row,) = read_steps(tmp_path)
    surprise = {name: state.totals[f"surprise/{name}"] for name in ("variance", "slack")}
    assert surprise["slack"] ** 2 / surprise["variance"] == pytest.approx(row["groups/flat"], rel=1e-3)


def test_advantages_over_the_whole_batch_are_those_of_the_groups_that_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = dict(baseline="mean", scale="batch")
    components = make_components(
        tmp_path, make_stage(steps=1, refills=2, objective_choices=choices), judge=undecided_on_one_and_two
    )
    packed: list[Group] = []

    def spy(groups: Sequence[Group], **options: Any) -> list[Update]:
        packed.extend(groups)
        return pack(groups, **options)

    monkeypatch.setattr("isomorph.engine.loop.pack", spy)
    train(components, RunState())
    assert len(packed) == 6
    lens = torch.tensor([len(r.token_ids) for group in packed for r in group.rollouts])
    tokens = torch.tensor([i % 2 - 0.5 for i in range(48)], dtype=torch.float64).repeat_interleave(lens)
    for group in packed:
        truth = [(i % 2 - 0.5 - tokens.mean()) / tokens.std() for i in range(8)]
        assert group.advantages == pytest.approx([float(t) for t in truth], rel=1e-5)


# -- memory
class Forgetful(Questions):
    """Keeps nothing of what it was shown; looks at what lives at the beginning of some steps."""

    held: dict[int, tuple[int, int, int]]

    def observe(self, groups: Sequence[Group]) -> None:
        super().observe(groups)
        self.observed.clear()

    def stage_step(self) -> int:
        if self.steps_done in (100, 299):
            gc.collect()
            num_tensors = sum(type(thing) in (Tensor, torch.nn.Parameter) for thing in gc.get_objects())
            self.held[self.steps_done] = num_tensors, len(os.listdir("/proc/self/fd")), threading.active_count()
        return super().stage_step()


@pytest.mark.slow
def test_three_hundred_steps_hold_on_to_nothing(tmp_path: Path) -> None:
    stage = make_stage(steps=300, objective="grpo", objective_choices=dict(kl_coef=0.01), refills=1)
    # a copy that is being written holds tensors, for how long depends on the disk
    saved = dict(checkpoint_every=50, checkpoint_in_background=False)
    components = make_components(tmp_path, stage, judge=gold_but_for_one, **saved)
    source = Forgetful(components.policy, stage)
    source.held = {}
    train(dataclasses.replace(components, source=source), RunState())
    assert source.held[299] == source.held[100]
    assert components.log.telemetry.growth.num_alarms == 0
    rss = [row["mem/rss_gib"] for row in read_steps(tmp_path)]
    assert min(rss[280:]) < min(rss[80:100]) * (
        1 + 2 * MIN_GROWTH
    )  # what the alarm calls growth, from window to window


# -- what ends a run
def test_a_reward_function_that_returns_the_wrong_number_of_rewards_ends_the_run(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), judge=lambda prompts, texts: gold(prompts, texts)[1:])
    with pytest.raises(RunFailed, match="one reward for each response"):
        train(components, RunState())


def test_an_evaluations_reward_function_that_returns_the_wrong_number_of_rewards_ends_the_run(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), judge=lambda prompts, texts: [], evaluates=True)
    with pytest.raises(RunFailed, match="one reward for each response"):
        train(components, RunState())


class Stale:
    """Says that it publishes, and samples from the weights of the beginning."""

    def __init__(self, policy: Policy) -> None:
        self.frozen = make_policy()
        self.inner = BuiltinSampler(self.frozen, SamplerConfig())
        self.policy_version = 0
        self.generate, self.asleep = self.inner.generate, self.inner.asleep

    def publish(self, version: int) -> Publication:
        self.policy_version = version
        return self.inner.publish(version)


def test_a_sampler_with_stale_weights_ends_the_run_before_anything_is_learned_from_it(tmp_path: Path) -> None:
    asked: list[int] = []

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        asked.append(len(texts))
        return gold(prompts, texts)

    components = make_components(tmp_path, make_stage(), sampler_of=Stale, judge=judge, checkpoint_every=1)
    with pytest.raises(RunFailed, match="differ by"):
        train(components, RunState())
    assert sum(asked) == 2 * 48  # the first step's are of the weights of the beginning
    _, weights, _ = load_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    assert sha(components) == weights_sha256(weights)  # the second step's moved nothing


def test_a_sampler_that_starts_with_other_weights_ends_the_run_before_it_is_asked(tmp_path: Path) -> None:
    asked: list[int] = []

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        asked.append(len(texts))
        return gold(prompts, texts)

    def other_weights(policy: Policy) -> Stale:
        sampler = Stale(policy)
        with torch.no_grad():
            sampler.frozen.unembedding.mul_(1.5)
        return sampler

    components = make_components(tmp_path, make_stage(), sampler_of=other_weights, judge=judge)
    with pytest.raises(RunFailed, match="differ by"):
        train(components, RunState())
    assert asked == []


class Drifting(BuiltinSampler):
    """Tells the truth of a probe, which is one prompt, and overstates what it draws for a step."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, *given)
        if len(prompts) == 1:
            return rollouts
        assert all(r.sampler_logprob is not None for r in rollouts)
        return [dataclasses.replace(r, sampler_logprob=r.sampler_logprob + 0.01) for r in rollouts]  # type: ignore[operator]


def test_drift_beyond_what_the_run_allows_ends_it(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), sampler_of=lambda policy: Drifting(policy, SamplerConfig()))
    with pytest.raises(RunFailed, match="differ by 1.00e-02"):
        train(components, RunState())
    assert not (tmp_path / "steps.jsonl").exists()


class Untrue(BuiltinSampler):
    """Draws at half the temperature for which it reports log-probabilities; a probe it answers truly."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        if len(prompts) == 1:
            return super().generate(prompts, sampling, *given)
        rollouts = super().generate(prompts, dataclasses.replace(sampling, temperature=0.5), *given)
        told = trainer_logprob(self.policy, prompts, rollouts, temperature=1.0)
        return [dataclasses.replace(r, sampler_logprob=q) for r, q in zip(rollouts, told, strict=True)]


def test_drawing_from_another_distribution_than_is_reported_ends_the_run(tmp_path: Path) -> None:
    def untrue(policy: Policy) -> Untrue:
        with torch.no_grad():
            policy.unembedding.mul_(4)  # as wide as a language model's logits
        return Untrue(policy, SamplerConfig())

    components = make_components(tmp_path, make_stage(objective_choices=dict(kl_coef=1e-3)), sampler_of=untrue)
    with pytest.raises(RunFailed, match="another distribution than it reports"):
        train(components, RunState())
    rows = read_steps(tmp_path)
    assert rows and all(-row["surprise/limit"] <= row["surprise/z"] < 0 for row in rows)
    assert max(row["drift/p999"] for row in rows) < 1e-5  # there is no drift to see it by


class Dropping(BuiltinSampler):
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, *given)
        return [r if len(r.token_ids) == 1 else without_stop_token(r) for r in rollouts]


def without_stop_token(rollout: Rollout) -> Rollout:
    n = len(rollout.token_ids) - (rollout.finish == "stop")
    assert rollout.sampler_logprob is not None
    return dataclasses.replace(rollout, token_ids=rollout.token_ids[:n], sampler_logprob=rollout.sampler_logprob[:n])


def test_dropped_stop_tokens_end_the_run(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), sampler_of=lambda policy: Dropping(policy, SamplerConfig()))
    with pytest.raises(RunFailed, match="drops stop tokens"):
        train(components, RunState())


def test_a_step_without_any_gradient_moves_nothing_and_publishes_nothing(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=2), judge=lambda prompts, texts: [0.5] * len(texts))
    before = sha(components)
    state = train(components, RunState())
    assert sha(components) == before
    assert (state.step, state.num_updates, state.policy_version) == (2, 0, 0)
    rows = read_steps(tmp_path)
    assert [(row["groups/flat"], row["updates"], row["loss"], row["publish/bytes"]) for row in rows] == [
        (6, 0, None, None)
    ] * 2
