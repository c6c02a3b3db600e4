import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_world import (  # noqa: F401
    CPU,
    NUM_VOCAB,
    TINY,
    WORDS,
    make_groups,
    moved,
    one_thread,
    updates_of,
    with_advantages,
)
from torch import Tensor
from truth import exact_norms, transformers_twin

from isomorph.engine.config import (
    BatchConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplerConfig,
    SamplingConfig,
    Stage,
    UserError,
)
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Group, PackedBatch, Rollout, RunFailed, Sampling, Scores, StepStats
from isomorph.engine.update import learner as learner_file
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.round import Tally
from isomorph.kernels.linear_logprob import TokenStats

GRPO = ObjectiveConfig(name="grpo", clip_low=0.1, clip_high=0.2)


# -- a small world
def make_policy(dtype: torch.dtype = torch.float64, scale: float = 0.4) -> Policy:
    policy = build_tiny(TINY, WORDS, seed=0, dtype=dtype, device=CPU)
    if dtype == torch.float64:
        exact_norms(policy.model)
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([scale * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    return policy


def one_by_one(group: Group) -> list[Group]:
    """The prompt repeated before each response."""
    return [
        Group(prompt=group.prompt, rollouts=(rollout,), rewards=(0.0,), advantages=(advantage,))
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]


def make_stage(objective: ObjectiveConfig = GRPO, **tables: Any) -> Stage:
    return Stage(
        name="s",
        steps=tables.pop("steps", 10),
        objective=objective,
        sampling=SamplingConfig(max_new_tok=9, samples_per_prompt=1 if objective.is_supervised else 3),
        optim=OptimConfig(**tables.pop("optim", {})),
        batch=BatchConfig(**{"prompts": 12, **tables.pop("batch", {})}),
        **tables,
    )


def gradient(policy: Policy, groups: list[Group], objective: ObjectiveConfig, micro_batch_tok: int = 10_000) -> Tensor:
    """Of one optimizer step over all micro-batches, before clipping: all parameters in one vector."""
    stage = make_stage(objective, batch=dict(micro_batch_tok=micro_batch_tok))
    learner = Learner(policy)
    learner.enter(stage)
    weights = policy.snapshot()
    learner.reference = moved(weights, 2)
    (update,) = updates_of(groups, stage)
    references = learner._reference_logprobs([update.batches], stage)
    with policy.borrowed_weights(moved(weights, 1)):
        old = [learner._logprob(batch, stage) for batch in update.batches]
    for b, batch in enumerate(update.batches):
        rows = learner._token_inputs(batch, update, stage, old[b], references[0][b] if references else None)
        learner._backward(batch, rows, stage, Tally())
    parameters = list(policy.named_parameters().values())
    whole = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return whole


def update(policy: Policy, groups: list[Group], stage: Stage, learner: Learner | None = None) -> StepStats:
    learner = learner or Learner(policy)
    if learner.optimizer is None:
        learner.enter(stage)
    return learner.update(updates_of(groups, stage), stage, 0)


def flat(policy: Policy) -> Tensor:
    return torch.cat([w.flatten() for w in policy.snapshot()])


# -- invariant 1: the gradient does not depend on how the step is cut
OBJECTIVES = [
    GRPO,
    ObjectiveConfig(name="dapo", importance_sampling="token", kl_coef=0.1),
    ObjectiveConfig(name="dr_grpo", entropy_coef=0.01, kl_coef=0.1, kl_estimator="k1"),
    ObjectiveConfig(name="gspo", clip_low=0.05, clip_high=0.05),
    ObjectiveConfig(
        name="cispo", importance_sampling="sequence", importance_sampling_mode="mask", importance_sampling_cap=1.2
    ),
    ObjectiveConfig(name="rloo", clip_low=0.05, clip_high=0.05),
    ObjectiveConfig(name="rft"),
    ObjectiveConfig(name="sft"),
]
by_name = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)


@by_name
def test_gradient_is_the_same_for_every_token_budget(objective: ObjectiveConfig) -> None:
    policy, groups = make_policy(), make_groups()
    whole = gradient(policy, groups, objective)
    assert whole.norm() > 1e-3
    for micro_batch_tok in (25, 14, 11):  # at 11 the first group is split between its responses
        parts = gradient(policy, groups, objective, micro_batch_tok)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@by_name
def test_gradient_is_the_same_for_every_order(objective: ObjectiveConfig) -> None:
    policy, groups = make_policy(), make_groups()
    whole = gradient(policy, groups, objective)
    turned = [
        Group(
            prompt=g.prompt,
            rollouts=g.rollouts[1:] + g.rollouts[:1],
            rewards=g.rewards,
            advantages=g.advantages[1:] + g.advantages[:1],
        )
        for g in reversed(groups)
    ]
    torch.testing.assert_close(gradient(policy, turned, objective), whole, rtol=0, atol=1e-12)


@by_name
def test_gradient_is_the_same_with_the_prompt_shared_or_repeated(objective: ObjectiveConfig) -> None:
    policy, groups = make_policy(), make_groups()
    repeated = [single for group in groups for single in one_by_one(group)]
    torch.testing.assert_close(
        gradient(policy, repeated, objective), gradient(policy, groups, objective), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("objective", OBJECTIVES[:1] + OBJECTIVES[3:7], ids=lambda o: o.name)
def test_gradient_is_the_same_whether_responses_without_advantage_are_left_out_or_not(
    objective: ObjectiveConfig,
) -> None:
    policy, groups = make_policy(), make_groups()
    groups = [with_advantages(groups[0], 1.0, 0.0, -1.0), with_advantages(groups[1], 0.0, 0.0, 0.0), groups[2]]
    assert objective.drops_zero_advantages
    trained = updates_of(groups, make_stage(objective))[0]
    assert sum(b.num_seqs for b in trained.batches) == 5
    if objective.name == "rft":  # what was rejected does not count there, so rejected responses may as well not exist
        kept = one_by_one(groups[0])[0:3:2] + one_by_one(groups[2])
    else:
        objective_kept = objective.model_copy(update={"entropy_coef": 1e-300})
        assert sum(b.num_seqs for b in updates_of(groups, make_stage(objective_kept))[0].batches) == 9
        torch.testing.assert_close(
            gradient(policy, groups, objective), gradient(policy, groups, objective_kept), rtol=0, atol=1e-13
        )
        return
    torch.testing.assert_close(
        gradient(policy, groups, objective), gradient(policy, kept, objective), rtol=0, atol=1e-13
    )


@by_name
def test_a_masked_response_may_as_well_not_exist(objective: ObjectiveConfig) -> None:
    """Its tokens are in no sum and in no denominator; the others' advantages, given here, have seen its reward."""
    policy, groups = make_policy(), make_groups()
    masks = ((False, True, False), (False, False, False), (True, False, True))

    def masked(g: Group, mask: tuple[bool, ...]) -> Group:
        return replace(g, scores=Scores(rewards=g.rewards, masked=mask))

    def without(g: Group, mask: tuple[bool, ...]) -> Group:
        kept = [i for i, is_masked in enumerate(mask) if not is_masked]
        columns = {name: tuple(getattr(g, name)[i] for i in kept) for name in ("rollouts", "rewards", "advantages")}
        return replace(g, **columns)

    of_step = [masked(g, mask) for g, mask in zip(groups, masks, strict=True)]
    wanted = [without(g, mask) for g, mask in zip(groups, masks, strict=True)]
    if objective.is_supervised:
        wanted = groups  # demonstrations are trained on whatever their rewards are
    for micro_batch_tok in (10_000, 14):
        found = gradient(policy, of_step, objective, micro_batch_tok)
        assert found.norm() > 1e-3
        torch.testing.assert_close(found, gradient(policy, wanted, objective), rtol=0, atol=1e-12)


def test_gradient_is_the_same_for_more_tokens_than_one_chunk_of_logits_holds() -> None:
    policy = make_policy()
    groups = make_groups(tuple((2, (27,) * 12) for _ in range(26)))
    objective = ObjectiveConfig(name="dapo", kl_coef=0.1)
    assert (
        updates_of(groups, make_stage(objective, batch=dict(micro_batch_tok=20_000)))[0].batches[0].num_loss_tok > 8192
    )
    torch.testing.assert_close(
        gradient(policy, groups, objective, 20_000), gradient(policy, groups, objective, 400), rtol=0, atol=1e-12
    )


@by_name
def test_gradient_is_the_same_where_a_chunk_of_logits_ends_within_a_sequence(
    objective: ObjectiveConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that depends on a whole sequence must not be computed chunk by chunk."""
    policy, groups = make_policy(), make_groups()
    whole = gradient(policy, groups, objective)
    monkeypatch.setattr("isomorph.engine.update.learner.logits_chunk_rows", lambda num_vocab, *, is_gpu: 3)
    torch.testing.assert_close(gradient(policy, groups, objective), whole, rtol=0, atol=1e-12)


# -- invariant 2: on the first update the policy is the one that drew
@pytest.fixture(scope="module")
def sampled() -> tuple[Policy, list[Group]]:
    """A float32 policy with rollouts that it drew itself."""
    policy = make_policy(torch.float32, scale=0.2)
    prompts = [g.prompt for g in make_groups(((5, ()), (3, ()), (2, ()), (7, ())))]
    sampling = Sampling(temperature=1.0, max_new_tok=9, samples_per_prompt=3, stop_ids=policy.text.stop_ids, seed=0)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
    groups = [
        Group(prompt=p, rollouts=tuple(rollouts[3 * i : 3 * i + 3]), rewards=(1, 0, 0), advantages=(1.0, -0.5, -0.5))
        for i, p in enumerate(prompts)
    ]
    return policy, groups


def restored(policy: Policy) -> Policy:
    """A policy of its own with the same weights: updates change them."""
    twin = make_policy(policy.dtype)
    twin.overwrite(policy.snapshot())
    return twin


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("batch", [dict(), dict(num_iterations=2), dict(prompts_per_update=2)])
def test_nothing_is_clipped_while_the_policy_has_not_moved(
    sampled: tuple[Policy, list[Group]], name: Any, batch: dict[str, Any]
) -> None:
    policy, groups = sampled
    stage = make_stage(ObjectiveConfig(name=name), optim=dict(lr=1e-30), batch=batch)
    stats = update(restored(policy), groups, stage)
    assert stats.clip_frac == 0
    assert stats.drift.largest < 1e-5  # nats, float32
    assert 0 < stats.drift.mean <= stats.drift.largest


def test_the_ratio_to_recomputed_old_log_probabilities_is_one(sampled: tuple[Policy, list[Group]]) -> None:
    policy, groups = sampled
    stage = make_stage()
    learner = Learner(policy)
    learner.enter(stage)
    (step,) = updates_of(groups, stage)
    (batch,) = step.batches
    old = learner._logprob(batch, stage)
    seen = learner._backward(batch, learner._token_inputs(batch, step, stage, None, None), stage, Tally()).logprob
    assert learner.optimizer is not None
    learner.optimizer.zero_grad()
    assert ((seen - old).exp() - 1).abs().max() < 1e-6
    assert (seen <= 0).all()


@pytest.mark.parametrize("scale", [0.0, 0.2, 5.0])
def test_log_probabilities_and_entropies_stay_within_their_bounds(scale: float) -> None:
    policy = make_policy(torch.float32, scale)
    stage = make_stage()
    stats = update(policy, make_groups(), stage)
    assert 0 <= stats.entropy <= math.log(NUM_VOCAB) * (1 + 1e-6)
    if scale == 0:
        assert stats.entropy == pytest.approx(math.log(NUM_VOCAB), rel=1e-6)


@pytest.mark.parametrize("name", ["sft", "rft"])
def test_imitation_is_a_cross_entropy_whatever_the_temperature_of_sampling(name: Any) -> None:
    policy, stage = make_policy(), make_stage(ObjectiveConfig(name=name))
    hot = stage.model_copy(update={"sampling": stage.sampling.model_copy(update={"temperature": 0.5})})
    groups = [with_advantages(g, 1.0, 1.0, 1.0) for g in make_groups()]
    if name == "sft":
        groups = [replace(g, rollouts=tuple(replace(r, sampler_logprob=None) for r in g.rollouts)) for g in groups]
    model = transformers_twin(policy)
    losses, num_tok = [], 0
    for g, r in [(group, r) for group in groups for r in group.rollouts]:
        ids = torch.tensor([[*g.prompt.token_ids, *r.token_ids.tolist()]])
        logits = model(input_ids=ids).logits[0, len(g.prompt.token_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, r.token_ids, reduction="sum"))
        num_tok += len(r.token_ids)
    truth = sum(losses) / num_tok
    stats = update(policy, groups, hot)
    assert stats.loss == pytest.approx(truth.item(), rel=1e-10)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(truth, list(model.parameters()))]).norm()
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-9)


def test_rejection_sampling_compares_with_the_sampler_at_the_temperature_of_sampling() -> None:
    policy = make_policy(torch.float32, scale=0.2)
    prompts = [g.prompt for g in make_groups(((5, ()), (3, ())))]
    sampling = Sampling(temperature=0.5, max_new_tok=9, samples_per_prompt=3, stop_ids=policy.text.stop_ids, seed=0)
    drawn = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
    groups = [
        Group(prompt=p, rollouts=tuple(drawn[3 * i : 3 * i + 3]), rewards=(1, 1, 1), advantages=(1.0, 1.0, 1.0))
        for i, p in enumerate(prompts)
    ]
    stage = make_stage(ObjectiveConfig(name="rft"), batch=dict(prompts=2, prompts_per_update=1, num_iterations=2))
    stage = stage.model_copy(update={"sampling": stage.sampling.model_copy(update={"temperature": 0.5})})
    stats = update(policy, groups, stage)
    assert stats.num_updates == 4 and 0 < stats.drift.largest < 1e-5  # nats, float32


# -- whole updates against a loop written out
def dense_logprob(model: Any, groups: list[Group]) -> tuple[list[Tensor], list[Tensor]]:
    """Of every response, by transformers' own forward on prompt and response alone: log-probabilities, entropies."""
    logprobs, entropies = [], []
    for g in groups:
        for r in g.rollouts:
            ids = torch.tensor([[*g.prompt.token_ids, *r.token_ids.tolist()]])
            first = len(g.prompt.token_ids) - 1
            rows = model(input_ids=ids).logits[0, first : ids.shape[1] - 1].log_softmax(-1)
            logprobs.append(rows.gather(1, r.token_ids[:, None])[:, 0])
            entropies.append(-(rows.exp() * rows).sum(-1))
    return logprobs, entropies


def written_out(model: Any, groups: list[Group], stage: Stage) -> list[dict[str, float]]:
    """PPO's epochs over minibatches of groups: clipped, mean over tokens, k3 to the start; PyTorch's AdamW."""
    o, optim = stage.objective, stage.optim
    adamw = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    with torch.no_grad():
        ref_S, _ = dense_logprob(model, groups)
    drawn_S = [r.sampler_logprob.double() for g in groups for r in g.rollouts]  # type: ignore[union-attr]
    old_S = drawn_S if o.old_logprob == "sampler" else ref_S
    minibatches = [range(i, i + stage.batch.prompts_per_update) for i in range(0, len(groups), 2)]  # type: ignore[operator]
    numbers = []
    for _ in range(stage.batch.num_iterations):
        for members in minibatches:
            part = [groups[i] for i in members]
            old, ref = (
                torch.cat([known_S[3 * i + j] for i in members for j in range(3)]) for known_S in (old_S, ref_S)
            )
            logprob_S, entropy_S = dense_logprob(model, part)
            logprob, ratio = torch.cat(logprob_S), (torch.cat(logprob_S) - old).exp()
            scored = [(r, a) for g in part for r, a in zip(g.rollouts, g.advantages, strict=True)]
            advantage = torch.cat([torch.full((len(r.token_ids),), a) for r, a in scored]).double()
            bounded = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)  # type: ignore[operator]
            kl = (ref - logprob).exp() - 1 - (ref - logprob)  # the reference is the policy before the step
            loss = (-torch.minimum(ratio * advantage, bounded * advantage) + o.kl_coef * kl).mean()
            adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            adamw.step()
            numbers.append(
                dict(
                    loss=loss.item(),
                    grad_norm=float(norm),
                    num_tok=len(logprob),
                    clipped=int((bounded * advantage < ratio * advantage).sum()),
                    entropy=torch.cat(entropy_S).sum().item(),
                    kl=kl.sum().item(),
                )
            )
    return numbers


@pytest.mark.parametrize("old_logprob", ["trainer", "sampler"])
def test_epochs_of_updates_are_those_of_a_loop_over_plain_sequences(old_logprob: Any) -> None:
    policy = make_policy()
    shapes = ((5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3)), (2, (5, 2, 4)))
    groups = make_groups(shapes)
    stage = make_stage(
        ObjectiveConfig(name="dapo", clip_low=0.02, clip_high=0.03, kl_coef=0.5, old_logprob=old_logprob),
        optim=dict(lr=3e-3, clip_norm=0.5),
        batch=dict(prompts=4, prompts_per_update=2, num_iterations=3, micro_batch_tok=17),
    )
    model = transformers_twin(policy)
    stats = update(policy, groups, stage)
    truth = written_out(model, groups, stage)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(policy.named_parameters()[name], parameter, rtol=0, atol=1e-9, msg=name)
    num_tok = sum(t["num_tok"] for t in truth)
    assert stats.num_updates == len(truth) == 6
    assert stats.loss == pytest.approx(sum(t["loss"] for t in truth) / 6, rel=1e-9)
    assert stats.grad_norm == pytest.approx(sum(t["grad_norm"] for t in truth) / 6, rel=1e-9)
    assert stats.clip_frac == pytest.approx(sum(t["clipped"] for t in truth) / num_tok)
    assert stats.clip_frac > 0
    assert stats.entropy == pytest.approx(sum(t["entropy"] for t in truth) / num_tok, rel=1e-9)
    assert stats.kl == pytest.approx(sum(t["kl"] for t in truth) / num_tok, rel=1e-7)
    assert stats.num_loss_tok == num_tok / 3


def test_drift_is_the_distance_to_the_sampler_before_anything_moved() -> None:
    policy, groups = make_policy(), make_groups()
    model = transformers_twin(policy)
    with torch.no_grad():
        logprob_S, _ = dense_logprob(model, groups)
    gaps = torch.cat(logprob_S) - torch.cat([r.sampler_logprob for g in groups for r in g.rollouts])  # type: ignore[misc]
    stage = make_stage(optim=dict(lr=0.1), batch=dict(prompts=3, prompts_per_update=1, num_iterations=2))
    stats = update(policy, groups, stage)
    assert stats.drift.mean == pytest.approx(float(gaps.abs().mean()), rel=1e-9)
    assert stats.drift.largest == pytest.approx(float(gaps.abs().max()), rel=1e-9)


def test_a_round_that_an_earlier_version_left_unfinished_is_refused() -> None:
    policy, stage = make_policy(), make_stage()
    learner = Learner(policy)
    learner.enter(stage)
    left = {"round/0/norms": torch.ones(1), "round/0/drift_max": torch.zeros(()), **learner.state_tensors()}
    learner.restore(stage, left)
    with pytest.raises(UserError, match="by an earlier version"):
        learner.begin(updates_of(make_groups(), stage), stage, 0)


def test_demonstrations_have_no_drift_no_kl_and_no_ratio() -> None:
    groups = [
        Group(
            prompt=g.prompt,
            rollouts=tuple(
                Rollout(
                    prompt_id=r.prompt_id,
                    sample=r.sample,
                    token_ids=r.token_ids,
                    sampler_logprob=None,
                    finish="stop",
                    policy_version=0,
                )
                for r in g.rollouts[:1]
            ),
            rewards=(0.0,),
            advantages=(0.0,),
        )
        for g in make_groups()
    ]
    policy = make_policy()
    before = flat(policy)
    stats = update(policy, groups, make_stage(ObjectiveConfig(name="sft")))
    assert math.isnan(stats.drift.largest) and math.isnan(stats.drift.mean) and math.isnan(stats.kl)
    assert stats.clip_frac == 0
    assert not torch.equal(flat(policy), before)


def test_the_schedule_runs_over_the_stage() -> None:
    stage = make_stage(steps=4, optim=dict(lr=0.5, schedule="linear", final_lr_frac=0.0))
    policy, groups = make_policy(), make_groups()
    learner = Learner(policy)
    learner.enter(stage)
    rates = [learner.update(updates_of(groups, stage), stage, step).lr for step in range(4)]
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_bf16_weights_learn_from_float32_sums_over_micro_batches() -> None:
    policy = make_policy(torch.bfloat16)
    learner = Learner(policy)
    stage = make_stage(optim=dict(lr=1e-5), batch=dict(micro_batch_tok=13))
    learner.enter(stage)
    (step,) = updates_of(make_groups(), stage)
    assert len(step.batches) > 1
    stats = learner.update([step], stage, 0)
    assert learner.optimizer is not None and stats.grad_norm > 0
    for name, parameter in policy.named_parameters().items():
        master = learner.optimizer.masters[name]
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
        assert not torch.equal(master, master.bfloat16().float())  # it remembers what bf16 cannot hold


# -- what need not be computed
def passes(
    policy: Policy, groups: list[Group], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, bool]]:
    """Of one step: tokens of each pass through the decoder, and whether it was one for gradients."""
    seen: list[tuple[int, bool]] = []
    hidden = Policy.hidden

    def counted(policy: Policy, batch: PackedBatch) -> Tensor:
        seen.append((len(batch.token_ids), torch.is_grad_enabled()))
        return hidden(policy, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "hidden", counted)
        update(policy, groups, stage)
    return seen


