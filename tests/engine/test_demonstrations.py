import pytest
import torch

from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.rollout.demonstrations import DemonstrationSampler
from isomorph.engine.types import Prompt, Rollout, Sampling

TEXT = TextCodec(word_tokenizer(["take", "stir", "5"]), chat_template=False, stop_ids=[1])


def prompt(prompt_id: int, answer: str | None) -> Prompt:
    return Prompt(prompt_id=prompt_id, token_ids=(2, 4), task="t", representation="graph", payload=answer)


def sampling(samples: int = 1, max_new_tok: int = 3) -> Sampling:
    return Sampling(temperature=1.0, max_new_tok=max_new_tok, samples_per_prompt=samples, stop_ids=(1,), seed=0)


def sampler() -> DemonstrationSampler:
    return DemonstrationSampler(TEXT, lambda prompt: prompt.payload, max_model_len=6)


def test_a_demonstration_is_a_rollout_that_nobody_sampled() -> None:
    demonstrations = sampler()
    assert demonstrations.publish(4).num_bytes == 0
    with demonstrations.asleep():
        pass
    handed: list[tuple[int, list[Rollout]]] = []
    prompts = [prompt(7, "stir 5"), prompt(3, "")]
    rollouts = demonstrations.generate(prompts, sampling(), lambda i, group: handed.append((i, list(group))))
    assert handed == [(0, rollouts[:1]), (1, rollouts[1:])]
    assert [r.token_ids.tolist() for r in rollouts] == [[5, 6, 1], [1]]
    assert [(r.prompt_id, r.sample, r.finish, r.policy_version) for r in rollouts] == [
        (7, 0, "stop", 4),
        (3, 0, "stop", 4),
    ]
    assert all(r.sampler_logprob is None and r.token_ids.dtype == torch.int64 for r in rollouts)


def test_a_prompt_without_a_demonstration_is_the_users_error() -> None:
    with pytest.raises(UserError, match="prompt 7 .*has no demonstration"):
        sampler().generate([prompt(7, None)], sampling())


def test_a_demonstration_that_is_too_long_is_the_users_error() -> None:
    with pytest.raises(UserError, match="prompt 7 has 4 tokens: .*got 3"):
        sampler().generate([prompt(7, "take stir 5")], sampling())


def test_more_than_one_sample_of_a_demonstration_is_the_users_error() -> None:
    with pytest.raises(UserError, match="must be 1, got 2"):
        sampler().generate([prompt(7, "take")], sampling(samples=2))


def test_a_demonstration_beyond_the_models_positions_is_the_users_error() -> None:
    fits = sampler().generate([prompt(7, "take stir 5")], sampling(max_new_tok=9))
    assert len(fits[0].token_ids) == 4  # 2 + 4 tokens on 6 positions
    with pytest.raises(UserError, match="2 [+] 5 tokens, the model has positions for 6"):
        sampler().generate([prompt(7, "take stir 5 5")], sampling(max_new_tok=9))
