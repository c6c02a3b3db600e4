"""Every loss against one independent truth: padded [S, L], sequence by sequence, from the papers' formulas, float64.

Once on given logits, over the whole grid of choices; once through packing, the decoder and the learner, against
transformers' own forward on repeated, padded prompts.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from small_world import moved, one_thread  # noqa: F401
from torch import Tensor
from truth import exact_norms, transformers_twin

from isomorph.engine.config import ObjectiveConfig, SamplingConfig, Stage, TinyModel
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import Group, Prompt, Rollout
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import Update, pack
from isomorph.engine.update.objective import MAX_LOG_RATIO, TokenInputs, kl_estimate, loss_of_tokens, token_weight
from isomorph.engine.update.round import Tally
from isomorph.kernels.linear_logprob import TokenStats

MAX_NEW_TOK = 9
REINFORCED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp")
ALL_CHOICES = dict(
    aggregation=("token", "sequence", "constant"),
    ratio=("token", "sequence", "product"),
    kl=(None, "k1", "k2", "k3"),
    importance_sampling=(
        None,
        ("token", "truncate"),
        ("token", "mask"),
        ("sequence", "truncate"),
        ("sequence", "mask"),
    ),
    clip=(None, (0.1, 0.2)),
    entropy_coef=(0.0, 0.03),
)


def objective(name: str, choices: dict[str, Any]) -> ObjectiveConfig:
    low, high = choices["clip"] or (None, None)
    importance_sampling, mode = choices["importance_sampling"] or ("off", "truncate")
    return ObjectiveConfig(
        name=name,  # type: ignore[arg-type]
        aggregation=choices["aggregation"],
        ratio=choices["ratio"],
        clip_low=low,
        clip_high=high,
        kl_coef=0.2 if choices["kl"] else 0.0,
        kl_estimator=choices["kl"] or "k3",
        entropy_coef=choices["entropy_coef"],
        importance_sampling=importance_sampling,
        importance_sampling_mode=mode,
        importance_sampling_cap=1.2,
    )


def every_choice() -> Iterator[dict[str, Any]]:
    for values in itertools.product(*ALL_CHOICES.values()):
        yield dict(zip(ALL_CHOICES, values, strict=True))


# -- the truth
@dataclass(frozen=True, kw_only=True)
class Known:
    """Of one sequence: [n] float64 each, and its advantage."""

    logprob: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantage: float


def true_loss(o: ObjectiveConfig, sequences: list[Known]) -> Tensor:
    if o.name == "rft":
        sequences = [s for s in sequences if s.advantage != 0]
    losses = [_sequence_loss(o, s) for s in sequences]
    if o.aggregation == "token":
        return torch.cat(losses).mean()
    if o.aggregation == "sequence":
        return torch.stack([loss.mean() for loss in losses]).mean()
    return torch.cat(losses).sum() / (len(sequences) * MAX_NEW_TOK)


def _sequence_loss(o: ObjectiveConfig, s: Known) -> Tensor:
    if o.name == "sft":
        return -s.logprob
    if o.name == "rft":
        return -s.advantage * s.logprob
    ratio = (s.logprob - (s.sampler if o.old_logprob == "sampler" else s.old)).exp()
    if o.ratio == "sequence":  # GSPO (arXiv 2507.18071), equation 7
        ratio = (ratio.log().sum() / len(ratio)).exp().expand(len(ratio))
    if o.ratio == "product":  # RLOO (arXiv 2402.14740): the whole response is one action
        ratio = ratio.prod().expand(len(ratio))
    advantage = torch.full_like(ratio, s.advantage)
    loss = -_surrogate(o, ratio, s.logprob, advantage) * _correction(o, s)
    if o.kl_coef and o.kl_estimator == "k1":
        loss = loss + o.kl_coef * (s.logprob - s.ref)
    if o.kl_coef and o.kl_estimator == "k2":
        loss = loss + o.kl_coef * (s.logprob - s.ref) ** 2 / 2
    if o.kl_coef and o.kl_estimator == "k3":
        loss = loss + o.kl_coef * ((s.ref - s.logprob).exp() - 1 - (s.ref - s.logprob))
    return loss - o.entropy_coef * s.entropy


def _surrogate(o: ObjectiveConfig, ratio: Tensor, logprob: Tensor, advantage: Tensor) -> Tensor:
    low = -math.inf if o.clip_low is None else 1 - o.clip_low
    high = math.inf if o.clip_high is None else 1 + o.clip_high
    if o.name == "cispo":  # arXiv 2506.13585, equation 4
        weight = ratio.clamp(low, high).detach()
        return weight * advantage * logprob
    bounded = ratio.clamp(low, high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    if o.clip_dual is not None:  # arXiv 1912.09729, equation 4
        gain = torch.where(advantage < 0, torch.maximum(gain, o.clip_dual * advantage), gain)
    return gain


def _correction(o: ObjectiveConfig, s: Known) -> Tensor:
    if o.old_logprob == "sampler":
        return torch.ones_like(s.old)
    weight = s.old.exp() / s.sampler.exp()
    if o.importance_sampling == "off":
        return torch.ones_like(weight)
    if o.importance_sampling == "sequence":
        weight = weight.prod().expand(len(weight))
    low, high, truncates = o.importance_sampling_floor, o.importance_sampling_cap, o.importance_sampling_mode != "mask"
    weight = weight.masked_fill(weight > high, high if truncates else 0.0)
    return weight.masked_fill(weight < low, low if truncates else 0.0)


# -- on given logits
LENS = (4, 1, 6, 3, 5)
ADVANTAGES = (1.3, -0.7, -1.9, 0.0, 0.8)
NUM_TOK = sum(LENS)


@dataclass(frozen=True, kw_only=True)
class Case:
    logits: Tensor  # [N, V] leaf
    stats: TokenStats
    rows: TokenInputs
    seq_id: Tensor


def case(seed: int = 0, spread: float = 0.3) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(NUM_TOK, generator=generator, dtype=torch.float64)

    logits = torch.randn(NUM_TOK, 8, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
    target = torch.randint(8, (NUM_TOK, 1), generator=generator)
    logprob_NV = logits.log_softmax(-1)
    stats = TokenStats(
        logprob_NV.gather(1, target)[:, 0], -(logprob_NV.exp() * logprob_NV).sum(-1), logits.logsumexp(-1)
    )
    seq_id = torch.arange(len(LENS)).repeat_interleave(torch.tensor(LENS))
    now = stats.logprob.detach()
    rows = TokenInputs(
        weight=torch.ones(NUM_TOK),
        advantage=torch.tensor(ADVANTAGES, dtype=torch.float64)[seq_id],
        seq_id=seq_id,
        old_logprob=now + noise(spread),
        ref_logprob=now + noise(spread),
        sampler_logprob=now + noise(spread),
    )
    return Case(logits=logits, stats=stats, rows=rows, seq_id=seq_id)


def known(c: Case) -> list[Known]:
    columns = (c.stats.logprob, c.stats.entropy, c.rows.old_logprob, c.rows.ref_logprob, c.rows.sampler_logprob)
    parts = zip(*(column.split(LENS) for column in columns if column is not None), ADVANTAGES, strict=True)
    names = ("logprob", "entropy", "old", "ref", "sampler", "advantage")
    return [Known(**dict(zip(names, part, strict=True))) for part in parts]


def our_loss(o: ObjectiveConfig, c: Case) -> Tensor:
    accepted = [length for length, a in zip(LENS, ADVANTAGES, strict=True) if o.name != "rft" or a]
    weight = token_weight(
        o,
        c.seq_id,
        len(LENS),
        num_loss_tok=sum(accepted),
        num_step_seqs=len(accepted),
        max_new_tok=MAX_NEW_TOK,
        dtype=torch.float64,
    )
    rows = c.rows if o.kl_coef else TokenInputs(**{**_fields(c.rows), "ref_logprob": None})
    return (weight * loss_of_tokens(o, c.stats, rows).loss).sum()


def _fields(rows: TokenInputs) -> dict[str, Any]:
    return {name: getattr(rows, name) for name in TokenInputs.__slots__}


def assert_same_loss_and_gradient(o: ObjectiveConfig, c: Case) -> None:
    ours, truth = our_loss(o, c), true_loss(o, known(c))
    (our_grad,) = torch.autograd.grad(ours, c.logits, retain_graph=True)
    (true_grad,) = torch.autograd.grad(truth, c.logits, retain_graph=True)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13, msg=lambda m: f"{o}: {m}")
    torch.testing.assert_close(our_grad, true_grad, rtol=1e-11, atol=1e-13, msg=lambda m: f"{o}: {m}")


@pytest.mark.parametrize("name", REINFORCED)
def test_every_combination_of_choices_is_the_papers_formula(name: str) -> None:
    c = case()
    for choices in every_choice():
        assert_same_loss_and_gradient(objective(name, choices), c)


@pytest.mark.parametrize("name", REINFORCED)
@pytest.mark.parametrize("ratio", ALL_CHOICES["ratio"])
@pytest.mark.parametrize(
    "choices",
    [
        dict(clip_dual=1.3, clip_high=0.2),
        dict(clip_dual=1.3, clip_low=None, clip_high=None),
        dict(old_logprob="sampler"),
        dict(old_logprob="sampler", clip_high=0.2, clip_dual=1.3, kl_coef=0.1),
        dict(importance_sampling="token", importance_sampling_cap=1.2, importance_sampling_floor=0.9),
        dict(importance_sampling="sequence", importance_sampling_mode="mask", importance_sampling_floor=0.5),
        dict(importance_sampling="token", importance_sampling_mode="mask", importance_sampling_floor=0.9),
    ],
)
def test_further_bounds_and_the_samplers_log_probabilities_are_in_the_formula(
    name: Any, ratio: Any, choices: dict[str, Any]
) -> None:
    c = case()
    assert_same_loss_and_gradient(ObjectiveConfig(name=name, ratio=ratio, **choices), c)
    assert c.rows.old_logprob is not None and c.rows.sampler_logprob is not None
    of_worse = (c.stats.logprob - c.rows.old_logprob).exp()[c.rows.advantage < 0]
    assert (of_worse > 1.3).any() and (of_worse < 1.3).any()
    weight = (c.rows.old_logprob - c.rows.sampler_logprob).exp()
    assert (weight < 0.9).any() and ((weight > 0.9) & (weight < 1.2)).any() and (weight > 1.2).any()


@pytest.mark.parametrize("name", ["sft", "rft"])
@pytest.mark.parametrize("aggregation", ALL_CHOICES["aggregation"])
def test_supervised_losses_are_the_mean_log_probability(name: Any, aggregation: Any) -> None:
    assert_same_loss_and_gradient(ObjectiveConfig(name=name, aggregation=aggregation), case())


def test_the_grid_meets_every_branch_of_every_clip() -> None:
    c = case()
    assert c.rows.old_logprob is not None and c.rows.sampler_logprob is not None
    ratio = (c.stats.logprob - c.rows.old_logprob).exp()
    for sign in (-1, 1):
        of_sign = ratio[c.rows.advantage.sign() == sign]
        assert (of_sign < 0.9).any() and (of_sign > 1.2).any() and ((of_sign > 0.9) & (of_sign < 1.2)).any()
    weight = (c.rows.old_logprob - c.rows.sampler_logprob).exp()
    assert (weight > 1.2).any() and (weight < 1.2).any()
    products = torch.stack([w.prod() for w in weight.split(LENS)])
    assert (products > 1.2).any() and (products < 1.2).any()


@pytest.mark.parametrize("name", REINFORCED)
def test_a_token_counts_as_clipped_where_the_clip_changed_something(name: str) -> None:
    c = case()
    o = ObjectiveConfig(name=name, clip_low=0.1, clip_high=0.2, ratio="token")  # type: ignore[arg-type]
    token = loss_of_tokens(o, c.stats, c.rows)
    assert c.rows.old_logprob is not None
    ratio, advantage = (c.stats.logprob - c.rows.old_logprob).exp(), c.rows.advantage
    if name == "cispo":
        is_clipped = (ratio < 0.9) | (ratio > 1.2)
    else:
        is_clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.9))
    assert torch.equal(token.is_clipped, is_clipped)
    gradient = torch.autograd.grad(token.loss.sum(), c.stats.logprob, retain_graph=True)[0]
    has_none = is_clipped if name != "cispo" else torch.zeros_like(is_clipped)
    assert torch.equal(gradient == 0, has_none | (advantage == 0))


@pytest.mark.parametrize("name", REINFORCED)
def test_without_an_old_policy_the_ratio_is_one_and_the_gradient_is_reinforce(name: str) -> None:
    c = case()
    rows = TokenInputs(**{**_fields(c.rows), "old_logprob": None})
    o = ObjectiveConfig(name=name)  # type: ignore[arg-type]
    token = loss_of_tokens(o, c.stats, rows)
    assert not token.is_clipped.any()
    if name != "cispo":
        torch.testing.assert_close(token.loss, -rows.advantage, rtol=0, atol=0)
    loss = [loss.mean() for loss in token.loss.split(LENS)] if o.ratio != "token" else token.loss
    reinforce = -rows.advantage * c.stats.logprob
    truth = [part.mean() for part in reinforce.split(LENS)] if o.ratio == "sequence" else reinforce
    (ours,) = torch.autograd.grad(sum(loss), c.logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(sum(truth), c.logits, retain_graph=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_kl_estimates_have_the_kl_as_their_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    prob, kl = policy.exp(), float((policy.exp() * (policy - reference)).sum())
    assert float((prob * kl_estimate("k1", policy, reference)).sum()) == pytest.approx(kl, rel=1e-12)
    assert float((prob * kl_estimate("k3", policy, reference)).sum()) == pytest.approx(kl, rel=1e-12)
    near = (policy + 0.01 * reference).log_softmax(0)  # k2 is biased; to second order it is right
    near_kl = float((prob * (policy - near)).sum())
    assert float((prob * kl_estimate("k2", policy, near)).sum()) == pytest.approx(near_kl, rel=0.02)


def test_what_is_not_measured_is_nan() -> None:
    c = case()
    rows = TokenInputs(**{**_fields(c.rows), "ref_logprob": None})
    assert loss_of_tokens(ObjectiveConfig(name="grpo"), c.stats, rows).kl.isnan().all()
    assert loss_of_tokens(ObjectiveConfig(name="sft"), c.stats, rows).kl.isnan().all()


@pytest.mark.parametrize(
    "choices", [dict(), dict(ratio="sequence"), dict(importance_sampling="token"), dict(importance_sampling="sequence")]
)
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_policies_that_are_far_apart_give_finite_losses(choices: dict[str, Any], kl: Any) -> None:
    c = case(spread=500.0)
    o = ObjectiveConfig(name="grpo", clip_low=None, clip_high=None, kl_coef=0.1, kl_estimator=kl, **choices)
    loss = loss_of_tokens(o, c.stats, c.rows).loss
    (gradient,) = torch.autograd.grad(loss.sum(), c.logits, retain_graph=True)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert loss.abs().max() < 10 * math.exp(2 * MAX_LOG_RATIO)


def test_columns_are_sliced_together() -> None:
    c = case()
    part = c.rows.slice(slice(3, 9))
    for name in TokenInputs.__slots__:
        assert torch.equal(getattr(part, name), getattr(c.rows, name)[3:9])
    assert TokenInputs(**{**_fields(c.rows), "old_logprob": None}).slice(slice(0, 2)).old_logprob is None


# -- through packing, decoder and learner
def random_policy() -> Policy:
    tiny = TinyModel(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=32)
    words = [f"w{chr(97 + i)}" for i in range(16)]
    policy = build_tiny(tiny, words, seed=0, dtype=torch.float64, device=torch.device("cpu"))
    exact_norms(policy.model)
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([0.4 * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    return policy


def random_groups(sampled: bool = True) -> list[Group]:
    """Three prompts, the last of one token; one flat group; one token that the sampler gave no number; two responses of
    several turns."""
    generator = torch.Generator().manual_seed(3)
    groups = []
    for prompt_id, (prompt_len, response_lens) in enumerate([(5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3))]):
        advantages = torch.randn(3, generator=generator).tolist() if prompt_id != 1 else [0.0, 0.0, 0.0]
        rollouts = tuple(
            Rollout(
                prompt_id=prompt_id,
                sample=i,
                token_ids=torch.randint(4, 20, (length,), generator=generator),
                sampler_logprob=-3 + 0.4 * torch.randn(length, generator=generator) if sampled else None,
                finish="stop",
                policy_version=0,
            )
            for i, length in enumerate(response_lens)
        )
        token_ids = tuple(torch.randint(4, 20, (prompt_len,), generator=generator).tolist())
        prompt = Prompt(prompt_id=prompt_id, token_ids=token_ids, task="t", representation="r", payload=None)
        groups.append(Group(prompt=prompt, rollouts=rollouts, rewards=(0.0, 0.0, 0.0), advantages=tuple(advantages)))
    if sampled:
        sampler_logprob = groups[0].rollouts[2].sampler_logprob
        assert sampler_logprob is not None
        sampler_logprob[3] = math.nan
    for group, places in ((groups[0], [2, 5]), (groups[2], [1])):
        context = torch.zeros(len(group.rollouts[2].token_ids), dtype=torch.bool)
        context[places] = True
        rollouts = (*group.rollouts[:2], replace(group.rollouts[2], context_mask=context))
        groups[group.prompt.prompt_id] = replace(group, rollouts=rollouts)
    return groups


def dense_stats(model: Any, groups: list[Group]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies of every response: prompts repeated, right-padded, all logits."""
    pairs = [(g.prompt.token_ids, r.token_ids.tolist()) for g in groups for r in g.rollouts]
    longest = max(len(p) + len(r) for p, r in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (p, r) in enumerate(pairs):
        ids[i, : len(p) + len(r)] = torch.tensor([*p, *r])
        mask[i, : len(p) + len(r)] = 1
    logprob_BTV = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    stats = []
    for i, (p, r) in enumerate(pairs):
        rows = logprob_BTV[i, len(p) - 1 : len(p) + len(r) - 1]
        stats.append((rows[torch.arange(len(r)), torch.tensor(r)], -(rows.exp() * rows).sum(-1)))
    return stats


@dataclass(frozen=True, kw_only=True)
class World:
    policy: Policy
    model: Any  # transformers' own forward on the same weights
    groups: list[Group]
    sequences: list[Known]
    old: list[Tensor]
    ref: list[Tensor]


@pytest.fixture(scope="module")
def world() -> World:
    policy, groups = random_policy(), random_groups()
    weights = policy.snapshot()
    old, ref = moved(weights, 1), moved(weights, 2)
    model = transformers_twin(policy)

    def stats_with(values: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            for p, value in zip(dict(model.named_parameters()).values(), values, strict=True):
                p.copy_(value)
        return dense_stats(model, groups)

    old_stats, ref_stats, stats = (stats_with(values) for values in (old, ref, weights))
    rollouts = [(r, a) for g in groups for r, a in zip(g.rollouts, g.advantages, strict=True)]
    sequences = []
    for i, (rollout, advantage) in enumerate(rollouts):
        assert rollout.sampler_logprob is not None
        is_known = rollout.sampler_logprob.isfinite()
        if rollout.context_mask is not None:
            is_known &= ~rollout.context_mask
        sequences.append(
            Known(
                logprob=stats[i][0][is_known],
                entropy=stats[i][1][is_known],
                old=old_stats[i][0].detach()[is_known],
                ref=ref_stats[i][0].detach()[is_known],
                sampler=rollout.sampler_logprob.double()[is_known],
                advantage=float(torch.tensor(advantage)),
            )
        )
    return World(policy=policy, model=model, groups=groups, sequences=sequences, old=old, ref=ref)


def learned(world: World, o: ObjectiveConfig, micro_batch_tok: int = 10_000) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step's micro-batches, as ``Learner.update`` makes them."""
    stage = Stage(
        name="s",
        steps=1,
        objective=o,
        sampling=SamplingConfig(max_new_tok=MAX_NEW_TOK, samples_per_prompt=1 if o.is_supervised else 3),
    )
    learner = Learner(world.policy)
    learner.enter(stage)
    learner.reference = world.ref
    (update,) = pack(
        world.groups, micro_batch_tok=micro_batch_tok, prompts_per_update=None, objective=o, device=torch.device("cpu")
    )
    tally = backward_all(learner, update, stage, world.old)
    gradients = {name: p.grad for name, p in world.policy.named_parameters().items()}
    assert learner.optimizer is not None
    learner.optimizer.zero_grad()
    assert all(g is not None for g in gradients.values())
    return tally.sums["loss"].item(), gradients  # type: ignore[return-value]


def backward_all(learner: Learner, update: Update, stage: Stage, old_weights: list[Tensor]) -> Tally:
    tally = Tally()
    with learner.policy.borrowed_weights(old_weights):
        old = [learner._logprob(batch, stage) for batch in update.batches]
    references = learner._reference_logprobs([update.batches], stage)
    for b, batch in enumerate(update.batches):
        rows = learner._token_inputs(batch, update, stage, old[b], references[0][b] if references else None)
        learner._backward(batch, rows, stage, tally)
    return tally


def some_choices() -> list[ObjectiveConfig]:
    """Every preset, and a fixed draw of combinations with every value of every choice in it."""
    draw = random.Random(0).sample(list(every_choice()), 40)
    for choice, values in ALL_CHOICES.items():
        assert {str(c[choice]) for c in draw} == {str(v) for v in values}
    presets = [ObjectiveConfig(name=name) for name in (*REINFORCED, "sft", "rft")]  # type: ignore[arg-type]
    return presets + [objective(REINFORCED[i % len(REINFORCED)], choices) for i, choices in enumerate(draw)]


@pytest.mark.parametrize(
    "o", some_choices(), ids=lambda o: f"{o.name}-{o.aggregation}-{o.ratio}-{o.kl_estimator}-{o.importance_sampling}"
)
def test_loss_and_gradient_of_every_parameter_are_those_of_padded_repeated_full_logits(
    world: World, o: ObjectiveConfig
) -> None:
    loss, gradients = learned(world, o)
    truth = true_loss(o, world.sequences)
    names = [name for name, _ in world.model.named_parameters()]
    true_gradients = torch.autograd.grad(truth, list(world.model.parameters()), retain_graph=True)
    assert loss == pytest.approx(truth.item(), rel=0, abs=1e-10)
    for name, gradient in zip(names, true_gradients, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_the_old_policy_of_the_gradient_test_is_clipped_on_both_sides(world: World) -> None:
    ratio = torch.cat([(s.logprob - s.old).exp() for s in world.sequences])
    assert (ratio < 0.9).any() and (ratio > 1.2).any()