def group_tok(group: Group) -> int:
    return len(group.prompt.token_ids) + sum(len(r.token_ids) - 1 for r in group.rollouts)


@pytest.mark.parametrize(("kl_coef", "num_iterations"), [(0.0, 1), (0.1, 1), (0.0, 3), (0.1, 3)])
def test_only_updates_after_the_first_need_a_pass_for_old_log_probabilities(
    monkeypatch: pytest.MonkeyPatch, kl_coef: float, num_iterations: int
) -> None:
    groups = make_groups()
    stage = make_stage(
        ObjectiveConfig(name="grpo", kl_coef=kl_coef),
        batch=dict(prompts=3, prompts_per_update=1, num_iterations=num_iterations),
    )
    a, b, c = (group_tok(g) for g in groups)
    reference = [(a, False), (b, False), (c, False)] if kl_coef else []  # once, whatever the number of iterations
    old = [(b, False), (c, False)]
    assert passes(make_policy(), groups, stage, monkeypatch) == [
        *reference,
        *old,
        *[(a, True), (b, True), (c, True)] * num_iterations,
    ]


def test_a_kl_in_the_reward_costs_the_first_update_a_pass_for_old_log_probabilities_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = make_groups()
    stage = make_stage(
        ObjectiveConfig(name="rloo", reward_kl_coef=0.1), batch=dict(prompts=3, prompts_per_update=1, num_iterations=2)
    )
    each = [group_tok(g) for g in groups]
    found = passes(make_policy(), groups, stage, monkeypatch)
    assert sorted(found[:6]) == sorted([(n, False) for n in each] * 2)  # reference, old
    assert found[6:] == [(n, True) for n in each] * 2


