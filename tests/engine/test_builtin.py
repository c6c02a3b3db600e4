"""What the built-in sampler samples: log-probabilities, ends of responses, and what a response depends on."""

import math
from collections import Counter

import pytest
import torch
from sampler_parts import generate, make_policy, make_prompts, make_sampling, policy_of, same
from small_world import CPU, NUM_VOCAB, one_thread  # noqa: F401
from torch import Tensor

from isomorph.engine.config import LoraConfig, SamplerConfig, UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import PackedBatch, Prompt, Rollout
from isomorph.kernels import backend
from isomorph.kernels.linear_logprob import linear_logprob
from isomorph.kernels.packed_layout import PackedLayout


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


def logits_after(policy: Policy, token_ids: list[int]) -> Tensor:
    """[V] of the next token, by a full forward over the prefix; no cache, nothing shared."""
    layout = PackedLayout.from_groups([len(token_ids)], [[]])
    batch = PackedBatch(
        token_ids=torch.tensor(token_ids),
        positions=layout.positions,
        layout=layout,
        row_index=torch.tensor([]),
        target_ids=torch.tensor([]),
        seq_id=torch.tensor([]),
        sampler_logprob=None,
        advantage=torch.tensor([]),
    )
    with torch.no_grad():
        return policy.hidden(batch)[-1] @ policy.unembedding.T


def trainer_logprob(policy: Policy, prompt: Prompt, rollout: Rollout, temperature: float) -> Tensor:
    ids = rollout.token_ids.tolist()
    logits = torch.stack([logits_after(policy, [*prompt.token_ids, *ids[:i]]) for i in range(len(ids))])
    return (logits / temperature).log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]


def pairs(prompts: list[Prompt], rollouts: list[Rollout]) -> list[tuple[Prompt, Rollout]]:
    size = len(rollouts) // len(prompts)
    return list(zip([p for p in prompts for _ in range(size)], rollouts, strict=True))


# -- what is drawn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_decoding_takes_the_likeliest_token_after_every_prefix(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    prompts = make_prompts(5, 1, 9)
    for prompt, rollout in pairs(prompts, generate(policy, prompts, make_sampling(0.0, samples=1))):
        prefix = list(prompt.token_ids)
        for i, token in enumerate(rollout.token_ids.tolist()):
            assert token == int(logits_after(policy, prefix).argmax())
            assert (token == 1) == (rollout.finish == "stop" and i + 1 == len(rollout.token_ids))
            prefix.append(token)
        assert rollout.sampler_logprob is None


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_log_probabilities_are_the_trainers_at_the_sampling_temperature(policy: Policy, temperature: float) -> None:
    prompts = make_prompts(5, 1, 9)
    for prompt, rollout in pairs(prompts, generate(policy, prompts, make_sampling(temperature))):
        assert rollout.sampler_logprob is not None and rollout.sampler_logprob.dtype == torch.float32
        truth = trainer_logprob(policy, prompt, rollout, temperature)
        torch.testing.assert_close(rollout.sampler_logprob, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])  # queries and keys are normalised, in olmo2 outputs as well
def test_families_with_further_norms_decode_what_the_trainer_computes_with_adapters(family: str) -> None:
    policy, prompts = policy_of(family, lora=LoraConfig(rank=2)), make_prompts(5, 1, 9)
    for prompt, rollout in pairs(prompts, generate(policy, prompts, make_sampling())):
        torch.testing.assert_close(
            rollout.sampler_logprob, trainer_logprob(policy, prompt, rollout, 1.0), rtol=0, atol=1e-5
        )
    with policy.adapters.disabled():  # type: ignore[union-attr]
        assert not torch.allclose(trainer_logprob(policy, prompt, rollout, 1.0), rollout.sampler_logprob, atol=1e-2)


def test_log_probabilities_agree_over_the_packed_path_of_training_in_bf16() -> None:
    policy = make_policy(torch.bfloat16)
    prompts = make_prompts(6)
    rollouts = generate(policy, prompts, make_sampling())
    inner = [r.token_ids[:-1] for r in rollouts]
    layout = PackedLayout.from_groups([6], [[len(ids) for ids in inner]])
    start, rows = 6, []
    for ids in inner:
        rows += [5, *range(start, start + len(ids))]
        start += len(ids)
    batch = PackedBatch(
        token_ids=torch.cat([torch.tensor(prompts[0].token_ids), *inner]),
        positions=layout.positions,
        layout=layout,
        row_index=torch.tensor(rows),
        target_ids=torch.cat([r.token_ids for r in rollouts]),
        seq_id=torch.tensor([]),
        sampler_logprob=None,
        advantage=torch.tensor([]),
    )
    with torch.no_grad():
        stats = linear_logprob(policy.hidden(batch), policy.unembedding, batch.target_ids, row_index_N=batch.row_index)
    gap = (stats.logprob - torch.cat([r.sampler_logprob for r in rollouts])).abs()  # type: ignore[misc]
    assert gap.max() < 0.1  # two roundings of hidden rows of order 1 to 8 bits


