"""A response's stated answer, from ``<answer>...</answer>`` or ``\\boxed{...}``, and the accepted answer as text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ANSWER_TAGS = _OPEN, _CLOSE = "<answer>", "</answer>"
_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response and what is known of its prompt, as a reward function gets it.

    Example: ``def right(answer: Answer) -> float: return float(answer.text.endswith(answer.gold))``
    """

    prompt: str  # the question, without system prompt and chat template
    text: str  # the whole response
    gold: str  # the accepted answer: ``answer`` of the [data.NAME] table
    row: Mapping[str, Any] = field(default_factory=dict)  # all columns of the row
    finish: Literal["stop", "length"] = "stop"  # "length": cut off at the length limit
    num_tok: int = 0  # tokens of the response, its stop token included


class AnswerUnreadable(ValueError):
    """An accepted answer that its family's reward function cannot read."""


def answer_text(answer: str | float) -> str:
    """An accepted answer as stripped text. Raises ValueError where it is neither text nor a number."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"an accepted answer must be text or a number, got {type(answer).__name__}")
    return str(answer).strip()


def check_not_empty(answer: str) -> None:
    """Raises ValueError for an empty accepted answer."""
    if not answer:
        raise ValueError("an accepted answer must not be empty")


def stated_answer(response: str, *, reads_boxed: bool) -> str | None:
    """The stripped content of the last ``<answer>...</answer>``; None without one. Linear time.

    ``reads_boxed``: without these tags, that of the last ``\\boxed{...}``.
    """
    stated = last_answer(response)
    return last_boxed(response) if stated is None and reads_boxed else stated


def last_answer(response: str) -> str | None:
    """The content of the last ``<answer>...</answer>``, stripped; None where there is none. Linear time."""
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, max(end, 0))
    if start < 0:
        return None
    return response[start + len(_OPEN) : response.index(_CLOSE, start)].strip()


def last_boxed(response: str) -> str | None:
    """The content of the ``\\boxed{...}`` that begins last, stripped; None where there is none. Linear time.

    Braces inside are balanced, ``\\{`` and ``\\}`` are no braces, and a box without a closing brace does not count.
    """
    box_starts: list[int] = []  # where the content of each open brace begins; -1 for braces that are no box
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(response):
        if token.group().endswith("{") and token.group() != r"\{":
            box_starts.append(token.end() if token.group().startswith("\\") else -1)
        elif token.group() == "}" and box_starts:
            start = box_starts.pop()
            if start >= 0 and (last is None or start > last[0]):
                last = start, token.start()
    return None if last is None else response[slice(*last)].strip()
