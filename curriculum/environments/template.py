"""In what form a chat template writes tool calls, found by rendering one."""

import json
from collections.abc import Mapping
from typing import Any

from isomorph.curriculum.environments.calls import CallFormat
from isomorph.engine.config import UserError
from isomorph.engine.foreign import foreign, shortened
from isomorph.engine.model.text import PROBE, TextCodec

NAME, KEY, VALUE = "probe_tool", "probe_argument", "a probe of a call"
SCHEMA = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A probe."}}},
    },
}


def call_format(text: TextCodec, template: str | None, arguments: Mapping[str, Any]) -> CallFormat:
    """How the model of this chat template writes calls; the plain form where there is no chat template.

    Raises UserError where the template does not describe tools, or writes calls in another form than JSON.
    """
    if not text.uses_chat_template and template is None:
        return CallFormat()
    user = {"role": "user", "content": PROBE}
    call = {"type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    options = {**arguments, "tools": [SCHEMA], "chat_template": template, "tokenize": False}
    with foreign("the chat template fails on tools"):
        asked = text.tokenizer.apply_chat_template([user], add_generation_prompt=True, **options)
    if NAME not in asked or KEY not in asked:
        raise UserError(
            "tools need a chat template that describes them to the model, and this one leaves them out: give one in "
            "chat_template, or use an environment without tools"
        )
    with foreign("the chat template fails on an assistant's turn with a tool call"):
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        rendered = text.tokenizer.apply_chat_template([user, turn], **options)
    own = rendered[len(_common_prefix(asked, rendered)) :]
    found = _call_in(own)
    if found is None:
        raise UserError(
            f"the chat template writes a tool call as '{shortened(own)}'; only calls that are a JSON object with a "
            "name and its arguments can be read"
        )
    start, call = found
    keys = {_kind(value): key for key, value in call.items()}
    return CallFormat(
        is_json=True,
        opening=text.decode(text.tokenizer(own[:start], add_special_tokens=False)["input_ids"]).strip().rstrip("[ \n"),
        name_key=keys["name"],
        arguments_key=keys["arguments"],
    )


def _call_in(rendered: str) -> tuple[int, dict[str, Any]] | None:
    """Where the JSON object of the probe's call begins, and that object."""
    decoder = json.JSONDecoder()
    for start in (i for i, letter in enumerate(rendered) if letter == "{"):
        try:
            call, _ = decoder.raw_decode(rendered, start)
        except json.JSONDecodeError:
            continue
        if {"name", "arguments"} <= {_kind(value) for value in call.values()}:
            return start, call
    return None


def _kind(value: Any) -> str:
    if value == NAME:
        return "name"
    return "arguments" if value in ({KEY: VALUE}, json.dumps({KEY: VALUE})) else ""


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
