"""What several test files of the engine work with: a tiny model with random weights, and groups of random tokens."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from isomorph.engine.config import Stage, TinyModel
from isomorph.engine.types import Group, Prompt, Rollout
from isomorph.engine.update.micro_batches import Update, pack

CPU = torch.device("cpu")
WORDS = [f"w{chr(97 + i)}" for i in range(16)]
NUM_VOCAB = len(WORDS) + 4
TINY = TinyModel(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=32)
SHAPES = ((5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3)))  # of each group: prompt length, response lengths


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other. Acts in every file that imports it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_groups(shapes: tuple[tuple[int, tuple[int, ...]], ...] = SHAPES, seed: int = 3) -> list[Group]:
    """Random tokens, log-probabilities and advantages; the rewards are the advantages."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for prompt_id, (prompt_len, response_lens) in enumerate(shapes):
        rollouts = tuple(
            Rollout(
                prompt_id=prompt_id,
                sample=i,
                token_ids=torch.randint(4, NUM_VOCAB, (length,), generator=generator),
                sampler_logprob=-3 + 0.4 * torch.randn(length, generator=generator),
                finish="stop",
                policy_version=0,
            )
            for i, length in enumerate(response_lens)
        )
        advantages = tuple(torch.randn(len(response_lens), generator=generator).tolist())
        token_ids = tuple(torch.randint(4, NUM_VOCAB, (prompt_len,), generator=generator).tolist())
        prompt = Prompt(prompt_id=prompt_id, token_ids=token_ids, task="t", representation="r", payload=None)
        groups.append(Group(prompt=prompt, rollouts=rollouts, rewards=advantages, advantages=advantages))
    return groups


def with_advantages(group: Group, *advantages: float) -> Group:
    return dataclasses.replace(group, advantages=advantages)


def updates_of(groups: list[Group], stage: Stage) -> list[Update]:
    """The groups packed as the stage's batch says."""
    return pack(
        groups,
        micro_batch_tok=stage.batch.micro_batch_tok,
        prompts_per_update=stage.batch.prompts_per_update,
        objective=stage.objective,
        device=CPU,
    )


def moved(weights: list[Tensor], seed: int) -> list[Tensor]:
    """Copies of the weights, each with noise of its own: a policy some steps away."""
    generator = torch.Generator().manual_seed(seed)
    return [w + 0.02 * torch.randn(w.shape, generator=generator) for w in weights]
