"""Log-probabilities and entropies of sampled tokens, as the trainer computes them."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from isomorph.engine.model.policy import Policy
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.types import Prompt, Rollout
from isomorph.kernels.linear_logprob import TokenStats, linear_logprob


def trainer_logprob(
    policy: Policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, temperature: float
) -> list[Tensor]:
    """For each rollout [n] float32 on the CPU: its tokens' log-probabilities as the trainer computes them, nats.

    ``rollouts`` stand as ``Sampler.generate`` returns them for ``prompts``.
    """
    stats = trainer_stats(policy, prompts, rollouts, temperature=temperature)
    return list(stats.logprob.float().cpu().split([len(r.token_ids) for r in rollouts]))


@torch.no_grad()
def trainer_stats(
    policy: Policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, temperature: float
) -> TokenStats:
    """Of the tokens of all rollouts, one after the other, as the trainer computes them."""
    size = len(rollouts) // len(prompts)
    unscored = [dataclasses.replace(r, sampler_logprob=None) for r in rollouts]  # so that every token is a target
    parts = [
        Part(prompt, tuple(unscored[i * size : (i + 1) * size]), (0.0,) * size) for i, prompt in enumerate(prompts)
    ]
    batch = pack_parts(parts, policy.device)
    return linear_logprob(
        policy.hidden(batch),
        policy.unembedding,
        batch.target_ids,
        row_index_N=batch.row_index,
        temperature=temperature,
    )
