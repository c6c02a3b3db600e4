"""Rollouts sampled with top-k, top-p and min-p: their log-probabilities, their kept sets, and the loss over these."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import start_apart
from echo import Echo
from small_world import CPU, one_thread, updates_of  # noqa: F401
from torch import Tensor
from toy_run import gold_but_for_one, make_components, make_stage, sha
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from truth import exact_norms, transformers_twin

from isomorph.engine.components import Components
from isomorph.engine.config import (
    BatchConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplerConfig,
    SamplingConfig,
    Stage,
    TinyModel,
    Truncation,
)
from isomorph.engine.loop import train
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint
from isomorph.engine.record.runlog import read_steps
from isomorph.engine.rollout import builtin
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.serialise import join_scored, split_scored
from isomorph.engine.types import Group, Prompt, Rollout, RunFailed, RunState, Sampling, ScoredRollouts, Scores
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.objective import TokenInputs, loss_of_tokens, token_weight
from isomorph.kernels import backend
from isomorph.kernels.kept_tokens import KeptTokens
from isomorph.kernels.linear_logprob import TokenStats

WORDS = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(296)]  # of 300 tokens: sets of ids and sets of bits
NUM_VOCAB = 300
TINY = TinyModel(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=64)
CUTS = [Truncation(top_p=0.9), Truncation(top_k=7), Truncation(min_p=0.05), Truncation(40, 0.9, 0.02)]


def make_policy(dtype: torch.dtype = torch.float64) -> Policy:
    policy = build_tiny(TINY, WORDS, seed=0, dtype=dtype, device=CPU)
    if dtype == torch.float64:
        exact_norms(policy.model)
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([0.35 * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    with torch.no_grad():
        policy.unembedding.mul_(4)  # peaked, as after training
    return policy


def make_prompts(*lens: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(sum(lens))
    ids = [tuple(torch.randint(4, NUM_VOCAB, (n,), generator=generator).tolist()) for n in lens]
    return [Prompt(prompt_id=i, token_ids=own, task="t", representation="r", payload=None) for i, own in enumerate(ids)]


def make_sampling(truncation: Truncation, temperature: float = 0.8, stop_ids: Sequence[int] = (1,)) -> Sampling:
    how = dict(temperature=temperature, max_new_tok=10, samples_per_prompt=4, stop_ids=tuple(stop_ids), seed=0)
    return Sampling(**how, truncation=truncation)  # type: ignore[arg-type]


def plain_logits(model: Any, prompt: Prompt, rollout: Rollout) -> Tensor:
    """[n, V] by transformers' own forward over prompt and response alone."""
    ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids.tolist()]])
    return model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]


def warped(logits: Tensor, temperature: float, cut: Truncation) -> Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if cut.top_k:
        scores = TopKLogitsWarper(cut.top_k)(None, scores)
    if cut.top_p < 1:
        scores = TopPLogitsWarper(cut.top_p)(None, scores)
    return MinPLogitsWarper(cut.min_p)(None, scores) if cut.min_p else scores


def kept_of(rollout: Rollout) -> KeptTokens:
    assert rollout.kept is not None and len(rollout.kept) == len(rollout.token_ids)
    return rollout.kept


