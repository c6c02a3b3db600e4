import math
import threading
from collections.abc import Sequence

import pytest
import torch

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.types import Group, Judge, Prompt, Rollout, RunFailed, Scores
from isomorph.engine.update.score import RewardThread, answers_found, score, share_without_answer, warning_of_no_answer


def prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, token_ids=(1, prompt_id), task="t", representation="natural", payload=None)


def rollout(prompt_id: int, sample: int) -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        sample=sample,
        token_ids=torch.tensor([10 * prompt_id + sample, 3]),
        sampler_logprob=torch.tensor([-1.0, -1.0]),
        finish="stop",
        policy_version=0,
    )


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


class Rewards:
    """A judge that knows the reward of each of ``ROLLOUTS``, in their order, and remembers what it was asked."""

    def __init__(self, *rewards: float) -> None:
        self.rewards = rewards
        self.asked: list[tuple[int, str]] = []

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        self.asked += [(p.prompt_id, text) for p, text in zip(prompts, texts, strict=True)]
        known = {decode(r.token_ids.tolist()): reward for r, reward in zip(ROLLOUTS, self.rewards, strict=True)}
        return [known[text] for text in texts]


def test_a_response_without_an_answer_is_told_from_a_wrong_one() -> None:
    asked = [prompt(0), prompt(1)]
    texts = ["<a>1</a>", "what\x1b[2J " + "x" * 500 + " the end", "<a>3</a>", ""]
    found = answers_found(lambda _, text: "<a>" in text, asked, texts)
    assert found == [True, False, True, False] and share_without_answer(found) == 0.5
    by_prompt = answers_found(lambda question, _: question is asked[1], asked, texts)
    assert by_prompt == [False, False, True, True]
    assert warning_of_no_answer("step 1", found, texts, 0.5) == ""
    warning = warning_of_no_answer("step 1", [False] * 4, texts[1:2] * 4, 0.5)
    assert "any of the 4 responses of step 1, 50% of which were cut off" in warning
    assert "what\\x1b[2J x" in warning and 'the end"' in warning and "\x1b" not in warning and len(warning) < 500
    assert answers_found(None, asked, texts) is None and math.isnan(share_without_answer(None))
    assert warning_of_no_answer("step 1", None, texts, 0.5) == ""


def judge_and_score(judge: Judge, objective: ObjectiveConfig) -> tuple[list[Group], list[str]]:
    """All groups handed in, the last one first."""
    with RewardThread(judge, decode, PROMPTS) as rewarding:
        rewarding.add(1, ROLLOUTS[3:])
        rewarding.add(0, ROLLOUTS[:3])
        texts, scores = rewarding.results()
    return score(PROMPTS, ROLLOUTS, scores, objective), texts


PROMPTS = [prompt(4), prompt(2)]
ROLLOUTS = [rollout(4, 0), rollout(4, 1), rollout(4, 2), rollout(2, 0), rollout(2, 1), rollout(2, 2)]


def advantages(judge: Rewards, **objective: str) -> list[tuple[float, ...]]:
    groups, _ = judge_and_score(judge, ObjectiveConfig.model_validate(objective))
    return [g.advantages for g in groups]


def test_each_response_is_scored_with_its_own_prompt() -> None:
    judge = Rewards(1, 0, 0, 0, 1, 1)
    groups, texts = judge_and_score(judge, ObjectiveConfig())
    assert sorted(judge.asked) == [(2, "20 3"), (2, "21 3"), (2, "22 3"), (4, "40 3"), (4, "41 3"), (4, "42 3")]
    assert texts == ["40 3", "41 3", "42 3", "20 3", "21 3", "22 3"]
    assert [g.prompt.prompt_id for g in groups] == [4, 2]
    assert [g.rewards for g in groups] == [(1, 0, 0), (0, 1, 1)]
    assert all(r.prompt_id == g.prompt.prompt_id for g in groups for r in g.rollouts)


