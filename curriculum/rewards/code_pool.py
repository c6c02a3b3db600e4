"""Calls reward functions in worker processes that are killed at a deadline, many responses in one job."""

import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import TimeoutError as DeadlineExceeded
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from isomorph.curriculum.rewards.signature import GroupInput, Progress
from isomorph.curriculum.rewards.spawn import CleanSpawnContext, WorkerPool
from isomorph.curriculum.rewards.worker import Call, Fault, Found, Place, Result, describe, do_nothing, prepare, run_job

IMPORT_S = 120.0  # of one file or package, once in each worker
MAX_GROUPS_PER_JOB = 32
MAX_TRIES = 3  # of a call whose worker ended before it began
MIN_WORKER_BYTES = 4 << 30  # of data; more where the machine has more


@dataclass(slots=True)
class _Job:
    future: ProcessFuture
    at: list[int]  # which calls
    num_tries: int


class CodePool(WorkerPool):
    """Worker processes that have imported the functions at ``places``. Start them with ``describe``.

    Workers are spawned, without the caller's main module. ``close`` ends them all.
    """

    def __init__(self, places: Sequence[Place], *, log: Path | None, max_workers: int | None = None) -> None:
        """``log``: the file that what the functions print is appended to; None: it is dropped."""
        super().__init__()
        self.places, self.log = tuple(places), log
        self.max_workers = max_workers or min(4, os.cpu_count() or 1)

    def describe(self, columns: Sequence[frozenset[str]]) -> list[Found | Fault]:
        """What each function is, or why it cannot be used; then starts the workers that call them.

        ``columns``: of the rows that each is for. Each is imported in a process that may end or be killed by that.
        """
        found: list[Found | Fault] = []
        with CodePool((), log=self.log, max_workers=1) as trying:
            for place, known in zip(self.places, columns, strict=True):
                future = trying._workers().schedule(describe, args=(place, known, IMPORT_S), timeout=IMPORT_S + 5)
                try:
                    found.append(future.result())
                except DeadlineExceeded:
                    found.append(Fault("deadline", f"{place.function}: must be imported within {IMPORT_S:g} s"))
                except ProcessExpired:
                    found.append(Fault("error", f"{place.function}: must be imported without ending its process"))
        if not any(isinstance(told, Fault) for told in found):
            self._workers().schedule(do_nothing)
        return found

    def run(
        self, groups: Sequence[GroupInput], calls: Sequence[Call], progress: Progress, deadline_s: float
    ) -> list[list[Result]]:
        """The results of each call: one for the response, or for each response of the group.

        A call that kills its worker, or that must be killed, is made again alone, and then has a Fault.
        """
        results: list[list[Result]] = [[] for _ in calls]
        per_job = max(1, min(MAX_GROUPS_PER_JOB, math.ceil(len(groups) / (2 * self.max_workers))))
        by_job: dict[int, list[int]] = {}
        for i, call in enumerate(calls):
            by_job.setdefault(call.group // per_job, []).append(i)

        def submit(at: list[int], num_tries: int = 0) -> _Job:
            needed = {calls[i].group: groups[calls[i].group] for i in at}
            args = (needed, [calls[i] for i in at], progress, deadline_s)
            return _Job(self._workers().schedule(run_job, args=args, timeout=2 * deadline_s + 1), at, num_tries)

        jobs = deque(submit(at) for at in by_job.values())
        while jobs:
            job = jobs.popleft()
            again = [[i] for i in job.at] if len(job.at) > 1 else []
            fault: Fault | None = None
            try:
                found = job.future.result()
            except DeadlineExceeded:
                fault = Fault("deadline", f"must return within {deadline_s:g} s; its process was killed")
            except BrokenProcessPool:
                self.close()
                again = again or ([job.at] if job.num_tries < MAX_TRIES else [])
                fault = Fault("error", "the process that called it ended")
            except ProcessExpired as error:
                fault = Fault("error", f"ended the process that called it (exit code {error.exitcode})")
            else:
                for i, result in zip(job.at, found, strict=False):
                    results[i] = result
                again = [rest] if (rest := job.at[len(found) :]) else []
            if fault is not None and not again:
                (i,) = job.at
                results[i] = [fault] * (len(groups[calls[i].group].texts) if calls[i].response is None else 1)
            jobs.extend(submit(at, job.num_tries + 1) for at in again)
        return results

    def _new_pool(self) -> ProcessPool:
        arguments = (
            self.places,
            None if self.log is None else str(self.log),
            _worker_bytes(self.max_workers),
            IMPORT_S,
        )
        context = CleanSpawnContext()
        return ProcessPool(max_workers=self.max_workers, initializer=prepare, initargs=arguments, context=context)


def _worker_bytes(num_workers: int) -> int:
    """How much memory a worker may allocate: half of the machine's, shared by the workers."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(MIN_WORKER_BYTES, total // (2 * num_workers))
