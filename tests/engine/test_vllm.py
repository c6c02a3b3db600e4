"""The vLLM sampler against the trainer, in real vLLM: tiny models of each family, and the 135M model by both ways."""

import dataclasses
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from isomorph.engine.config import LoraConfig, ModelConfig, SamplerConfig, UserError
from isomorph.engine.policy import Policy, TextCodec, load_policy, word_tokenizer
from isomorph.engine.rollout import vllm as vllm_sampler
from isomorph.engine.rollout.vllm import VllmSampler, start_vllm
from isomorph.engine.rollout.weights import (
    check_publication,
    fingerprint,
    probe_drift,
    storage_fingerprint,
    trainer_logprob,
)
from isomorph.engine.types import Prompt, Rollout, RunFailed, Sampling
from isomorph.kernels.linear_logprob import linear_logprob

CPU = torch.device("cpu")
WORDS = [f"w{chr(97 + i)}" for i in range(26)]
Pair = tuple[Policy, VllmSampler]


def with_vllm(test: Callable[..., None]) -> Callable[..., None]:
    is_there = importlib.util.find_spec("vllm") is not None and not torch.cuda.is_available()
    needs = pytest.mark.skipif(not is_there, reason="needs vLLM's CPU build")
    return pytest.mark.vllm(pytest.mark.slow(needs(test)))


def with_real_model(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.model(with_vllm(test))


def make_policy(config_class: type = Qwen2Config, dtype: torch.dtype = torch.float32, **options: Any) -> Policy:
    """Every parameter random, biases and norms too: a tensor that is missing or misplaced changes the numbers."""
    tokenizer = word_tokenizer(WORDS)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="isomorph", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    return Policy(model, TextCodec(tokenizer, chat_template=False, stop_ids=[tokenizer.eos_token_id]))


def make_prompts(policy: Policy, texts: list[str]) -> list[Prompt]:
    ids = [policy.text.encode_prompt(text) for text in texts]
    return [
        Prompt(prompt_id=i, token_ids=t, task="t", representation="natural", payload=None) for i, t in enumerate(ids)
    ]


def make_sampling(policy: Policy, **changes: Any) -> Sampling:
    usual = {"temperature": 1.0, "max_new_tok": 12, "samples_per_prompt": 2, "seed": 5}
    return Sampling(**{"stop_ids": policy.text.stop_ids, **usual, **changes})


def drift(policy: Policy, prompts: list[Prompt], rollouts: list[Rollout], temperature: float = 1.0) -> float:
    trainer = torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=temperature))
    drawn = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
    assert trainer.shape == drawn.shape
    return (trainer - drawn).abs().max().item()


# -- refused before vLLM starts
def test_a_missing_vllm_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import finds when there is none
    with pytest.raises(
        UserError, match=r'needs vLLM: pip install "isomorph\[cpu\]".*torchvision torchaudio torchcodec'
    ):
        start_vllm(make_policy(), SamplerConfig(kind="vllm"), 0)


@with_vllm
def test_what_cannot_be_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = make_policy(), SamplerConfig(kind="vllm", publish="shared", max_seqs=4)
    with pytest.raises(UserError, match=r"memory_frac=1e-06 of .* raise it"):
        start_vllm(policy, SamplerConfig(kind="vllm", memory_frac=1e-6), 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"0\.24 to 0\.32, got 0\.33"):
        patch.setattr("vllm.__version__", "0.33.1")
        start_vllm(policy, config, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="without quantisation"):
        patch.setattr(policy.config, "quantization_config", {"bits": 4}, raising=False)
        start_vllm(policy, config, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="compiler 'no-such-compiler'"):
        patch.setenv("CXX", "no-such-compiler")
        start_vllm(policy, config, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="process group that torchrun made"):
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        start_vllm(policy, config, 0)


