"""Rows of Parquet, CSV and Arrow files as an Arrow table. A row becomes Python objects only when it is read."""

import base64
import bisect
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of

ROWS_AT_ONCE = 1024
BLOCK, MOST_BLOCK = 1 << 20, 1 << 29  # bytes of a CSV file that are parsed at a time; a row must fit
SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PLAIN = (str, int, float, bool, type(None))


class ArrowRows:
    """The rows of an Arrow table, with values as JSON has them."""

    def __init__(self, table: Any, path: str | Path) -> None:
        """Raises DataError for a table without rows, or with two columns of one name."""
        self.path, self.columns = path, tuple(table.column_names)
        if twice := [name for name in self.columns if self.columns.count(name) > 1]:
            raise DataError(f"{path}: columns must have different names, two are called {twice[0]!r}")
        self._table = table
        self._batches = [batch for batch in table.to_batches() if len(batch)]
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + len(batch))
        if not len(self):
            raise DataError(f"{path}: must hold at least one row, is empty")

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """Row ``index``, from 0."""
        k = bisect.bisect_right(self._starts, index) - 1
        batch, inside = self._batches[k], index - self._starts[k]
        return {name: _plain(batch.column(j)[inside].as_py()) for j, name in enumerate(self.columns)}

    def each(self, columns: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """All rows in order; with ``columns`` these alone."""
        table = self._table.select(list(columns)) if columns else self._table
        for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
            for row in batch.to_pylist():
                yield {name: _plain(value) for name, value in row.items()}

    def place(self, index: int) -> str:
        """Where row ``index`` stands, for messages."""
        return f"{self.path}, row {index + 1}"

    def number(self, index: int) -> int:
        """The number of row ``index``, from 1."""
        return index + 1


def read_file(path: Path) -> ArrowRows:
    """The rows of a Parquet, CSV, TSV or Arrow file; columns of CSV and TSV are text.

    An Arrow file is memory-mapped. Raises DataError, or UserError where pyarrow is missing.
    """
    pyarrow = _pyarrow(path)
    try:
        if path.suffix == ".parquet":
            return ArrowRows(_parquet(path), path)
        if path.suffix in SEPARATORS:
            return ArrowRows(_csv(path, SEPARATORS[path.suffix]), path)
        return ArrowRows(_mapped(pyarrow, path), path)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: must be a readable {path.suffix} file: {cause_of(error)}") from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} files needs pyarrow: pip install 'isomorph[data]'") from None
    return pyarrow


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path, memory_map=True)


def _csv(path: Path, separator: str) -> Any:
    import pyarrow
    from pyarrow import csv as arrow_csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    # as text: 007 stays what it is
    text = arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False)
    parse = arrow_csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    block = BLOCK
    while True:
        read = arrow_csv.ReadOptions(block_size=block)
        try:
            return arrow_csv.read_csv(path, read_options=read, parse_options=parse, convert_options=text)
        except pyarrow.ArrowInvalid as error:
            if "straddling" not in str(error) or block >= MOST_BLOCK:
                raise
            block *= 8  # a row is longer than two blocks


def _mapped(pyarrow: Any, path: Path) -> Any:
    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_file(source).read_all()
    except pyarrow.ArrowInvalid:  # the stream format, which datasets writes
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: bytes in base64, dates and decimals as text."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
