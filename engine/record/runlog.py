"""Writes the run folder: one JSON row a step in steps.jsonl, completions, JSON files; and console lines.

run.json  steps.jsonl  completions/step-00000010.jsonl  checkpoints/  model/  summary.json

Time is measured by phase. The phases ``time/<phase>_s`` of a step sum to ``time/step_s``; the time between two steps
(rows, checkpoints, evaluations) is in the later one's row as ``time/between/<phase>_s``, which sum to
``time/between_s``. The time of a nested phase is subtracted from the outer one.
"""

import contextlib
import fcntl
import json
import math
import os
import re
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
from isomorph.engine.foreign import printable
from isomorph.engine.record.alive import LINE_S, WORDS, Pace, in_words, signs_of_life
from isomorph.engine.record.telemetry import NUM_GROWING, WINDOW, Gather, Telemetry
from isomorph.engine.types import RunFailed

STEP_FILE = re.compile(r"(?:exam-)?step-(\d+)")  # under completions/: a step's responses, an evaluation's after it
LAST_ROW_BYTES = 1 << 16  # read from the end of steps.jsonl, at first

Row = dict[str, Any]
Sink = Callable[[Row], None]  # called with every row after it has been written to steps.jsonl


class RunLog:
    """Writes the run folder's files and the console. Phases are timed by ``with log.time("generate"):``."""

    def __init__(self, folder: Path, console: Console, *, every: int = 1) -> None:
        """``every``: steps between console lines; the first step of a stage always has one."""
        self.folder = folder
        self.console = console
        self.every = every
        self.telemetry = Telemetry()
        self.sinks: list[Sink] = []
        self.exam_keys: tuple[str, ...] = ()  # of evaluations: null in a row until ``write_evaluation``
        self.failed = ""  # a file that could not be written: no checkpoint may follow that would count it as written
        self._has_rows = False  # whether this process has written to steps.jsonl
        self.times: dict[str, float] = {}
        self.seconds_before = 0.0  # wall time up to the checkpoint that this run resumes
        self._between: dict[str, float] = {}  # seconds of phases between the previous step and this one
        self._between_s = 0.0
        self._inner = [0.0]  # seconds of finished phases within each open phase
        self._opened = self._started = self._ended = time.perf_counter()
        self._line_stage: str | None = None  # stage and time (perf_counter) of the last console line
        self._line_at = -math.inf
        self._progress: Progress | None = None
        self._bar: Any = None
        self._pace = Pace()
        self._said_at = time.perf_counter()  # when anything was printed
        self._phases: list[str] = []  # that are open, the outer ones first
        self._step = 0  # the last that ended

    def wall_s(self) -> float:
        """Returns the seconds of the run so far, evaluations and checkpoints included, without lost work."""
        return self.seconds_before + time.perf_counter() - self._opened

    @contextlib.contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to ``phase`` of this step; the block has that name in a profile."""
        start = time.perf_counter()
        self._inner.append(0.0)
        self._phases.append(phase)
        try:
            with record_function(phase):
                yield
        finally:
            self._phases.pop()
            seconds = time.perf_counter() - start
            self.times[phase] = self.times.get(phase, 0.0) + seconds - self._inner.pop()
            self._inner[-1] += seconds

    def begin_step(self) -> None:
        """Starts the clock of a step; the phases since the end of the step before are those between the two."""
        with self.time("record"):
            self.telemetry.begin()
        self._started = time.perf_counter()
        self._between_s = self._started - self._ended
        self._between, self.times = self.times, {}

    def end_step(self, *, num_tok: int, num_correct: int, gather: Gather = lambda own: [own]) -> Row:
        """Stops the clock of the step; returns its ``time/...``, ``mem/...``, ``gpu/...`` and ``energy/...`` keys.

        ``num_tok``: tokens in the loss; ``num_correct``: responses that solve their prompt; both of all ranks.
        ``gather`` collects a value from all ranks; all of them must call ``end_step``.
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
        """Appends a row to steps.jsonl and prints ``line`` if one is due. Raises RunFailed if the disk refuses."""
        row = _jsonable({**row, **dict.fromkeys(self.exam_keys)})
        with self.writing("steps.jsonl"):
            _append(self.folder / "steps.jsonl", json.dumps(row) + "\n", creates=not self._has_rows)
        self._has_rows = True
        self._step = row["step"]
        self._pace.observe(row["step"])
        if self._is_due(row):
            self.say("  ".join(part for part in (line, self._pace.left()) if part))
        rss_gib = row.get("mem/rss_gib")
        if rss_gib is not None and self.telemetry.growth.observe(rss_gib) and self.telemetry.growth.num_alarms == 1:
            self.say(
                f"warning: step {row['step']}: resident memory grew in {NUM_GROWING} consecutive windows of {WINDOW} "
                f"steps, now {rss_gib:.2f} GiB, and does not slow down: possible memory leak; see mem/rss_gib in "
                "steps.jsonl, and look at what reward functions and environments keep; a checkpoint resumes the run"
            )
        for sink in self.sinks:
            sink(row)
        if self._progress is not None:
            self._progress.update(self._bar, completed=row["step"], description=row["stage"], left=self._pace.left())

    def write_evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Puts the numbers of an evaluation into the row of ``step``, which must be the last, and sends them to sinks.

        Before the first step there is no row, and only the sinks get them. Raises RunFailed if the disk refuses.
        """
        row: Row = _jsonable(dict(values))
        with self.writing("steps.jsonl"):
            _add_to_last(self.folder / "steps.jsonl", step, row)
        for sink in self.sinks:
            sink({"step": step, **row})

    def _is_due(self, row: Row) -> bool:
        now = time.perf_counter()
        is_new, is_late = row["stage"] != self._line_stage, now - self._line_at >= LINE_S
        if is_new or is_late or row["step"] % self.every == 0:
            self._line_stage, self._line_at = row["stage"], now
            return True
        return False

    def write_completions(self, name: str, rows: Sequence[Row]) -> None:
        """Writes completions/``name``.jsonl, responses with their rewards, replaced atomically.

        Raises RunFailed if the disk refuses.
        """
        folder = self.folder / "completions"
        with self.writing(f"completions/{name}.jsonl"):
            folder.mkdir(exist_ok=True)
            partial = folder / f".{name}.jsonl"
            partial.write_text("".join(json.dumps(_jsonable(row)) + "\n" for row in rows))
            os.replace(partial, folder / f"{name}.jsonl")

    def write_items(self, label: str, rows: Sequence[Row]) -> None:
        """Writes evaluations/``label``.jsonl, one row a question, replaced atomically: written again, it is the same.

        Raises RunFailed if the disk refuses.
        """
        folder = self.folder / "evaluations"
        with self.writing(f"evaluations/{label}.jsonl"):
            folder.mkdir(exist_ok=True)
            partial = folder / f".{label}.jsonl"
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(_jsonable(row), ensure_ascii=False) + "\n" for row in rows)
            os.replace(partial, folder / f"{label}.jsonl")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes ``name`` in the run folder, replaced atomically. Raises RunFailed if the disk refuses."""
        partial = self.folder / f".{name}"
        with self.writing(name):
            partial.write_text(json.dumps(_jsonable(dict(value)), indent=2) + "\n")
            os.replace(partial, self.folder / name)

    def say(self, text: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        self._said_at = time.perf_counter()
        console = self._progress.console if self._progress else self.console
        console.print(
            printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True
        )  # no markup: brackets stay

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Context for writing ``name`` in the run folder: turns errors of the disk into RunFailed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.failed = name
            raise RunFailed(f"{name} cannot be written in {self.folder}: {error}") from error

    @contextlib.contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Context with a progress bar over all steps; without a terminal there is no bar."""
        self._step = done
        self._pace.begin(done, total)
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(
            *columns, TextColumn("{task.fields[left]}"), console=self.console, transient=True
        ) as self._progress:
            self._bar = self._progress.add_task("", total=total, completed=done, left="")
            try:
                yield
            finally:
                self._progress = None

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Context in which a silent console says every now and then in what phase the run is; a bar is enough."""
        with signs_of_life(self._silence_s, self._say_phase, first_s=LINE_S):
            yield

    def _silence_s(self) -> float:
        return 0.0 if self._progress is not None else time.perf_counter() - self._said_at

    def _say_phase(self, silent_s: float) -> None:
        phases = self._phases[-1:]  # the main thread may open and close some meanwhile
        doing = WORDS.get(phases[0], phases[0]) if phases else "at work"
        where = f"step {self._step + 1} of {self._pace.total}: " if self._pace.total is not None else ""
        said_at = self._said_at
        self.say(f"{where}{doing}; nothing to report for {in_words(silent_s)}")
        self._said_at = said_at

    def cut_after(self, step: int) -> None:
        """Removes what was written after ``step``, that of the checkpoint from which the run resumes."""
        file = self.folder / "steps.jsonl"
        if file.exists():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _is_before(line, step)]
            partial = self.folder / ".steps.jsonl"
            with self.writing("steps.jsonl"):
                partial.write_text("".join(line + "\n" for line in kept))
                os.replace(partial, file)
        written = (path for name in ("completions", "evaluations") for path in (self.folder / name).glob("*.jsonl"))
        for path in written:
            if (found := STEP_FILE.fullmatch(path.stem)) and int(found[1]) > step:
                path.unlink()


