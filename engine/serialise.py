"""One serialised form of a draw (rollouts, texts, rewards), for checkpoints and for the exchange between ranks.

Token ids and log-probabilities of all rollouts are concatenated, because thousands of small tensors are slow to send
and to write; everything else is JSON.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isomorph.engine.types import Draw, Rollout


def split_draw(draw: Draw) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The draw as fields for JSON and tensors on the CPU, both read by ``join_draw``.

    Tensors: ``token_ids`` [sum of lengths] int64 and, unless the rollouts have none (demonstrations, greedy
    responses), ``sampler_logprob`` [sum of lengths] float32, in nats.
    """
    tensors = {"token_ids": torch.cat([torch.empty(0, dtype=torch.int64), *(r.token_ids for r in draw.rollouts)])}
    if known := [r.sampler_logprob for r in draw.rollouts if r.sampler_logprob is not None]:
        tensors["sampler_logprob"] = torch.cat(known)
    fields = {
        "rollouts": [
            {"prompt_id": r.prompt_id, "sample": r.sample, "finish": r.finish, "policy_version": r.policy_version}
            for r in draw.rollouts
        ],
        "lens": [len(r.token_ids) for r in draw.rollouts],
        "texts": list(draw.texts),
        "rewards": list(draw.rewards),
    }
    return fields, tensors


def join_draw(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Draw:
    """The draw that ``split_draw`` took apart. Raises KeyError, TypeError or ValueError where the parts do not fit."""
    token_ids = tensors["token_ids"].split(fields["lens"])
    joined = tensors.get("sampler_logprob")
    logprobs = [None] * len(token_ids) if joined is None else joined.split(fields["lens"])
    rollouts = tuple(
        Rollout(**rollout, token_ids=ids, sampler_logprob=logprob)
        for rollout, ids, logprob in zip(fields["rollouts"], token_ids, logprobs, strict=True)
    )
    return Draw(rollouts=rollouts, texts=tuple(fields["texts"]), rewards=tuple(fields["rewards"]))
