"""Environments of the package verifiers, driven from turn to turn; runs in a worker.

The package runs a rollout from its first message to its end, and asks a client of OpenAI's form for each turn of the
model. Here that client waits: for the text that the sampler drew. So everything between the turns, its stop conditions
and its rubric are the package's own code, on the messages that the package would have sent to a server.
"""

import asyncio
import copy
import functools
import importlib
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from isomorph.curriculum.environments.calls import CallFormat, split_calls, words_as_arguments
from isomorph.curriculum.environments.done import Done, Message
from isomorph.curriculum.environments.spec import VERIFIERS, VERIFIERS_VERSION
from isomorph.curriculum.rewards.user_code import load

SPLITS = ("train", "eval")  # of an environment's own rows


def loaded(place: str, arguments: dict[str, Any], max_turns: int | None = None) -> Any:
    """The package's environment at ``place``, with at most ``max_turns`` turns of the model; one object a process.

    ``place``: "verifiers:NAME", an installed environment, or "verifiers:/folder/file.py" with ``load_environment``.
    Raises ImportError without the package, TypeError or ValueError for an environment that cannot be driven from here.
    """
    return _loaded(place, json.dumps(arguments, sort_keys=True), max_turns)


@functools.cache
def _loaded(place: str, arguments: str, max_turns: int | None) -> Any:
    vf = _package()
    name = place.removeprefix(VERIFIERS)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # an environment takes both signals for itself
        if name.endswith(".py"):
            environment = load(f"{name}:load_environment")(**json.loads(arguments))
        else:
            environment = vf.load_environment(name, **json.loads(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not isinstance(environment, vf.Environment):
        raise TypeError(f"load_environment must return an environment of verifiers, got {type(environment).__name__}")
    for one in (environment, *getattr(environment, "envs", ())):
        _refuse(one)
        own = getattr(one, "max_turns", -1)
        if max_turns is not None:
            one.max_turns = min(own, max_turns) if own > 0 else max_turns
    return environment


def _package() -> Any:
    try:
        found = metadata.version("verifiers")
        if found != VERIFIERS_VERSION:
            raise ImportError(f"verifiers {VERIFIERS_VERSION} is needed, there is {found}")
        return importlib.import_module("verifiers")
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'isomorph[verifiers]'") from error


def _refuse(environment: Any) -> None:
    if environment.message_type != "chat":
        raise ValueError(f'message_type must be "chat", got {environment.message_type!r}')
    rubrics = getattr(environment.rubric, "rubrics", [environment.rubric])
    of_groups = [name for rubric in rubrics for name in rubric._get_group_reward_func_names()]
    if of_groups:
        raise ValueError(f"reward functions of a whole group are not supported: {', '.join(of_groups)}")


def tools_of(environment: Any) -> list[dict[str, Any]]:
    """The JSON schemas of the tools that the model is told of."""
    return list(environment.oai_tools or ())


def is_single_turn(environment: Any) -> bool:
    """Whether a rollout has one turn of the model, after which nothing is said."""
    return isinstance(environment, _package().SingleTurnEnv)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop of all conversations of this process: what environments share, such as connections, belongs to it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    messages: list[Message]  # all messages so far
    tools: list[dict[str, Any]]
    reply: asyncio.Future[Any]


class _Client:
    """The part of OpenAI's client that the package uses: ``chat.completions.create``."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[_Request] = asyncio.Queue()
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    async def _create(
        self, *, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), **options: Any
    ) -> Any:
        reply = asyncio.get_running_loop().create_future()
        self.requests.put_nowait(_Request(copy.deepcopy(list(messages)), list(tools), reply))
        return await reply


class Conversation:
    """One rollout of an environment of the package, with ``reset`` and ``step``."""

    def __init__(self, environment: Any, format: CallFormat) -> None:
        self.environment, self.format = environment, format
        self.client = _Client()
        self.tools = tools_of(environment)
        self.names = {schema["function"]["name"]: schema["function"]["parameters"] for schema in self.tools}
        self._request: _Request | None = None
        self._rollout: asyncio.Task[Any] | None = None
        self._calls: dict[str, str] = {}  # of the present turn: the tool that each call names

    def reset(self, row: dict[str, Any]) -> list[Message]:
        """Begins; returns the messages of the prompt. Raises what the environment raises."""
        if not isinstance(row.get("prompt"), list):
            raise ValueError(f"a row of an environment of verifiers has messages in prompt, got {', '.join(row)}")
        rollout = self.environment.rollout(row, self.client, "policy", {})
        self._rollout = _loop().create_task(rollout)
        self._request = self._next()
        if self._request is None:
            self._ended()
            raise ValueError("the rollout is over before the model's first turn")
        if self._request.tools != self.tools:
            raise ValueError("the tools of all rows must be those of the environment, this row has others")
        return [_without_none(message) for message in self._request.messages]

    def step(self, text: str) -> list[Message] | Done:
        """What follows the model's turn ``text``: messages, or the end with the rubric's reward."""
        assert self._request is not None
        before, num = self._request.messages, len(self._request.messages)
        self._request.reply.set_result(self._completion(text))
        self._request = self._next()
        if self._request is None:
            return Done(self._scored())
        messages = self._request.messages
        if messages[:num] != before or len(messages) <= num or messages[num].get("role") != "assistant":
            raise ValueError("the environment rewrites earlier messages: it can only go on after the model's turn")
        return [self._as_ours(message) for message in messages[num + 1 :]]

    def close(self) -> None:
        """Cancels the rollout; the environment cleans up."""
        if self._rollout is not None and not self._rollout.done():
            self._rollout.cancel()
            _loop().run_until_complete(asyncio.wait([self._rollout]))

    def _next(self) -> _Request | None:
        """Lets the rollout go on until it asks for a turn; None: it is over."""

        async def wait() -> _Request | None:
            assert self._rollout is not None
            asked = asyncio.ensure_future(self.client.requests.get())
            await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            asked.cancel()
            return None

        return _loop().run_until_complete(wait())

    def _completion(self, text: str) -> Any:
        """``text`` as a server answers: calls apart from the text before them."""
        from openai.types.chat import ChatCompletion

        content, found = split_calls(self.format, text) if self.tools else (text, [])
        self._calls = {f"call_{i}": name for i, (name, _) in enumerate(found)}
        functions = [{"name": name, "arguments": self._json(name, arguments)} for name, arguments in found]
        calls = [{"id": f"call_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
        message = {"role": "assistant", "content": content, "tool_calls": calls or None}
        choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}
        head = {"id": "turn", "object": "chat.completion", "created": 0, "model": "policy"}
        return ChatCompletion.model_validate({**head, "choices": [choice]})

    def _json(self, name: str, arguments: Any) -> str:
        """Arguments as a call has them; what cannot be read stays as it is, and the environment says so."""
        if isinstance(arguments, list):
            arguments = words_as_arguments(self.names.get(name, {}), arguments)
        return arguments if isinstance(arguments, str) else json.dumps(arguments)

    def _as_ours(self, message: Message) -> Message:
        if message.get("role") != "tool":
            return _without_none(message)
        name = self._calls.get(message.get("tool_call_id", ""), "")
        return {"role": "tool", "name": name, "content": message.get("content")}

    def _ended(self) -> Any:
        """The state of the rollout that is over. Raises what ended it, but for what the model did wrong."""
        assert self._rollout is not None
        state = self._rollout.result()
        error = state.get("error")
        if error is not None and not isinstance(error, _package().ModelError):
            raise error.__cause__ or error
        return state

    def _scored(self) -> float | None:
        state = self._ended()
        if not self.environment.score_rollouts:
            return None
        _loop().run_until_complete(self.environment.rubric.score_rollout(state))
        return float(state["reward"])


def _without_none(message: Message) -> Message:
    """A row's messages have every key that one of them has."""
    return {key: value for key, value in message.items() if value is not None}