def test_the_samplers_log_probabilities_as_old_ones_cost_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = make_groups()
    o = ObjectiveConfig(name="rloo", old_logprob="sampler", reward_kl_coef=0.1)
    batch = dict(prompts=3, prompts_per_update=1, num_iterations=2)
    each = [group_tok(g) for g in groups]
    found = passes(make_policy(), groups, make_stage(o, batch=batch), monkeypatch)
    assert found == [(n, False) for n in each] + [(n, True) for n in each] * 2  # the reference's alone


def test_a_round_on_the_samplers_log_probabilities_goes_on_bit_for_bit_within_it() -> None:
    o = ObjectiveConfig(name="grpo", old_logprob="sampler", clip_dual=3.0, kl_coef=0.1)
    stage = make_stage(o, optim=dict(lr=1e-3), batch=dict(prompts=3, prompts_per_update=1, num_iterations=2))
    policy, twin = make_policy(), make_policy()
    learner, other = Learner(policy), Learner(twin)
    learner.enter(stage)
    work = learner.begin(updates_of(make_groups(), stage), stage, 0)
    learner.advance(work)
    learner.advance(work)
    weights, tensors = policy.snapshot(), {k: v.clone() for k, v in learner.state_tensors().items()}
    twin.overwrite(weights)
    other.restore(stage, tensors)
    again = other.begin(updates_of(make_groups(), stage), stage, 0)
    while not work.is_done:
        learner.advance(work)
        other.advance(again)
    assert learner.stats(work) == other.stats(again)
    assert torch.equal(flat(policy), flat(twin))


