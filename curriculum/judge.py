"""Verifiable rewards: a response is worth 1.0 or 0.0. What the model wrote never raises and never hangs.

Asynchronous-planning answers are judged on the spot, in bounded time. Mathematics and physics run SymPy on
what the model wrote, so they are always judged in worker processes that are killed at a deadline.
"""

import atexit
import functools
import importlib
import importlib.util
import math
import os
import re
import resource
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as DeadlineExceeded
from contextlib import contextmanager
from fractions import Fraction
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.popen_spawn_posix import Popen
from typing import Any, Protocol, Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from isomorph.curriculum.rewards import paper
from isomorph.curriculum.rewards.answer import ANSWER_TAGS, last_answer, last_boxed, stated_answer
from isomorph.curriculum.rewards.duration import (
    Duration,
    Interval,
    number_of,
    parse_calendar,
    parse_timedeltas,
    same_duration,
)
from isomorph.curriculum.tasks.task import FAMILIES, REWARDS, Task

__all__ = [
    "ANSWER_TAGS",
    "JudgePool",
    "answer_found",
    "check_answer",
    "judge",
    "last_answer",
    "last_boxed",
    "refuse_golds",
]

DEADLINE_S = 5.0
MAX_ANSWER_CHARS = 2_000  # of mathematics and physics; longer answers are wrong
GOLDS_PER_JOB = 100
MAX_WORKER_BYTES = 4 << 30  # address space: what a formula may make SymPy allocate

_PLAIN_QUANTITY = re.compile(
    r"[-+]?\d{1,20}(?:\.\d{1,20})?(?:[eE][-+]?\d{1,3})?(?: [A-Za-z%][A-Za-z0-9%^*/]{0,40})?", re.ASCII
)


class HasPayload(Protocol):
    """What the pool needs of a prompt: the task that it asks."""

    @property
    def payload(self) -> Any: ...


def judge(family: str, response: str, answer: str | float, *, reward: str = "strict") -> float:
    """1.0 if the last ``<answer>...</answer>`` of ``response`` gives ``answer``, else 0.0.

    In mathematics a response without these tags is judged by its last ``\\boxed{...}``.

    family: "async_plan" (the answer is a duration, ``[datetime.timedelta(..), datetime.timedelta(..)]``, or a
    number), "math" (LaTeX, SymPy's notation or text) or "physics" (a value with a unit). Mathematics and physics
    run in one worker process that this module keeps, and kills after DEADLINE_S seconds; ``JudgePool`` has
    several. No response makes it raise.

    reward: "strict" accepts what a careful reader would; "paper" is the reward of arXiv 2602.03542 with its quirks
    (``tasks/paper.py``), for figures that are to be compared with it: plans and mathematics only, no ``\\boxed{...}``.

    Raises:
        ValueError: an unknown family or reward, an accepted answer that cannot be read, "paper" in physics.
        ImportError: mathematics or physics without the extra [math]; "paper" needs no extra.
    """
    judged = _judge_here(family, response, answer, reward)
    return _shared_pool().judge(family, response, answer, reward=reward) if judged is None else judged


