"""Writes checkpoints while training goes on: a thread writes copies of the tensors that were made at once.

    saver.save(...)      copies this rank's tensors to host memory and starts the thread; or, waiting, writes in place
    saver.settle(...)    between steps: when every rank has written, the checkpoint gets its name, or the run its error

There is one thread at most: the next checkpoint waits for the one before. A process that is killed meanwhile leaves a
folder without a name, and the checkpoint before stays the newest.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.distributed.shards import Part, host_part, is_written_here, own_part
from isomorph.engine.record.checkpoint import (
    abandon_shards,
    begin_shards,
    finish_shards,
    save_checkpoint,
    write_shards,
)
from isomorph.engine.types import RunFailed, RunState

SaveWhole = Callable[..., Path]  # as engine.record.checkpoint.save_checkpoint


@dataclass(slots=True)
class _Job:
    """One checkpoint on its way to the disk. ``finish``: on the first rank, of what all ranks have written."""

    step: int
    finish: Callable[[list[Any]], object]
    abandon: Callable[[], None]
    written: Any = None
    error: BaseException | None = None
    thread: threading.Thread | None = None
    is_done: threading.Event = field(default_factory=threading.Event)

    def run(self, write: Callable[[], Any]) -> None:
        try:
            self.written = write()
        except BaseException as error:  # raised by ``settle``, on the main thread
            self.error = error
        finally:
            self.is_done.set()


class Saver:
    """Writes the checkpoints of a run. Where several ranks are given, all must call a method, in the same order."""

    def __init__(self) -> None:
        self._job: _Job | None = None

    def save(
        self,
        root: Path,
        state: RunState,
        weights: Mapping[str, Tensor],
        learner: Mapping[str, Tensor],
        ranks: Ranks,
        *,
        keep: int,
        waits: bool,
        save_whole: SaveWhole = save_checkpoint,
    ) -> None:
        """Writes ``root``/step-N; ``waits``: it is complete when this returns. Raises RunFailed, as ``settle`` does.

        Where a tensor is a DTensor every rank writes its shards, else the first rank writes everything. ``waits``:
        tensors in host memory are not copied.
        """
        self.settle(ranks, waits=True)
        state = copy.deepcopy(state)  # the source goes on to change what it has handed over
        is_sharded = any(isinstance(weight, DTensor) for weight in weights.values())
        if is_sharded:
            job, write = _shards(root, state, weights, learner, ranks, keep=keep, copies=not waits)
            if failure := next((text for text in ranks.gather(_begun(root, state.step, ranks)) if text), None):
                raise RunFailed(failure)
        else:
            job, write = _Job(state.step, lambda written: None, lambda: None), lambda: None
            if ranks.is_first:
                held = [_on_host(tensors, copies=not waits) for tensors in (weights, learner)]
                write = lambda: save_whole(root, state, *held, keep=keep)  # noqa: E731
        self._job = job
        if waits:
            job.run(write)
            self.settle(ranks, waits=True)
            return
        # no daemon: a process that ends in order completes its checkpoint
        job.thread = threading.Thread(target=job.run, args=(write,), name="checkpoint")
        job.thread.start()

    def settle(self, ranks: Ranks, *, waits: bool = False) -> None:
        """Completes the checkpoint that is being written, if all ranks have written theirs or ``waits``.

        Raises RunFailed, on every rank, where one could not write; what else a thread raised is raised on its rank.
        """
        job = self._job
        if job is None or (not waits and ranks.any(not job.is_done.is_set())):
            return
        self.join()
        self._job = None
        told = ranks.gather((job.written, None if job.error is None else str(job.error)))
        failure = next((text for _, text in told if text is not None), None)
        if failure is None:
            failure = next((text for text in ranks.gather(_finished(job, told, ranks)) if text), None)
        elif ranks.is_first:
            job.abandon()
        if job.error is not None and not isinstance(job.error, RunFailed):
            raise job.error
        if failure is not None:
            raise RunFailed(failure) from job.error

    def join(self) -> None:
        """Waits until this rank has written what it is writing. No collective."""
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join()

    def close(self) -> str | None:
        """``join`` of a run that fails; returns why the checkpoint could not be written. No collective.

        What several ranks have written of a checkpoint with shards stays without a name.
        """
        self.join()
        job, self._job = self._job, None
        return None if job is None or job.error is None else str(job.error)


def _on_host(tensors: Mapping[str, Tensor], *, copies: bool) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=copies) for name, tensor in tensors.items()}


def _shards(
    root: Path,
    state: RunState,
    weights: Mapping[str, Tensor],
    learner: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    keep: int,
    copies: bool,
) -> tuple[_Job, Callable[[], Any]]:
    """A job that writes this rank's parts. What is not divided the first rank writes, but for a round's tensors."""
    kept = host_part if copies else Part._make
    own, rows = ({name: kept(own_part(t)) for name, t in _written_here(held, ranks)} for held in (learner, weights))
    job = _Job(
        state.step,
        lambda written: finish_shards(root, state, written, keep=keep),
        lambda: abandon_shards(root, state.step),
    )
    return job, lambda: write_shards(root, state.step, ranks.rank, ranks.size, rows, own)


def _written_here(tensors: Mapping[str, Tensor], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    divided = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            is_own, divided = is_written_here(tensor, divided), divided + 1
        else:
            is_own = ranks.is_first or name.startswith("round/")
        if is_own:
            yield name, tensor


def _begun(root: Path, step: int, ranks: Ranks) -> str | None:
    return _failure(lambda: begin_shards(root, step)) if ranks.is_first else None


def _finished(job: _Job, told: list[tuple[Any, str | None]], ranks: Ranks) -> str | None:
    return _failure(lambda: job.finish([written for written, _ in told])) if ranks.is_first else None


def _failure(act: Callable[[], object]) -> str | None:
    try:
        act()
    except RunFailed as error:
        return str(error)
    return None