def test_of_updates_on_the_samplers_log_probabilities_the_first_is_compared_with_it() -> None:
    policy, groups = make_policy(), make_groups()
    with torch.no_grad():
        logprob_S, _ = dense_logprob(transformers_twin(policy), groups[:1])
    gaps = torch.cat(logprob_S) - torch.cat([r.sampler_logprob for r in groups[0].rollouts])  # type: ignore[misc]
    o = ObjectiveConfig(name="grpo", old_logprob="sampler")
    batch = dict(prompts=3, prompts_per_update=1, num_iterations=2)
    stats = update(policy, groups, make_stage(o, optim=dict(lr=0.1), batch=batch))
    assert stats.drift.num_tok == len(gaps)
    assert stats.drift.mean == pytest.approx(float(gaps.abs().mean()), rel=1e-9)


def test_one_update_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = make_groups()
    assert passes(make_policy(), groups, make_stage(), monkeypatch) == [(sum(group_tok(g) for g in groups), True)]


@pytest.mark.parametrize("idle", [dict(), dict(kl_coef=0.1), dict(entropy_coef=0.1)])
def test_groups_without_variance_go_through_no_pass_where_they_have_no_gradient(
    monkeypatch: pytest.MonkeyPatch, idle: dict[str, Any]
) -> None:
    first, *others = make_groups()
    groups = [with_advantages(first, 0.0, 0.0, 0.0), *others]
    stage = make_stage(ObjectiveConfig(name="grpo", **idle))
    left_out = 0 if idle else group_tok(first)
    (*_, (num_tok, _)) = passes(make_policy(), groups, stage, monkeypatch)
    assert num_tok == sum(group_tok(g) for g in groups) - left_out