def equal(ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> bool:
    def same(a: Rollout, b: Rollout) -> bool:
        kept, other = kept_of(a), kept_of(b)
        pairs = ((a.token_ids, b.token_ids), (kept.words, other.words), (kept.offsets, other.offsets))
        assert a.sampler_logprob is not None and b.sampler_logprob is not None
        logprobs = (logprob.nan_to_num(1.0) for logprob in (a.sampler_logprob, b.sampler_logprob))  # NaN: a reply's
        return all(torch.equal(x, y) for x, y in pairs) and torch.equal(*logprobs)

    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


# -- the sampler
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_log_probabilities_and_kept_tokens_are_those_of_transformers(cut: Truncation) -> None:
    policy, prompts = make_policy(), make_prompts(5, 1, 9)
    rollouts = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, make_sampling(cut))
    model, scored = transformers_twin(policy), trainer_logprob(policy, prompts, rollouts, temperature=0.8)
    num_kept = []
    for i, rollout in enumerate(rollouts):
        with torch.no_grad():
            scores = warped(plain_logits(model, prompts[i // 4], rollout), 0.8, cut)
        truth = scores.log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]
        assert torch.equal(kept_of(rollout).mask(), scores > -torch.inf)
        assert kept_of(rollout).has(rollout.token_ids).all()
        for ours in (rollout.sampler_logprob, scored[i]):
            torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-6)
        num_kept += kept_of(rollout).num_kept().tolist()
    assert 1 <= min(num_kept) < 10 <= max(num_kept) or cut.top_k == 7  # some stored as ids, some as bits
    others = BuiltinSampler(policy, SamplerConfig()).generate(prompts, make_sampling(Truncation()))
    assert all(r.kept is None for r in others)


def test_membership_is_that_of_the_mask() -> None:
    mask = torch.rand(60, NUM_VOCAB, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 60)[:, None]
    mask[:, 5] = True
    mask[-1] = True
    kept = KeptTokens.from_mask(mask)
    for token in (0, 5, 31, 32, 63, 299):
        ids = torch.full((60,), token)
        assert torch.equal(kept.has(ids), mask.gather(1, ids[:, None])[:, 0])


def test_kept_tokens_do_not_depend_on_how_many_steps_are_made_between_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where eight are made, and responses end between two checks."""
    policy, prompts = make_policy(), make_prompts(5, 1, 9)
    sampling = make_sampling(CUTS[0], stop_ids=(1, *range(200, 260)))
    with backend.using("reference"):
        each = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling)
        monkeypatch.setitem(builtin.STEPS_BETWEEN_CHECKS, "cpu", 8)
        many = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling)
    assert len({len(r.token_ids) for r in each}) > 3 and equal(each, many)


def test_tokens_of_an_environment_have_no_set_and_those_after_them_their_own() -> None:
    policy, prompts = make_policy(), make_prompts(5, 3)
    sampling = dataclasses.replace(make_sampling(CUTS[0], stop_ids=(1, *range(150, 300))), max_new_tok=40)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling, dialogue=Echo())
    assert {r.num_turns for r in rollouts} == {3}
    for rollout, scored in zip(rollouts, trainer_logprob(policy, prompts, rollouts, temperature=0.8), strict=True):
        context = rollout.context_mask
        assert context is not None and rollout.sampler_logprob is not None
        assert (kept_of(rollout).num_kept()[context] == NUM_VOCAB).all()
        assert (kept_of(rollout).num_kept()[~context] < NUM_VOCAB).all()
        torch.testing.assert_close(scored[~context], rollout.sampler_logprob[~context], rtol=0, atol=1e-6)


def test_turns_that_a_stop_string_ends_between_two_checks_keep_their_own_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where tokens behind the string have been drawn before it is found, and a reply takes their place."""
    policy, prompts = make_policy(), make_prompts(5, 1, 9)
    sampling = dataclasses.replace(make_sampling(CUTS[0]), max_new_tok=50, stop=("a", "b"))
    with backend.using("reference"):
        each = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling, dialogue=Echo(num_tok=3))
        monkeypatch.setitem(builtin.STEPS_BETWEEN_CHECKS, "cpu", 8)
        many = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling, dialogue=Echo(num_tok=3))
    assert all(r.num_turns == 3 for r in each) and equal(each, many)


def test_rollouts_come_back_from_a_checkpoint_as_they_were() -> None:
    rollouts = BuiltinSampler(make_policy(), SamplerConfig()).generate(make_prompts(5, 3), make_sampling(CUTS[0]))
    scored = ScoredRollouts(rollouts=tuple(rollouts), texts=("",) * 8, scores=Scores(rewards=(0.0,) * 8))
    assert equal(join_scored(*split_scored(scored)).rollouts, rollouts)


# -- the learner
OBJECTIVES = [
    dict(name="grpo", kl_coef=0.1, entropy_coef=0.02),
    dict(name="dapo", importance_sampling="token"),
    dict(name="gspo"),
    dict(name="cispo", importance_sampling="sequence"),
    dict(name="rft"),
]