def test_every_response_has_a_log_probability_for_every_token_and_a_policy_version(policy: Policy) -> None:
    prompts = make_prompts(3, 2, first_id=7)
    sampler = BuiltinSampler(policy, SamplerConfig())
    assert sampler.publish(5).num_bytes == 0
    rollouts = sampler.generate(prompts, make_sampling(samples=3))
    assert [(r.prompt_id, r.sample) for r in rollouts] == [(7, 0), (7, 1), (7, 2), (8, 0), (8, 1), (8, 2)]
    for r in rollouts:
        assert r.policy_version == 5
        assert r.token_ids.dtype == torch.int64 and r.token_ids.device == CPU
        assert r.sampler_logprob is not None and r.sampler_logprob.shape == r.token_ids.shape
        assert (r.sampler_logprob <= 0).all() and len(r.token_ids) >= 1


def test_every_group_is_handed_over_once_when_it_is_finished(policy: Policy) -> None:
    prompts = make_prompts(3, 9, 2, 5, 1)
    handed: list[tuple[int, list[Rollout]]] = []
    sampler = BuiltinSampler(policy, SamplerConfig(max_seqs=4))
    rollouts = sampler.generate(prompts, make_sampling(samples=2), lambda i, group: handed.append((i, list(group))))
    assert sorted(i for i, _ in handed) == [0, 1, 2, 3, 4]
    assert all(group == rollouts[2 * i : 2 * i + 2] for i, group in handed)


def test_no_prompts_give_no_responses(policy: Policy) -> None:
    assert generate(policy, [], make_sampling()) == []


# -- where a response ends
def test_the_stop_token_is_kept_as_the_last_one_and_nothing_follows(policy: Policy) -> None:
    prompts = make_prompts(4, 6)
    rollouts = generate(policy, prompts, make_sampling(samples=40, stop_ids=(1, 7, 12), max_new_tok=10))
    stops = Counter(int(r.token_ids[-1]) for r in rollouts if r.finish == "stop")
    assert set(stops) == {1, 7, 12}  # all of them were met
    for r in rollouts:
        is_stop = torch.isin(r.token_ids, torch.tensor([1, 7, 12]))
        assert not is_stop[:-1].any()
        assert bool(is_stop[-1]) == (r.finish == "stop")
        assert r.finish == "stop" or len(r.token_ids) == 10
    assert any(r.finish == "length" for r in rollouts)
    assert any(len(r.token_ids) == 1 for r in rollouts)


def test_a_stop_token_in_the_last_place_is_a_stop(policy: Policy) -> None:
    prompts = make_prompts(4)
    (whole,) = generate(policy, prompts, make_sampling(samples=1, stop_ids=(), max_new_tok=6))
    assert whole.finish == "length" and len(whole.token_ids) == 6
    last = int(whole.token_ids[-1])
    first = whole.token_ids.tolist().index(last)
    (stopped,) = generate(policy, prompts, make_sampling(samples=1, stop_ids=(last,), max_new_tok=first + 1))
    assert stopped.finish == "stop"
    assert torch.equal(stopped.token_ids, whole.token_ids[: first + 1])


def test_one_new_token_is_enough(policy: Policy) -> None:
    rollouts = generate(policy, make_prompts(4, 2), make_sampling(max_new_tok=1))
    assert all(len(r.token_ids) == 1 for r in rollouts)


def test_a_shorter_limit_gives_the_beginning_of_the_same_response(policy: Policy) -> None:
    prompts = make_prompts(4, 2)
    long = generate(policy, prompts, make_sampling(max_new_tok=40))
    short = generate(policy, prompts, make_sampling(max_new_tok=7))
    assert all(torch.equal(s.token_ids, r.token_ids[:7]) for s, r in zip(short, long, strict=True))


def test_long_responses_have_the_trainers_log_probabilities_to_their_end(policy: Policy) -> None:
    prompts = make_prompts(3)
    rollouts = generate(policy, prompts, make_sampling(samples=2, stop_ids=(), max_new_tok=131))
    for prompt, rollout in pairs(prompts, rollouts):
        assert len(rollout.token_ids) == 131 and rollout.sampler_logprob is not None
        truth = trainer_logprob(policy, prompt, rollout, 1.0)
        torch.testing.assert_close(rollout.sampler_logprob, truth, rtol=0, atol=2e-5)


def test_a_prompt_that_leaves_no_positions_is_refused() -> None:
    policy = make_policy(max_model_len=16)
    generate(policy, make_prompts(4), make_sampling(max_new_tok=12))
    with pytest.raises(UserError, match="make 17 tokens, the model has positions for 16"):
        generate(policy, make_prompts(2, 5), make_sampling(max_new_tok=12))


