"""What runs in the processes that call reward functions: imports the user's file, calls it, and names what went wrong.

A job is a list of calls, made one after the other; those of an ``async`` function at the same time. Each call has the
deadline of its table: an alarm raises in the function, and where that does not help, as in C code, the parent kills the
process. A job that has used up its deadline returns what it has, and the parent sends the rest again.

    returned     a number                      None                      text, a list of another length, ...
    the result   it, and NaN counts as nan     the reward is left out    Fault("error", sentence)

What a function prints goes to a file of bounded size. Python's and numpy's global random numbers are seeded before each
call, so that a resumed run gets the same rewards.
"""

import asyncio
import contextlib
import ctypes
import functools
import io
import math
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from isomorph.curriculum.rewards.signature import (
    OURS,
    TRIAL,
    GroupInput,
    Progress,
    RewardFunction,
    classify,
    keywords,
)
from isomorph.curriculum.rewards.user_code import DoesNotFit, enter, home_of, load

MAX_LOG_BYTES = 16 << 20  # of the file that prints go to
MAX_MESSAGE_CHARS = 300
MAX_FLOAT32 = 3.4e38
PARENT_PERIOD_S = 1.0  # between two looks whether the trainer still lives


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reward function is, and its arguments."""

    function: str  # "/folder/file.py:name" or "package.module:name"
    arguments: Mapping[str, Any]


class Fault(NamedTuple):
    """Why a response has no number from a reward function."""

    kind: Literal["error", "nan", "deadline"]
    sentence: str


class Call(NamedTuple):
    """One call of a function: for a response of a group, or for the whole group."""

    function: int  # index into the pool's places
    group: int
    response: int | None


class Found(NamedTuple):
    """What the parent needs to know of a function."""

    is_for_group: bool
    is_async: bool
    wants_token_ids: bool
    missing: list[str]  # its required parameters that are no columns of the rows


Result = float | None | Fault  # None: the reward does not apply


class DeadlineAlarm(BaseException):
    """Raised by the alarm in a function; no Exception, which the function might catch."""


_FUNCTIONS: list[RewardFunction | Fault] = []
_PID = [0]


# -- the start of a worker
def prepare(places: Sequence[Place], log: str | None, max_bytes: int, import_s: float) -> None:
    """Prepares the process, and imports the functions, each within ``import_s``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pool
    signal.signal(signal.SIGALRM, _raise_deadline)
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    warnings.simplefilter("ignore")
    _PID[:] = [os.getpid()]
    os._exit = _exit_as_failure  # type: ignore[assignment]
    os.register_at_fork(after_in_child=_die_with_parent)
    _redirect(log)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for place in places:
        _FUNCTIONS.append(_loaded(place, import_s))


def _loaded(place: Place, import_s: float) -> RewardFunction | Fault:
    where = place.function
    try:
        with _deadline(import_s):
            function = replace(classify(load(where), place.arguments), home=home_of(where))
            if where.startswith(f"{OURS}:"):
                _try(function)
            return function
    except DoesNotFit as error:
        return Fault("error", f"{where}: {error}")
    except DeadlineAlarm:
        return Fault("deadline", f"{where}: importing it must end within {import_s:g} s")
    except BaseException as error:  # a user's file may raise anything, SystemExit too
        return Fault("error", f"{where}: {_described(error, where.rpartition(':')[0])}")


def _try(function: RewardFunction) -> None:
    response = None if function.is_for_group else 0
    function.call(**keywords(function, TRIAL, response, Progress(step=0, max_steps=0)))


# -- jobs
def describe(place: Place, columns: frozenset[str], import_s: float) -> Found | Fault:
    """Imports a function; returns what the parent needs to know of it. ``columns``: of the rows that it is for."""
    f = _loaded(place, import_s)
    return f if isinstance(f, Fault) else Found(f.is_for_group, f.is_async, f.wants_token_ids, f.missing(columns))


def do_nothing() -> None:
    """Its answer says that the worker has started."""


def run_job(
    groups: Mapping[int, GroupInput], calls: Sequence[Call], progress: Progress, deadline_s: float
) -> list[list[Result]]:
    """A list of results for each call: of its responses. Fewer calls are answered where ``deadline_s`` has passed."""
    results: list[list[Result]] = []
    ends = time.monotonic() + deadline_s
    while len(results) < len(calls) and (not results or time.monotonic() < ends):
        call = calls[len(results)]
        function, group = _FUNCTIONS[call.function], groups[call.group]
        if isinstance(function, Fault):
            results.append([function] * (len(group.texts) if call.response is None else 1))
        elif function.is_async:
            together = [c for c in calls[len(results) :] if c.function == call.function]
            results += asyncio.run(_all_at_once(function, groups, together, progress, deadline_s))
        else:
            results.append(called(function, group, call.response, progress, deadline_s))
    _end_if_forked()
    return results


def called(
    function: RewardFunction, group: GroupInput, response: int | None, progress: Progress, deadline_s: float | None
) -> list[Result]:
    """The results of one call. ``deadline_s``: None: without an alarm, for a function that is known to return."""
    size = 1 if response is not None else len(group.texts)
    enter(function.home)
    try:
        if deadline_s is None:
            value = function.call(**keywords(function, group, response, progress))
        else:
            _seed(group.seed + (response or 0))
            with _deadline(deadline_s):
                value = function.call(**keywords(function, group, response, progress))
    except DeadlineAlarm:
        return [Fault("deadline", f"must return within {deadline_s:g} s")] * size
    except BaseException as error:  # a user's function may raise anything, SystemExit too
        return [Fault("error", _described(error, _file_of(function)))] * size
    finally:
        if deadline_s is not None:
            _end_if_forked()
    return _results(function, value, size)


