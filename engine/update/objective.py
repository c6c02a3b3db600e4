"""The losses, on what is known of each predicted token: plain PyTorch on [N].

    r      = exp(logprob - old_logprob)           of a token; ratio = "sequence": its mean over the sequence, in exp
    rho    = exp(old_logprob - sampler_logprob)   importance weight between sampler and trainer, truncated
    loss_i = w_i * (rho_i * surrogate_i + kl_coef * KL_i - entropy_coef * H_i)

The weights w come from one denominator for the whole optimizer step, an argument, so that the gradient does not depend
on how the step is cut into micro-batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.config import ObjectiveConfig
from isomorph.kernels.linear_logprob import TokenStats

MAX_LOG_RATIO = 20.0  # beyond it exp() would carry no information; value and gradient are clamped


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What is known of n predicted tokens, aligned to targets. ``slice`` keeps whole columns together."""

    weight: Tensor  # [n] of ``token_weight``, in the dtype of the log-probabilities
    advantage: Tensor  # [n] float32
    seq_id: Tensor  # [n] int64
    old_logprob: Tensor | None  # [n]; None: the policy as it is, so the ratio is 1 and carries only the gradient
    ref_logprob: Tensor | None  # [n]; needed where kl_coef > 0
    sampler_logprob: Tensor | None  # [n]; needed for truncated importance sampling

    def slice(self, rows: slice) -> "Rows":
        def cut(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[rows]

        return Rows(
            weight=self.weight[rows],
            advantage=self.advantage[rows],
            seq_id=self.seq_id[rows],
            old_logprob=cut(self.old_logprob),
            ref_logprob=cut(self.ref_logprob),
            sampler_logprob=cut(self.sampler_logprob),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenLoss:
    """Per token, before the weights; all but ``loss`` detached."""

    loss: Tensor  # [n]
    is_clipped: Tensor  # [n] bool: the clip took the gradient away
    kl: Tensor  # [n]; NaN where there is no reference


def token_weight(
    objective: ObjectiveConfig,
    seq_id: Tensor,
    num_seqs: int,
    *,
    num_loss_tok: int,
    num_step_seqs: int,
    max_new_tok: int,
    dtype: torch.dtype,
) -> Tensor:
    """[n] of ``dtype``. ``num_loss_tok`` and ``num_step_seqs`` count the whole optimizer step, over all micro-batches.

    token: 1 / tokens. sequence: 1 / (sequences * tokens of its sequence). constant: 1 / (sequences * max_new_tok).
    """
    if objective.aggregation == "token":
        return torch.full(seq_id.shape, 1.0 / num_loss_tok, dtype=dtype, device=seq_id.device)
    if objective.aggregation == "constant":
        return torch.full(seq_id.shape, 1.0 / (num_step_seqs * max_new_tok), dtype=dtype, device=seq_id.device)
    len_S = torch.bincount(seq_id, minlength=num_seqs)
    return 1.0 / (num_step_seqs * len_S[seq_id].to(dtype))


def loss_of_tokens(objective: ObjectiveConfig, stats: TokenStats, rows: Rows) -> TokenLoss:
    """The loss that ``objective`` names, per token."""
    if objective.name == "sft":
        return _plain(-stats.logprob)
    if objective.name == "rft":
        return _plain(-rows.advantage * stats.logprob)
    old = stats.logprob.detach() if rows.old_logprob is None else rows.old_logprob
    advantage = rows.advantage
    kl = torch.full_like(old, torch.nan)
    if rows.ref_logprob is not None:
        kl = kl_estimate(objective.kl, stats.logprob, rows.ref_logprob)
        if objective.kl == "k1":  # its gradient as a loss is zero in expectation, so it is a cost of the token instead
            advantage = advantage - objective.kl_coef * (old - rows.ref_logprob)
    surrogate = {"cispo": cispo, "rloo": importance_weighted}.get(objective.name, clipped)
    loss, is_clipped = surrogate(
        objective, _ratio(objective, stats.logprob, old, rows.seq_id), stats.logprob, advantage
    )
    if objective.tis != "off":
        assert rows.sampler_logprob is not None
        loss = loss * sampler_correction(objective, old, rows.sampler_logprob, rows.seq_id)
    if objective.kl_coef and objective.kl != "k1":
        loss = loss + objective.kl_coef * kl
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * stats.entropy
    return TokenLoss(loss=loss, is_clipped=is_clipped, kl=kl.detach())


def clipped(objective: ObjectiveConfig, ratio: Tensor, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A): GRPO, Dr. GRPO, DAPO, GSPO and REINFORCE++ differ in advantage, ratio, clip and weights."""
    if objective.clip_low is None or objective.clip_high is None:
        return importance_weighted(objective, ratio, logprob, advantage)
    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    is_clipped = bounded * advantage < ratio * advantage
    return -torch.minimum(ratio * advantage, bounded * advantage), is_clipped.detach()


def cispo(objective: ObjectiveConfig, ratio: Tensor, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-sg(clip(r)) A logprob: the clip bounds a token's weight and never takes its gradient away."""
    low = 0.0 if objective.clip_low is None else 1 - objective.clip_low
    high = torch.inf if objective.clip_high is None else 1 + objective.clip_high
    bounded = ratio.detach().clamp(low, high)
    return -bounded * advantage * logprob, bounded != ratio.detach()


def importance_weighted(
    objective: ObjectiveConfig, ratio: Tensor, logprob: Tensor, advantage: Tensor
) -> tuple[Tensor, Tensor]:
    """-r A, unclipped: RLOO."""
    return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)


def kl_estimate(kind: str, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """[n] estimates of KL(policy || reference) from the policy's own samples (Schulman 2020)."""
    if kind == "k1":
        return logprob - ref_logprob
    if kind == "k2":
        return 0.5 * (logprob - ref_logprob).square()
    log_ratio = (ref_logprob - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def sampler_correction(objective: ObjectiveConfig, old: Tensor, sampler_logprob: Tensor, seq_id: Tensor) -> Tensor:
    """[n] weight trainer / sampler, of the token or of its whole sequence, truncated or masked at the cap."""
    log_weight = (old - sampler_logprob).detach()
    if objective.tis == "sequence":
        log_weight = _per_sequence(log_weight, seq_id)[seq_id]
    weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if objective.tis_mode == "truncate":
        return weight.clamp(max=objective.tis_cap)
    return torch.where(weight <= objective.tis_cap, weight, torch.zeros_like(weight))


def _ratio(objective: ObjectiveConfig, logprob: Tensor, old: Tensor, seq_id: Tensor) -> Tensor:
    log_ratio = (logprob - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if objective.ratio == "sequence":
        total_S = _per_sequence(log_ratio, seq_id)
        log_ratio = (total_S / torch.bincount(seq_id, minlength=len(total_S)).clamp(min=1))[seq_id]
    return log_ratio.exp()


def _per_sequence(value_n: Tensor, seq_id: Tensor) -> Tensor:
    """[S] sums over each sequence."""
    num_seqs = int(seq_id.max()) + 1 if len(seq_id) else 0
    return value_n.new_zeros(num_seqs).index_add(0, seq_id, value_n)


def _plain(loss: Tensor) -> TokenLoss:
    return TokenLoss(
        loss=loss,
        is_clipped=torch.zeros_like(loss, dtype=torch.bool),
        kl=torch.full_like(loss, torch.nan).detach(),
    )
