"""A tiny policy with wide logits, prompts and sampling parameters, for the tests of the built-in sampler."""

from typing import Any

import torch
import transformers
from small_world import CPU, NUM_VOCAB, WORDS

from isomorph.engine.config import LoraConfig, SamplerConfig, TinyModel
from isomorph.engine.model.attention import registered_attention
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.lora import attach
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Rollout, Sampling


def make_policy(dtype: torch.dtype = torch.float32, max_model_len: int = 256) -> Policy:
    tiny = TinyModel(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=max_model_len
    )
    policy = build_tiny(tiny, WORDS, seed=0, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([0.35 * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    return policy


def policy_of(
    family: str, dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None, **options: Any
) -> Policy:
    """Of transformers' ``family``, every weight random, adapters too."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(
        family,
        **{**sizes, "intermediate_size": 24, "vocab_size": NUM_VOCAB, "max_position_embeddings": 256, **options},
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=registered_attention(), dtype=dtype
    )
    adapters = None if lora is None else attach(model, lora, seed=0, base=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    return Policy(model, TextCodec(word_tokenizer(WORDS), chat_template=False, stop_ids=[1]), adapters=adapters)


def make_prompts(*lens: int, first_id: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(sum(lens))
    return [
        Prompt(
            prompt_id=first_id + i,
            token_ids=tuple(torch.randint(4, NUM_VOCAB, (length,), generator=generator).tolist()),
            task="t",
            representation="r",
            payload=None,
        )
        for i, length in enumerate(lens)
    ]


def make_sampling(
    temperature: float = 1.0, max_new_tok: int = 12, samples: int = 4, stop_ids: tuple[int, ...] = (1,), seed: int = 0
) -> Sampling:
    return Sampling(
        temperature=temperature,
        max_new_tok=max_new_tok,
        samples_per_prompt=samples,
        stop_ids=stop_ids,
        seed=seed,
    )


def generate(
    policy: Policy, prompts: list[Prompt], sampling: Sampling, max_seqs: int = 256, kv_tok: int | None = None
) -> list[Rollout]:
    return BuiltinSampler(policy, SamplerConfig(max_seqs=max_seqs, kv_tok=kv_tok)).generate(prompts, sampling)


def same(ours: list[Rollout], theirs: list[Rollout]) -> bool:
    return all(
        torch.equal(a.token_ids, b.token_ids) and (a.prompt_id, a.sample, a.finish) == (b.prompt_id, b.sample, b.finish)
        for a, b in zip(ours, theirs, strict=True)
    )