def stage_of(objective: dict[str, Any], **batch: Any) -> Stage:
    return Stage(
        name="s",
        steps=9,
        objective=ObjectiveConfig(**objective),
        optim=OptimConfig(lr=1e-30),
        sampling=SamplingConfig(temperature=0.8, top_p=0.9, max_new_tok=10, samples_per_prompt=4),
        batch=BatchConfig(prompts=3, **batch),
    )


def groups_of(policy: Policy) -> list[Group]:
    prompts = make_prompts(5, 1, 9)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, make_sampling(Truncation(top_p=0.9)))
    return [
        Group(
            prompt=prompt,
            rollouts=tuple(rollouts[4 * i : 4 * i + 4]),
            rewards=(1.0, 0.0, 0.5, 0.0),
            advantages=(1.2, -0.7, 0.2, -0.7),
        )
        for i, prompt in enumerate(prompts)
    ]


def true_loss(policy: Policy, model: Any, groups: list[Group], stage: Stage) -> Tensor:
    """By transformers' forward, a softmax over the kept tokens by autograd, and no packing, chunks or kernels."""
    pairs = [(g, r, a) for g in groups for r, a in zip(g.rollouts, g.advantages, strict=True)]
    seq_id = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(r.token_ids) for _, r, _ in pairs]))
    logprob, entropy = [], []
    for group, rollout, _ in pairs:
        logits = plain_logits(model, group.prompt, rollout) / stage.loss_temperature
        for row, mask, token in zip(logits, kept_of(rollout).mask(), rollout.token_ids.tolist(), strict=True):
            ids = mask.nonzero()[:, 0] if stage.objective.name != "rft" else torch.arange(NUM_VOCAB)
            logp = row[ids].log_softmax(0)
            logprob.append(logp[ids == token][0])
            entropy.append(-(logp.exp() * logp).sum())
    stats = TokenStats(torch.stack(logprob), torch.stack(entropy), torch.stack(entropy))
    weight = token_weight(
        stage.objective,
        seq_id,
        len(pairs),
        num_loss_tok=len(seq_id),
        num_step_seqs=len(pairs),
        max_new_tok=10,
        dtype=torch.float64,
    )
    inputs = TokenInputs(
        weight=weight,
        advantage=torch.tensor([a for _, _, a in pairs])[seq_id],
        seq_id=seq_id,
        old_logprob=None,
        ref_logprob=stats.logprob.detach() if stage.objective.needs_reference else None,
        sampler_logprob=torch.cat([r.sampler_logprob for _, r, _ in pairs if r.sampler_logprob is not None]).double(),
    )
    return (weight * loss_of_tokens(stage.objective, stats, inputs).loss).sum()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["name"])