async def _all_at_once(
    function: RewardFunction,
    groups: Mapping[int, GroupInput],
    calls: Sequence[Call],
    progress: Progress,
    deadline_s: float,
) -> list[list[Result]]:
    async def ended(group: GroupInput, response: int | None, size: int) -> list[Result]:
        try:
            value = await function.call(**keywords(function, group, response, progress))
        except (SystemExit, KeyboardInterrupt) as error:  # out of a task it would end the event loop, and all calls
            return [Fault("error", _described(error, _file_of(function)))] * size
        return _results(function, value, size)

    async def one(call: Call) -> list[Result]:
        group = groups[call.group]
        size = 1 if call.response is not None else len(group.texts)
        started = time.monotonic()
        try:
            return await asyncio.wait_for(ended(group, call.response, size), deadline_s)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, TimeoutError) and time.monotonic() - started >= deadline_s:
                return [Fault("deadline", f"must return within {deadline_s:g} s")] * size
            return [Fault("error", _described(error, _file_of(function)))] * size

    enter(function.home)
    return list(await asyncio.gather(*map(one, calls)))


def _results(function: RewardFunction, value: Any, size: int) -> list[Result]:
    if not function.is_for_group:
        if function.form == "verl" and isinstance(value, Mapping):
            if "score" not in value:
                return [Fault("error", f'must return a number or a dict with "score", got {_brief(value)}')]
            value = value["score"]
        return [_number(value)]
    try:
        if isinstance(value, str | bytes | Mapping):
            raise TypeError
        values = list(value)
    except Exception:
        return [Fault("error", f"must return a list of {size} numbers, got {_brief(value)}")] * size
    if len(values) != size:
        return [Fault("error", f"must return one reward for each of {size} responses, got {len(values)}")] * size
    if function.form == "verl_batch":
        values = [v.get("score") if isinstance(v, Mapping) else v for v in values]
    return [_number(v) for v in values]


def _number(value: Any) -> Result:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except Exception:
        return Fault("error", f"must return a number, got {_brief(value)}")
    if not math.isfinite(number) or abs(number) > MAX_FLOAT32:
        return Fault("nan", f"must return a finite number, got {number}")
    return number


# -- sentences
def _described(error: BaseException, file: str) -> str:
    """The user's line, and the exception."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    others = [frame for frame in frames if frame.filename != __file__]
    at = own[-1] if own else others[-1] if others else None
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename == file:
        return _short(f"line {error.lineno}: {type(error).__name__}: {error.msg}")
    where = f"{at.filename}, line {at.lineno}, in {at.name}: " if at is not None else ""
    return where + _short(message)


def _file_of(function: RewardFunction) -> str:
    call = function.call if hasattr(function.call, "__code__") else type(function.call).__call__
    code = getattr(call, "__code__", None)
    return code.co_filename if code is not None else ""


def _brief(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception:
        shown = "a value without repr"
    return _short(f"{type(value).__name__} {shown}", 80)


def _short(text: str, most: int = MAX_MESSAGE_CHARS) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


# -- the process
def _raise_deadline(number: int, frame: Any) -> None:
    raise DeadlineAlarm


@contextlib.contextmanager
def _deadline(seconds: float) -> Any:
    signal.signal(signal.SIGALRM, _raise_deadline)  # a function may have set its own
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _seed(seed: int) -> None:
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


_really_exit = os._exit


def _exit_as_failure(status: int) -> None:
    """A worker that ends with status 0 looks to the pool like one that has done its work, and its job never ends."""
    _really_exit(status or (1 if os.getpid() == _PID[0] else 0))


def _end_if_forked() -> None:
    """A process that a function has forked must not answer in its worker's place."""
    if os.getpid() != _PID[0]:
        _really_exit(0)


def _die_with_parent() -> None:
    """A process that a function forks ends with its worker."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_PERIOD_S)
    _really_exit(1)


def _redirect(log: str | None) -> None:
    """Sends what Python prints to ``log``; what C code and further processes print goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    if log is not None:
        sys.stdout = sys.stderr = io.TextIOWrapper(
            _BoundedFile(log), encoding="utf-8", errors="backslashreplace", write_through=True
        )


class _BoundedFile(io.RawIOBase):
    """Appends to a file, which several workers write, until it has MAX_LOG_BYTES."""

    def __init__(self, path: str) -> None:
        self.path, self.is_full = path, False

    @functools.cached_property
    def handle(self) -> int:
        """Made with the first print, so that a run that is refused leaves no file."""
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if len(data) and not self.is_full:
            room = MAX_LOG_BYTES - os.fstat(self.handle).st_size
            os.write(self.handle, bytes(data[: max(room, 0)]))
            if len(data) > room:
                self.is_full = True
                os.write(self.handle, b"\n[what was printed beyond %d bytes is not kept]\n" % MAX_LOG_BYTES)
        return len(data)
