"""A run of three stages that ends by itself or by SIGKILL at a chosen moment of a phase, and goes on after that."""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from apart import start_apart
from kill_timer import Moment, Watch
from toy_run import gold_but_for_one, make_components, make_stage

from isomorph.engine.components import Components
from isomorph.engine.loop import train
from isomorph.engine.record import saver
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint
from isomorph.engine.record.runlog import locked
from isomorph.engine.types import RunState

STAGES = (
    make_stage("a", 3, "sft"),
    make_stage("b", 3, objective_choices=dict(kl_coef=0.05)),
    make_stage(
        "c", 3, "grpo", objective_choices=dict(kl_coef=0.05), optimizer_state="carry", reference="previous", refills=2
    ),
)


def trained_apart(folder: Path, moment: Moment | None, times: Path | None = None) -> int | None:
    """The exit code of a process that trains in ``folder``; ``times``: where it writes the seconds of its phases."""
    process = start_apart(_train, folder, moment, times)
    process.join(300)
    assert process.exitcode is not None, "the process has not ended"
    return process.exitcode


def _train(folder: Path, moment: Moment | None, times: Path | None) -> None:
    torch.set_num_threads(1)
    watch = Watch(mmap.mmap(-1, 4096), moment, times)
    components, state = found(folder)
    of_log, write = components.log.time, saver._Job.run

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        with watch.phase(name), of_log(name):
            yield

    def run(job: Any, act: Callable[[], Any]) -> None:
        with watch.phase("write"):
            write(job, act)

    components.log.time, saver._Job.run = timed, run  # type: ignore[method-assign]
    with locked(folder):
        train(components, state)
    watch.finish()


def found(folder: Path) -> tuple[Components, RunState]:
    """The run in ``folder`` as it is to be resumed, or begun where it has no checkpoint."""
    components = make_components(folder, *STAGES, judge=gold_but_for_one, evaluates=True, checkpoint_every=2)
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        components.log.cut_after(0)
        return components, RunState()
    state, weights, tensors = load_checkpoint(newest)
    components.policy.overwrite([weights[name] for name in components.policy.named_parameters()])
    components.source.load_state_dict(state.source)
    components.learner.restore(next(s for s in STAGES if s.name == state.stage), tensors)
    components.log.cut_after(state.step)
    return components, state
