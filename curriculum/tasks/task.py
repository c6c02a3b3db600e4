"""``Task``: one question with its verifiable answer, as plain data.

A task travels as the payload of a prompt, and into checkpoints and completion files as JSON.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

Split = Literal["train", "dev", "test", "eval"]  # "eval" is another name of "dev"
FULL_MARKS = 1.0  # the reward of a right answer, in every family


class DataError(ValueError):
    """The user's data cannot be used; the message says what must hold, what was found and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A question with the accepted answer that a response's stated answer is compared with.

    Example: ``Task(family="async_plan", representation="graph", question="graph = {1: [2], 2: []} ...",
    answer="12 min", key="9f0c...")``
    """

    family: str  # of rewards.families.FAMILIES, or "rows": the rewards of its [data.NAME] table
    representation: str  # "natural" | "graph" | "code" | a held-out form; of rows a label
    question: str  # the whole user prompt, or what the last of ``messages`` says
    answer: str
    reward: str = "strict"  # "strict" | "paper": which of the family's functions
    key: str  # identity of the underlying procedure: the same in all of its representations
    demonstration: str | None = None  # a worked response, ends in <answer>..</answer>
    sequential_answer: str | None = None  # what doing one step after the other would give
    difficulty: dict[str, Any] = field(default_factory=dict)
    data: str = ""  # NAME of its [data.NAME]
    row: dict[str, Any] = field(default_factory=dict)  # all columns of its row, JSON-able; of generated tasks the facts
    messages: tuple[dict[str, Any], ...] | None = None  # a chat up to the user's turn; None: ``question`` is that turn
    place: str = ""  # where its row stands, for messages: "rows.jsonl, line 41"; "" for generated tasks

    def is_correct(self, reward: float) -> bool:
        """Whether ``reward`` is that of a right answer: FULL_MARKS, not a part of it."""
        return reward >= FULL_MARKS

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The task that ``to_json`` wrote.

        Raises:
            DataError: the text is not JSON, or its keys or their types are not a task's.
        """
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"a task must be one JSON object, got {text[:80]!r}: {error}") from error
        _check_record(record)
        messages = record.pop("messages")
        return cls(**record, messages=None if messages is None else tuple(messages))


_OPTIONAL = ("demonstration", "sequential_answer", "messages")
_KINDS = {"difficulty": dict, "row": dict, "messages": list}  # the others are text


def _check_record(record: Any) -> None:
    if not isinstance(record, dict):
        raise DataError(f"a task must be one JSON object, got {type(record).__name__}")
    names = {f.name for f in fields(Task)}
    if record.keys() != names:
        missing, unknown = sorted(names - record.keys()), sorted(record.keys() - names)
        raise DataError(f"a task has the keys {sorted(names)}; missing: {missing}, unknown: {unknown}")
    for name, value in record.items():
        expected = _KINDS.get(name, str)
        if not isinstance(value, expected) and not (value is None and name in _OPTIONAL):
            raise DataError(f"a task's {name} must be {expected.__name__}, got {type(value).__name__}")