def test_gradient_ratio_and_drift_are_those_of_the_distribution_that_was_sampled_from(
    objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, stage = make_policy(), stage_of(objective, micro_batch_tok=40)
    groups, model = groups_of(policy), transformers_twin(policy)
    true_loss(policy, model, groups, stage).backward()
    learner = Learner(policy)
    learner.enter(stage)
    work = learner.begin(updates_of(groups, stage), stage, 0)
    assert len(work.trained[0].batches) > 2
    learner._accumulate(work)
    for ours, theirs in zip(policy.named_parameters().values(), model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)  # collected in float32
    learner.close()


@pytest.mark.parametrize("batch", [dict(), dict(num_iterations=2), dict(prompts_per_update=1)])
@pytest.mark.parametrize("name", ["gspo", "rft"])
def test_nothing_is_clipped_while_the_policy_has_not_moved(name: str, batch: dict[str, Any]) -> None:
    policy, stage = make_policy(torch.float32), stage_of(dict(name=name), **batch)
    learner = Learner(policy)
    learner.enter(stage)
    stats = learner.update(updates_of(groups_of(policy), stage), stage, 0)
    assert stats.clip_frac == 0 and stats.drift.largest < 1e-5 and stats.drift.num_tok > 50
    assert stats.entropy > 0
    learner.close()


# -- whole runs
def cut_stage(steps: int = 4, **choices: Any) -> Stage:
    stage = make_stage(steps=steps, objective="grpo", objective_choices=dict(kl_coef=0.05), **choices)
    return stage.model_copy(
        update={
            "sampling": SamplingConfig(max_new_tok=4, samples_per_prompt=8, top_p=0.8, top_k=9),
            "batch": stage.batch.model_copy(update={"prompts_per_update": 2, "num_iterations": 2}),
        }
    )


def taken_up(folder: Path) -> Components:
    """The run in ``folder`` from what is on the disk to its end."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    state, weights, tensors = load_checkpoint(newest)
    components = make_components(folder, cut_stage(), judge=gold_but_for_one)
    components.policy.overwrite([weights[name] for name in components.policy.named_parameters()])
    components.source.load_state_dict(state.source)
    components.learner.restore(cut_stage(), tensors)
    train(components, state)
    return components


def stop_and_be_killed(folder: Path) -> None:
    torch.set_num_threads(1)
    questions: list[int] = []

    def stop_requested() -> bool:
        questions.append(1)
        return len(questions) == 20

    try:
        train(make_components(folder, cut_stage(), judge=gold_but_for_one, stop_requested=stop_requested), RunState())
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_goes_on_bit_for_bit_with_the_same_kept_tokens(tmp_path: Path) -> None:
    """The process stops in the middle of a step, with rollouts in its checkpoint, and is gone with SIGKILL."""
    whole = make_components(tmp_path / "whole", cut_stage(), judge=gold_but_for_one)
    train(whole, RunState())
    folder = tmp_path / "killed"
    process = start_apart(stop_and_be_killed, folder)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    (drawn,) = load_checkpoint(newest)[0].draws
    assert all(kept_of(r).has(r.token_ids).all() and kept_of(r).num_kept().max() <= 9 for r in drawn.rollouts)
    assert sha(taken_up(folder)) == sha(whole)
    ours, theirs = ([row["kept/bytes"] for row in read_steps(run)] for run in (folder, tmp_path / "whole"))
    assert ours == theirs and len(ours) == 4 and min(ours) > 0


class Spoiling(BuiltinSampler):
    """Returns other kept tokens than it drew from; a probe, which is not truncated, it answers truly."""

    def spoil(self, rollout: Rollout) -> KeptTokens | None:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, *given)
        if not sampling.truncation.is_on:
            return rollouts
        return [dataclasses.replace(r, kept=self.spoil(r)) for r in rollouts]


class OneTooMany(Spoiling):
    """Each set has one token more, the likeliest of those that were left out or another."""

    def spoil(self, rollout: Rollout) -> KeptTokens:
        mask = kept_of(rollout).mask()
        left_out = ~mask
        mask[torch.arange(len(mask)), left_out.int().argmax(1)] = True
        return KeptTokens.from_mask(mask)


class Whole(Spoiling):
    def spoil(self, rollout: Rollout) -> KeptTokens:
        return KeptTokens.all_of(len(rollout.token_ids), kept_of(rollout).num_vocab)


class Shifted(Spoiling):
    """The sets of other tokens."""

    def spoil(self, rollout: Rollout) -> KeptTokens:
        return KeptTokens.from_mask(kept_of(rollout).mask().roll(1, 1))


class Silent(Spoiling):
    def spoil(self, rollout: Rollout) -> None:
        return None


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (OneTooMany, "log-probabilities .* differ by"),
        (Whole, "log-probabilities .* differ by"),
        (Shifted, "must have a set of kept tokens for each of its"),
        (Silent, "top_k = 9, top_p = 0.8, min_p = 0.0, got none"),
    ],
)
def test_wrong_kept_tokens_end_the_run_before_it_learns(tmp_path: Path, sampler: Any, message: str) -> None:
    components = make_components(tmp_path, cut_stage(), sampler_of=lambda policy: sampler(policy, SamplerConfig()))
    before = sha(components)
    with pytest.raises(RunFailed, match=message):
        train(components, RunState())
    assert sha(components) == before
