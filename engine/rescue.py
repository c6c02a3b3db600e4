"""What is left of a run that fails: a checkpoint of its last whole step, where its weights are sound, and a sentence.

Between two updates they are. While an update writes into them they are not, and the checkpoint before stays the newest.
What was drawn in the step that failed is dropped, because it may be what it failed of; but where some of the step's
updates are made already, the rest can only be made with it, and it is kept.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isomorph.engine.config import UserError
from isomorph.engine.record.checkpoint import latest_checkpoint
from isomorph.engine.types import RunFailed, RunState

KEEP_ALL = 1_000_000  # checkpoints: where weights may have diverged, the earlier ones are what is wanted


class StopRequested(Exception):
    """This rank, or another one, was asked to stop."""


@dataclass(slots=True)
class Here:
    """Where the run is, at every moment."""

    state: RunState  # to go on from, with the weights as they are
    is_whole: bool = True  # False: the weights have gone beyond ``state``


def rescue(crew: Any, here: Here, error: Exception, save: Callable[..., None]) -> Exception:
    """Writes the checkpoint and returns what is to be raised: ``error``, or the same with what was done about it.

    ``crew``: an ``engine.loop.Crew``; ``save``: its ``save``. A defect that has no sentence of its own (whatever is
    neither RunFailed nor UserError nor a lack of memory) stays as it is; the log then says what was done.
    """
    step, root = here.state.step, crew.log.folder / "checkpoints"
    is_within = crew.learner.is_within_round
    newest = latest_checkpoint(root)
    if crew.ranks.size > 1:
        outcome = "no checkpoint of this moment, which takes all ranks"
    elif step == 0 and not is_within:
        return _explained(error)  # nothing has been learned
    elif not here.is_whole or crew.learner.is_moving:
        outcome = "no checkpoint of this moment: the weights were being written"
    elif newest is not None and newest.name == f"step-{step:08d}" and not is_within:
        outcome = f"the checkpoint of step {step} is of this moment"
    elif broken := _broken(crew.policy.named_parameters()):
        outcome = f"no checkpoint of this moment: {broken} holds numbers that are not finite"
    else:
        state = here.state if is_within else dataclasses.replace(here.state, draws=())
        try:
            save(crew, state, keep=KEEP_ALL)
            where = "in the midst of the step after" if is_within else "after"
            outcome = f"a checkpoint {where} step {step} has been written, earlier ones are kept"
        except RunFailed as failure:
            outcome = f"nor could a checkpoint of this moment be written ({failure})"
    told = _explained(error)
    sentence = f"{outcome}; {_how_to_go_on(crew.log.folder, latest_checkpoint(root))}"
    if type(told) not in (RunFailed, UserError):
        crew.log.say(sentence)
        return told
    return type(told)(f"{told}; {sentence}")


def _explained(error: Exception) -> Exception:
    """A lack of memory has many types, and a first line that says enough."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not is_memory:
        return error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RunFailed(f"out of memory ({first}): lower batch.micro_batch_tok, sampler.max_seqs or sampler.kv_tok")


def _broken(parameters: dict[str, Any]) -> str | None:
    """The name of a weight that is not finite."""
    return next((name for name, weight in parameters.items() if not weight.detach().isfinite().all()), None)


def _how_to_go_on(folder: Path, newest: Path | None) -> str:
    if newest is None:
        return "there is none to go on with: start anew"
    return f"go on with: isomorph train --resume {folder} [section.key=value ...], or delete {newest} to go on earlier"
