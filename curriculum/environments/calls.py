"""Tool calls in the model's text: found, made, and answered with messages of role "tool".

    json     OPENING {"name": "look", "arguments": {"key": 3}} CLOSING      as the chat template writes calls
    plain    <call> look 3 </call>          without a chat template: the tool's name, then its arguments in their order

Everything that is wrong with a call is told to the model as the tool's result, ``error: ...``, and so is what a tool
raises: a call that fails is a move of the model's.
"""

import contextlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isomorph.curriculum.environments.done import Message

PLAIN_CALL = re.compile(r"<call>\s*(.*?)\s*</call>", re.DOTALL)
MOST_CALLS = 16  # of one turn; what follows is not run
_BETWEEN_CALLS = " \t\r\n,;]"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How the model writes a call. ``opening`` is "" where it begins with the JSON object at once."""

    is_json: bool = False
    opening: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"


Tools = Mapping[str, Callable[..., Any]]


def called(format: CallFormat, text: str, tools: Tools) -> list[Message]:
    """Makes the calls in ``text`` in their order; a message with the result for each, [] where there is none."""
    calls = _json_calls(format, text) if format.is_json else _plain_calls(text)
    results: list[Message] = []
    for name, arguments in calls:
        if len(results) == MOST_CALLS:
            break
        results.append({"role": "tool", "name": name, "content": _result(tools, name, arguments)})
    return results


def split_calls(format: CallFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """The text before the first call, and all calls: (name, arguments), or ("", what is wrong with the call).

    Arguments: a dict; in the plain form a list of words. Without a call the text is all of ``text``.
    """
    calls = list(itertools.islice(_json_calls(format, text) if format.is_json else _plain_calls(text), MOST_CALLS))
    if not calls:
        return text, []
    first = PLAIN_CALL.search(text)
    start = text.find(format.opening) if format.is_json else first.start() if first else 0
    return text[:start].strip(), calls


def words_as_arguments(parameters: Mapping[str, Any], words: list[str]) -> dict[str, Any] | str:
    """Words as the arguments of a tool with the JSON schema ``parameters``, in their order; what is wrong with them."""
    kinds = {"integer": int, "number": float}
    known: Mapping[str, Any] = parameters.get("properties", {})
    if len(words) > len(known):
        return f"at most {len(known)} arguments, got {len(words)}"
    given = zip(known.items(), words, strict=False)
    try:
        return {name: kinds.get(schema.get("type"), str)(word) for (name, schema), word in given}
    except ValueError as error:
        return str(error)


def _result(tools: Tools, name: str, arguments: Any) -> str:
    if name not in tools:
        return f"error: {arguments}" if not name else f"error: there is no tool {name}, there is {', '.join(tools)}"
    try:
        found = (
            tools[name](**arguments) if isinstance(arguments, dict) else tools[name](*_typed(tools[name], arguments))
        )
    except Exception as error:  # the model's arguments, or what it asked for
        return f"error: {type(error).__name__}: {error}"
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)


def _plain_calls(text: str) -> Iterator[tuple[str, Any]]:
    for match in PLAIN_CALL.finditer(text):
        name, *arguments = match[1].split() or [""]
        yield name, arguments if name else "an empty call"


def _typed(tool: Callable[..., Any], words: list[str]) -> list[Any]:
    """Words as the types that the tool's arguments have."""
    parameters = list(inspect.signature(tool, eval_str=True).parameters.values())
    types = [p.annotation for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    typed = [kind(word) if kind in (int, float) else word for kind, word in zip(types, words, strict=False)]
    return typed + words[len(types) :]


def _json_calls(format: CallFormat, text: str) -> Iterator[tuple[str, Any]]:
    """(name, arguments), or ("", what is wrong)."""
    decoder = json.JSONDecoder()
    places = [m.end() for m in re.finditer(re.escape(format.opening), text)] if format.opening else [0]
    for place in places:
        while True:
            while place < len(text) and text[place] in _BETWEEN_CALLS + "[":
                place += 1
            if not text.startswith("{", place):
                break
            try:
                call, place = decoder.raw_decode(text, place)
            except (json.JSONDecodeError, RecursionError) as error:
                if format.opening:  # else the text is no call, but an answer that begins with a brace
                    yield "", f"a call must be a JSON object: {error}"
                break
            yield _name_and_arguments(format, call)


def _name_and_arguments(format: CallFormat, call: dict[str, Any]) -> tuple[str, Any]:
    name, arguments = call.get(format.name_key), call.get(format.arguments_key, {})
    if isinstance(arguments, str):
        with contextlib.suppress(json.JSONDecodeError):
            arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        return "", f"a call has a {format.name_key} and an object {format.arguments_key}, got {json.dumps(call)[:200]}"
    return name, arguments