# -- invariant 5: refused or counted, never silent
def spoiled(group: Group, *positions: tuple[int, int], value: float = math.nan) -> Group:
    for response, token in positions:
        sampler_logprob = group.rollouts[response].sampler_logprob
        assert sampler_logprob is not None
        sampler_logprob[token] = value
    return group


def test_a_step_whose_tokens_are_all_dropped_changes_nothing_and_says_so() -> None:
    (group,) = make_groups(((3, (2, 1)),))
    policy = make_policy()
    before = flat(policy)
    stats = update(policy, [spoiled(group, (0, 0), (0, 1), (1, 0))], make_stage())
    assert torch.equal(flat(policy), before)
    assert (stats.num_updates, stats.num_dropped_tok, stats.num_loss_tok) == (0, 3, 0)
    for number in (stats.loss, stats.grad_norm, stats.entropy, stats.clip_frac, stats.drift.largest):
        assert math.isnan(number)


def test_a_step_of_groups_without_variance_changes_nothing_and_says_so() -> None:
    policy = make_policy()
    before = flat(policy)
    stats = update(policy, [with_advantages(g, 0.0, 0.0, 0.0) for g in make_groups()], make_stage())
    assert torch.equal(flat(policy), before)
    assert (stats.num_updates, stats.num_loss_tok) == (0, 28)
    assert math.isnan(stats.loss)


