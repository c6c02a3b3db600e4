"""One serialised form of ``ScoredRollouts``, for checkpoints and for the exchange between ranks.

Token ids and log-probabilities of all rollouts are concatenated, because thousands of small tensors are slow to send
and to write; everything else is JSON.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isomorph.engine.types import Rollout, ScoredRollouts, Scores, StepDrift
from isomorph.kernels.kept_tokens import KeptTokens

# a rollout's JSON
_PLAIN = (
    *("prompt_id", "sample", "finish", "policy_version", "num_turns"),
    *("environment_reward", "environment_failure"),
)


def split_scored(scored: ScoredRollouts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields for JSON, and tensors on the CPU; ``join_scored`` reads both.

    Tensors: ``token_ids`` [sum of lengths] int64; unless the rollouts have none (demonstrations, greedy responses),
    ``sampler_logprob`` [sum of lengths] float32, in nats; where a rollout has one, ``context_mask`` [sum of lengths]
    bool; where they have kept tokens, ``kept_words`` int32 and ``kept_counts`` [sum of lengths] int32.
    """
    tensors = {"token_ids": torch.cat([torch.empty(0, dtype=torch.int64), *(r.token_ids for r in scored.rollouts)])}
    if known := [r.sampler_logprob for r in scored.rollouts if r.sampler_logprob is not None]:
        tensors["sampler_logprob"] = torch.cat(known)
    if any(r.context_mask is not None for r in scored.rollouts):
        tensors["context_mask"] = torch.cat([_context_mask(r) for r in scored.rollouts])
    kept = [r.kept for r in scored.rollouts if r.kept is not None]
    if kept:
        joined = KeptTokens.cat(kept, kept[0].num_vocab)
        tensors |= {"kept_words": joined.words, "kept_counts": joined.offsets.diff().int()}
    fields = {
        "rollouts": [{name: getattr(r, name) for name in _PLAIN} for r in scored.rollouts],
        "lens": [len(r.token_ids) for r in scored.rollouts],
        "texts": list(scored.texts),
        "scores": scored.scores.columns(),
        "drift": None if scored.drift is None else dataclasses.asdict(scored.drift),
    }
    if kept:
        fields["kept_vocab"] = kept[0].num_vocab
    return fields, tensors


def join_scored(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ScoredRollouts:
    """The inverse of ``split_scored``. Raises KeyError, TypeError or ValueError where fields and tensors do not fit."""
    token_ids = tensors["token_ids"].split(fields["lens"])
    joined = tensors.get("sampler_logprob")
    logprobs = [None] * len(token_ids) if joined is None else joined.split(fields["lens"])
    joined = tensors.get("context_mask")
    masks = [None] * len(token_ids) if joined is None else joined.split(fields["lens"])
    kept = _kept(fields, tensors) if "kept_vocab" in fields else [None] * len(token_ids)
    rollouts = tuple(
        Rollout(
            **rollout,
            token_ids=ids,
            sampler_logprob=logprob,
            context_mask=None if mask is None or not mask.any() else mask,
            kept=sets,
        )
        for rollout, ids, logprob, mask, sets in zip(fields["rollouts"], token_ids, logprobs, masks, kept, strict=True)
    )
    known = fields["scores"] if "scores" in fields else {"rewards": fields["rewards"]}  # as earlier versions wrote it
    scores = Scores(**{name: _as_tuples(column) for name, column in known.items()})
    return ScoredRollouts(
        rollouts=rollouts, texts=tuple(fields["texts"]), scores=scores, drift=_drift(fields.get("drift"))
    )


def _drift(told: Mapping[str, Any] | None) -> StepDrift | None:
    return None if told is None else StepDrift(**{**told, "histogram": tuple(told["histogram"])})


def _kept(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[KeptTokens | None]:
    offsets = torch.nn.functional.pad(tensors["kept_counts"].long().cumsum(0), (1, 0))
    joined = KeptTokens(tensors["kept_words"], offsets, fields["kept_vocab"])
    ends = list(itertools.accumulate(fields["lens"]))
    return [joined.rows(slice(end - n, end)) for n, end in zip(fields["lens"], ends, strict=True)]


def _as_tuples(column: Any) -> Any:
    """JSON has lists only."""
    if isinstance(column, Mapping):
        return {name: tuple(values) for name, values in column.items()}
    return None if column is None else tuple(column)


def _context_mask(rollout: Rollout) -> Tensor:
    known = rollout.context_mask
    return torch.zeros(len(rollout.token_ids), dtype=torch.bool) if known is None else known