class JudgePool:
    """Judges prompts whose payload is a ``Task``; mathematics and physics have ``deadline_s`` a response.

    Satisfies the engine's Judge protocol. Workers start with the first response that needs one, by spawning,
    without importing the caller's main module; ``close`` leaves none behind. ``num_timeouts`` counts responses
    cut off at the deadline, ``num_crashes`` those that took their worker down, ``num_errors`` those on which
    SymPy or pint failed: all are worth 0.0.
    """

    def __init__(self, *, max_workers: int | None = None, deadline_s: float = DEADLINE_S) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {max_workers}")
        if not (deadline_s > 0 and math.isfinite(deadline_s)):
            raise ValueError(f"deadline_s must be a positive number of seconds, got {deadline_s}")
        self.max_workers = max_workers or min(4, os.cpu_count() or 1)
        self.deadline_s = deadline_s
        self.num_timeouts = 0
        self.num_crashes = 0
        self.num_errors = 0
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[HasPayload], texts: Sequence[str]) -> list[float]:
        """One reward for each (prompt, text) pair.

        Raises:
            TypeError: a prompt's payload is not a Task.
            ValueError: not as many prompts as texts; a task with an unknown family or an unreadable answer.
        """
        asked = [(_task_of(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
        started = [self._start(task.family, text, task.answer, task.reward) for task, text in asked]
        return [got if isinstance(got, float) else self._finish(got) for got in started]

    def judge(self, family: str, response: str, answer: str | float, *, reward: str = "strict") -> float:
        """``isomorph.curriculum.judge.judge`` with this pool's workers and deadline."""
        got = self._start(family, response, answer, reward)
        return got if isinstance(got, float) else self._finish(got)

    def unreadable(self, golds: Sequence[str]) -> dict[str, str]:
        """Of accepted answers in physics those that cannot be read, each with the reason; ``deadline_s`` for each.

        Plain numbers with a unit are known to be fine; the others are read where they would be judged, in a worker.
        """
        waiting = [gold for gold in dict.fromkeys(golds) if not _PLAIN_QUANTITY.fullmatch(gold)]
        found: dict[str, str] = {}
        lots = [waiting[k : k + GOLDS_PER_JOB] for k in range(0, len(waiting), GOLDS_PER_JOB)]
        while lots:
            lot = lots.pop()
            args = (lot, 2 * self.deadline_s)
            try:
                found |= self._workers().schedule(_unreadable_golds, args=args, timeout=self.deadline_s).result()
            except (DeadlineExceeded, ProcessExpired):
                if len(lot) == 1:
                    found[lot[0]] = f"must be read within {self.deadline_s} s"
                lots += [[gold] for gold in lot if len(lot) > 1]
        return found

    def close(self) -> None:
        """Kills the workers and waits for them. The pool can be used again afterwards."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, family: str, response: str, answer: str | float, reward: str) -> float | ProcessFuture:
        judged = _judge_here(family, response, answer, reward)
        if judged is not None:
            return judged
        _require_extra(family)
        check_answer(family, answer)
        stated, text = stated_answer(family, response), _answer_text(answer)
        if stated is None or len(stated) > MAX_ANSWER_CHARS:
            return 0.0
        args = (family, stated, text, 2 * self.deadline_s)
        return self._workers().schedule(_grade, args=args, timeout=self.deadline_s)

    def _finish(self, future: ProcessFuture) -> float:
        try:
            reward: float | None = future.result()
            self.num_errors += reward is None
            return reward or 0.0
        except DeadlineExceeded:
            self.num_timeouts += 1
        except ProcessExpired:
            self.num_crashes += 1
        return 0.0

    def _workers(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPool(
                    max_workers=self.max_workers, initializer=_prepare_worker, context=_CleanSpawnContext()
                )
            return self._pool


def answer_found(family: str, response: str) -> bool:
    """Whether ``response`` states an answer that the judge can look at, right or wrong. Linear time.

    It does where its last ``<answer>...</answer>``, or in mathematics without one its last ``\\boxed{...}``, is not
    empty. A response for which this is False is worth 0.0.

    Raises:
        ValueError: an unknown family.
    """
    _check_family(family)
    return bool(stated_answer(family, response))


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")


def _task_of(prompt: HasPayload) -> Task:
    if not isinstance(prompt.payload, Task):
        raise TypeError(f"a prompt to judge must carry a Task as its payload, got {type(prompt.payload).__name__}")
    return prompt.payload


def check_reward(family: str, reward: str) -> None:
    """Raises ValueError unless ``family`` has a reward of that name."""
    _check_family(family)
    if reward not in REWARDS:
        raise ValueError(f"reward must be one of {REWARDS}, got {reward!r}")
    if (family, reward) == ("physics", "paper"):
        raise ValueError(
            'physics has no reward "paper": the paper\'s function runs the response as Python code, and its '
            'tolerance of 100 % takes every number of the right sign; use reward = "strict"'
        )


def check_answer(family: str, answer: str | float) -> None:
    """Raises ValueError where ``judge`` would for this accepted answer; physics answers only for being empty."""
    _check_family(family)
    if family == "async_plan":
        _plan_answer(_answer_text(answer))
    elif not _answer_text(answer):
        raise ValueError("an accepted answer must not be empty")


def refuse_golds(family: str, golds: Sequence[str], reward: str) -> dict[str, str]:
    """What of a file's accepted answers cannot be judged by, each with the reason; before any response is there.

    Raises:
        ImportError: what is needed to judge this family is not installed.
    """
    if family == "async_plan" or reward == "paper":
        return {}
    _require_extra(family)
    if family != "physics":  # in mathematics any text can be compared with
        return {}
    with JudgePool(max_workers=1) as pool:
        return pool.unreadable(golds)


def _judge_here(family: str, response: str, answer: str | float, reward: str) -> float | None:
    """The reward where it needs no worker: bounded time, no library that a response could crash; else None."""
    check_reward(family, reward)
    if family == "async_plan":
        return _judge_plan(response, answer, reward)
    return float(paper.same_mathematics(response, str(answer))) if reward == "paper" else None


def _judge_plan(response: str, answer: str | float, reward: str) -> float:
    text = _answer_text(answer)
    gold = _plan_answer(text)
    if reward == "paper":
        return float(paper.same_plan(response, text, parse_timedeltas(text) if "timedelta" in text else None))
    stated = last_answer(response)
    if stated is None:
        return 0.0
    return float(number_of(stated) == gold if isinstance(gold, Fraction) else same_duration(stated, gold))


def _answer_text(answer: str | float) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"an accepted answer must be text or a number, got {type(answer).__name__}")
    return str(answer).strip()


@functools.lru_cache(maxsize=65_536)
def _plan_answer(text: str) -> Interval | Duration | Fraction:
    """The accepted answer: an interval of seconds, a duration, or a bare number."""
    if "timedelta" in text:
        return parse_timedeltas(text)
    number = number_of(text)
    if number is not None:
        return number
    duration = parse_calendar(text)
    if duration is None:
        raise ValueError(
            f"an accepted answer must be a finite number, a duration such as '20 min', or "
            f"'[datetime.timedelta(...), datetime.timedelta(...)]', got {text[:200]!r}"
        )
    return duration


# What follows runs in a worker process.


_NO_QUANTITY = "an accepted answer in physics must be a value with a unit, got {!r}"


class GoldUnreadable(ValueError):
    """An accepted answer that the judge cannot read."""


def _grade(family: str, stated: str, gold: str, limit_s: float) -> float | None:
    """The reward of a mathematics or physics answer; None where the libraries failed on it.

    The worker ends after ``limit_s`` even if nobody is left to kill it.

    Raises:
        ValueError: ``gold`` cannot be read.
    """
    signal.setitimer(signal.ITIMER_REAL, limit_s)  # SIGALRM's default action: it ends C code, too
    try:
        return float(_same_physics(stated, gold) if family == "physics" else _same_mathematics(stated, gold))
    except GoldUnreadable:
        raise
    except Exception:  # SymPy, pint and their parsers raise nearly anything on hostile text; it is counted
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _same_physics(stated: str, gold: str) -> bool:
    from isomorph.curriculum.rewards.quantity import parse_quantity, same_answer

    expected = parse_quantity(gold)
    if expected is None:
        raise GoldUnreadable(_NO_QUANTITY.format(gold[:200]))
    if expected.value.free_symbols:
        return _same_mathematics(stated, gold, imaginary=False)
    return same_answer(stated, expected)


def _unreadable_golds(golds: Sequence[str], limit_s: float) -> dict[str, str]:
    from isomorph.curriculum.rewards.quantity import parse_quantity

    signal.setitimer(signal.ITIMER_REAL, limit_s)
    found = {}
    for gold in golds:
        try:
            if parse_quantity(gold) is None:
                found[gold] = _NO_QUANTITY.format(gold[:200])
        except Exception as error:  # as in _grade; here it is told
            found[gold] = f"{_NO_QUANTITY.format(gold[:200])}: {type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def _same_mathematics(stated: str, gold: str, *, imaginary: bool = True) -> bool:
    from isomorph.curriculum.rewards.mathematics import same_expression

    return same_expression(stated, gold, imaginary=imaginary)


def _prepare_worker() -> None:
    """Imports once what judging needs: no response pays for it out of its seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pool
    resource.setrlimit(resource.RLIMIT_AS, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    warnings.simplefilter("ignore")
    importlib.import_module("isomorph.curriculum.rewards.mathematics")
    if not _missing("physics"):
        importlib.import_module("isomorph.curriculum.rewards.quantity")


# How workers start.


def _missing(family: str) -> list[str]:
    needed = {"math": ("sympy",), "physics": ("sympy", "pint")}[family]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _require_extra(family: str) -> None:
    if missing := _missing(family):
        raise ImportError(f"judging {family} needs {' and '.join(missing)}: pip install 'isomorph[math]'")


@functools.cache
def _shared_pool() -> JudgePool:
    pool = JudgePool(max_workers=1)
    atexit.register(pool.close)
    return pool


_MAIN_LOCK = threading.Lock()


@contextmanager
def _without_main_module() -> Iterator[None]:
    """A spawned child imports its parent's main module: torch with it, or a script that has no guard."""
    with _MAIN_LOCK:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _CleanSpawnProcess(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        with _without_main_module():
            return Popen(process_obj)


class _CleanSpawnContext(SpawnContext):
    Process = _CleanSpawnProcess
