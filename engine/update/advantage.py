"""Advantages that need more than one group's rewards: whitening over a step, and a KL penalty on the reward.

    reward_kl_coef    with a baseline: R - coef * sum_t k1[t], then baseline and scale of the group (RLOO, GRPO)
                      without: R - coef * sum_{i >= t} k1[i], the return from token t on (REINFORCE++)
    k1[t]             log pi_old(y[t]) - log pi_ref(y[t]); a masked response, which no pass scores, counts in the
                      baseline with the mean KL of the others of its group
    scale = "batch"   (A - mean) / sqrt(var + 1e-8), over the tokens of a step

Statistics are over all updates, micro-batches and ranks of a step, so advantages do not depend on how it is split.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.types import PackedBatch
from isomorph.engine.update.micro_batches import Update
from isomorph.kernels.advantage import gae, group_advantage

VARIANCE_EPS = 1e-8


def whitened(values: Sequence[Tensor], num_tok: Sequence[Tensor], ranks: Ranks = ALONE) -> list[Tensor]:
    """Returns (value - mean) / standard deviation (n - 1), with statistics over all ``values`` of all ranks.

    ``num_tok``: tensors of the same shapes, the number of tokens with that value. Computed in float64, returned in the
    dtype of ``values``. If all values are equal, the result is exactly 0. A collective: all ranks must call it.
    """
    known = [(v.double(), n.double()) for v, n in zip(values, num_tok, strict=True)]
    counted = [v[n > 0] for v, n in known]
    own = torch.cat([*counted, torch.empty(0, dtype=torch.float64, device=values[0].device)])
    low, high = (own.min().item(), own.max().item()) if len(own) else (torch.inf, -torch.inf)
    total, num = sum((n * v).sum().item() for v, n in known), sum(n.sum().item() for _, n in known)
    of_ranks = ranks.gather((low, high, total, num))
    num = sum(n for *_, n in of_ranks)
    if max(high for _, high, *_ in of_ranks) <= min(low for low, *_ in of_ranks):
        return [torch.zeros_like(v) for v in values]
    mean = sum(total for _, _, total, _ in of_ranks) / num
    squares = sum(ranks.gather(sum((n * (v - mean).square()).sum().item() for v, n in known)))
    scale = (squares / (num - 1) + VARIANCE_EPS) ** -0.5
    return [((v - mean) * scale).to(value.dtype) for (v, _), value in zip(known, values, strict=True)]


def penalised(
    updates: Sequence[Update],
    old: Sequence[Sequence[Tensor]],
    reference: Sequence[Sequence[Tensor]],
    objective: ObjectiveConfig,
    ranks: Ranks = ALONE,
) -> list[list[Tensor]]:
    """Returns the advantage [N] of each predicted token of each micro-batch of each update, with the KL penalty.

    ``old`` and ``reference``: log-probabilities [N] of the same micro-batches, nats. A collective.
    """
    kl = [[o - r for o, r in zip(olds, refs, strict=True)] for olds, refs in zip(old, reference, strict=True)]
    of_update = _returns_to_go if objective.baseline == "none" else _group_relative
    advantages = [of_update(u, kl_of_batch, objective) for u, kl_of_batch in zip(updates, kl, strict=True)]
    if objective.scale == "batch":
        flat = list(itertools.chain.from_iterable(advantages))
        flat = whitened(flat, [torch.ones_like(a) for a in flat], ranks)
        advantages = [[flat.pop(0) for _ in batches] for batches in advantages]
    return advantages


def compared(reward_S: Tensor, size_P: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Returns [S] bool, which responses have an advantage of their own, and the offsets of their groups among these.

    ``size_P``: responses of each group. NaN: no reward applies, and the response has no part in the others' advantages.
    One that is left alone by that is compared with nothing, where baseline or scale compare.
    """
    known_S, group_S = reward_S.isfinite(), torch.arange(len(size_P)).repeat_interleave(size_P)
    num_P = torch.bincount(group_S[known_S], minlength=len(size_P))
    if objective.baseline != "none" or objective.scale == "std":
        is_alone_P = (num_P == 1) & (size_P > 1)
        known_S, num_P = known_S & ~is_alone_P[group_S], num_P.masked_fill(is_alone_P, 0)
    return known_S, torch.cat([num_P.new_zeros(1), num_P[num_P > 0].cumsum(0)])


def _group_relative(update: Update, kl: Sequence[Tensor], objective: ObjectiveConfig) -> list[Tensor]:
    """Subtracts the KL of a whole response from its reward, before baseline and scale are applied.

    A rank knows the KL of the groups assigned to it only; its advantages of other groups are wrong, and not used.
    """
    size_P = torch.tensor([len(rewards) for rewards in update.rewards])
    group_S = torch.arange(len(size_P)).repeat_interleave(size_P)
    reward_S = torch.tensor([r for rewards in update.rewards for r in rewards], dtype=torch.float64)
    kl_S, is_scored_S = torch.zeros_like(reward_S), torch.zeros(len(reward_S), dtype=torch.bool)
    for batch, response_id, kl_N in zip(update.batches, update.response_ids, kl, strict=True):
        id_N = response_id[batch.seq_id.cpu()]
        kl_S.index_add_(0, id_N, kl_N.double().cpu())
        is_scored_S[id_N] = True
    sum_P = torch.zeros(len(size_P), dtype=torch.float64).index_add(0, group_S, kl_S)
    mean_P = sum_P / torch.bincount(group_S[is_scored_S], minlength=len(size_P)).clamp(min=1)
    penalised_S = reward_S - objective.reward_kl_coef * torch.where(is_scored_S, kl_S, mean_P[group_S])
    known_S, offsets = compared(reward_S, size_P, objective)
    scale = "none" if objective.scale == "batch" else objective.scale
    advantage_S = torch.zeros_like(reward_S)
    if known_S.any():
        advantage_S[known_S] = group_advantage(penalised_S[known_S], offsets, baseline=objective.baseline, scale=scale)
    return [
        advantage_S[response_id[batch.seq_id.cpu()]].to(kl_N)
        for batch, response_id, kl_N in zip(update.batches, update.response_ids, kl, strict=True)
    ]


def _returns_to_go(update: Update, kl: Sequence[Tensor], objective: ObjectiveConfig) -> list[Tensor]:
    """Returns reward minus the KL of this token and those after it."""
    reward_S = torch.tensor([r for rewards in update.rewards for r in rewards], dtype=torch.float64)
    return [
        _return_to_go(batch, reward_S[response_id].to(kl_N.device), objective.reward_kl_coef * kl_N.double()).to(kl_N)
        for batch, response_id, kl_N in zip(update.batches, update.response_ids, kl, strict=True)
    ]


def _return_to_go(batch: PackedBatch, reward_S: Tensor, cost_N: Tensor) -> Tensor:
    len_S = torch.bincount(batch.seq_id, minlength=batch.num_seqs)
    ends_S = len_S.cumsum(0)
    reward_N = -cost_N
    reward_N[ends_S[len_S > 0] - 1] += reward_S[len_S > 0]
    bounds = torch.cat([ends_S.new_zeros(1), ends_S])
    return gae(reward_N, torch.zeros_like(reward_N), bounds, gamma=1.0, lam=1.0)[1]
