"""One fault after the other, planted in tensors, masks and samplers: what stops the run, and after how many tokens."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_world import CPU, TINY, WORDS, make_groups, one_thread  # noqa: F401
from torch import Tensor
from toy_run import make_components, make_stage
from transformers import AutoModelForCausalLM

from isomorph.engine.config import SamplerConfig
from isomorph.engine.drift import DriftSums, Surprise, check_ends, check_step, step_drift
from isomorph.engine.loop import train
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_stats
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.fingerprint import fingerprint
from isomorph.engine.rollout.tripwire import check_publication
from isomorph.engine.types import PackedBatch, Publication, Rollout, RunFailed, RunState, Sampling, StepDrift
from isomorph.engine.update import micro_batches
from isomorph.engine.update.learner import Learner


# -- a stale tensor in the sampler
def random_policy(is_tied: bool) -> Policy:
    """Every tensor random and of a size that matters, biases and norms too."""
    policy = build_tiny(TINY, WORDS, seed=0, dtype=torch.float32, device=CPU)
    if not is_tied:
        policy.config.tie_word_embeddings = False
        model = AutoModelForCausalLM.from_config(policy.config, attn_implementation="isomorph", dtype=torch.float32)
        policy = Policy(model, policy.text)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters().items():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator) + ("norm" in name))
    assert (policy.unembedding is policy.model.model.embed_tokens.weight) == is_tied
    return policy


class Reporting(BuiltinSampler):
    """Has weights of its own, whose hash it reports."""

    def told(self) -> Publication:
        return Publication(version=1, num_bytes=1, fingerprint=fingerprint(self.policy.named_parameters()))


@pytest.mark.parametrize("is_tied", [True, False])
def test_each_tensor_that_is_stale_by_one_bit_is_caught_by_its_hash(is_tied: bool) -> None:
    policy, own = random_policy(is_tied), random_policy(is_tied)
    sampler = Reporting(own, SamplerConfig())
    sampler.policy_version = 1
    check_publication(policy, sampler, sampler.told(), None, None)
    assert ("lm_head.weight" in policy.named_parameters()) != is_tied
    for weight in own.named_parameters().values():
        last = weight.data.view(torch.int32).view(-1)[-1:]
        last ^= 1
        with pytest.raises(RunFailed, match="stale weights"):
            check_publication(policy, sampler, sampler.told(), None, None)
        last ^= 1
    check_publication(policy, sampler, sampler.told(), None, None)


@pytest.mark.parametrize("is_tied", [True, False])
def test_each_tensor_that_is_computed_with_and_is_stale_is_caught_by_log_probabilities(is_tied: bool) -> None:
    """As where hashes agree and a packed copy is used: each tensor 1 % off, on some hundred tokens."""
    policy, stale = random_policy(is_tied), random_policy(is_tied)
    prompts = [group.prompt for group in make_groups()]
    sampling = Sampling(temperature=1.0, max_new_tok=20, samples_per_prompt=16, stop_ids=policy.text.stop_ids, seed=0)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)

    def found() -> StepDrift:
        """Of the sampler ``stale``: what it reports of the tokens that were drawn."""
        own = trainer_stats(policy, prompts, rollouts, temperature=1.0)
        sums = DriftSums(CPU)
        sums.add(own.logprob, trainer_stats(stale, prompts, rollouts, temperature=1.0).logprob, own.entropy)
        return step_drift([sums.tensors()], 0, 0)

    check_step(found(), torch.float32, TINY.num_layers, None)
    for name, weight in stale.named_parameters().items():
        fresh = weight.data.clone()
        weight.data.mul_(1.01)
        with pytest.raises(RunFailed, match="a layer is stale"):
            check_step(found(), torch.float32, TINY.num_layers, None)
            pytest.fail(name)  # which tensor was not seen
        weight.data.copy_(fresh)


# -- tokens and masks
def test_trained_tokens_that_are_off_by_one_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the learner alone: the sampler's log-probabilities are then those of other tokens."""

    def shifted(parts: list[Part], device: torch.device) -> PackedBatch:
        batch = pack_parts(parts, device)
        return dataclasses.replace(batch, row_index=(batch.row_index - 1).clamp(min=0))

    monkeypatch.setattr(micro_batches, "pack_parts", shifted)
    with pytest.raises(RunFailed, match="before the first step was done: trainer and sampler log-probabilities"):
        train(make_components(tmp_path, make_stage()), RunState())


