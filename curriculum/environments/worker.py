"""What runs in a worker process: environments and tools of the user's, one object for each open rollout.

An ``Outcome`` never raises: what the user's code raises becomes a sentence that names its file and line. A call that is
not over at its deadline is interrupted by a signal, which ends Python code and system calls; the pool kills a worker
that does not react, and with it the other environments in it, which are then rebuilt from what was said so far.
"""

import contextlib
import functools
import inspect
import math
import random
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from isomorph.curriculum.environments import verifiers_form
from isomorph.curriculum.environments.calls import CallFormat, called
from isomorph.curriculum.environments.done import Done, Message
from isomorph.curriculum.environments.methods import MethodTools, has_methods
from isomorph.curriculum.environments.spec import VERIFIERS
from isomorph.curriculum.rewards.user_code import enter, home_of, load
from isomorph.curriculum.rewards.worker import DeadlineAlarm, prepare
from isomorph.engine.types import EnvironmentFailure


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """What a worker needs to make an environment; paths are absolute."""

    environment: str | None
    tools: tuple[str, ...]
    arguments: dict[str, Any] = field(hash=False)
    deadline_s: float
    calls: CallFormat
    max_turns: int | None = None  # of the model; environments of verifiers end there by themselves

    @property
    def is_of_verifiers(self) -> bool:
        return self.environment is not None and self.environment.startswith(VERIFIERS)

    @property
    def home(self) -> str:
        """The folder whose modules the environment may import, or the first tool without one; "" for packages."""
        return home_of((self.environment or self.tools[0]).removeprefix(VERIFIERS))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a call: one of the fields is set, or ``is_lost``; none: the prompt is the row's own."""

    messages: tuple[Message, ...] = ()
    added: str = ""  # of ``reset``: what is added to the prompt's last message
    done: Done | None = None
    failed: str = ""  # what went wrong, with file and line
    is_late: bool = False  # with ``failed``: the deadline was over
    is_crash: bool = False  # with ``failed``: the worker has died
    is_lost: bool = False  # this worker does not hold the environment: it has to be built again

    @property
    def kind(self) -> EnvironmentFailure:
        """Of what ``failed`` says."""
        return "timeouts" if self.is_late else "crashes" if self.is_crash else "errors"


@dataclass(slots=True)
class _Open:
    environment: Any  # None: tools alone
    num_steps: int = 0


_open: dict[int, _Open] = {}


def reset(spec: EnvironmentSpec, row: dict[str, Any], seed: int) -> Outcome:
    """What a rollout on ``row`` begins with; nothing stays open."""

    def run() -> Outcome:
        environment, begun = _begin(spec, row, seed)
        _close(environment)
        return begun

    return _guarded(spec.deadline_s, run)


def step(
    spec: EnvironmentSpec,
    key: int,
    row: dict[str, Any],
    seed: int,
    first: tuple[Message, ...],
    said: tuple[str, ...],
    is_last: bool,
    is_new: bool,
) -> Outcome:
    """The environment's answer to ``said[-1]``; ``said`` are all turns of the model in rollout ``key``.

    ``first``: the messages of its prompt, the last of which are the environment's where it makes them. ``is_last``: the
    model has no further turn. ``is_new``: builds the environment, and says all earlier turns to it again, which are not
    timed one by one.
    """
    if key not in _open and not is_new:
        return Outcome(is_lost=True)

    def run() -> Outcome:
        if key not in _open:
            environment, begun = _begin(spec, row, seed)
            same = begun.messages == first[len(first) - len(begun.messages) :]
            if not same or (begun.added and not str(first[-1]["content"]).endswith(begun.added)):
                raise ValueError(
                    "reset must return the same messages for all rollouts of a prompt, got other ones for the same "
                    "row and seed: draw random numbers from its argument seed"
                )
            state = _Open(environment)
            for text in said[:-1]:
                _answer(spec, state, text, seed, is_last=False)
            _open[key] = state
        return _answer(spec, _open[key], said[-1], seed, is_last=is_last)

    outcome = _guarded(spec.deadline_s * (len(said) if is_new else 1), run)
    if outcome.failed or outcome.done is not None:
        close(key)
    return outcome


def close(key: int) -> None:
    """Forgets the environment of rollout ``key``; calls its ``close`` where it has one."""
    state = _open.pop(key, None)
    if state is not None:
        _guarded(1.0, lambda: _close(state.environment))


def _close(environment: Any) -> Outcome:
    if hasattr(environment, "close"):
        environment.close()
    return Outcome()


def start(specs: Sequence[EnvironmentSpec], log: str | None, max_bytes: int, import_s: float) -> None:
    """Prepares the process, and imports what ``specs`` name, which no deadline of a call is for.

    What fails there fails again in the first call, which names it.
    """
    prepare((), log, max_bytes, import_s)
    for spec in specs:
        _guarded(import_s, functools.partial(_imported, spec))


def do_nothing() -> None:
    """Its call starts the worker."""


def _imported(spec: EnvironmentSpec) -> Outcome:
    for tool in spec.tools:
        located_object(tool)
    if spec.environment is not None:
        _made_by(spec)
    return Outcome()


