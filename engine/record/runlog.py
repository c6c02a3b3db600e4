"""The numbers of a run: one JSON row a step in steps.jsonl (the truth), one line a step on the console.

run.json  steps.jsonl  completions/step-00000010.jsonl  checkpoints/  model/  summary.json

Time is told apart without a gap: a step's ``time/<phase>_s`` add up to its ``time/step_s``, and what was done between
two steps (rows, checkpoints, exams) stands in the later one's row as ``time/between/<phase>_s``. A phase inside
another one is taken off the outer one.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from torch.profiler import record_function

from isomorph.engine.config import UserError
from isomorph.engine.record.telemetry import Gather, Telemetry
from isomorph.engine.types import RunFailed

LINE_S = 10.0  # a line on the console at least so often, as soon as a step has ended

Row = dict[str, Any]
Sink = Callable[[Row], None]  # gets every row of steps.jsonl after it has been written


class RunLog:
    """Writes the run folder's files and tells the console. Times come from ``with log.time("generate"):``."""

    def __init__(self, folder: Path, console: Console, *, every: int = 1) -> None:
        """``every``: steps from one line on the console to the next; a stage's first step has one always."""
        self.folder = folder
        self.console = console
        self.every = every
        self.telemetry = Telemetry()
        self.sinks: list[Sink] = []
        self.times: dict[str, float] = {}
        self.seconds_before = 0.0  # of the run that this one goes on with
        self._between: dict[str, float] = {}  # phases between the step before and the present one
        self._between_s = 0.0
        self._inner = [0.0]  # seconds of the phases that have ended within each open one
        self._opened = self._started = self._ended = time.perf_counter()
        self._told_stage: str | None = None
        self._told_at = -math.inf  # perf_counter
        self._progress: Progress | None = None
        self._bar: Any = None

    def wall_s(self) -> float:
        """Seconds of the run so far, exams and checkpoints included; of a resumed run, without what was lost."""
        return self.seconds_before + time.perf_counter() - self._opened

    @contextlib.contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to this step's ``phase``, and names it in a profile."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            with record_function(phase):
                yield
        finally:
            seconds = time.perf_counter() - start
            self.times[phase] = self.times.get(phase, 0.0) + seconds - self._inner.pop()
            self._inner[-1] += seconds

    def begin_step(self) -> None:
        with self.time("record"):
            self.telemetry.begin()
        self._started = time.perf_counter()
        self._between_s = self._started - self._ended
        self._between, self.times = self.times, {}

    def end_step(self, *, num_tok: int, num_correct: int, gather: Gather = lambda own: [own]) -> Row:
        """What the step cost, for its row; what comes until the next one begins is between them.

        ``num_tok``: that counted in the loss. ``num_correct``: answers that solve their prompt. Both of all ranks,
        each of which must ask; ``gather``: what they say.
        """
        with self.time("record"):
            machine = self.telemetry.end(num_tok=num_tok, num_correct=num_correct, gather=gather)
        self._ended = time.perf_counter()
        times, self.times = self.times, {}
        return {
            **{f"time/{phase}_s": seconds for phase, seconds in times.items()},
            "time/step_s": self._ended - self._started,
            **{f"time/between/{phase}_s": seconds for phase, seconds in self._between.items()},
            "time/between_s": self._between_s,
            **machine,
        }

    def write_step(self, row: Row, line: str) -> None:
        """One row, flushed to the disk's cache, and its line where one is due. Raises RunFailed on a full disk."""
        row = _jsonable(row)
        with self.writing("steps.jsonl"), (self.folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._is_due(row):
            self.say(line)
        rss_gib = row.get("mem/rss_gib")
        if rss_gib is not None and self.telemetry.growth.observe(rss_gib) and self.telemetry.growth.num_alarms == 1:
            self.say(f"warning: this process's memory only grows, {rss_gib:.2f} GiB now: something is never freed")
        for read in self.sinks:
            read(row)
        if self._progress is not None:
            self._progress.update(self._bar, completed=row["step"], description=row["stage"])

    def _is_due(self, row: Row) -> bool:
        now = time.perf_counter()
        is_new, is_late = row["stage"] != self._told_stage, now - self._told_at >= LINE_S
        if is_new or is_late or row["step"] % self.every == 0:
            self._told_stage, self._told_at = row["stage"], now
            return True
        return False

    def write_completions(self, name: str, rows: Sequence[Row]) -> None:
        """``completions/name.jsonl``: what was answered, with what it was worth. Raises RunFailed as above."""
        folder = self.folder / "completions"
        with self.writing(f"completions/{name}.jsonl"):
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(_jsonable(row)) + "\n" for row in rows))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """``name`` under the run folder, replaced in one piece. Raises RunFailed as above."""
        partial = self.folder / f".{name}"
        with self.writing(name):
            partial.write_text(json.dumps(_jsonable(dict(value)), indent=2) + "\n")
            os.replace(partial, self.folder / name)

    def say(self, text: str) -> None:
        """One line on the console, above the progress bar where there is one."""
        console = self._progress.console if self._progress else self.console
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)  # as it is, brackets and all

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """A disk that refuses inside becomes a RunFailed about ``name`` under the run folder."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"{name} cannot be written in {self.folder}: {error}") from error

    @contextlib.contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """A bar over all steps while open; plain lines alone where the output is no terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._bar = self._progress.add_task("", total=total, completed=done)
            try:
                yield
            finally:
                self._progress = None

    def cut_after(self, step: int) -> None:
        """Drops what a lost run wrote after its last checkpoint, so that no step stands twice."""
        file = self.folder / "steps.jsonl"
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _is_before(line, step)]
            partial = self.folder / ".steps.jsonl"
            with self.writing("steps.jsonl"):
                partial.write_text("".join(line + "\n" for line in kept))
                os.replace(partial, file)
        for path in (self.folder / "completions").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()


LOCK = ".lock"  # in the run folder: who writes there


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While open, no other process writes into ``folder``. Raises UserError where one does.

    The kernel lets go of the lock when this process ends, however it ends. A file system that has no locks is no
    reason not to run: then nothing is locked.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # workers that are spawned do not inherit it
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{folder}: {owner} writes into this run folder: wait for it, end it, or name another folder"
            ) from None
        except OSError:
            pass  # no locks here, as on some network file systems
        else:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(handle)


class QuietLog(RunLog):
    """Of a rank that does not write: it keeps the time, and the rest is the first rank's."""

    def write_step(self, row: Row, line: str) -> None:
        pass

    def write_completions(self, name: str, rows: Sequence[Row]) -> None:
        pass

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        yield

    def cut_after(self, step: int) -> None:
        pass


def read_steps(folder: Path) -> list[Row]:
    """All rows of a run's steps.jsonl; a last row that a killed run left half written is left out."""
    rows = []
    for line in (folder / "steps.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False  # the half row of a killed run


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value