@pytest.mark.parametrize("by", [1, -1])
def test_a_mask_of_an_environments_tokens_that_is_shifted_by_one_is_caught(by: int) -> None:
    stop = 1
    rollout = Rollout(
        prompt_id=0,
        sample=0,
        token_ids=torch.tensor([5, stop, 8, 8, 9, stop]),
        sampler_logprob=torch.zeros(6),
        finish="stop",
        policy_version=0,
        context_mask=torch.tensor([False, False, True, True, False, False]),
        num_turns=2,
    )
    sampling = Sampling(temperature=1.0, max_new_tok=9, samples_per_prompt=1, stop_ids=(stop,), seed=0)
    check_ends([rollout], sampling)
    assert rollout.context_mask is not None
    with pytest.raises(RunFailed, match="stop token"):
        check_ends([dataclasses.replace(rollout, context_mask=rollout.context_mask.roll(by))], sampling)


# -- the KL reference
def test_a_reference_that_moved_is_named_before_it_is_saved_or_kept() -> None:
    policy = random_policy(is_tied=True)
    learner = Learner(policy)
    stage = make_stage(objective="grpo", objective_choices={"kl_coef": 0.1}, reference="previous")
    learner.enter(stage)
    learner.state_tensors()
    assert learner.reference is not None
    for name, weight in zip(policy.named_parameters(), learner.reference, strict=True):
        weight.view(torch.int32).view(-1)[0] ^= 1
        for use in (learner.state_tensors, lambda: learner.enter(stage)):
            with pytest.raises(RunFailed, match=f"KL reference have changed .*the first is {re.escape(name)};"):
                use()
        weight.view(torch.int32).view(-1)[0] ^= 1
    again = Learner(policy)
    again.restore(stage, learner.state_tensors())
    assert again.reference is not None
    again.reference[0].zero_()
    with pytest.raises(RunFailed, match="KL reference have changed"):
        again.state_tensors()


def test_a_reference_that_shares_the_policys_memory_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(steps=4, objective="grpo", objective_choices={"kl_coef": 0.1})
    components = make_components(tmp_path, stage, checkpoint_every=2)
    policy = components.policy
    monkeypatch.setattr(policy, "snapshot", lambda: [p.detach() for p in policy.named_parameters().values()])
    with pytest.raises(RunFailed, match=r"after step 2, in stage words: the weights of the KL reference have changed"):
        train(components, RunState())


# -- a sampler that draws from another distribution than it reports: after how many tokens it is seen
def tokens_until_seen(drawn: Callable[[Tensor], Tensor], step_tok: int = 4_000, most: int = 400_000) -> Surprise:
    """From 64 distributions over 200 tokens: entropy 4.3 nats, varentropy 1.0."""
    generator = torch.Generator().manual_seed(0)
    logprob_CV = (1.4 * torch.randn(64, 200, generator=generator, dtype=torch.float64)).log_softmax(-1)
    entropy_C = -(logprob_CV.exp() * logprob_CV).sum(-1)
    prob_CV, run = drawn(logprob_CV), Surprise()
    while run.num_tok < most:
        tokens = torch.multinomial(prob_CV, step_tok // 64, replacement=True, generator=generator)
        q = logprob_CV.gather(1, tokens).flatten()
        sums = DriftSums(CPU)
        sums.add(q, q, entropy_C.repeat_interleave(tokens.shape[1]))
        found = step_drift([sums.tensors()], 0, 0)
        check_step(found, torch.float32, 2, None)  # one step's statistics are blind to it
        run = run.plus(found)
        try:
            run.check()
        except RunFailed:
            return run
    return run


def test_the_number_of_tokens_until_biased_sampling_is_seen() -> None:
    """A temperature 2 % off takes six times as many tokens as one 5 % off; a top-k of 50 of 200 tokens very few."""

    def top_k(logprob_CV: Tensor) -> Tensor:
        kept = logprob_CV.topk(50).values[:, -1:]
        return logprob_CV.masked_fill(logprob_CV < kept, -math.inf).softmax(-1)

    honest = tokens_until_seen(torch.exp)
    assert honest.num_tok >= 400_000
    needed = {error: honest.tokens_needed(error) for error in (0.02, 0.05)}
    assert 5 < needed[0.02] / needed[0.05] < 8
    for error in (0.02, -0.02, 0.05):
        run = tokens_until_seen(lambda logprob_CV, error=error: (logprob_CV / (1 + error)).softmax(-1))  # type: ignore[misc]
        assert run.num_tok <= 1.15 * needed[abs(error)] + 4_000, error
    assert tokens_until_seen(top_k).num_tok <= 8_000
