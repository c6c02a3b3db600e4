"""Log-probabilities and entropies of given tokens under the trainer's weights.

The learner scores packed batches with ``batch_stats``; the checks of the sampler score its rollouts with
``trainer_stats`` and ``trainer_logprob``. All of them make one and the same forward pass.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from isomorph.engine.model.policy import Policy
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.types import PackedBatch, Prompt, Rollout
from isomorph.kernels.linear_logprob import TokenStats, linear_logprob


def batch_stats(policy: Policy, batch: PackedBatch, *, temperature: float) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of the N targets of ``batch`` at ``temperature``, over ``batch.kept``.

    Three tensors [N] on the policy's device, in nats; float32, or float64 where the policy is float64. Gradients reach
    the policy's parameters unless the caller turns them off.
    """
    return linear_logprob(
        policy.hidden(batch),
        policy.unembedding,
        batch.target_ids,
        row_index_N=batch.row_index,
        temperature=temperature,
        kept=batch.kept,
    )


@torch.no_grad()
def trainer_stats(
    policy: Policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, temperature: float
) -> TokenStats:
    """``batch_stats`` of every token of ``rollouts``, concatenated in their order: [sum of lengths] each, no gradient.

    ``rollouts``: G for each prompt, in the order in which ``Sampler.generate`` returns them for ``prompts``. Tokens
    without a finite sampler log-probability and tokens of an environment are scored, too.
    """
    size = len(rollouts) // len(prompts)
    unscored = [dataclasses.replace(r, sampler_logprob=None, context_mask=None) for r in rollouts]  # all are targets
    parts = [
        Part(prompt, tuple(unscored[i * size : (i + 1) * size]), (0.0,) * size) for i, prompt in enumerate(prompts)
    ]
    return batch_stats(policy, pack_parts(parts, policy.device), temperature=temperature)


def trainer_logprob(
    policy: Policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, temperature: float
) -> list[Tensor]:
    """The log-probabilities of ``trainer_stats``, one tensor [n] float32 on the CPU for each rollout, in nats."""
    stats = trainer_stats(policy, prompts, rollouts, temperature=temperature)
    return list(stats.logprob.float().cpu().split([len(r.token_ids) for r in rollouts]))