def test_an_update_without_anything_to_learn_does_not_stop_the_others() -> None:
    groups = make_groups(((5, (4, 1)), (3, (2, 2)), (2, (3, 1))))
    groups[1] = with_advantages(groups[1], 0.0, 0.0)
    stage = make_stage(batch=dict(prompts=3, prompts_per_update=1))
    assert update(make_policy(), groups, stage).num_updates == 2


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_dropped_tokens_are_counted_and_give_no_gradient(value: float) -> None:
    policy = make_policy()
    groups = make_groups()
    spoiled(groups[0], (2, 1), (2, 3), value=value)
    stats = update(policy, groups, make_stage(optim=dict(lr=1e-30)))
    assert (stats.num_dropped_tok, stats.num_loss_tok) == (2, 26)
    assert math.isfinite(stats.loss) and math.isfinite(stats.drift.largest)


@pytest.mark.parametrize("batch", [dict(), dict(num_iterations=2)])
@pytest.mark.parametrize("objective", [GRPO, ObjectiveConfig(name="gspo")], ids=lambda o: o.name)
def test_a_policy_that_gives_no_finite_log_probability_ends_the_run_with_its_weights_unchanged(
    objective: ObjectiveConfig, batch: dict[str, int]
) -> None:
    policy = make_policy(torch.float32)
    with torch.no_grad():
        policy.named_parameters()["model.norm.weight"][3] = math.inf
    before = flat(policy)
    with pytest.raises(RunFailed, match="not finite"):
        update(policy, make_groups(), make_stage(objective, batch=batch))
    assert torch.equal(flat(policy), before)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("choices, whose", [(dict(), "log-probabilities are"), (dict(kl_coef=0.1), "of the KL ref")])
