"""The losses of all objectives, per predicted token: plain PyTorch on tensors of shape [n].

    r      = exp(logprob - old_logprob)           ratio = "token"
             exp(mean over the sequence)          ratio = "sequence": geometric mean of its tokens' ratios (GSPO)
             exp(sum over the sequence)           ratio = "product": product of its tokens' ratios (RLOO)
    rho    = exp(old_logprob - sampler_logprob)   importance weight trainer / sampler, truncated or masked at its bounds
    loss_i = w_i * (rho_i * surrogate_i + kl_coef * KL_i - entropy_coef * H_i)

The weights w_i contain one denominator for the whole optimizer step, which is passed in, so that the gradient does not
depend on how the step is split into micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.config import ObjectiveConfig
from isomorph.kernels.linear_logprob import TokenStats

MAX_LOG_RATIO = 20.0  # beyond it exp() would carry no information; value and gradient are clamped


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenInputs:
    """Inputs of the loss for n predicted tokens, aligned to targets."""

    weight: Tensor  # [n] from ``token_weight``, in the dtype of the log-probabilities
    advantage: Tensor  # [n] float32
    seq_id: Tensor  # [n] int64, ascending; which sequence of the micro-batch a token belongs to
    old_logprob: Tensor | None  # [n]; None: logprob.detach(); ratio 1, its gradient the policy gradient
    ref_logprob: Tensor | None  # [n]; required with kl_coef > 0; if given, kl is measured
    sampler_logprob: Tensor | None  # [n]; required for importance sampling and old_logprob = "sampler"

    def slice(self, tokens: slice) -> "TokenInputs":
        """The inputs of some of the tokens."""

        def part(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[tokens]

        return TokenInputs(
            weight=self.weight[tokens],
            advantage=self.advantage[tokens],
            seq_id=self.seq_id[tokens],
            old_logprob=part(self.old_logprob),
            ref_logprob=part(self.ref_logprob),
            sampler_logprob=part(self.sampler_logprob),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenLoss:
    """Per token, before multiplication by ``weight``; all but ``loss`` are detached."""

    loss: Tensor  # [n]
    is_clipped: Tensor  # [n] bool: the clip made the gradient zero (CISPO: the weight was clipped)
    kl: Tensor  # [n]; NaN where there is no reference


# (objective, log-probability and entropy with gradient, inputs) -> loss per token; ``loss_of_tokens`` is ours
LossFunction = Callable[[ObjectiveConfig, TokenStats, TokenInputs], TokenLoss]


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
    """[n] of ``dtype``: the factor of each token's loss, for ``seq_id`` [n] with ``num_seqs`` sequences.

    aggregation = "token": 1 / num_loss_tok. "sequence": 1 / (num_step_seqs * number of tokens of its sequence).
    "constant": 1 / (num_step_seqs * max_new_tok). ``num_loss_tok`` and ``num_step_seqs`` count the whole optimizer
    step, over all micro-batches and ranks.
    """
    if objective.aggregation == "token":
        return torch.full(seq_id.shape, 1.0 / num_loss_tok, dtype=dtype, device=seq_id.device)
    if objective.aggregation == "constant":
        return torch.full(seq_id.shape, 1.0 / (num_step_seqs * max_new_tok), dtype=dtype, device=seq_id.device)
    len_S = torch.bincount(seq_id, minlength=num_seqs)
    return 1.0 / (num_step_seqs * len_S[seq_id].to(dtype))


def loss_of_tokens(objective: ObjectiveConfig, stats: TokenStats, inputs: TokenInputs) -> TokenLoss:
    """The loss of ``objective`` for each token. ``stats``: log-probability and entropy [n], nats, with gradient."""
    if objective.name == "sft":
        return _plain(-stats.logprob)
    if objective.name == "rft":
        return _plain(-inputs.advantage * stats.logprob)
    old = inputs.sampler_logprob if objective.old_logprob == "sampler" else inputs.old_logprob
    old = stats.logprob.detach() if old is None else old
    kl = torch.full_like(old, torch.nan)
    if inputs.ref_logprob is not None:  # without a KL term in the loss, measure k1, which is what reward_kl_coef uses
        kl = kl_estimate(objective.kl_estimator if objective.kl_coef else "k1", stats.logprob, inputs.ref_logprob)
    surrogate = cispo if objective.name == "cispo" else clipped
    ratio = _ratio(objective, stats.logprob, old, inputs.seq_id)
    loss, is_clipped = surrogate(objective, ratio, stats.logprob, inputs.advantage)
    if objective.importance_sampling != "off":
        assert inputs.sampler_logprob is not None
        loss = loss * sampler_correction(objective, old, inputs.sampler_logprob, inputs.seq_id)
    if objective.kl_coef:
        loss = loss + objective.kl_coef * kl
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * stats.entropy
    return TokenLoss(loss=loss, is_clipped=is_clipped, kl=kl.detach())


def clipped(objective: ObjectiveConfig, ratio: Tensor, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), or -r A without a clip: [n] loss and [n] bool. Used by all objectives but CISPO.

    With ``clip_dual`` and A < 0: -max(min(r A, clip(r) A), clip_dual A).
    """
    gain, is_clipped = ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)
    if objective.clip_low is not None and objective.clip_high is not None:
        bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage
        is_clipped, gain = bounded < gain, torch.minimum(gain, bounded)
    if objective.clip_dual is not None:
        least = torch.where(advantage < 0, objective.clip_dual * advantage, -torch.inf)
        is_clipped, gain = is_clipped | (gain < least), torch.maximum(gain, least)
    return -gain, is_clipped.detach()


def cispo(objective: ObjectiveConfig, ratio: Tensor, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-sg(clip(r)) A logprob: [n] loss and [n] bool. The clip bounds a token's weight, its gradient is never zero."""
    low = 0.0 if objective.clip_low is None else 1 - objective.clip_low
    high = torch.inf if objective.clip_high is None else 1 + objective.clip_high
    bounded = ratio.detach().clamp(low, high)
    return -bounded * advantage * logprob, bounded != ratio.detach()


def kl_estimate(kind: str, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """[n] estimates of KL(policy || reference), nats, from samples of the policy: k1, k2, k3 of Schulman (2020).

    As a term of the loss, k1 has gradient zero in expectation; k2 has the gradient of the KL.
    """
    if kind == "k1":
        return logprob - ref_logprob
    if kind == "k2":
        return 0.5 * (logprob - ref_logprob).square()
    log_ratio = (ref_logprob - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def sampler_correction(objective: ObjectiveConfig, old: Tensor, sampler_logprob: Tensor, seq_id: Tensor) -> Tensor:
    """[n] importance weight trainer / sampler of the token or its whole sequence, truncated or masked at its bounds."""
    log_weight = (old - sampler_logprob).detach()
    if objective.importance_sampling == "sequence":
        log_weight = _per_sequence(log_weight, seq_id)[seq_id]
    weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = weight.clamp(objective.importance_sampling_floor, objective.importance_sampling_cap)
    if objective.importance_sampling_mode == "truncate":
        return bounded
    return torch.where(weight == bounded, weight, torch.zeros_like(weight))


def _ratio(objective: ObjectiveConfig, logprob: Tensor, old: Tensor, seq_id: Tensor) -> Tensor:
    log_ratio = (logprob - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if objective.ratio != "token":
        total_S = _per_sequence(log_ratio, seq_id)
        if objective.ratio == "sequence":
            total_S = total_S / torch.bincount(seq_id, minlength=len(total_S)).clamp(min=1)
        log_ratio = total_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[seq_id]
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
