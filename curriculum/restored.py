"""A resumed run's model, curriculum and state, from the newest checkpoint that can be used."""

import dataclasses
from pathlib import Path

from torch import Tensor

from isomorph.curriculum.stage import Curriculum
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.foreign import cause_of
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.checkpoint import UnusableCheckpoint, load_checkpoint, load_shards
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.record.usable import load_newest
from isomorph.engine.rollout.fingerprint import fingerprint
from isomorph.engine.types import RunState


def restore(policy: Policy, curriculum: Curriculum, log: RunLog, ranks: Ranks) -> tuple[RunState, dict[str, Tensor]]:
    """Fills policy and curriculum from the newest checkpoint that can be used; returns state and learner's tensors.

    What was logged after that checkpoint is removed. A collective. Raises UserError.
    """

    def load(folder: Path) -> tuple[RunState, dict[str, Tensor]]:
        state, learned = _read_into(policy, folder, ranks)
        _give_place(curriculum, state, folder)
        return state, learned

    used, (state, learned) = load_newest(log.folder / "checkpoints", load, ranks, log.say)
    where = "within the step after" if state.draws else "after"
    if state.num_ranks != ranks.size and state.draws:
        raise UserError(
            f"{used} was written within a step by {state.num_ranks} ranks, each of which holds a part of it: "
            f"resume with {state.num_ranks} ranks, got {ranks.size}"
        )
    log.cut_after(state.step)
    log.seconds_before = state.totals["wall_s"]
    log.say(f"resuming {where} step {state.step} from {used}")
    if state.num_ranks != ranks.size:
        log.say(
            f"warning: the run had {state.num_ranks} ranks and resumes with {ranks.size}: prompts are the same, "
            "gradients the same up to rounding, so the run is not bit for bit the uninterrupted one"
        )
    if curriculum.reopen_extended():  # with more steps in the last stage that stage goes on
        state = dataclasses.replace(state, source=curriculum.state_dict())
    return state, learned


def _read_into(policy: Policy, folder: Path, ranks: Ranks) -> tuple[RunState, dict[str, Tensor]]:
    if policy.is_sharded:
        state, learned = load_shards(folder, policy.stored(), ranks)
        policy.unread = ()
        return state, learned
    state, weights, learned = load_checkpoint(folder)
    named = policy.named_parameters()
    for name in sorted(named.keys() | weights.keys()):
        wanted, found = (list(where[name].shape) if name in where else None for where in (named, weights))
        if wanted != found:
            raise UnusableCheckpoint(
                folder, f"its weights are not of the recipe's model: {name} must have the shape {wanted}, got {found}"
            )
    check_base(policy, state.base, folder)
    policy.overwrite([weights[name] for name in named])
    return state, learned


def _give_place(curriculum: Curriculum, state: RunState, folder: Path) -> None:
    """The curriculum takes the place of ``state``. Raises UnusableCheckpoint where it is not of its recipe."""
    try:
        curriculum.load_state_dict(state.source)
    except Exception as error:  # a state.json of another recipe can be wrong anywhere
        raise UnusableCheckpoint(folder, f"its state.json is not of the recipe's stages: {cause_of(error)}") from error


def base_of(policy: Policy) -> str:
    """Fingerprint of the weights under the policy's adapters; "" without adapters: checkpoints hold all weights."""
    return "" if policy.adapters is None else fingerprint(policy.base())


def check_base(policy: Policy, base: str, checkpoint: Path) -> None:
    """Raises UserError where the adapters of ``checkpoint`` were trained on other weights than the policy's."""
    if (found := base_of(policy)) != base:
        raise UserError(
            f"{checkpoint} holds adapters only, trained on weights with fingerprint {base}; the recipe's model has "
            f"{found}: restore the model that the run began with"
        )
