"""Rewards with parts: GDPO, responses without a reward, what a step logs of them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import console, gold, make_components, make_stage

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.loop import train
from isomorph.engine.record.runlog import read_steps
from isomorph.engine.serialise import join_scored, split_scored
from isomorph.engine.types import Group, Prompt, Rollout, RunFailed, RunState, ScoredRollouts, Scores
from isomorph.engine.update.score import checked_scores, normalised_sum, score

NAN = math.nan


def rollouts(num_groups: int, size: int) -> tuple[list[Prompt], list[Rollout]]:
    prompts = [
        Prompt(prompt_id=p, token_ids=(1,), task="t", representation="r", payload=None) for p in range(num_groups)
    ]
    found = [
        Rollout(
            prompt_id=p,
            sample=s,
            token_ids=torch.tensor([2, 3]),
            sampler_logprob=torch.zeros(2),
            finish="stop",
            policy_version=0,
        )
        for p in range(num_groups)
        for s in range(size)
    ]
    return prompts, found


def scores_of(parts: dict[str, list[list[float]]], weights: dict[str, float]) -> Scores:
    """Of several groups, normalised."""
    num = len(next(iter(parts.values())))
    relative = [x for g in range(num) for x in normalised_sum({k: v[g] for k, v in parts.items()}, weights)]
    flat = {name: tuple(x for group in groups for x in group) for name, groups in parts.items()}
    rewards = [
        NAN
        if all(map(math.isnan, each))
        else sum(w * x for w, x in zip(weights.values(), each, strict=True) if not math.isnan(x))
        for each in zip(*flat.values(), strict=True)
    ]
    return Scores(rewards=tuple(rewards), parts=flat, relative=tuple(relative))


def advantages(parts: dict[str, list[list[float]]], weights: dict[str, float], size: int) -> list[float]:
    prompts, drawn = rollouts(len(next(iter(parts.values()))), size)
    groups = score(prompts, drawn, scores_of(parts, weights), ObjectiveConfig(name="grpo"))
    return [advantage for group in groups for advantage in group.advantages]


def test_gdpo_by_hand() -> None:
    """Two groups of two: a reward is (1, -1) / sqrt(2) there, whatever its size (std of n - 1), up to 1e-4."""
    found = advantages({"a": [[1, 0], [0, 0]], "b": [[100, 300], [7, 5]]}, {"a": 1.0, "b": 0.5}, 2)
    unit = math.sqrt(0.5)
    sums = [unit - 0.5 * unit, -unit + 0.5 * unit, 0.5 * unit, -0.5 * unit]
    spread = math.sqrt(sum(x * x for x in sums) / 3)
    assert found == pytest.approx([x / (spread + 1e-4) for x in sums], rel=5e-4)
    assert sum(found) == pytest.approx(0, abs=1e-6)


def test_gdpo_leaves_out_what_does_not_apply_and_what_has_no_variance() -> None:
    parts = {"a": [[1, 0, NAN], [5, 5, 5]], "b": [[NAN, NAN, NAN], [2, 2, 2]]}
    found = advantages(parts, {"a": 1.0, "b": 1.0}, 3)
    assert found[2:] == [0, 0, 0, 0] and found[0] == -found[1] > 0
    prompts, drawn = rollouts(2, 3)
    groups = score(prompts, drawn, scores_of(parts, {"a": 1.0, "b": 1.0}), ObjectiveConfig(name="grpo"))
    assert [group.has_zero_variance for group in groups] == [False, True]
    assert [group.is_trained for group in groups] == [(True, True, False), (True, True, True)]
    equal_sums = scores_of({"a": [[1, 0]], "b": [[0, 1]]}, {"a": 1.0, "b": 1.0})
    prompts, drawn = rollouts(1, 2)
    (group,) = score(prompts, drawn, dataclasses.replace(equal_sums, rewards=(1.0, 1.0)), ObjectiveConfig(name="grpo"))
    assert group.has_zero_variance  # both are worth the same, also one by one


@pytest.mark.filterwarnings("ignore")
def test_gdpo_is_trls(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from test_trl_adapter import WORDS, model_of, trainer_of

    trainer = trainer_of(tmp_path, model_of(), max_steps=1)
    if not hasattr(trainer, "multi_objective_aggregation"):
        pytest.skip("this TRL has no GDPO")
    given: dict[str, list[float]] = {"a": [], "b": []}

    def a(completions: list[str], **columns: Any) -> list[float]:
        given["a"] += (found := [float(len(text) % 7) for text in completions])
        return found

    def b(completions: list[str], **columns: Any) -> list[float | None]:
        found = [None if text.count(WORDS[3]) else float(text.count(WORDS[0]) + len(text) % 2) for text in completions]
        given["b"] += [NAN if value is None else value for value in found]
        return found

    trainer.multi_objective_aggregation = "normalize_then_sum"
    trainer.reward_funcs, trainer.reward_func_names = [a, b], ["a", "b"]
    trainer.reward_processing_classes = [None, None]
    trainer.reward_weights = torch.tensor([1.0, 0.3])
    drawn: list[torch.Tensor] = []
    original = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: _kept(original(inputs), drawn)
    trainer.train()
    grouped = {name: [values[i : i + 4] for i in (0, 4)] for name, values in given.items()}
    assert len(set(given["a"])) > 1
    found = advantages(grouped, {"a": 1.0, "b": 0.3}, 4)
    assert found == pytest.approx(drawn[0].tolist(), abs=2e-5)


def _kept(output: dict[str, Any], drawn: list[torch.Tensor]) -> dict[str, Any]:
    drawn.append(output["advantages"])
    return output


def test_a_response_without_a_reward_has_no_part_in_the_others_advantages() -> None:
    prompts, drawn = rollouts(2, 3)
    scores = Scores(rewards=(1, NAN, 0, NAN, NAN, 5), parts={"a": (1, NAN, 0, NAN, NAN, 5)})
    for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp"):
        objective = ObjectiveConfig(name=name)  # type: ignore[arg-type]
        first, second = score(prompts, drawn, scores, objective)
        alone = [r for r in drawn if (r.prompt_id, r.sample) in ((0, 0), (0, 2))]
        if name != "reinforce_pp":
            (pair,) = score(prompts[:1], alone, Scores(rewards=(1, 0)), objective)
            assert first.advantages == (pair.advantages[0], 0, pair.advantages[1])
            assert second.advantages == (0, 0, 0)  # one that is compared with nothing
        assert first.is_trained == (True, False, True) and first.known_rewards == [1, 0]


def test_nan_without_a_part_that_says_so_ends_the_run() -> None:
    class Judge:
        def __init__(self, part: float) -> None:
            self.part = part

        def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
            raise AssertionError("score is called instead")

        def score(self, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Sequence[Rollout]) -> Scores:
            return Scores(rewards=(NAN,), parts={"a": (self.part,)})

    prompts, drawn = rollouts(1, 1)
    assert math.isnan(checked_scores(Judge(NAN), prompts, ["x"], drawn).rewards[0])
    with pytest.raises(RunFailed, match="finite"):
        checked_scores(Judge(1.0), prompts, ["x"], drawn)


def test_scores_are_cut_joined_and_written() -> None:
    one = Scores(rewards=(1.0, NAN), parts={"a": (1.0, NAN)}, correct=(True, False), outcomes={"a": ("value", "none")})
    other = Scores(rewards=(0.5,), parts={"b": (0.5,)}, correct=(False,), masked=(True,))
    both = Scores.joined([one, other])
    assert both.outcomes == {"a": ("value", "none", "absent"), "b": ("absent", "absent", "value")}
    assert both.masked == (False, False, True) and both.correct == (True, False, False)
    assert both.slice(0, 1).parts["a"] == (1.0,)
    fields, tensors = split_scored(ScoredRollouts(rollouts=(), texts=(), scores=both))
    again = join_scored(json.loads(json.dumps(fields)), tensors).scores
    assert repr(again) == repr(both)
    old = {**fields, "rewards": [1.0]}
    del old["scores"]
    assert join_scored(old, tensors).scores == Scores(rewards=(1.0,))


class Parts:
    """Two rewards, of which one fails on some responses; long responses are masked."""

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return gold(prompts, texts)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Sequence[Rollout]) -> Scores:
        right = tuple(gold(prompts, texts))
        short = tuple(0.0 if r.sample == 7 else 1 / len(r.token_ids) for r in rollouts)
        return Scores(
            rewards=tuple(a + b for a, b in zip(right, short, strict=True)),
            parts={"right": right, "short": short},
            correct=tuple(reward == 1 for reward in right),
            masked=tuple(r.finish == "length" for r in rollouts),
            outcomes={
                "right": ("value",) * len(texts),
                "short": tuple("error" if r.sample == 7 else "value" for r in rollouts),
            },
        )


def test_a_step_logs_each_reward_apart(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=2), judge=Parts(), completions_every=1)
    train(components, RunState())
    (first, _) = read_steps(tmp_path)
    rows = [json.loads(x) for x in (tmp_path / "completions" / "step-00000001.jsonl").read_text().splitlines()]
    for name in ("right", "short"):
        values = torch.tensor([row["rewards"][name] for row in rows], dtype=torch.float64)
        assert first[f"reward/{name}/mean"] == pytest.approx(values.mean().item())
        assert first[f"reward/{name}/std"] == pytest.approx(values.std().item())
    assert first["reward/short/errors"] == 6 and first["reward/right/errors"] == 0
    assert first["reward/mean"] == pytest.approx(first["reward/right/mean"] + first["reward/short/mean"])
    assert first["response/masked"] == sum(row["finish"] == "length" for row in rows) > 0
    assert [row["correct"] for row in rows] == [row["rewards"]["right"] == 1 for row in rows]
    line = next(line for line in console(components).splitlines() if line.startswith("step "))
    assert f"right {first['reward/right/mean']:.3f}  short" in line and "failed rewards 6" in line


def test_the_mask_of_a_group_is_told() -> None:
    prompts, drawn = rollouts(1, 3)
    scores = Scores(rewards=(1, 0, NAN), parts={"a": (1, 0, NAN)}, masked=(False, True, False))
    group = Group(
        prompt=prompts[0], rollouts=tuple(drawn), rewards=scores.rewards, advantages=(1, -1, 0), scores=scores
    )
    assert group.is_trained == (True, False, False)