@dataclass(slots=True)
class Described:
    """What the trainer needs to know before the first step."""

    failed: str = ""  # what is wrong with the environment or a tool
    has_tools: bool = False  # the environment has tools of its own
    has_step: bool = False  # the environment may answer with a user's message
    schemas: list[dict[str, Any]] = field(default_factory=list)  # of all tools, where the model is told of them


def describe(spec: EnvironmentSpec) -> Described:
    """Imports environment and tools."""
    found = Described()

    def run() -> Outcome:
        tools = [located_object(tool) for tool in spec.tools]
        if spec.is_of_verifiers:
            environment = _made_by(spec)
            own = verifiers_form.tools_of(environment)
            found.has_tools, found.has_step = bool(own), not verifiers_form.is_single_turn(environment)
            found.schemas += own if spec.calls.is_json else ()
        elif spec.environment is not None:
            made = located_object(spec.environment)
            if inspect.isclass(made) and not callable(getattr(made, "reset", None)):
                raise TypeError(f"an environment has reset(row) and step(text): {spec.environment} has no reset")
            found.has_tools = inspect.isclass(made) and has_methods(made)
            found.has_step = not found.has_tools
            if found.has_tools:
                tools += MethodTools(made(**spec.arguments)).tools.values()
        if spec.calls.is_json:
            from isomorph.engine.model.tool_schema import tool_schema  # it takes seconds to import

            found.schemas += map(tool_schema, tools)
        return Outcome()

    outcome = _guarded(max(60.0, spec.deadline_s), run)  # imports may take longer than any call
    found.failed = outcome.failed
    return found


located_object = functools.cache(load)


def _guarded(deadline_s: float, run: Any) -> Outcome:
    try:
        with _limited(deadline_s):
            found: Outcome = run()
            return found
    except DeadlineAlarm as error:
        return Outcome(failed=f"not over after {deadline_s:g} s{_place(error)}", is_late=True)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is the rollout's end, and counted
        return Outcome(failed=f"{type(error).__name__}: {error}{_place(error)}")


@contextlib.contextmanager
def _limited(deadline_s: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, deadline_s, 0.1)  # again, where a "finally" or a bare "except" went on
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _place(error: BaseException) -> str:
    """Where in the user's files ``error`` was raised, as " (file:line)"; "" where it was in none of them."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _begin(spec: EnvironmentSpec, row: dict[str, Any], seed: int) -> tuple[Any, Outcome]:
    _seed(f"{seed}")
    if spec.environment is None:
        return None, Outcome()
    enter(spec.home)
    if spec.is_of_verifiers:
        conversation = verifiers_form.Conversation(_made_by(spec), spec.calls)
        return conversation, Outcome(messages=_messages(conversation.reset(row), "reset"))
    environment = _made_by(spec)(**spec.arguments)
    if has_methods(environment):
        environment = MethodTools(environment)
        return environment, Outcome(added=environment.reset(row))
    takes_seed = "seed" in inspect.signature(environment.reset).parameters
    said = environment.reset(row, seed=seed) if takes_seed else environment.reset(row)
    return environment, Outcome(messages=() if said is None else _messages(said, "reset"))


def _made_by(spec: EnvironmentSpec) -> Any:
    """What makes the environment of a rollout: the user's class; of verifiers the environment that rollouts share."""
    assert spec.environment is not None
    if spec.is_of_verifiers:
        return verifiers_form.loaded(spec.environment, spec.arguments, spec.max_turns)
    return located_object(spec.environment)


def _answer(spec: EnvironmentSpec, state: _Open, text: str, seed: int, *, is_last: bool) -> Outcome:
    _seed(f"{seed}:{state.num_steps}")
    state.num_steps += 1
    enter(spec.home)
    tools = {tool.rpartition(":")[2]: located_object(tool) for tool in spec.tools}
    by_methods = isinstance(state.environment, MethodTools)
    if by_methods:
        tools |= state.environment.tools
    if tools and (results := called(spec.calls, text, tools)) and not (by_methods and is_last):
        return Outcome(messages=tuple(results))
    if state.environment is None:
        return Outcome(done=Done())
    said = state.environment.step(text)
    if isinstance(said, Done):
        return Outcome(done=Done(_reward(said.reward)))
    return Outcome(messages=_messages(said, "step"))


def _reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if isinstance(reward, str) or not math.isfinite(float(reward)):
        raise ValueError(f"the reward in Done must be a finite number or None, got {reward!r}")
    return float(reward)


def _messages(said: Any, function: str) -> tuple[Message, ...]:
    """What ``reset`` or ``step`` returned, as messages. Raises TypeError or ValueError for anything else."""
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    what = 'messages such as [{"role": "user", "content": "..."}] or a text' + (
        " or Done" if function == "step" else ""
    )
    if not isinstance(said, (list, tuple)) or not all(isinstance(m, dict) for m in said):
        raise TypeError(f"{function} must return {what}, got {said!r:.200}")
    for m in said:
        if not (isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise TypeError(f"{function} must return {what}, got the message {m!r:.200}")
        if function == "step" and m["role"] == "assistant":
            raise ValueError("step must not return a message of the assistant, which is the model's")
    if not said or not any(m["content"].strip() for m in said):
        raise ValueError(f"{function} must return {what}, got nothing to say")
    return tuple(said)


def _seed(seed: str) -> None:
    """Global random numbers become a function of the prompt and the number of the turn."""
    rng = random.Random(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(rng.getrandbits(32))
