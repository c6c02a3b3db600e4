"""Runs a study: processes side by side, warm starts first, finished runs never again, unfinished ones resumed."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from isomorph.curriculum.machine import usable_cores
from isomorph.curriculum.report.run_record import read_summary
from isomorph.curriculum.study.child import has_gpu, start
from isomorph.curriculum.study.design import Design, PlannedRun
from isomorph.curriculum.study.results import harvest, newest_identities, newest_warm_starts
from isomorph.curriculum.study.spec import WARM_START
from isomorph.engine.record.checkpoint import latest_checkpoint

STARTED, ASIDE, LOGS = "started.json", "set-aside", "logs"
POLL_S = 0.1
MAX_STARTS = 2  # of a run that something kills, in one call of the command
TAIL_BYTES = 1 << 16

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclass(kw_only=True)
class Job:
    """A run and how far it is."""

    run: PlannedRun
    status: str = WAITING
    was_done: bool = False  # before this call
    why: str = ""  # it failed, in a sentence
    identity: str = ""
    num_starts: int = 0
    started: float = 0.0  # time.monotonic of this process
    first_step: int = 0  # completed steps when this process started
    process: BaseProcess | None = field(default=None, repr=False)

    def progress(self) -> tuple[int, float | None]:
        """Completed steps, and seconds to the end as they went since the start; None: not known yet."""
        row = last_row(self.run.folder / "steps.jsonl")
        step = int(row["step"]) if row else 0
        made = step - self.first_step
        left = (self.run.steps - step) * (time.monotonic() - self.started) / made if made > 0 else None
        return step, left


def default_jobs(threads: int) -> int:
    """One with a GPU, whose memory a run may need; else as many as the cores hold."""
    return 1 if has_gpu() else max(1, int(usable_cores()) // threads)


class Execution:
    """All runs of a call of ``isomorph study``."""

    def __init__(self, design: Design, runs: Sequence[PlannedRun], *, jobs: int, say: Callable[[str], None]) -> None:
        """``say`` gets a line for each event."""
        self.design, self.say, self.num_jobs = design, say, jobs
        self.jobs = [Job(run=run) for run in runs]
        self._started: dict[str, str] = _read_started(design.out / STARTED)

    def go(self, *, stop_after_s: float | None, show: Callable[[Sequence[Job]], None]) -> None:
        """Runs all. ``show`` is called several times a second.

        On KeyboardInterrupt, and after ``stop_after_s`` seconds, the processes write checkpoints and end.
        """
        deadline = None if stop_after_s is None else time.monotonic() + stop_after_s
        try:
            self._find_finished()
            while self._is_open():
                if deadline is not None and time.monotonic() > deadline:
                    self._stop()
                    return
                self._reap()
                self._start_ready()
                show(self.jobs)
                time.sleep(POLL_S)
        except BaseException:
            self._stop()
            raise

    @property
    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.status == FAILED]

    @property
    def is_complete(self) -> bool:
        return all(job.status == DONE for job in self.jobs)

    def _find_finished(self) -> None:
        """Marks what is done. A warm start is not needed where all that begins from it is done."""
        kept = newest_identities(self.design.out)
        for job in self.jobs:
            warm = self._warm_row(job.run.seed)
            if job.run.condition == WARM_START:
                identity = self.design.identity(job.run, None)
                job.was_done = warm is not None and warm["identity"] == identity
            elif job.run.warm is None or (warm is not None and self._warm_job(job).was_done):
                identity = self.design.identity(job.run, warm["weights_sha256"] if warm else None)
                job.was_done = kept.get((job.run.condition, job.run.seed)) == identity
        for job in self.jobs:
            if job.run.condition == WARM_START:
                own = [other for other in self.jobs if other.run.warm == job.run.folder]
                job.was_done = job.was_done and (_has_model(job.run.folder) or all(other.was_done for other in own))
        for job in self.jobs:
            if job.was_done:
                job.status = DONE

    def _warm_row(self, seed: int) -> dict[str, Any] | None:
        return newest_warm_starts(self.design.out).get(seed)

    def _warm_job(self, job: Job) -> Job:
        return next(other for other in self.jobs if other.run.folder == job.run.warm)

    def _is_open(self) -> bool:
        return any(job.status in (WAITING, RUNNING) for job in self.jobs)

    def _start_ready(self) -> None:
        for job in self.jobs:
            if sum(other.status == RUNNING for other in self.jobs) >= self.num_jobs:
                return
            if job.status == WAITING:
                warm = None if job.run.warm is None else self._warm_job(job)
                if warm is not None and warm.status == FAILED:
                    job.status, job.why = FAILED, f"its warm start failed: {warm.run.name}"
                elif warm is None or warm.status == DONE:
                    self._start(job)

    def _start(self, job: Job) -> None:
        row = None if job.run.warm is None else self._warm_row(job.run.seed)
        job.identity = self.design.identity(job.run, row["weights_sha256"] if row else None)
        resume = self._prepared(job)
        if job.status == DONE:
            return
        self._started[job.run.name] = job.identity
        _write_json(self.design.out / STARTED, self._started)
        job.num_starts += 1
        before = last_row(job.run.folder / "steps.jsonl") if resume else None
        job.first_step = int(before["step"]) if before else 0
        job.process = start(job.run, self.log(job), resume=resume)
        job.status, job.started = RUNNING, time.monotonic()
        self.say(f"{job.run.name} {f'resumed after step {job.first_step}' if resume else 'started'}")

    def _prepared(self, job: Job) -> bool:
        """Makes way in the run's folder; whether the run that is in it goes on. Job is done where it has ended."""
        folder = job.run.folder
        if not folder.exists():
            return False
        if self._started.get(job.run.name) != job.identity:
            aside = _free_name(self.design.out / ASIDE / job.run.name)
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
            self.say(
                f"{job.run.name}: its recipe, inputs or versions have changed: trained anew, the old run is {aside}"
            )
            return False
        summary = read_summary(folder)
        if summary is not None and summary["status"] == "done":
            self._finish(job)
            return False
        if latest_checkpoint(folder / "checkpoints") is None:
            shutil.rmtree(folder)  # it holds nothing that a run could begin with
            return False
        return True

    def _finish(self, job: Job) -> None:
        harvest(job.run, job.identity, self.design.out)
        job.status = DONE

    def _reap(self) -> None:
        for job in self.jobs:
            if job.status != RUNNING or job.process is None or job.process.exitcode is None:
                continue
            code, job.process = job.process.exitcode, None
            if code == 0:
                self._finish(job)
                self.say(f"{job.run.name} done")
            elif code < 0 and job.num_starts < MAX_STARTS:
                job.status = WAITING
                self.say(f"{job.run.name} was killed by {signal.Signals(-code).name}; it goes on")
            else:
                job.status, job.why = FAILED, _sentence(self.log(job), code)
                self.say(f"{job.run.name} failed: {job.why} (log: {self.log(job)})")

    def _stop(self) -> None:
        """All processes write a checkpoint and end."""
        running = [job for job in self.jobs if job.status == RUNNING and job.process is not None]
        for job in running:
            assert job.process is not None and job.process.pid is not None
            if job.process.exitcode is None:
                os.kill(job.process.pid, signal.SIGTERM)
        for job in running:
            assert job.process is not None
            job.process.join()
            job.status = STOPPED
            if job.process.exitcode == 0:
                self._finish(job)

    def log(self, job: Job) -> Path:
        """What the run prints."""
        return self.design.out / LOGS / f"{job.run.name}.log"


def last_row(file: Path) -> dict[str, Any] | None:
    """The last complete row of a run's steps.jsonl; None: there is none yet."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = opened.read().split(b"\n")[:-1]
    except OSError:
        return None
    try:
        row: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:  # longer than the tail
        return None
    return row or None


def _has_model(folder: Path) -> bool:
    summary = read_summary(folder) if folder.is_dir() else None
    return summary is not None and summary["status"] == "done" and (folder / "model" / "config.json").is_file()


def _sentence(log: Path, code: int) -> str:
    """Why a process ended, as it says at the end of its log."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}, twice"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else lines[-1].strip() if lines else f"exit code {code}"


def _free_name(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return found


def _read_started(file: Path) -> dict[str, str]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _write_json(file: Path, value: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(file)
