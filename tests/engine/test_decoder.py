"""The built-in sampler's decoder: slots of the KV cache, and what a CUDA graph does, on the CPU."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from sampler_parts import generate, make_policy, make_prompts, make_sampling, same
from small_world import one_thread  # noqa: F401
from step_rules import Broken, recordable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from isomorph.engine.config import SamplerConfig, Truncation, UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout import builtin
from isomorph.engine.rollout import decoder as decoder_file
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.decoder import Decoder, DecoderSpec, pad_slots, padded_size
from isomorph.engine.types import Prompt, Sampling
from isomorph.kernels import backend
from isomorph.kernels import decode_attention as attention_file
from isomorph.kernels.kept_tokens import keep_tokens_ref


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


# -- slots
class Watched(Decoder):
    """Records prefills and steps with their slots."""

    def __init__(self, policy: Policy, spec: DecoderSpec) -> None:
        super().__init__(policy, spec)
        self.prefilled: list[int] = []
        self.steps: list[list[int]] = []

    def prefill(self, prompts: Sequence[Prompt], prompt_slots: Sequence[int]) -> None:
        self.prefilled += [p.prompt_id for p in prompts]
        super().prefill(prompts, prompt_slots)

    def advance(self, slots: Sequence[int], num_steps: int) -> None:
        self.steps.append(list(slots))
        super().advance(slots, num_steps)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Callable[..., Watched]:
    monkeypatch.setattr(builtin, "Decoder", Watched)

    def run(prompts: list[Prompt], sampling: Sampling, **config: int) -> Watched:
        sampler = BuiltinSampler(policy, SamplerConfig(**config))  # type: ignore[arg-type]
        sampler.generate(prompts, sampling)
        assert isinstance(sampler._decoder, Watched)
        return sampler._decoder

    return run


def test_a_slot_is_filled_again_as_soon_as_its_response_ends(watched: Callable[..., Watched]) -> None:
    sampling = make_sampling(samples=5, stop_ids=(1, 5, 9, 13), max_new_tok=30)
    decoder = watched(make_prompts(5, 1, 9, 4, 4, 7), sampling, max_seqs=4)
    full = [len(step) == 4 for step in decoder.steps]
    assert not any(full[full.index(False) :])  # never full again once nobody waits any more
    assert sum(full) > 0.7 * len(full)


def test_a_prompt_is_prefilled_once_and_its_slot_is_used_again(watched: Callable[..., Watched]) -> None:
    prompts = make_prompts(5, 1, 9, 4, 4, 7)
    decoder = watched(prompts, make_sampling(samples=5), max_seqs=4)  # a group is larger than what is decoded at once
    assert decoder.prefilled == [p.prompt_id for p in prompts]
    assert decoder.spec.prompts == 4


def test_rows_of_a_prompt_stand_next_to_each_other(watched: Callable[..., Watched], policy: Policy) -> None:
    decoder = watched(make_prompts(5, 1, 9), make_sampling(samples=4, stop_ids=()), max_seqs=12)
    prompt_slot = decoder.prompt_slot[decoder.steps[0]].tolist()
    assert prompt_slot == sorted(prompt_slot) and set(prompt_slot) == {0, 1, 2}


def test_the_kv_budget_limits_what_is_decoded_at_once(watched: Callable[..., Watched]) -> None:
    prompts, sampling = make_prompts(5, 1, 9, 4), make_sampling(samples=4, max_new_tok=12)
    whole = watched(prompts, sampling, max_seqs=16)
    assert whole.spec.kv_tok == 16 * 12 + 4 * 9 and len(whole.steps[0]) > 8
    small = watched(prompts, sampling, max_seqs=16, kv_tok=90)
    assert small.spec.kv_tok <= 90 and small.spec.seqs == 4
    assert max(len(step) for step in small.steps) <= 4
    assert same(generate(small.policy, prompts, sampling), generate(small.policy, prompts, sampling, kv_tok=90))


def test_a_sequence_that_the_kv_budget_cannot_hold_is_refused(policy: Policy) -> None:
    generate(policy, make_prompts(3, 9), make_sampling(max_new_tok=12), kv_tok=21)
    with pytest.raises(UserError, match=r"one sequence, .* 9 tokens and .*=12, must fit sampler.kv_tok, got 20: .* 21"):
        generate(policy, make_prompts(3, 9), make_sampling(max_new_tok=12), kv_tok=20)


def test_the_cache_serves_again_and_is_given_back_in_sleep(policy: Policy) -> None:
    sampler = BuiltinSampler(policy, SamplerConfig())
    prompts = make_prompts(3, 9)
    first = sampler.generate(prompts, make_sampling())
    decoder = sampler._decoder
    assert same(sampler.generate(prompts, make_sampling()), first) and sampler._decoder is decoder
    with sampler.asleep():
        assert sampler._decoder is None
    assert same(sampler.generate(prompts, make_sampling()), first)


def test_prompts_beyond_one_packed_pass_are_prefilled_in_several(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(5, 1, 9, 4, 4, 7)
    usual = generate(policy, prompts, make_sampling())
    monkeypatch.setattr(decoder_file, "PREFILL_TOK", 9)
    assert same(generate(policy, prompts, make_sampling()), usual)


@pytest.mark.parametrize("most", [1, 3, 4, 8])
def test_a_prompt_longer_than_a_pass_is_prefilled_in_chunks(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Two implementations of attention, in float32: caches agree to rounding."""
    prompts, sampling = make_prompts(5, 13, 1, 9), make_sampling(samples=1)
    decoders, num_rows = [], []

    def backbone(token_ids: Tensor, *given: Any) -> Tensor:
        num_rows.append(token_ids.numel())
        return Policy.backbone(policy, token_ids, *given)

    monkeypatch.setattr(policy, "backbone", backbone)
    for limit in (decoder_file.PREFILL_TOK, most):
        monkeypatch.setattr(decoder_file, "PREFILL_TOK", limit)
        decoder = Decoder(policy, builtin.plan_decoder([5, 13, 1, 9], sampling, 4, None))
        with torch.no_grad():
            num_rows.clear()
            decoder.prefill(prompts, [2, 0, 3, 1])
        decoders.append(decoder)
    whole, chunked = decoders
    assert max(num_rows) <= most and sum(num_rows) == 28
    torch.testing.assert_close(chunked.prompt_hidden, whole.prompt_hidden, rtol=1e-4, atol=1e-5)
    for slot, num_tok in zip([2, 0, 3, 1], [5, 13, 1, 9], strict=True):
        caches = [decoder.prompt_kv[:, :, slot, :, :num_tok] for decoder in (chunked, whole)]
        torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-5)


