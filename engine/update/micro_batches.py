"""Assigns groups to optimizer steps, ranks and micro-batches of at most ``batch.micro_batch_tok`` tokens.

A group larger than that is split between responses, and its prompt is repeated in each part. Gradients do not depend
on the split. With several ranks each rank packs the groups that are assigned to it; all ranks get the same number of
micro-batches, some of them without predicted tokens, so that their collectives match.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.config import ObjectiveConfig, UserError
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.types import Group, PackedBatch
from isomorph.kernels.packing import assign_groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """Micro-batches and denominators of one optimizer step.

    The denominators ``num_loss_tok`` and ``num_seqs`` are global over ranks. They include responses with advantage 0
    that are skipped, because their gradient is zero (with rft they do not). They exclude tokens of an environment or
    without a finite sampler log-probability, and responses that are masked or have no reward (``Group.is_trained``).
    """

    batches: tuple[PackedBatch, ...]  # of this rank; the last ones may be without predicted tokens
    num_loss_tok: int
    num_seqs: int  # with at least one token in the loss
    num_dropped_tok: int  # tokens left out because their sampler log-probability is not finite
    # skipped because their advantage is 0 or they are masked, on all ranks: whole groups, and responses of the others
    num_zero_advantage_groups: int = 0
    num_zero_advantage_seqs: int = 0
    rewards: tuple[tuple[float, ...], ...] = ()  # of each group, on all ranks; NaN where none applies
    response_ids: tuple[Tensor, ...] = ()  # [S] of each batch: index into the flattened ``rewards``


def pack(
    groups: Sequence[Group],
    *,
    micro_batch_tok: int,
    prompts_per_update: int | None,
    objective: ObjectiveConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[Update]:
    """Returns one Update for every ``prompts_per_update`` groups (None: for all), with this rank's micro-batches.

    ``groups``: of all ranks, in the same order on each. Raises UserError if a prompt with one response is longer than
    ``micro_batch_tok``, ValueError if a prompt or a response is empty.
    """
    per_update = prompts_per_update or len(groups)
    chunks = [groups[i : i + per_update] for i in range(0, len(groups), per_update)]
    return [_update(chunk, micro_batch_tok, objective, device, ranks) for chunk in chunks]


def _update(
    groups: Sequence[Group], micro_batch_tok: int, objective: ObjectiveConfig, device: torch.device, ranks: Ranks
) -> Update:
    first_id = [0, *itertools.accumulate(len(group.rollouts) for group in groups)]
    parts_of = [
        _parts(group, micro_batch_tok, objective, start) for group, start in zip(groups, first_id, strict=False)
    ]
    assigned = ranks.assign([sum(part.num_tok for part in parts) for parts in parts_of])
    trained = [[part for i in members for part in parts_of[i]] for members in assigned]
    bins = [assign_groups([part.num_tok for part in parts], micro_batch_tok) for parts in trained]
    own, own_bins = trained[ranks.rank], bins[ranks.rank]
    batches = [pack_parts([own[i] for i in members], device) for members in own_bins]
    num_idle = max(map(len, bins)) - len(own_bins)
    trained_of = [_is_trained(group, objective) for group in groups]
    flat = [
        sum(not is_trained or _is_left_out(a, objective) for a, is_trained in zip(g.advantages, trained_G, strict=True))
        for g, trained_G in zip(groups, trained_of, strict=True)
    ]
    is_whole = [num == len(group.rollouts) for num, group in zip(flat, groups, strict=True)]
    counted = [
        r
        for g, trained_G in zip(groups, trained_of, strict=True)
        for r, a, is_trained in zip(g.rollouts, g.advantages, trained_G, strict=True)
        if is_trained and (objective.name != "rft" or a)
    ]
    num_known = [r.num_loss_tok for r in counted]
    return Update(
        batches=(*batches, *[_empty_batch(groups[0], device)] * num_idle),
        num_loss_tok=sum(num_known),
        num_seqs=sum(num > 0 for num in num_known),
        num_dropped_tok=sum(r.num_model_tok for r in counted) - sum(num_known),
        num_zero_advantage_groups=sum(is_whole),
        num_zero_advantage_seqs=sum(num for num, whole in zip(flat, is_whole, strict=True) if not whole),
        rewards=tuple(group.rewards for group in groups),
        response_ids=(
            *[torch.tensor([r for i in members for r in own[i].response_ids]) for members in own_bins],
            *[torch.zeros(1, dtype=torch.int64)] * num_idle,
        ),
    )


def _parts(group: Group, micro_batch_tok: int, objective: ObjectiveConfig, first_id: int) -> list[Part]:
    """The group's responses that have a gradient, in parts of at most ``micro_batch_tok`` tokens.

    ``first_id``: index of its first response among those of the update.
    """
    parts: list[Part] = []
    free = -1  # tokens; -1 opens a part for the first response, even if that adds no token
    responses = zip(group.rollouts, group.advantages, _is_trained(group, objective), strict=True)
    for response_id, (rollout, advantage, is_trained) in enumerate(responses, first_id):
        if min(len(group.prompt.token_ids), len(rollout.token_ids)) == 0:
            raise ValueError(f"prompt {group.prompt.prompt_id} and its responses must hold at least one token each")
        if not is_trained or rollout.num_loss_tok == 0 or _is_left_out(advantage, objective):
            continue
        size = len(rollout.token_ids) - 1
        if size > free:
            free = micro_batch_tok - len(group.prompt.token_ids)
            if size > free:
                raise UserError(
                    f"batch.micro_batch_tok must be at least the tokens of a prompt and one response, "
                    f"{len(group.prompt.token_ids)} + {size} for prompt {group.prompt.prompt_id}, got "
                    f"{micro_batch_tok}: raise it, or lower sampling.max_new_tok"
                )
            parts.append(Part(group.prompt, (), ()))
        free -= size
        last = parts[-1]
        ids = (*last.response_ids, response_id)
        parts[-1] = Part(last.prompt, (*last.rollouts, rollout), (*last.advantages, advantage), ids)
    return parts


def _is_trained(group: Group, objective: ObjectiveConfig) -> tuple[bool, ...]:
    """Which responses may enter the loss: of demonstrations all, whatever their rewards."""
    return (True,) * len(group.rollouts) if objective.is_supervised else group.is_trained


def _is_left_out(advantage: float, objective: ObjectiveConfig) -> bool:
    return advantage == 0 and objective.drops_zero_advantages


def _empty_batch(group: Group, device: torch.device) -> PackedBatch:
    """A micro-batch of one prompt token without predicted tokens: its gradient is zero."""
    prompt = dataclasses.replace(group.prompt, token_ids=group.prompt.token_ids[:1])
    unknown = torch.full((1,), torch.nan)
    first = group.rollouts[0]
    ids, kept = first.token_ids[:1], None if first.kept is None else first.kept.rows(slice(0, 1))
    rollout = dataclasses.replace(first, token_ids=ids, sampler_logprob=unknown, context_mask=None, kept=kept)
    return pack_parts([Part(prompt, (rollout,), (0.0,))], device)
