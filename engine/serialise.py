"""One serialised form of ``ScoredRollouts``, for checkpoints and for the exchange between ranks.

Token ids and log-probabilities of all rollouts are concatenated, because thousands of small tensors are slow to send
and to write; everything else is JSON.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isomorph.engine.types import Rollout, ScoredRollouts, Scores

# a rollout's JSON
_PLAIN = (
    *("prompt_id", "sample", "finish", "policy_version", "num_turns"),
    *("environment_reward", "environment_failure"),
)


def split_scored(scored: ScoredRollouts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields for JSON, and tensors on the CPU; ``join_scored`` reads both.

    Tensors: ``token_ids`` [sum of lengths] int64; unless the rollouts have none (demonstrations, greedy responses),
    ``sampler_logprob`` [sum of lengths] float32, in nats; where a rollout has one, ``context_mask`` [sum of lengths]
    bool.
    """
    tensors = {"token_ids": torch.cat([torch.empty(0, dtype=torch.int64), *(r.token_ids for r in scored.rollouts)])}
    if known := [r.sampler_logprob for r in scored.rollouts if r.sampler_logprob is not None]:
        tensors["sampler_logprob"] = torch.cat(known)
    if any(r.context_mask is not None for r in scored.rollouts):
        tensors["context_mask"] = torch.cat([_context_mask(r) for r in scored.rollouts])
    fields = {
        "rollouts": [{name: getattr(r, name) for name in _PLAIN} for r in scored.rollouts],
        "lens": [len(r.token_ids) for r in scored.rollouts],
        "texts": list(scored.texts),
        "scores": scored.scores.columns(),
    }
    return fields, tensors


def join_scored(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ScoredRollouts:
    """The inverse of ``split_scored``. Raises KeyError, TypeError or ValueError where fields and tensors do not fit."""
    token_ids = tensors["token_ids"].split(fields["lens"])
    joined = tensors.get("sampler_logprob")
    logprobs = [None] * len(token_ids) if joined is None else joined.split(fields["lens"])
    joined = tensors.get("context_mask")
    masks = [None] * len(token_ids) if joined is None else joined.split(fields["lens"])
    rollouts = tuple(
        Rollout(
            **rollout,
            token_ids=ids,
            sampler_logprob=logprob,
            context_mask=None if mask is None or not mask.any() else mask,
        )
        for rollout, ids, logprob, mask in zip(fields["rollouts"], token_ids, logprobs, masks, strict=True)
    )
    known = fields["scores"] if "scores" in fields else {"rewards": fields["rewards"]}  # as earlier versions wrote it
    scores = Scores(**{name: _as_tuples(column) for name, column in known.items()})
    return ScoredRollouts(rollouts=rollouts, texts=tuple(fields["texts"]), scores=scores)


def _as_tuples(column: Any) -> Any:
    """JSON has lists only."""
    if isinstance(column, Mapping):
        return {name: tuple(values) for name, values in column.items()}
    return None if column is None else tuple(column)


def _context_mask(rollout: Rollout) -> Tensor:
    known = rollout.context_mask
    return torch.zeros(len(rollout.token_ids), dtype=torch.bool) if known is None else known
