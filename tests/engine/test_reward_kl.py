"""KL taken off the reward, through packing, decoder and learner, against the papers' formulas on padded full logits.

RLOO (arXiv 2402.14740): R - coef * sum_t k1[t] of the whole response, less the mean of the group's others.
REINFORCE++ (arXiv 2501.03262): return-to-go of the token rewards, whitened over the tokens of a step.
"""

import math
from typing import Any

import pytest
import torch
from test_distributed import make_groups, make_policy, make_stage, step_on
from torch import Tensor
from truth import transformers_twin

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.types import Group, Prompt, Rollout, Scores
from isomorph.engine.update.advantage import penalised, whitened
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import score

COEF = 0.3
GROUPS = make_groups(((5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3)), (4, (8, 2, 1))))


def logprobs(model: Any, groups: list[Group]) -> list[Tensor]:
    found = []
    for g in groups:
        for r in g.rollouts:
            ids = torch.tensor([[*g.prompt.token_ids, *r.token_ids.tolist()]])
            rows = model(input_ids=ids).logits[0, len(g.prompt.token_ids) - 1 : -1].log_softmax(-1)
            found.append(rows.gather(1, r.token_ids[:, None])[:, 0])
    return found


def models() -> tuple[Any, list[Tensor], list[Tensor]]:
    """A model of transformers with the policy's weights; log-probabilities by the policy, and by the reference."""
    policy = make_policy()
    model = transformers_twin(policy)
    known = []
    for factor in (0.9, 1.0):  # step_on's reference comes first
        with torch.no_grad():
            for p, value in zip(model.parameters(), policy.snapshot(), strict=True):
                p.copy_(factor * value)
            known.append(logprobs(model, GROUPS))
    return model, known[1], known[0]


def true_advantages(o: ObjectiveConfig, old: list[Tensor], ref: list[Tensor]) -> list[Tensor]:
    """[n] of each response."""
    kl = [a - b for a, b in zip(old, ref, strict=True)]
    rewards = [r for g in GROUPS for r in g.rewards]
    if o.baseline == "none":
        tokens = []
        for r, cost in zip(rewards, kl, strict=True):
            tokens.append(torch.tensor([r - COEF * float(cost[t:].sum()) for t in range(len(cost))]))
    else:
        worth = [r - COEF * float(cost.sum()) for r, cost in zip(rewards, kl, strict=True)]
        tokens = []
        for i, cost in enumerate(kl):
            group = worth[3 * (i // 3) : 3 * (i // 3) + 3]
            others = sum(group) - worth[i]
            value = worth[i] - (others / 2 if o.baseline == "leave_one_out" else sum(group) / 3)
            if o.scale == "std":
                mean = sum(group) / 3
                value /= math.sqrt(sum((w - mean) ** 2 for w in group) / 2) + 1e-4
            tokens.append(torch.full((len(cost),), value))
    if o.scale == "batch":
        flat = torch.cat(tokens)
        tokens = [(t - flat.mean()) / (flat.var() + 1e-8).sqrt() for t in tokens]
    return tokens


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "o",
    [
        ObjectiveConfig(name="rloo", reward_kl_coef=COEF),
        ObjectiveConfig(name="reinforce_pp", reward_kl_coef=COEF),
        ObjectiveConfig(name="reinforce_pp", baseline="mean", reward_kl_coef=COEF),
        ObjectiveConfig(name="grpo", reward_kl_coef=COEF),
        ObjectiveConfig(name="dr_grpo", reward_kl_coef=COEF),
    ],
    ids=lambda o: f"{o.name}-{o.baseline}",
)
def test_the_gradient_is_that_of_the_penalised_reward(o: ObjectiveConfig) -> None:
    model, old, ref = models()
    advantages = true_advantages(o, old, ref)
    for micro_batch_tok in (1000, 14):
        gradients, _ = step_on(ALONE, o, GROUPS, dict(prompts=4, prompts_per_update=2, micro_batch_tok=micro_batch_tok))
        for u, gradient in enumerate(gradients):
            own = range(6 * u, 6 * u + 6)
            now = logprobs(model, GROUPS[2 * u : 2 * u + 2])
            terms = [-advantages[i] * lp for i, lp in zip(own, now, strict=True)]  # at ratio 1: REINFORCE
            if o.aggregation == "token":
                loss = torch.cat(terms).mean()
            elif o.ratio == "product":  # mean over sequences of the sum over tokens
                loss = torch.stack([term.sum() for term in terms]).mean()
            elif o.aggregation == "sequence":
                loss = torch.stack([term.mean() for term in terms]).mean()
            else:
                loss = torch.cat(terms).sum() / (6 * make_stage(o).sampling.max_new_tok)
            truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            assert truth.norm() > 1e-3
            torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-10)


