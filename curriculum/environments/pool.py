"""Worker processes that hold the environments of open rollouts, each rollout's always in the same one.

A worker that has to be killed, or that dies, costs the rollout whose call it was running; the others in it are built
again in the next process, from the row, the seed and what the model said so far.
"""

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as DeadlineExceeded
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool

from isomorph.curriculum.environments import worker
from isomorph.curriculum.environments.done import Message
from isomorph.curriculum.environments.worker import Described, EnvironmentSpec, Outcome
from isomorph.curriculum.rewards.code_pool import MIN_WORKER_BYTES
from isomorph.curriculum.rewards.spawn import CleanSpawnContext
from isomorph.engine.config import UserError

START_S = 120.0  # for a worker to import the user's files
GRACE_S = 1.0  # beyond twice the deadline: then a worker is killed


@dataclass(frozen=True, slots=True)
class Call:
    """One call of ``step`` for an open rollout."""

    spec: EnvironmentSpec
    key: int
    row: dict[str, Any]
    seed: int
    first: tuple[Message, ...]
    said: tuple[str, ...]
    is_last: bool = False  # the model has no further turn


class EnvironmentPool:
    """Environments in worker processes, which start with the first call; ``close`` ends them all.

    ``failures`` counts rollouts that ended because their environment raised ("errors"), hung ("timeouts") or ended its
    process ("crashes"); the first of each kind is told with its file and line.
    """

    def __init__(
        self,
        *,
        log: Path | None = None,
        say: Callable[[str], None] = lambda sentence: None,
        max_workers: int | None = None,
    ) -> None:
        """``log``: the file that what environments print is appended to; None: dropped. ``say``: prints a warning."""
        self.log, self.say = log, say
        self.max_workers = max_workers or min(4, os.cpu_count() or 1)
        self.failures: Counter[str] = Counter()
        self._pools: list[ProcessPool] = []
        self._specs: list[EnvironmentSpec] = []  # what a worker imports when it starts
        self._keys = itertools.count()
        self._lock = threading.Lock()

    def describe(self, spec: EnvironmentSpec, where: str) -> Described:
        """What environment and tools of ``spec`` are. Raises UserError, with ``where``, if one cannot be loaded."""
        with self._lock:
            if spec not in self._specs:
                self._specs.append(spec)
        try:
            future = self._worker(0).schedule(worker.describe, args=(spec,), timeout=START_S)
            found: Described = future.result()
        except DeadlineExceeded:
            found = Described(failed=f"importing it was not over after {START_S:g} s")
        except ProcessExpired as error:
            found = Described(failed=f"its process ended: {error}")
        if found.failed:
            places = ", ".join(place for place in (spec.environment, *spec.tools) if place)
            raise UserError(f"{where}: {places} cannot be used: {found.failed}")
        return found

    def reset(self, spec: EnvironmentSpec, row: dict[str, Any], seed: int) -> Outcome:
        """The messages that rollouts on ``row`` begin with."""
        timeout = 2 * spec.deadline_s + GRACE_S
        future = self._worker(0).schedule(worker.reset, args=(spec, row, seed), timeout=timeout)
        try:
            outcome: Outcome = future.result()
            return outcome
        except (DeadlineExceeded, ProcessExpired) as error:
            return _ended(error, spec)

    def warm(self) -> None:
        """Starts all workers, which then import what was described; does not wait for them."""
        for i in range(self.max_workers):
            self._worker(i).schedule(worker.do_nothing)

    def new_key(self) -> int:
        """A number for a new rollout."""
        return next(self._keys)

    def step(self, call: Call) -> Future[Outcome]:
        """The environment's answer to the last of ``call.said``."""
        answer: Future[Outcome] = Future()
        self._send(call, answer, is_new=len(call.said) == 1)
        return answer

    def _send(self, call: Call, answer: Future[Outcome], *, is_new: bool) -> None:
        def received(sent: Any) -> None:
            try:
                outcome: Outcome = sent.result()
            except (DeadlineExceeded, ProcessExpired) as error:
                outcome = _ended(error, call.spec)
            except BaseException as error:  # the pool was closed, or a message could not be sent
                answer.set_exception(error)
                return
            if outcome.is_lost:
                self._send(call, answer, is_new=True)
            else:
                answer.set_result(self._counted(outcome))

        calls = len(call.said) if is_new else 1
        timeout = 2 * calls * call.spec.deadline_s + GRACE_S
        args = (call.spec, call.key, call.row, call.seed, call.first, call.said, call.is_last, is_new)
        self._worker(call.key).schedule(worker.step, args=args, timeout=timeout).add_done_callback(received)

    def forget(self, key: int) -> None:
        """The rollout is over."""
        self._worker(key).schedule(worker.close, args=(key,), timeout=START_S)

    def close(self) -> None:
        """Kills the workers and waits for them. The pool can be used again afterwards."""
        with self._lock:
            pools, self._pools = self._pools, []
        for pool in pools:
            pool.stop()
        for pool in pools:
            pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _counted(self, outcome: Outcome) -> Outcome:
        if outcome.failed:
            with self._lock:
                self.failures[outcome.kind] += 1
                is_first = self.failures[outcome.kind] == 1
            if is_first:
                self.say(
                    f"warning: the environment of a rollout failed: {outcome.failed}; the rollout ends there with a "
                    "reward of 0 from it, and further ones are only counted"
                )
        return outcome

    def _worker(self, key: int) -> ProcessPool:
        """The pool of the one process that holds rollout ``key``."""
        with self._lock:
            if not self._pools:
                self._pools = [
                    ProcessPool(
                        max_workers=1,
                        initializer=worker.start,
                        initargs=(self._specs, None if self.log is None else str(self.log), MIN_WORKER_BYTES, START_S),
                        context=CleanSpawnContext(),
                    )
                    for _ in range(self.max_workers)
                ]
            return self._pools[key % len(self._pools)]


def _ended(error: BaseException, spec: EnvironmentSpec) -> Outcome:
    if isinstance(error, ProcessExpired):
        return Outcome(failed=f"its process ended: {error}", is_crash=True)
    return Outcome(failed=f"not over after {spec.deadline_s:g} s, and could not be interrupted", is_late=True)