def test_advantages_are_the_formulas_of_the_papers() -> None:
    std = math.sqrt(1 / 3)  # of (1, 0, 0), with n - 1
    grpo = advantages(Rewards(1, 0, 0, 0, 1, 1), name="grpo")
    assert grpo[0] == pytest.approx([(2 / 3) / (std + 1e-4), -(1 / 3) / (std + 1e-4), -(1 / 3) / (std + 1e-4)])
    dr_grpo = advantages(Rewards(1, 0, 0, 0, 1, 1), name="dr_grpo")
    assert dr_grpo[1] == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    rloo = advantages(Rewards(1, 0, 0, 0, 1, 1), name="rloo")
    assert rloo[0] == pytest.approx([1.0, -0.5, -0.5])
    over_all = advantages(Rewards(1, 0, 0, 0, 1, 1), name="reinforce_pp")
    half = 0.5 / math.sqrt(12 * 0.25 / 11 + 1e-8)  # of twelve tokens, six of them worth 1
    assert over_all[0] == pytest.approx([half, -half, -half])
    assert advantages(Rewards(1, 0, 0, 0, 0.5, 1), name="sft") == [(1, 0, 0), (0, 0.5, 1)]


def test_a_group_without_variance_has_advantage_zero_exactly() -> None:
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"):
        assert advantages(Rewards(0.1, 0.1, 0.1, 1, 0, 0), name=name)[0] == (0, 0, 0)
    assert advantages(Rewards(*[0.1] * 6), name="reinforce_pp") == [(0, 0, 0), (0, 0, 0)]


def test_a_group_of_one_is_refused_where_responses_are_compared() -> None:
    alone = [rollout(4, 0), rollout(2, 0)]
    with pytest.raises(ValueError, match="one response"):
        score(PROMPTS, alone, Scores(rewards=(1, 0)), ObjectiveConfig(name="grpo"))
    groups = score(PROMPTS, alone, Scores(rewards=(1, 0)), ObjectiveConfig(name="rft"))
    assert [g.advantages for g in groups] == [(1,), (0,)]


@pytest.mark.parametrize("rollouts", [ROLLOUTS[:5], []])
def test_prompts_with_different_numbers_of_rollouts_are_refused(rollouts: list[Rollout]) -> None:
    with pytest.raises(ValueError, match="same number of rollouts"):
        score(PROMPTS, rollouts, Scores(rewards=(0,) * len(rollouts)), ObjectiveConfig())


def test_rollouts_in_another_order_than_their_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        score(PROMPTS, ROLLOUTS[3:] + ROLLOUTS[:3], Scores(rewards=(0,) * 6), ObjectiveConfig())


@pytest.mark.parametrize("rewards", [(1, 0), (1, 0, 0, 0), ()])
def test_a_wrong_number_of_rewards_ends_the_run(
    rewards: tuple[float, ...],
) -> None:
    with pytest.raises(RunFailed, match="one reward for each response"):
        judge_and_score(lambda prompts, texts: list(rewards), ObjectiveConfig())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_reward_that_is_not_finite_in_float32_ends_the_run(bad: float) -> None:
    with pytest.raises(RunFailed, match="finite"):
        judge_and_score(Rewards(1, 0, bad, 0, 1, 1), ObjectiveConfig())


def test_a_group_is_scored_while_another_is_still_being_sampled() -> None:
    called, judged = threading.Event(), []

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        judged.append([p.prompt_id for p in prompts])
        called.set()
        return [0.0] * len(texts)

    with RewardThread(judge, decode, PROMPTS) as rewarding:
        rewarding.add(1, ROLLOUTS[3:])
        assert called.wait(10)  # before the other group is there
        rewarding.add(0, ROLLOUTS[:3])
        rewarding.results()
    assert judged == [[2, 2, 2], [4, 4, 4]]


def test_what_the_reward_function_raised_ends_sampling_at_the_next_group() -> None:
    def broken(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        raise RunFailed("the judge is broken")

    with RewardThread(broken, decode, PROMPTS) as rewarding:
        rewarding.add(1, ROLLOUTS[3:])
        rewarding._thread.submit(lambda: None).result()  # its only thread is past the first group
        with pytest.raises(RunFailed, match="broken"):
            rewarding.add(0, ROLLOUTS[:3])


def test_groups_that_arrive_during_a_reward_call_are_scored_in_one_call() -> None:
    prompts, is_first, may_go = [prompt(i) for i in range(5)], threading.Event(), threading.Event()
    calls: list[int] = []

    def judge(asked: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        calls.append(len(texts))
        is_first.set()
        assert may_go.wait(10)
        return [float(p.prompt_id) for p in asked]

    with RewardThread(judge, decode, prompts) as rewarding:
        rewarding.add(3, [rollout(3, 0)])
        assert is_first.wait(10)
        for i in (4, 0, 2, 1):
            rewarding.add(i, [rollout(i, 0)])
        may_go.set()
        assert rewarding.results()[1].rewards == (0, 1, 2, 3, 4)
    assert calls == [1, 4]
