"""A row as a task: prompt or chat, accepted answer, label and demonstration."""

from collections.abc import Sequence
from typing import Any

from isomorph.curriculum.rows.spec import ROWS, RowsData
from isomorph.curriculum.rows.template import Source, as_text
from isomorph.curriculum.tasks.task import DataError, Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import content_text

Message = dict[str, Any]


class Renderer:
    """Turns rows with these columns into tasks of the [data.NAME] ``data``.

    ``shown`` are the messages before every question: the system prompt and the examples.
    """

    def __init__(self, data: RowsData, columns: Sequence[str], name: str, note: str = "") -> None:
        """``note``: which rows they are, for messages.

        Raises UserError for a column that is not there, or a template that cannot be read.
        """

        def source(key: str) -> Source | None:
            text = getattr(data, key)
            return None if text is None else Source(text, columns, f"data.{name}.{key}{note}")

        self._data, self._name = data, name
        prompt = source("prompt")
        assert prompt is not None
        self._prompt = prompt
        self._answer, self._demonstration = source("answer"), source("demonstration")
        self._label = source("representation_column")
        used = (self._prompt, self._answer, self._demonstration, self._label)
        self.tops = tuple(dict.fromkeys(top for one in used if one is not None for top in one.tops))
        self.shown: tuple[Message, ...] = () if data.system is None else ({"role": "system", "content": data.system},)

    def show(self, examples: Sequence[Task]) -> None:
        """Shows ``examples`` before every question from now on, each with its answer."""
        for example in examples:
            own = example.messages or ({"role": "user", "content": example.question},)
            turns = [turn for turn in own if turn["role"] != "system"]
            answer = example.answer if example.demonstration is None else example.demonstration
            self.shown += (*turns, {"role": "assistant", "content": answer})

    def task(self, row: dict[str, Any], key: str, place: str, *, is_bare: bool = False) -> Task:
        """The task of ``row``, which stands at ``place``. ``is_bare``: without the messages that are shown before it.

        Raises DataError.
        """
        question, messages = self.prompt(row)
        if self.shown and not is_bare:
            own = messages or ({"role": "user", "content": question},)
            messages = (*self.shown, *own)
        return Task(
            family=ROWS,
            representation=self.label(row),
            question=question,
            answer=self.answer(row),
            key=key,
            demonstration=self.demonstration(row),
            data=self._name,
            row=row,
            messages=messages,
            place=place,
        )

    def prompt(self, row: dict[str, Any]) -> tuple[str, tuple[Message, ...] | None]:
        """The question, and the row's own chat where it has one."""
        value = self._prompt.value(row)
        if not isinstance(value, list):
            question = self._prompt.text(row)
            if not question.strip():
                raise DataError(f"{self._prompt.name} must be a question, is empty")
            return question, None
        messages = [{k: v for k, v in turn.items() if v is not None} for turn in self._turns(value, self._prompt.name)]
        if self._holds_response(messages):
            messages.pop()
        if not messages or messages[-1]["role"] == "assistant":
            last = messages[-1]["role"] if messages else "nothing"
            raise DataError(f"{self._prompt.name} must end with the user's message, ends with {last}")
        if self._data.system is not None and messages[0]["role"] == "system":
            raise DataError(f"{self._prompt.name} has a system message of its own: remove system from the recipe")
        return content_text(messages[-1].get("content")), tuple(messages)

    def answer(self, row: dict[str, Any]) -> str:
        """The accepted answer; "" where the recipe names none."""
        return "" if self._answer is None else self._answer.text(row)

    def scan(self, row: dict[str, Any]) -> tuple[int, str]:
        """A hash that is equal for equal prompts, in this process, and the label. Raises DataError for a broken row."""
        value = self._prompt.value(row)
        if isinstance(value, str) and not value.isspace() and value:
            key = hash(value)
        else:
            question, messages = self.prompt(row)
            turns = (
                ()
                if messages is None
                else tuple((turn["role"], as_text(turn.get("content") or "")) for turn in messages)
            )
            key = hash(turns or question)
        if self._answer is not None:
            self._answer.text(row)
        self.demonstrations(row)
        return key, self.label(row)

    def label(self, row: dict[str, Any]) -> str:
        return self._data.representation if self._label is None else self._label.text(row)

    def demonstration(self, row: dict[str, Any]) -> str | None:
        """The first of ``demonstrations``; None where the row has none."""
        return next(iter(self.demonstrations(row)), None)

    def demonstrations(self, row: dict[str, Any]) -> tuple[str, ...]:
        """The worked responses. Of messages it is what the assistant says last; a list of either is several."""
        if self._demonstration is None:
            return ()
        value = self._demonstration.value(row)
        is_several = isinstance(value, list) and all(isinstance(item, (str, list)) for item in value)
        given = value if is_several else [] if value is None else [value]
        return tuple(self._demonstrated(item) for item in given)

    def _demonstrated(self, value: Any) -> str:
        assert self._demonstration is not None
        if not isinstance(value, list):
            return as_text(value)
        turns = self._turns(value, self._demonstration.name)
        if not turns or turns[-1]["role"] != "assistant":
            raise DataError(f"{self._demonstration.name} must end with the assistant's message")
        return content_text(turns[-1]["content"])

    def _holds_response(self, messages: Sequence[Message]) -> bool:
        """Whether prompt and demonstration are one column: a chat that ends with the response."""
        one = self._demonstration is not None and self._demonstration.name == self._prompt.name
        return one and bool(messages) and messages[-1]["role"] == "assistant"

    def _turns(self, value: list[Any], name: str) -> list[Message]:
        for turn in value:
            if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn):
                raise DataError(f"{name} must be messages with role and content, has {str(turn)[:80]!r}")
            content = turn["content"]
            parts = content if isinstance(content, list) else [] if content is None else [{"text": content}]
            if not all(isinstance(part, dict) and isinstance(part.get("text", 0), str | None) for part in parts):
                raise DataError(f"{name} must be messages of text, has {str(content)[:80]!r}")
        return value


def refuse_unknown_label(wanted: str, known: Sequence[str], name: str, purpose: str) -> None:
    """Raises UserError where ``wanted`` is none of the labels that [data.NAME] has for this purpose."""
    if wanted not in known:
        raise UserError(f"data {name!r} has no row for {purpose} of representation {wanted!r}, only {', '.join(known)}")