def test_an_empty_prompt_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(policy, make_prompts(3, 0), make_sampling())


# -- what a response depends on: seed, prompt, sample, and nothing else
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_does_not_depend_on_its_company(temperature: float) -> None:
    policy = make_policy(torch.float64)  # rounding apart, which differs with the shapes of the products
    prompts = make_prompts(5, 1, 9, 4, 4, 7)
    sampling = make_sampling(temperature, stop_ids=(1, 5, 9, 13), max_new_tok=30)
    together = generate(policy, prompts, sampling)
    assert len({len(r.token_ids) for r in together}) > 4 or temperature == 0
    alone = [r for prompt in prompts for r in generate(policy, [prompt], sampling)]
    assert same(alone, together)
    for max_seqs in (4, 9, 16):
        assert same(generate(policy, prompts, sampling, max_seqs), together)
    turned = generate(policy, prompts[::-1], sampling)
    assert same(sorted(turned, key=lambda r: (r.prompt_id, r.sample)), together)


def test_a_response_does_not_depend_on_how_many_others_its_prompt_gets() -> None:
    policy = make_policy(torch.float64)
    prompts = make_prompts(5, 1, 9)
    few, many = (generate(policy, prompts, make_sampling(samples=n)) for n in (2, 6))
    assert same(few, [r for r in many if r.sample < 2])


def test_on_the_reference_path_no_bit_depends_on_the_company(policy: Policy) -> None:
    prompts = make_prompts(5, 1, 9, 4)
    sampling = make_sampling(samples=2, stop_ids=(1, 5, 9, 13), max_new_tok=10)
    with backend.using("reference"):
        together = generate(policy, prompts, sampling)
        for other in (
            generate(policy, prompts, sampling, max_seqs=3),
            [r for prompt in prompts for r in generate(policy, [prompt], sampling)],
        ):
            assert same(other, together)
            for a, b in zip(other, together, strict=True):
                assert a.sampler_logprob is not None and b.sampler_logprob is not None
                assert torch.equal(a.sampler_logprob, b.sampler_logprob)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_responses(policy: Policy) -> None:
    prompts = make_prompts(5, 1)
    first, again, other = (generate(policy, prompts, make_sampling(seed=seed)) for seed in (0, 0, 1))
    assert same(first, again)
    for a, b in zip(first, again, strict=True):
        assert a.sampler_logprob is not None and b.sampler_logprob is not None
        assert torch.equal(a.sampler_logprob, b.sampler_logprob)
    assert not same(first, other)


def test_samples_of_a_prompt_and_equal_prompts_with_different_ids_differ(policy: Policy) -> None:
    prompt = make_prompts(5)[0]
    twin = Prompt(prompt_id=99, token_ids=prompt.token_ids, task="t", representation="r", payload=None)
    rollouts = generate(policy, [prompt, twin], make_sampling(samples=6, stop_ids=(), max_new_tok=20))
    assert len({tuple(r.token_ids.tolist()) for r in rollouts}) == 12


# -- the distribution
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_tokens_come_as_often_as_the_softmax_says(policy: Policy, temperature: float) -> None:
    (prompt,) = make_prompts(5)
    num_draws = 4000
    rollouts = generate(policy, [prompt], make_sampling(temperature, 1, num_draws, ()), max_seqs=num_draws)
    count = torch.bincount(torch.cat([r.token_ids for r in rollouts]), minlength=NUM_VOCAB)
    assert_drawn_from(count, (logits_after(policy, list(prompt.token_ids)) / temperature).softmax(-1))


def test_second_tokens_come_as_often_as_the_softmax_after_the_first_says(policy: Policy) -> None:
    (prompt,) = make_prompts(5)
    rollouts = generate(policy, [prompt], make_sampling(1.0, 2, 6000, ()), max_seqs=6000)
    first = Counter(int(r.token_ids[0]) for r in rollouts).most_common(1)[0][0]
    second = torch.stack([r.token_ids[1] for r in rollouts if r.token_ids[0] == first])
    assert len(second) > 500
    prob = logits_after(policy, [*prompt.token_ids, first]).softmax(-1)
    assert_drawn_from(torch.bincount(second, minlength=NUM_VOCAB), prob)


def assert_drawn_from(count_V: Tensor, prob_V: Tensor) -> None:
    """Chi-square; the seed is fixed, so the 99.9 % bound (Wilson and Hilferty 1931) is met or not once and for all."""
    wanted = prob_V.double() * count_V.sum()
    is_common = wanted >= 5
    cells = [(count_V[is_common], wanted[is_common]), (count_V[~is_common].sum(), wanted[~is_common].sum())]
    chi2 = sum(float(((c - w).square() / w).sum()) for c, w in cells if float(w.sum()) > 0)
    freedom = int(is_common.sum())
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 3
    assert chi2 < bound
