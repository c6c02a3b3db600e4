"""Packs groups into one micro-batch; the only place where tokens are shifted against their targets.

A group is packed as [P][R1]..[RG], without padding, its prompt once. The last token of a response is a target only and
is not in the decoder's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.types import PackedBatch, Prompt, Rollout
from isomorph.kernels.kept_tokens import KeptTokens
from isomorph.kernels.packed_layout import PackedLayout


@dataclass(frozen=True, slots=True)
class Part:
    """Some or all responses of one group, with their advantages: what one micro-batch holds of it."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]
    response_ids: tuple[int, ...] = ()  # index of each response among those of an update, if the caller needs it

    @property
    def num_tok(self) -> int:
        return len(self.prompt.token_ids) + sum(len(r.token_ids) - 1 for r in self.rollouts)


def pack_parts(parts: Sequence[Part], device: torch.device) -> PackedBatch:
    """Returns ``parts`` concatenated, on ``device``.

    Tokens of an environment are in the sequence, attended to, and no targets; tokens without a finite sampler
    log-probability neither.

    Raises ValueError if some rollouts have sampler log-probabilities or kept tokens and others do not.
    """
    token_ids: list[Tensor] = []
    row_index: list[Tensor] = []
    start = 0
    for part in parts:
        prompt_end = start + len(part.prompt.token_ids)
        token_ids.append(torch.tensor(part.prompt.token_ids))
        start = prompt_end
        for rollout in part.rollouts:
            inner = rollout.token_ids[:-1]
            token_ids.append(inner)
            # the first token is predicted from the prompt's last row, every other from the token before it
            row_index.append(torch.cat([torch.tensor([prompt_end - 1]), torch.arange(start, start + len(inner))]))
            start += len(inner)
    rollouts = [r for part in parts for r in part.rollouts]
    lens = torch.tensor([len(r.token_ids) for r in rollouts])
    rows, targets = torch.cat(row_index), torch.cat([r.token_ids for r in rollouts])
    seq_id = torch.arange(len(rollouts)).repeat_interleave(lens)
    sampler_logprob, kept = _sampler_logprob(rollouts), _kept(rollouts)
    layout = PackedLayout.from_groups(
        [len(part.prompt.token_ids) for part in parts],
        [[len(r.token_ids) - 1 for r in part.rollouts] for part in parts],
    ).to(device)
    is_target = torch.cat([_is_target(r) for r in rollouts])
    rows, targets, seq_id = (x[is_target] for x in (rows, targets, seq_id))
    if sampler_logprob is not None:
        sampler_logprob = sampler_logprob[is_target]
    return PackedBatch(
        token_ids=torch.cat(token_ids).to(device),
        positions=layout.positions,
        layout=layout,
        row_index=rows.to(device),
        target_ids=targets.to(device),
        seq_id=seq_id.to(device),
        sampler_logprob=None if sampler_logprob is None else sampler_logprob.to(device),
        advantage=torch.tensor([a for part in parts for a in part.advantages]).to(device),
        kept=None if kept is None else kept.where(is_target),
    )


def _sampler_logprob(rollouts: Sequence[Rollout]) -> Tensor | None:
    known = [r.sampler_logprob for r in rollouts if r.sampler_logprob is not None]
    if known and len(known) != len(rollouts):
        raise ValueError(
            "either all rollouts of a micro-batch must have sampler_logprob or none, got some with and some without"
        )
    return torch.cat(known) if known else None


def _kept(rollouts: Sequence[Rollout]) -> KeptTokens | None:
    known = [r.kept for r in rollouts if r.kept is not None]
    if known and len(known) != len(rollouts):
        raise ValueError(
            "either all rollouts of a micro-batch must have kept tokens or none, got some with and some without"
        )
    return KeptTokens.cat(known, known[0].num_vocab) if known else None


def _is_target(rollout: Rollout) -> Tensor:
    found = rollout.is_target
    return torch.ones(len(rollout.token_ids), dtype=torch.bool) if found is None else found