@with_vllm
def test_starting_leaves_the_generators_and_threads_of_the_process_alone() -> None:
    def state() -> tuple[Any, ...]:
        threads = (torch.get_num_threads(), torch.set_num_threads)
        return (*threads, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    policy = make_policy()
    before = state()
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", max_seqs=4), 7)
    after = state()
    sampler.close()
    assert after == before


@with_vllm
def test_older_versions_unmap_the_kv_cache_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would do, told by its allocator's own table; the two calls into CUDA are written down instead."""
    from vllm.device_allocator import AllocationData, cumem

    calls: list[tuple[str, int]] = []
    allocator = cumem.CuMemAllocator()
    allocator.pointer_to_data = {p: AllocationData((0, 1, p, 0), tag) for p, tag in ((1, "weights"), (2, "kv_cache"))}
    monkeypatch.setattr(cumem.CuMemAllocator, "get_instance", lambda: allocator)
    monkeypatch.setattr(cumem, "unmap_and_release", lambda handle: calls.append(("unmap", handle[2])))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    vllm_sampler._unmap_kv()
    assert calls == [("unmap", 2)]


# -- every family, tiny
@with_vllm
@pytest.mark.parametrize(
    ("config_class", "publish", "dtype", "options"),
    [
        (LlamaConfig, "copy", torch.float32, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        (LlamaConfig, "shared", torch.float32, {"attention_bias": True, "tie_word_embeddings": False}),
        (MistralConfig, "copy", torch.float32, {"sliding_window": None, "tie_word_embeddings": False}),
        (Qwen2Config, "shared", torch.float32, {"tie_word_embeddings": True}),
        (Qwen3Config, "copy", torch.float32, {"head_dim": 64, "tie_word_embeddings": False}),
        (Qwen3Config, "shared", torch.bfloat16, {"head_dim": 64, "tie_word_embeddings": True}),
    ],
)
def test_every_family_agrees_with_the_trainer(
    config_class: type, publish: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    policy = make_policy(config_class, dtype, **options)
    prompts = make_prompts(policy, ["wa wb wc wd we", "wz wy wx"])
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", publish=publish, max_seqs=8), 0)
    try:
        for version in (1, 2):
            publication = sampler.publish(version)
            whole = fingerprint if publish == "copy" else storage_fingerprint
            assert publication.fingerprint == whole(policy.named_parameters())
            check_publication(policy, sampler, publication, prompts[0], None)
            rollouts = sampler.generate(prompts, make_sampling(policy))
            assert drift(policy, prompts, rollouts) < (1e-4 if dtype == torch.float32 else 0.2)
            assert {r.policy_version for r in rollouts} == {version}
            policy.overwrite([0.9 * weight for weight in policy.snapshot()])
    finally:
        sampler.close()


@with_real_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_published_merged_into_weights_that_stay(dtype: Any, smollm2_folder: Path) -> None:
    config = ModelConfig(path=str(smollm2_folder), dtype=dtype)
    policy = load_policy(config, vocabulary=[], seed=0, device=CPU, lora=LoraConfig(rank=8))
    base, limit = fingerprint(policy.base()), {"float32": 1e-3, "bfloat16": 2.0}[dtype]
    prompts = make_prompts(policy, ["Say a word on rivers.", "Say a word on mountains."])
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", max_model_len=256, max_seqs=8), 0)
    try:
        assert sampler.fingerprint() == base  # B = 0
        before = sampler.generate(prompts, make_sampling(policy))
        assert drift(policy, prompts, before) <= limit
        for seed, (name, parameter) in enumerate(policy.named_parameters().items()):
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data.copy_(0.1 * noise)
        assert drift(policy, prompts, before) > 2 * limit  # stale weights would be seen
        publication = sampler.publish(1)
        assert publication.num_bytes == sum(w.nbytes for w in policy.base().values())
        assert publication.fingerprint == fingerprint(policy.weights()) != base == fingerprint(policy.base())
        check_publication(policy, sampler, publication, prompts[0], None)
        assert drift(policy, prompts, sampler.generate(prompts, make_sampling(policy))) <= limit
        parameter.data[3, 2] += 0.01
        with pytest.raises(RunFailed, match="stale weights"):
            check_publication(policy, sampler, publication, prompts[0], None)
    finally:
        sampler.close()


# -- the 135M model
@pytest.fixture(scope="module", params=["copy", "shared"])
def started(request: pytest.FixtureRequest, smollm2_folder: Path) -> Iterator[tuple[Policy, VllmSampler, list[Tensor]]]:
    """The policy, vLLM on it, and the weights as they were: starting takes long, so the tests share it."""
    policy = load_policy(ModelConfig(path=str(smollm2_folder)), vocabulary=[], seed=0, device=CPU)
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", publish=request.param, max_model_len=256, max_seqs=32), 0)
    yield policy, sampler, policy.snapshot()
    sampler.close()


@pytest.fixture
def pair(started: tuple[Policy, VllmSampler, list[Tensor]]) -> Pair:
    policy, sampler, weights = started
    policy.overwrite(weights)
    return policy, sampler


only_copied = pytest.mark.parametrize("started", ["copy"], indirect=True, scope="module")


def is_shared(sampler: VllmSampler) -> bool:
    embedding = sampler.policy.model.model.embed_tokens.weight
    return embedding.data_ptr() == sampler.model.model.embed_tokens.weight.data_ptr()


def take_steps(policy: Policy, num: int = 2) -> None:
    """Real AdamW steps, so large that stale weights are far off."""
    optimizer = torch.optim.AdamW(policy.named_parameters().values(), lr=1e-4)
    token_ids = torch.tensor(policy.text.encode_prompt("Name three rivers and three mountains."))
    positions = torch.arange(len(token_ids))
    for _ in range(num):
        hidden_TD = policy.trunk(token_ids[None], positions[None], causal)[0]
        loss = -linear_logprob(hidden_TD[:-1], policy.unembedding, token_ids[1:]).logprob.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


@with_real_model
def test_trainer_and_vllm_agree_on_log_probabilities(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(policy, [f"Count from {i} to {i + 3}, then say a word on {i}." for i in range(16)])
    handed: list[tuple[int, list[Rollout]]] = []
    rollouts = sampler.generate(prompts, make_sampling(policy), lambda i, group: handed.append((i, list(group))))
    assert [(r.prompt_id, r.sample) for r in rollouts] == [(i, s) for i in range(16) for s in range(2)]
    assert sorted(i for i, _ in handed) == list(range(16))
    assert all(group == rollouts[2 * i : 2 * i + 2] for i, group in handed)
    assert drift(policy, prompts, rollouts) <= 1e-3
    assert sampler.generate([], make_sampling(policy)) == []
    cooler = sampler.generate(prompts[:2], make_sampling(policy, temperature=0.6))
    assert drift(policy, prompts[:2], cooler, temperature=0.6) <= 1e-3


@with_real_model
def test_they_agree_again_after_optimizer_steps_and_a_publication(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(policy, ["Say a word on rivers.", "Say a word on mountains."])
    before = sampler.generate(prompts, make_sampling(policy))
    take_steps(policy)
    assert drift(policy, prompts, before) > 0.05  # the steps were real
    publication = sampler.publish(2)
    check_publication(policy, sampler, publication, prompts[0], None)
    after = sampler.generate(prompts, make_sampling(policy))
    assert drift(policy, prompts, after) <= 1e-3
    assert {r.policy_version for r in after} == {2}


@with_real_model
def test_publishing_moves_all_bytes_or_none(pair: Pair) -> None:
    policy, sampler = pair
    parameters = policy.named_parameters()
    if not is_shared(sampler):
        assert sampler.publish(3).num_bytes == sum(p.nbytes for p in parameters.values())
        return
    assert sampler.publish(3).num_bytes == 0
    first = sampler.model.model.layers[0]
    query, key = (parameters[f"model.layers.0.self_attn.{m}_proj.weight"] for m in "qk")
    assert query.data_ptr() == first.self_attn.qkv_proj.weight.data_ptr()
    assert key.data_ptr() == first.self_attn.qkv_proj.weight[len(query) :].data_ptr()
    up = parameters["model.layers.0.mlp.up_proj.weight"]
    assert up.data_ptr() == first.mlp.gate_up_proj.weight[len(up) :].data_ptr()


@with_real_model
def test_a_policy_that_moved_without_a_publication_is_caught(pair: Pair) -> None:
    policy, sampler = pair
    prompt = make_prompts(policy, ["Say a word on rivers."])[0]
    publication = sampler.publish(1)
    down = policy.named_parameters()["model.layers.7.mlp.down_proj.weight"]
    if is_shared(sampler):
        down.data = down.data.clone()  # storage of its own again: the sampler no longer follows
        publication = sampler.publish(2)
    with torch.no_grad():
        down[5, 7] += 1e-6
    if is_shared(sampler):
        publication = sampler.publish(3)
    with pytest.raises(RunFailed, match="stale weights"):
        check_publication(policy, sampler, publication, prompt, None)
    if is_shared(sampler):
        down.data = sampler.model.model.layers[7].mlp.down_proj.weight.data


@with_real_model
@only_copied
def test_a_tensor_left_behind_is_caught_by_its_fingerprint(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sampler = pair
    prompt = make_prompts(policy, ["Say a word on rivers."])[0]
    sampler.publish(1)
    take_steps(policy, 1)
    weights: Any = sampler._weights
    monkeypatch.setattr(weights, "packs", [p for p in weights.packs if "layers.7.mlp.down" not in p.standing.name])
    with pytest.raises(RunFailed, match="stale weights"):
        check_publication(policy, sampler, sampler.publish(2), prompt, None)


@with_real_model
@only_copied
def test_a_stale_packed_unembedding_is_caught_by_the_probe(pair: Pair) -> None:
    policy, sampler = pair
    prompt = make_prompts(policy, ["Say a word on rivers."])[0]
    sampler.publish(1)
    stale = sampler.model.lm_head.cpu_linear
    take_steps(policy)
    publication = sampler.publish(2)
    assert publication.fingerprint == fingerprint(policy.named_parameters())
    fresh, sampler.model.lm_head.cpu_linear = sampler.model.lm_head.cpu_linear, stale
    with pytest.raises(RunFailed, match="does not compute with the trainer's weights"):
        check_publication(policy, sampler, publication, prompt, None)
    sampler.model.lm_head.cpu_linear = fresh
    assert probe_drift(policy, sampler, prompt) <= 1e-3


@with_real_model
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(
        policy, ["Name a bird and say why you chose it, in one sentence of at most twelve words."] * 2
    )
    state = torch.get_rng_state()
    first = sampler.generate(prompts, make_sampling(policy))
    sampler.generate(prompts[:1], make_sampling(policy, seed=6))
    again = sampler.generate(prompts, make_sampling(policy))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.token_ids, b.token_ids)
        assert a.sampler_logprob is not None and b.sampler_logprob is not None
        assert torch.equal(a.sampler_logprob, b.sampler_logprob)
    other = sampler.generate(prompts, make_sampling(policy, seed=6))
    drawn = {tuple(r.token_ids.tolist()) for r in [*first, *other]}
    assert len(drawn) == 8  # another prompt id, sample or seed: another response


@with_real_model
def test_the_stop_token_is_kept_and_ends_the_response(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    # a frequent word ends a response too, so that both ways of ending come up
    stop_ids = (*policy.text.stop_ids, *policy.text.tokenizer(" the", add_special_tokens=False)["input_ids"])
    prompts = make_prompts(policy, ["Tell a story of the sea.", "Tell a story of the sky."])
    rollouts = sampler.generate(prompts, make_sampling(policy, stop_ids=stop_ids, samples_per_prompt=8))
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        *before, last = rollout.token_ids.tolist()
        assert not set(before) & set(stop_ids)
        assert (last in stop_ids) == (rollout.finish == "stop")
        assert rollout.finish == "stop" or len(rollout.token_ids) == 12
        assert rollout.sampler_logprob is not None and len(rollout.sampler_logprob) == len(rollout.token_ids)


@with_real_model
def test_nothing_but_the_stop_ids_ends_a_response(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    (question,) = make_prompts(policy, ["What is the capital of France?"])
    answer = policy.text.tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
    answered = dataclasses.replace(question, token_ids=(*question.token_ids, *answer))
    greedy = make_sampling(policy, temperature=0.0, samples_per_prompt=1)
    (ended,) = sampler.generate([answered], greedy)
    assert (ended.token_ids.tolist(), ended.finish) == ([policy.text.stop_ids[0]], "stop")
    (endless,) = sampler.generate([answered], dataclasses.replace(greedy, stop_ids=()))
    assert endless.token_ids[0] == policy.text.stop_ids[0]
    assert (len(endless.token_ids), endless.finish) == (12, "length")


@with_real_model
def test_greedy_takes_the_likeliest_token_and_carries_no_log_probability(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    (prompt,) = make_prompts(policy, ["What is the capital of France?"])
    rollouts = sampler.generate([prompt], make_sampling(policy, temperature=0.0, samples_per_prompt=2))
    assert [r.sample for r in rollouts] == [0, 1]
    assert torch.equal(rollouts[0].token_ids, rollouts[1].token_ids)
    assert all(r.sampler_logprob is None for r in rollouts)
    token_ids = torch.tensor([*prompt.token_ids, *rollouts[0].token_ids.tolist()])
    with torch.no_grad():
        hidden = policy.trunk(token_ids[None], torch.arange(len(token_ids))[None], causal)[0]
        logits_NV = hidden[len(prompt.token_ids) - 1 : -1] @ policy.unembedding.T
    chosen = logits_NV.gather(1, rollouts[0].token_ids[:, None])[:, 0]
    assert (logits_NV.max(1).values - chosen).max() <= 1e-3


@with_real_model
def test_requests_that_vllm_would_bend_are_refused(pair: Pair) -> None:
    policy, sampler = pair
    prompts = make_prompts(policy, ["Say a word on rivers."])
    with pytest.raises(UserError, match="vLLM was started for 256: raise sampler.max_model_len"):
        sampler.generate(prompts, make_sampling(policy, max_new_tok=250))
    with pytest.raises(UserError, match=r"temperature must be 0 or >= 0\.01 with vLLM, got 0\.001"):
        sampler.generate(prompts, make_sampling(policy, temperature=0.001))
    with pytest.raises(UserError, match="one process, one vLLM"):
        start_vllm(policy, SamplerConfig(kind="vllm"), 0)


@with_real_model
def test_asleep_gives_the_sampler_back_as_it_was(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(policy, ["Say a word on rivers."])
    with sampler.asleep():
        pass
    assert drift(policy, prompts, sampler.generate(prompts, make_sampling(policy))) <= 1e-3
