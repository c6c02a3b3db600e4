"""A checkpoint when a run fails, where its weights are sound, and what to tell the user about it.

Between two optimizer steps the weights are sound. While an optimizer step writes them they are not; then no checkpoint
is written, and the one before stays the newest. The rollouts of the failed step are dropped, because they may be the
cause; but if some of the step's optimizer steps have been made, the rest need the same rollouts, and they are kept, as
are rollouts that were drawn from older weights (engine/ahead.py).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from isomorph.engine.components import Components, RunProgress
from isomorph.engine.config import UserError
from isomorph.engine.record.checkpoint import latest_checkpoint
from isomorph.engine.types import RunFailed, RunState
from isomorph.engine.update.not_finite import not_finite_weight

KEEP_ALL = 1_000_000  # checkpoints: where weights may have diverged, the earlier ones are what is wanted

Save = Callable[[Components, RunState, int | None], None]  # engine.loop.save


def rescue(components: Components, progress: RunProgress, error: Exception, save: Save) -> Exception:
    """Writes a checkpoint if it can, and returns the exception to raise in place of ``error``.

    RunFailed, UserError and a lack of memory (as RunFailed) get a sentence that says which checkpoint to resume from.
    Any other exception is returned as it is, and the sentence goes to the console.
    """
    explained = _explained(error)
    if type(explained) is RunFailed:
        explained = RunFailed(f"{_when(progress.state)}: {explained}")
    if failure := components.saver.close():
        components.log.say(f"warning: {failure}")
    if components.ranks.size == 1 and progress.state.step == 0 and not components.learner.is_within_round:
        return explained  # nothing has been learned
    folder = components.log.folder
    outcome = _checkpointed(components, progress, save)
    sentence = f"{outcome}; {_how_to_resume(folder, latest_checkpoint(folder / 'checkpoints'))}"
    if type(explained) not in (RunFailed, UserError):
        components.log.say(sentence)
        return explained
    return type(explained)(f"{explained}; {sentence}")


def _checkpointed(components: Components, progress: RunProgress, save: Save) -> str:
    """Writes the checkpoint where that makes sense; returns what was done, or why nothing was."""
    step = progress.state.step
    is_within = components.learner.is_within_round
    newest = latest_checkpoint(components.log.folder / "checkpoints")
    if components.ranks.size > 1:
        return "no checkpoint was written, because that takes all ranks"
    if not progress.matches_weights or components.learner.is_writing_weights:
        return "no checkpoint was written, because the weights are ahead of the last whole step"
    if newest is not None and newest.name == f"step-{step:08d}" and not is_within:
        return f"the checkpoint of step {step} holds the present state"
    if lost := components.log.failed:
        return f"no checkpoint was written, because a resumed run would not write {lost} again"
    if broken := not_finite_weight(components.policy.named_parameters()):
        return f"no checkpoint was written, because {broken} holds numbers that are not finite"
    state = progress.state
    if not is_within and not _are_of_older_weights(state):
        state = dataclasses.replace(state, draws=(), num_ahead=0)
    try:
        save(components, state, KEEP_ALL)
    except RunFailed as failure:
        return f"a checkpoint could not be written either ({failure})"
    where = "within the step after" if is_within else "after"
    return f"a checkpoint {where} step {step} has been written, earlier ones are kept"


def _are_of_older_weights(state: RunState) -> bool:
    """Whether the rollouts in ``state`` were drawn from weights that are gone: they cannot be drawn again."""
    return any(r.policy_version < state.policy_version for scored in state.draws for r in scored.rollouts)


def _when(state: RunState) -> str:
    """The last whole step: also an evaluation or a weight sync after it can fail."""
    if state.step == 0:
        return "before the first step was done"
    return f"after step {state.step}, in stage {state.stage}"


def _explained(error: Exception) -> Exception:
    """A lack of memory, of whatever type, as RunFailed with the first line of its message and what to lower."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not is_memory:
        return error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RunFailed(f"out of memory ({first}): lower batch.micro_batch_tok, sampler.max_seqs or sampler.kv_tok")


def _how_to_resume(folder: Path, newest: Path | None) -> str:
    if not folder.is_dir():
        return (
            f"the run folder has gone: bring it back (is its disk connected?), and resume: isomorph train --resume "
            f"{folder}"
        )
    if newest is None:
        return "there is no checkpoint to resume from: start the run again"
    return (
        f"to resume: isomorph train --resume {folder} [section.key=value ...]; to resume from an earlier checkpoint, "
        f"delete {newest} before"
    )