def test_what_is_scored_before_the_first_update_must_be_finite_too(
    monkeypatch: pytest.MonkeyPatch, choices: dict[str, float], whose: str, value: float
) -> None:
    """No update has begun then; k3 would take -infinity for 20 nats."""
    policy, scored = make_policy(), learner_file.batch_stats

    def spoiled_stats(*given: Any, **options: Any) -> TokenStats:
        stats = scored(*given, **options)
        stats.logprob[-1] = value
        return stats

    monkeypatch.setattr(learner_file, "batch_stats", spoiled_stats)
    before = flat(policy)
    stage = make_stage(GRPO.model_copy(update=choices), batch=dict(prompts=3, prompts_per_update=1))
    with pytest.raises(RunFailed, match=f"^1 of .*{whose}.* not finite"):
        update(policy, make_groups(), stage)
    assert torch.equal(flat(policy), before)


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_weights_unchanged() -> None:
    policy = make_policy(torch.float32)
    before = flat(policy)
    groups = [with_advantages(g, 3e38, -3e38, 3e38) for g in make_groups()]
    with pytest.raises(RunFailed, match="norm"):
        update(policy, groups, make_stage(ObjectiveConfig(name="dapo")))
    assert torch.equal(flat(policy), before)


# -- stages
def kl_of_one_step(learner: Learner, stage: Stage) -> float:
    """The step's k3 to the reference, measured before it moves anything; then it moves."""
    return learner.update(updates_of(make_groups(), stage), stage, 0).kl


