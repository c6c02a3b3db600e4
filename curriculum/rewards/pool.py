"""Scores responses, where needed in worker processes that are killed at a deadline.

Scoring mathematics and physics runs SymPy on what the model wrote, which may take any time and memory; so they are
always scored in workers. Planning answers are scored in the caller's thread, in bounded time.
"""

import importlib
import math
import os
import resource
import signal
import warnings
from collections.abc import Sequence
from concurrent.futures import TimeoutError as DeadlineExceeded
from typing import Any, Protocol, runtime_checkable

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from isomorph.curriculum.rewards.answer import AnswerUnreadable, answer_text, stated_answer
from isomorph.curriculum.rewards.families import (
    FAMILIES,
    check_answer,
    check_reward,
    family_of,
    function,
    missing_packages,
    require_packages,
)
from isomorph.curriculum.rewards.spawn import CleanSpawnContext, WorkerPool

DEADLINE_S = 5.0
MAX_ANSWER_CHARS = 2_000  # of an answer that is scored in a worker; longer ones are wrong
ANSWERS_PER_JOB = 100
MAX_WORKER_BYTES = 4 << 30  # address space: what a formula may make SymPy allocate


class HasPayload(Protocol):
    """A prompt, as far as the pool reads it."""

    @property
    def payload(self) -> Any: ...