def _append(file: Path, line: str, *, creates: bool) -> None:
    """Adds ``line`` whole, or leaves ``file`` as it was. Without ``creates`` a file that has gone is an error."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if creates else 0), 0o666)
    try:
        _write_whole(handle, line.encode(), os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _write_whole(handle: int, new: bytes, size: int) -> None:
    """Writes ``new``; where the disk takes only a part of it, cuts the file to ``size`` bytes and raises OSError."""
    left = memoryview(new)
    try:
        while left:
            left = left[os.write(handle, left) :]
    except OSError:
        os.ftruncate(handle, size)
        raise


def _add_to_last(file: Path, step: int, values: Row) -> None:
    """Replaces the last row, if it is that of ``step``, by one write in place, so that a kill loses no other row."""
    if not file.exists():
        return
    with file.open("r+b", buffering=0) as rows:
        end = rows.seek(0, os.SEEK_END)
        size = 0
        while (size := min(end, size + LAST_ROW_BYTES)) < end:
            rows.seek(end - size)
            if rows.read(size).count(b"\n") > 1:
                break
        rows.seek(end - size)
        line = rows.read(size).rstrip(b"\n").rpartition(b"\n")[2]
        row = json.loads(line) if line else {}
        if row.get("step") == step:
            new = json.dumps({**row, **values}).encode()
            rows.seek(start := end - len(line) - 1)
            try:
                _write_whole(rows.fileno(), new.ljust(len(line)) + b"\n", end)  # spaces after a value are JSON
            except OSError:  # over what it had already, which takes no space
                os.pwrite(rows.fileno(), line + b"\n", start)
                raise


LOCK = ".lock"  # file in the run folder; holds the process that writes there


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process writes into ``folder``. Raises UserError if one does already.

    The kernel releases the lock when this process ends, for whatever reason. On a file system without locks nothing is
    locked.
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
                f"{folder} is in use by {owner}: wait until it has ended, stop it, or choose another folder"
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
    """The log of all ranks but the first: measures time and writes nothing."""

    def write_step(self, row: Row, line: str) -> None:
        pass

    def write_evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        pass

    def write_items(self, label: str, rows: Sequence[Row]) -> None:
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

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        yield

    def cut_after(self, step: int) -> None:
        pass


def read_steps(folder: Path) -> list[Row]:
    """Returns all rows of a run's steps.jsonl, without an incomplete last row of a killed run."""
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
    except (ValueError, LookupError, TypeError):
        return False  # incomplete row of a killed run, or no row at all


def _jsonable(value: Any) -> Any:
    """Returns ``value`` with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value