def test_whitening_counts_every_token_once_and_leaves_no_dust_where_all_are_equal() -> None:
    values, counts = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([3, 2, 0])
    tokens = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    (found,) = whitened([values], [counts])
    torch.testing.assert_close(found, (values - tokens.mean()) / (tokens.var() + 1e-8).sqrt())
    assert whitened([torch.full((3,), 0.1)], [counts])[0].tolist() == [0.0, 0.0, 0.0]
    assert whitened([values], [torch.zeros(3)])[0].tolist() == [0.0, 0.0, 0.0]


def drawn(rewards: list[float], lens: list[int], o: ObjectiveConfig, masked: tuple[bool, ...] | None = None) -> Any:
    """A scored group of one prompt, its update in one micro-batch, and the sampler's log-probabilities."""
    prompt = Prompt(prompt_id=0, token_ids=(2, 3), task="", representation="", payload=None)
    rollouts = [
        Rollout(
            prompt_id=0,
            sample=i,
            token_ids=torch.arange(4, 4 + n),
            sampler_logprob=torch.linspace(-1.0, -2.0, n),
            finish="length",
            policy_version=0,
        )
        for i, n in enumerate(lens)
    ]
    groups = score([prompt], rollouts, Scores(rewards=tuple(rewards), masked=masked), o)
    updates = pack(groups, micro_batch_tok=1000, prompts_per_update=None, objective=o, device=torch.device("cpu"))
    return groups[0], updates, [[batch.sampler_logprob for batch in update.batches] for update in updates]


def of_responses(updates: Any, advantage: Tensor) -> list[float]:
    """The first token's, of each response in the micro-batch."""
    seq_id = updates[0].batches[0].seq_id
    return [advantage[seq_id == i][0].item() for i in range(int(seq_id.max()) + 1)]


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo"])
def test_a_response_without_a_reward_has_no_part_in_the_others_advantages(name: Any) -> None:
    o = ObjectiveConfig(name=name, reward_kl_coef=COEF)
    _, updates, old = drawn([1.0, 0.0, 0.5, math.nan], [3, 2, 4, 5], o)
    reference = [[logprob - 0.1 for logprob in old[0]]]  # a KL of 0.1 a token
    found = of_responses(updates, penalised(updates, old, reference, o)[0][0])
    plain, _, _ = drawn([1.0 - 0.3 * COEF, 0.0 - 0.2 * COEF, 0.5 - 0.4 * COEF], [3, 2, 4], o)
    assert found == pytest.approx(list(plain.advantages), abs=1e-6)
    _, updates, old = drawn([1.0, math.nan], [3, 3], o)  # is compared with nothing
    reference = [[logprob - 0.1 for logprob in old[0]]]
    assert of_responses(updates, penalised(updates, old, reference, o)[0][0]) == [0.0]


def test_a_masked_response_does_not_move_the_baseline_by_a_kl_that_nobody_knows() -> None:
    o = ObjectiveConfig(name="dr_grpo", reward_kl_coef=COEF)
    _, updates, old = drawn([1.0, 1.0, 1.0, 0.0], [3, 3, 3, 3], o, masked=(False, False, False, True))
    reference = [[logprob - 0.1 for logprob in old[0]]]
    assert of_responses(updates, penalised(updates, old, reference, o)[0][0]) == pytest.approx([0.25] * 3)


def test_masked_tokens_are_not_among_those_that_advantages_are_whitened_over() -> None:
    o, masked = ObjectiveConfig(name="reinforce_pp"), (False, False, True)
    group, _, _ = drawn([1.0, 0.0, 0.0], [2, 4, 50], o, masked)
    plain, _, _ = drawn([1.0, 0.0], [2, 4], o)
    assert group.advantages[:2] == pytest.approx(plain.advantages, abs=1e-6)