@runtime_checkable
class Question(Protocol):
    """A prompt's payload, as far as the pool reads it: a ``Task``."""

    @property
    def family(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def reward(self) -> str: ...


class RewardPool(WorkerPool):
    """Reward function for prompts whose payload is a ``Task``, with worker processes.

    Satisfies the engine's Judge protocol. A response that is scored in a worker has ``deadline_s`` seconds. Workers
    start with the first response that needs one, by spawning, without importing the caller's main module; ``close``
    ends them all. ``num_timeouts`` counts responses cut off at the deadline, ``num_crashes`` those whose worker died,
    ``num_errors`` those on which a library such as SymPy failed: all have a reward of 0.0.
    """

    def __init__(self, *, max_workers: int | None = None, deadline_s: float = DEADLINE_S) -> None:
        super().__init__()
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {max_workers}")
        if not (deadline_s > 0 and math.isfinite(deadline_s)):
            raise ValueError(f"deadline_s must be a positive number of seconds, got {deadline_s}")
        self.max_workers = max_workers or min(4, os.cpu_count() or 1)
        self.deadline_s = deadline_s
        self.num_timeouts = 0
        self.num_crashes = 0
        self.num_errors = 0

    def __call__(self, prompts: Sequence[HasPayload], texts: Sequence[str]) -> list[float]:
        """One reward for each (prompt, text) pair.

        Raises:
            TypeError: a prompt's payload is not a Task.
            ValueError: not as many prompts as texts; a task with an unknown family or an unreadable answer.
        """
        pairs = [(_question_of(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
        started = [self._start(task.family, text, task.answer, task.reward) for task, text in pairs]
        return [got if isinstance(got, float) else self._finish(got) for got in started]

    def judge(self, family: str, response: str, answer: str | float, *, reward: str = "strict") -> float:
        """``isomorph.curriculum.judge.judge`` with this pool's workers and deadline."""
        got = self._start(family, response, answer, reward)
        return got if isinstance(got, float) else self._finish(got)

    def start_worker(self, family: str, reward: str) -> None:
        """Starts a worker where ``family`` needs one, before its first response comes.

        Raises:
            ImportError: a package that scores this family is not installed.
        """
        known = family_of(family)
        if known.in_worker and reward == "strict":
            require_packages(known)
            self._workers().schedule(_do_nothing).result()

    def unreadable(self, family: str, answers: Sequence[str]) -> dict[str, str]:
        """The accepted answers that the family's function cannot read, each with the reason.

        Reads them in a worker with ``deadline_s`` for each, but for those that are known to be readable.
        """
        known = family_of(family)
        readable = known.readable
        waiting = [text for text in dict.fromkeys(answers) if not (readable and readable.fullmatch(text))]
        found: dict[str, str] = {}
        jobs = [waiting[k : k + ANSWERS_PER_JOB] for k in range(0, len(waiting), ANSWERS_PER_JOB)]
        while jobs:
            job = jobs.pop()
            args = (known.why_unreadable, job, 2 * self.deadline_s)
            try:
                found |= self._workers().schedule(_unreadable, args=args, timeout=self.deadline_s).result()
            except (DeadlineExceeded, ProcessExpired):
                if len(job) == 1:
                    found[job[0]] = f"must be read within {self.deadline_s} s"
                jobs += [[text] for text in job if len(job) > 1]
        return found

    def _start(self, family: str, response: str, answer: str | float, reward: str) -> float | ProcessFuture:
        """The reward, or the worker's call that will return it."""
        check_reward(family, reward)
        known = family_of(family)
        if reward == "paper":
            return float(function(known.paper)(response, str(answer)))
        require_packages(known)
        check_answer(family, answer)
        stated, accepted = stated_answer(response, reads_boxed=known.reads_boxed), answer_text(answer)
        if stated is None:
            return 0.0
        if not known.in_worker:
            return float(function(known.function)(stated, accepted))
        if len(stated) > MAX_ANSWER_CHARS:
            return 0.0
        args = (known.function, stated, accepted, 2 * self.deadline_s)
        return self._workers().schedule(_score, args=args, timeout=self.deadline_s)

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

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(max_workers=self.max_workers, initializer=_prepare_worker, context=CleanSpawnContext())


def answer_found(family: str, response: str) -> bool:
    """Whether ``response`` states an answer, right or wrong. Linear time.

    It does where its last ``<answer>...</answer>``, or in mathematics without one its last ``\\boxed{...}``, is not
    empty. A response for which this is False has a reward of 0.0.

    Raises:
        ValueError: an unknown family.
    """
    return bool(stated_answer(response, reads_boxed=family_of(family).reads_boxed))


def unreadable_answers(family: str, answers: Sequence[str], reward: str) -> dict[str, str]:
    """The accepted answers of a file that cannot be compared with, each with the reason.

    Raises:
        ImportError: a package that scores this family is not installed.
    """
    known = family_of(family)
    if reward == "paper":
        return {}
    require_packages(known)
    if not known.why_unreadable:
        return {}
    with RewardPool(max_workers=1) as pool:
        return pool.unreadable(family, answers)


def _question_of(prompt: HasPayload) -> Question:
    if not isinstance(prompt.payload, Question):
        raise TypeError(f"the payload of a prompt must be a Task, got {type(prompt.payload).__name__}")
    return prompt.payload


# What follows runs in a worker process.


def _score(path: str, stated: str, accepted: str, limit_s: float) -> float | None:
    """The reward by the function at ``path``; None where the libraries failed.

    The worker ends after ``limit_s`` even where its parent was killed.

    Raises:
        AnswerUnreadable: ``accepted`` cannot be read.
    """
    signal.setitimer(signal.ITIMER_REAL, limit_s)  # SIGALRM's default action: it ends C code, too
    try:
        return float(function(path)(stated, accepted))
    except AnswerUnreadable:
        raise
    except Exception:  # SymPy, pint and their parsers raise nearly anything on hostile text; it is counted
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _unreadable(path: str, answers: Sequence[str], limit_s: float) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    found = {text: reason for text in answers if (reason := function(path)(text))}
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def _do_nothing() -> None:
    pass


def _prepare_worker() -> None:
    """Imports what scoring needs, so that imports do not count against a response's deadline."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pool
    resource.setrlimit(resource.RLIMIT_AS, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    warnings.simplefilter("ignore")
    for family in FAMILIES.values():
        if family.in_worker and not missing_packages(family):
            importlib.import_module(family.function.partition(":")[0])