def test_a_stage_measures_kl_to_where_it_began_or_to_where_an_earlier_one_began() -> None:
    policy = make_policy()
    learner = Learner(policy)
    o = ObjectiveConfig(name="grpo", kl_coef=0.1)
    snapshotted = make_stage(o, optim=dict(lr=1e-3), reference="snapshot")
    kept = make_stage(o, optim=dict(lr=1e-3), reference="previous")
    learner.enter(snapshotted)
    assert kl_of_one_step(learner, snapshotted) == pytest.approx(0, abs=1e-12)
    assert kl_of_one_step(learner, snapshotted) > 1e-6
    learner.enter(kept)
    far = kl_of_one_step(learner, kept)
    assert far > 1e-6
    learner.enter(snapshotted)
    assert kl_of_one_step(learner, snapshotted) == pytest.approx(0, abs=1e-12)


def test_a_stage_without_kl_keeps_or_forgets_the_reference_as_it_says() -> None:
    policy = make_policy()
    learner = Learner(policy)
    learner.enter(make_stage(ObjectiveConfig(name="grpo", kl_coef=0.1)))
    first = learner.reference
    learner.enter(make_stage(reference="previous"))
    assert learner.reference is first
    learner.enter(make_stage(reference="snapshot"))
    assert learner.reference is None


def test_a_stage_carries_the_optimizer_over_or_begins_with_a_fresh_one() -> None:
    policy, stage = make_policy(), make_stage()
    learner = Learner(policy)
    learner.enter(stage)
    update(policy, make_groups(), stage, learner)
    moments = learner.state_tensors()
    assert moments["step/model.norm.weight"] == 1
    learner.enter(make_stage(optimizer_state="carry", optim=dict(betas=(0.5, 0.5))))
    assert torch.equal(learner.state_tensors()["exp_avg/model.norm.weight"], moments["exp_avg/model.norm.weight"])
    learner.enter(make_stage(optimizer_state="reset"))
    assert learner.state_tensors() == {}


def test_a_reset_optimizer_is_the_only_one_that_collects_bf16_gradients() -> None:
    policy, stage = make_policy(torch.bfloat16), make_stage()
    learner = Learner(policy)
    learner.enter(stage)
    learner.enter(stage)
    update(policy, make_groups(), stage, learner)
    assert learner.state_tensors()["step/model.norm.weight"] == 1


def test_a_second_learner_on_the_same_weights_is_refused_until_the_first_is_closed() -> None:
    policy, stage, groups = make_policy(torch.bfloat16), make_stage(), make_groups()
    first, second = Learner(policy), Learner(policy)
    update(policy, groups, stage, first)
    with pytest.raises(RuntimeError, match="another learner is open"):
        update(policy, groups, stage, second)
    first.close()
    second.close()
    update(policy, groups, stage, Learner(policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_learner_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    o = ObjectiveConfig(name="grpo", kl_coef=0.1)
    stage = make_stage(o, optim=dict(lr=1e-3), batch=dict(prompts=3, prompts_per_update=1))
    policy = make_policy(dtype)
    learner = Learner(policy)
    learner.enter(stage)
    learner.update(updates_of(make_groups(), stage), stage, 0)
    weights, tensors = policy.snapshot(), {k: v.clone() for k, v in learner.state_tensors().items()}
    twin = make_policy(dtype)
    twin.overwrite(weights)
    other = Learner(twin)
    other.restore(stage, tensors)
    for step in (1, 2):
        groups = make_groups(seed=step)
        assert learner.update(updates_of(groups, stage), stage, step) == other.update(
            updates_of(groups, stage), stage, step
        )
    assert torch.equal(flat(policy), flat(twin))
    for name, value in learner.state_tensors().items():
        assert torch.equal(other.state_tensors()[name], value), name
