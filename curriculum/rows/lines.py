"""Rows of JSON: the bytes of a file and where its lines begin. A row becomes Python objects only when it is read.

JSON Lines are not turned into an Arrow table: Arrow gives each column one type, so that it refuses a column of numbers
and texts, adds the keys that other rows have, and reads a text such as "2020-01-01" as a time. The file's bytes take
less memory than a table and give each row as it was written.
"""

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.curriculum.tasks.task import DataError

BLOCK = 1 << 25  # bytes searched for line ends at a time
MAPPED_FROM = 1 << 28  # bytes; a larger file is mapped, a smaller one read: a mapped file must not be cut short
NUM_FIRST = 100  # rows whose keys together are the columns
ROWS_AT_ONCE = 1 << 14
_BOM = b"\xef\xbb\xbf"
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # json joins whole pairs into one character


_decode = json.JSONDecoder().raw_decode  # json.loads without what it does around it


class LineRows:
    """The rows of JSON Lines, or of a JSON array of objects."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file cannot be read or holds no row."""
        self.path, self.noun = path, "line"
        self._bytes = _content(path)
        if path.suffix == ".json" and self._bytes[:1024].lstrip(_BOM + b" \t\r\n")[:1] == b"[":
            self._bytes, self.noun = _array_as_lines(path, self._bytes), "row"
        self._starts, self._stops = _lines(self._bytes)
        self._numbers = np.arange(1, len(self._starts) + 1, dtype=np.int32)
        short = np.flatnonzero(self._stops - self._starts < 16)
        blank = [i for i in short if not self._bytes[self._starts[i] : self._stops[i]].strip()]
        if blank:
            kept = np.ones(len(self._starts), bool)
            kept[blank] = False
            self._starts, self._stops, self._numbers = self._starts[kept], self._stops[kept], self._numbers[kept]
        if not len(self):
            raise DataError(f"{path}: must hold at least one row, is empty")
        found = (self.row(i) for i in range(min(len(self), NUM_FIRST)))
        self.columns = tuple(dict.fromkeys(name for row in found for name in row))

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> dict[str, Any]:
        """Row ``index``, from 0. Raises DataError for a broken one."""
        return self._parsed(self._bytes[self._starts[index] : self._stops[index]], index)

    def each(self, columns: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """All rows in order, whole; ``columns`` are those that will be read."""
        for at in range(0, len(self), ROWS_AT_ONCE):  # as Python's numbers, which index faster than numpy's
            ends = (array[at : at + ROWS_AT_ONCE].tolist() for array in (self._starts, self._stops))
            for index, (start, stop) in enumerate(zip(*ends, strict=True), at):
                yield self._parsed(self._bytes[start:stop], index)

    def _parsed(self, line: bytes, index: int) -> dict[str, Any]:
        try:
            text = line.decode()
            found, end = _decode(text) if text[0] == "{" else (json.loads(text), len(text))
            if end != len(text) and not text[end:].isspace():
                json.loads(text)  # raises, and says where
        except json.JSONDecodeError as error:
            where = f"{error.msg}, column {error.colno}"
            raise DataError(f"{self.place(index)}: must be a JSON object in UTF-8: {where}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.place(index)}: must be a JSON object in UTF-8: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f"{self.place(index)}: must be a JSON object, is {type(found).__name__}: {text[:80]!r}")
        if "\\u" in text and _ESCAPED.search(text) and _SURROGATE.search(json.dumps(found, ensure_ascii=False)):
            raise DataError(f"{self.place(index)}: holds half a surrogate pair, which is no Unicode text")
        return found

    def place(self, index: int) -> str:
        """Where row ``index`` stands, for messages."""
        return f"{self.path}, {self.noun} {self.number(index)}"

    def number(self, index: int) -> int:
        """The number of row ``index`` in its file, from 1."""
        return int(self._numbers[index])


def _content(path: Path) -> bytes | mmap.mmap:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size >= MAPPED_FROM else file.read()
    except OSError as error:
        raise DataError(f"{path}: must be a readable file: {error}") from error


def _lines(content: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of each line, [n] int64 each."""
    raw = np.frombuffer(content, np.uint8) if len(content) else np.empty(0, np.uint8)
    blocks = (raw[at : at + BLOCK] for at in range(0, len(raw), BLOCK))
    ends = [np.flatnonzero(block == ord("\n")) + k * BLOCK for k, block in enumerate(blocks)]
    stops = np.concatenate([*ends, [len(raw)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    if content[:3] == _BOM:
        starts[0] = 3
    return starts, stops


def _array_as_lines(path: Path, content: bytes | mmap.mmap) -> bytes:
    try:
        rows = json.loads(bytes(content).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be a JSON array of objects, or one object a line: {error}") from error
    return b"\n".join(json.dumps(row).encode() for row in rows)
