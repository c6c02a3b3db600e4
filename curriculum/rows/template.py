"""Columns and templates over columns: how a recipe names what it takes from a row."""

import json
import re
import string
from collections.abc import Sequence
from typing import Any

from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError

_INDEX = re.compile("[0-9]{1,9}")  # of an item of a list


class Column:
    """A value of a row, by the name of its column or a dotted name of what lies inside one."""

    def __init__(self, name: str, columns: Sequence[str], where: str) -> None:
        """``where``: the key of the recipe, for the message. Raises UserError where there is no such column."""
        self.name = name
        self.keys = (name,) if name in columns else tuple(name.split("."))
        if self.keys[0] not in columns:
            raise UserError(f"{where}: there is no column {name!r}; the columns are {', '.join(columns)}")
        self.top = self.keys[0]

    def value(self, row: dict[str, Any]) -> Any:
        """The value in ``row``; None where it is null. Raises DataError where the row has none."""
        if (found := row.get(self.name)) is not None:
            return found
        found = row
        for key in self.keys:
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif (
                isinstance(found, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(found)
            ):
                found = found[int(key)]
            else:
                raise DataError(f"must have the column {self.name}, has {', '.join(row)}")
        return found


class Template:
    """A text with ``{column}`` in it."""

    def __init__(self, text: str, columns: Sequence[str], where: str) -> None:
        """Raises UserError for a template that cannot be read, or that names a column that is not there."""
        self.parts: list[str | Column] = []
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{where}: {error}; write {{{{ and }}}} for braces, got {text!r}") from error
        for before, name, spec, conversion in parsed:
            if before:
                self.parts.append(before)
            if name is None:
                continue
            if not name or spec or conversion:
                raise UserError(f"{where}: a column stands as {{name}}; write {{{{ and }}}} for braces, got {text!r}")
            self.parts.append(Column(name, columns, where))
        self.tops = tuple(part.top for part in self.parts if isinstance(part, Column))

    def value(self, row: dict[str, Any]) -> str:
        return "".join([part if isinstance(part, str) else _required_text(part, row) for part in self.parts])


class Source:
    """What a key of the recipe takes from a row: the value of a column, or a template's text."""

    def __init__(self, text: str, columns: Sequence[str], where: str) -> None:
        is_template = "{" in text or "}" in text
        self.reader: Column | Template = (Template if is_template else Column)(text, columns, where)
        self.tops = self.reader.tops if isinstance(self.reader, Template) else (self.reader.top,)
        self.name = text

    def value(self, row: dict[str, Any]) -> Any:
        return self.reader.value(row)

    def text(self, row: dict[str, Any]) -> str:
        """The value as text. Raises DataError where it is null."""
        if isinstance(self.reader, Template):
            return self.reader.value(row)
        return _required_text(self.reader, row)


def as_text(value: Any) -> str:
    """Text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _required_text(column: Column, row: dict[str, Any]) -> str:
    value = column.value(row)
    if value is None:
        raise DataError(f"column {column.name} must have a value, is null")
    return as_text(value)