# -- what a CUDA graph does, on the CPU: rows padded to a captured size, several steps between two checks
def test_rows_that_fill_up_and_steps_after_the_end_change_nothing(policy: Policy) -> None:
    prompts = make_prompts(5, 9)
    sampling = make_sampling(samples=3, stop_ids=(1, 5, 9, 13), max_new_tok=20)
    usual = generate(policy, prompts, sampling)
    spec = dataclasses.replace(builtin.plan_decoder([5, 9], sampling, 6, None), seqs=9)
    decoder = Decoder(policy, spec)
    with torch.no_grad():
        decoder.prefill(prompts, [1, 0])
        keys = [builtin.rng_key(0, p.prompt_id, sample) for p in prompts for sample in range(3)]
        decoder.admit(range(6), [1, 1, 1, 0, 0, 0], [5, 5, 5, 9, 9, 9], keys)
        rows = torch.tensor(pad_slots(range(6), padded_size(9), decoder.spec.seqs))
        assert len(rows) == 10
        for _ in range(25):
            decoder._advance(rows)
    lengths, (token_ids, logprob) = decoder.ended_lengths(), decoder.responses(range(6))
    for i, rollout in enumerate(usual):
        assert lengths[i] == len(rollout.token_ids)
        assert torch.equal(token_ids[i, : lengths[i]], rollout.token_ids)
        torch.testing.assert_close(logprob[i, : lengths[i]], rollout.sampler_logprob, rtol=0, atol=1e-5)


