"""Stop strings: the search against a decode of every prefix, and the sampler against its own longer responses.

vLLM's is in test_vllm_life.py.
"""

import random

import pytest
import torch
from small_world import CPU, WORDS, one_thread  # noqa: F401
from stop_truth import check_that_they_end_there, first_end
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm_parts import make_prompts, make_sampling

from isomorph.engine.config import SamplerConfig, TinyModel, UserError
from isomorph.engine.drift import check_ends
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.rollout import builtin
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.stop_strings import StopStrings, check_stop_strings

CORPUS = ["the </answer> is né 日本 </ans wer> done.", "a b c </answer>, then\n\nmore </tool> wörter"] * 20


def byte_level() -> TextCodec:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|pad|>"])
    )
    return TextCodec(
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>"), chat_template=False, stop_ids=[0]
    )


def sentence_pieces() -> TextCodec:
    """As Llama 2's: a mark for a space, the first of which decoding drops."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"]))
    return TextCodec(
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"), chat_template=False, stop_ids=[1]
    )


def words() -> TextCodec:
    tokenizer = word_tokenizer(["the", "answer", "</answer>", "done", ".", ","])
    return TextCodec(tokenizer, chat_template=False, stop_ids=[1])


@pytest.mark.parametrize(
    ("make", "stop"),
    [
        (byte_level, ("</answer>",)),
        (byte_level, ("日本", "\n\n")),
        (byte_level, ("e", "er> d")),
        (sentence_pieces, ("</answer>", "ö")),
        (sentence_pieces, ("the ",)),
        (words, ("</answer>",)),
        (words, ("done .", "the the")),
    ],
)
def test_the_first_token_is_found_that_completes_a_string(make: object, stop: tuple[str, ...]) -> None:
    codec = make()  # type: ignore[operator]
    rng, size, found = random.Random(0), len(codec.tokenizer), []
    written = [codec.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*stop, *CORPUS[:2])]
    for _ in range(120):
        ids = [rng.randrange(2, size) for _ in range(rng.randrange(1, 30))]
        ids += [0] * rng.randrange(12) + rng.choice(written) + [rng.randrange(size) for _ in range(3)]
        at = StopStrings(stop, codec).first_end(ids)
        assert at == first_end(codec, stop, ids), ids
        found.append(at)
    assert any(found)


def test_a_string_that_no_text_contains_is_refused() -> None:
    codec = byte_level()
    check_stop_strings(["</answer>", "日", "\n"], codec)
    check_stop_strings([" the"], sentence_pieces())
    for other, string in ((codec, "<|end|>"), (words(), "answer  done"), (words(), "</tool>")):
        with pytest.raises(UserError, match=r"name a special token in model\.stop"):
            check_stop_strings([string], other)


# -- the samplers: the same seeds without the strings give the same tokens, further
def make_policy() -> Policy:
    tiny = TinyModel(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=64)
    policy = build_tiny(tiny, WORDS, seed=0, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([0.35 * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    return policy


@pytest.mark.parametrize("steps_between", [1, 8])
@pytest.mark.parametrize("max_seqs", [3, 64])
def test_the_built_in_samplers_responses_end_with_that_token(
    monkeypatch: pytest.MonkeyPatch, steps_between: int, max_seqs: int
) -> None:
    monkeypatch.setitem(builtin.STEPS_BETWEEN_CHECKS, "cpu", steps_between)
    policy = make_policy()
    stop = ("wc wd", "we", "wa wa")
    prompts = make_prompts(policy, ["wa wb", "wc", "wd we wf"])
    free, ended = (
        BuiltinSampler(policy, SamplerConfig(max_seqs=max_seqs)).generate(
            prompts, make_sampling(policy, samples_per_prompt=6, max_new_tok=20, stop=strings)
        )
        for strings in ((), stop)
    )
    check_that_they_end_there(policy, stop, free, ended)
    check_ends(ended, make_sampling(policy, max_new_tok=20, stop=stop))


def test_a_greedy_response_ends_there_too() -> None:
    policy = make_policy()
    sampler, prompts = BuiltinSampler(policy, SamplerConfig()), make_prompts(policy, ["wa wb"])
    greedy = {"temperature": 0.0, "samples_per_prompt": 1, "max_new_tok": 20}
    (free,) = sampler.generate(prompts, make_sampling(policy, **greedy))
    stop = policy.text.decode(free.token_ids[2:4].tolist())
    (ended,) = sampler.generate(prompts, make_sampling(policy, **greedy, stop=(stop,)))
    assert ended.token_ids.tolist() == free.token_ids[: len(ended.token_ids)].tolist()
    assert len(ended.token_ids) <= 4 and stop in policy.text.decode(ended.token_ids.tolist())
