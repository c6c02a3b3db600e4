"""Opens what ``path`` of a [data.NAME] names: one file, a folder of files, or a dataset of the hub."""

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from isomorph.curriculum.rows import arrow
from isomorph.curriculum.rows.lines import LineRows
from isomorph.curriculum.rows.spec import HUB, RowsData
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError

OF_JSON = (".jsonl", ".json", ".ndjson")
OF_ARROW = (".parquet", ".csv", ".tsv", ".arrow")
HELD_OUT = ("test", "validation", "valid", "eval", "dev")  # how files of rows that are not for training are called
NUM_NAMED = 8


class Rows(Protocol):
    """Rows with named columns, read one at a time."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]: ...

    def each(self, columns: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]: ...

    def place(self, index: int) -> str: ...

    def number(self, index: int) -> int: ...


def training_rows(data: RowsData) -> Rows:
    """The rows of ``path``. Raises UserError and DataError."""
    if data.path is None:
        return _of_environment(data, data.split)
    return _open(data.path, data.split, data.subset)


def evaluation_rows(data: RowsData) -> Rows:
    """The rows of ``eval_path`` and ``eval_split``. Raises UserError and DataError."""
    path = data.eval_path or data.path
    if path is None:
        return _of_environment(data, data.eval_split)
    return _open(path, data.eval_split, data.subset if path.startswith(HUB) else None)


def files_of(path: str, split: str | None) -> list[Path]:
    """The files that ``path`` stands for, sorted; [] for a hub dataset. Raises UserError where there is none."""
    if path.startswith(HUB):
        return []
    place = Path(path)
    if place.is_dir():
        return _files_in(place, split)
    if not place.exists():
        raise UserError(f"{path}: there is no such file or folder; paths are relative to the recipe's folder")
    if split is not None:
        raise UserError(f"{path}: a file has no splits: remove split = {split!r}, or name a folder or a hub dataset")
    if place.suffix not in (*OF_JSON, *OF_ARROW):
        known = ", ".join((*OF_JSON, *OF_ARROW))
        raise UserError(f"{path}: must be a file that ends in {known}, a folder of such files, or hub:NAME")
    return [place]


class _Parts:
    """The rows of several files, one after the other; all have the columns of the first."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts, self._starts = parts, [0, *itertools.accumulate(map(len, parts))]
        self.columns = parts[0].columns

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> tuple[Rows, int]:
        k = bisect.bisect_right(self._starts, index) - 1
        return self._parts[k], index - self._starts[k]

    def row(self, index: int) -> dict[str, Any]:
        part, inside = self._at(index)
        return part.row(inside)

    def each(self, columns: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        for part in self._parts:
            if missing := [name for name in columns if name not in part.columns]:
                raise DataError(f"{part.place(0)}: must have the column {missing[0]}, has {', '.join(part.columns)}")
            yield from part.each(columns)

    def place(self, index: int) -> str:
        part, inside = self._at(index)
        return part.place(inside)

    def number(self, index: int) -> int:
        return index + 1


def _of_environment(data: RowsData, split: str | None) -> Rows:
    from isomorph.curriculum.environments.verifiers_rows import read_rows  # pebble, where it is needed

    assert data.environment is not None
    return read_rows(data.environment, data.environment_arguments, split)


def _open(path: str, split: str | None, subset: str | None) -> Rows:
    if path.startswith(HUB):
        from isomorph.curriculum.rows.hub import read_hub

        return read_hub(path.removeprefix(HUB), subset, split)
    parts = [LineRows(file) if file.suffix in OF_JSON else arrow.read_file(file) for file in files_of(path, split)]
    return parts[0] if len(parts) == 1 else _Parts(parts)


def _files_in(folder: Path, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():  # written by save_to_disk of datasets, a folder for each split
        splits = sorted(inner.name for inner in folder.iterdir() if inner.is_dir())
        if split not in splits:
            raise UserError(f"{folder}: split must be one of {', '.join(splits)}, got {split!r}")
        return _files_in(folder / split, None)
    if saved := _files_saved_in(folder):
        return saved
    known = sorted(file for file in folder.rglob("*") if file.suffix in (*OF_JSON, *OF_ARROW) and file.is_file())
    found = [file for file in known if split is None or _is_of(file, folder, split)]
    listed = ", ".join(str(file.relative_to(folder)) for file in known[:NUM_NAMED]) or "nothing else"
    if not found:
        what = f"of the split {split!r}" if split else f"that ends in {', '.join((*OF_JSON, *OF_ARROW))}"
        raise UserError(f"{folder}: must hold a file {what}; it holds {listed}")
    mixed = split is None and {any(_is_of(file, folder, name) for name in HELD_OUT) for file in found}
    if mixed == {True, False}:
        raise UserError(f'{folder}: name a split, for example split = "train"; it holds {listed}')
    return found


def _files_saved_in(folder: Path) -> list[Path]:
    """The files of a dataset that ``datasets`` saved there; [] where it saved none."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # no such file, or one of something else
        return []
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{folder}/state.json: the files of a dataset must lie in its folder, got {outside[0]!r}")
    return [folder / name for name in names]


def _is_of(file: Path, folder: Path, split: str) -> bool:
    """Whether a file is of a split by the name of a folder above it, or by how its own name begins."""
    inside = file.relative_to(folder)
    own = file.stem
    return split in inside.parts[:-1] or own == split or own.startswith((f"{split}-", f"{split}_", f"{split}."))