@contextlib.contextmanager
def ready(policy: Policy, monkeypatch: pytest.MonkeyPatch, sampling: Sampling, bodies: str) -> Iterator[Decoder]:
    """A decoder with three running responses of one prompt. Checks of values are off on a GPU, so they are off here."""
    decoder = Decoder(policy, builtin.plan_decoder([5], sampling, 3, None))
    with torch.no_grad(), backend.using(bodies):
        decoder.prefill(make_prompts(5), [0])
        decoder.admit(range(3), [0, 0, 0], [5, 5, 5], [1, 2, 3])
        monkeypatch.setattr(attention_file, "_check", lambda q, prompt, own, scale: scale)
        monkeypatch.setattr(decoder_file, "keep_tokens", keep_tokens_ref)  # what a GPU runs; a CPU sorts fewer tokens
        yield decoder


@pytest.mark.parametrize("cut", [None, Truncation(top_k=3, top_p=0.9)], ids=["whole", "truncated"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_step_is_what_a_cuda_graph_can_record(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, temperature: float, cut: Truncation | None
) -> None:
    """No value is read on the host, nothing is copied from it, no shape depends on values, and logits are written to
    the decoder's one buffer. Which tokens are kept, with top-k and the like, takes memory beside it."""
    sampling = dataclasses.replace(make_sampling(temperature, samples=3), truncation=cut or Truncation())
    rows, num_vocab = torch.arange(3), len(policy.unembedding)
    with ready(policy, monkeypatch, sampling, "decode_attention=torch") as decoder:
        sees_all = decoder.kept is None
        with recordable(3, num_vocab if sees_all else None) as operations:
            decoder._advance(rows)
        assert "aten::mm" in operations
    by_pytorch = "rms_norm=torch,swiglu=torch,rotary=torch,linear_logprob=torch,sample_token=reference"
    with ready(policy, monkeypatch, sampling, f"decode_attention=torch,{by_pytorch}") as decoder:
        before = decoder.token_ids.clone()
        with FakeTensorMode(allow_non_fake_inputs=True):  # has no values: Python that depends on one cannot go on
            decoder._advance(rows)
        assert torch.equal(decoder.token_ids, before)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0] * x.shape[1]),
        lambda x: x.new_empty(3, 7),
        lambda x: x.softmax(-1),
    ],
)
def test_a_step_that_a_graph_cannot_record_is_refused(fault: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, 7)
    with recordable(3, 7), pytest.raises(Broken):
        fault(x)
    with recordable(3, 7):
        x.mul_(2).sum(1)
        x[torch.arange(2)].add_(1)


def test_the_cache_is_kept_in_sleep_and_serves_what_fits_it(policy: Policy) -> None:
    """A kept decoder samples what a new one does: shorter prompts, fewer of them, after new weights in their place."""
    kept = BuiltinSampler(policy, SamplerConfig(keep_cache=True))
    kept.generate(make_prompts(3, 9, 4), make_sampling())
    decoder = kept._decoder
    with kept.asleep():
        assert kept._decoder is decoder
        weights = policy.snapshot()
        policy.overwrite([1.5 * w for w in weights])
    try:
        for prompts in (make_prompts(8, 5, 2), make_prompts(6)):
            usual = generate(policy, prompts, make_sampling())
            assert same(kept.generate(prompts, make_sampling()), usual) and kept._decoder is decoder
        for prompts, sampling in ((make_prompts(10), make_sampling()), (make_prompts(4), make_sampling(0.5))):
            before = kept._decoder
            assert same(kept.generate(prompts, sampling), generate(policy, prompts, sampling))
            assert kept._decoder is not before
    finally:
        policy.overwrite(weights)


def test_numbers_of_rows_that_are_recorded_are_few_and_near() -> None:
    sizes = [padded_size(n) for n in range(1, 513)]
    assert all(n <= size <= 1.25 * n for n, size in enumerate(sizes, start=1))
    assert sizes[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10] and len(set(sizes)) < 40
