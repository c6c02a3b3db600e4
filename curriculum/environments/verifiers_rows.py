"""The rows of an environment of the package verifiers: its own datasets, made in a process of their own.

The trainer's process imports neither the package nor the environment, which take signals and install exit hooks.
"""

import functools
import json
import tempfile
from concurrent.futures import TimeoutError as DeadlineExceeded
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from isomorph.curriculum.environments.verifiers_form import SPLITS, loaded
from isomorph.curriculum.rewards.code_pool import MIN_WORKER_BYTES
from isomorph.curriculum.rewards.spawn import CleanSpawnContext
from isomorph.curriculum.rewards.worker import prepare
from isomorph.curriculum.rows.arrow import ArrowRows, read_file
from isomorph.engine.config import UserError

START_S = 600.0  # for a worker to import the environment and to make or download its rows


def read_rows(place: str, arguments: dict[str, Any], split: str | None) -> ArrowRows:
    """The rows of the environment at ``place``, memory-mapped; ``split``: "train" or "eval", None: "train".

    Raises UserError where the environment cannot be loaded, or has no such rows.
    """
    wanted = split or SPLITS[0]
    if wanted not in SPLITS:
        raise UserError(f"{place}: split must be one of {', '.join(SPLITS)}, got {wanted!r}")
    found = _rows(place, json.dumps(arguments, sort_keys=True))
    if wanted not in found:
        raise UserError(f"{place}: has no rows of the split {wanted!r}, only of {', '.join(found) or 'none'}")
    return found[wanted]


@functools.cache  # a run reads them for the model's words, and to draw them
def _rows(place: str, arguments: str) -> dict[str, ArrowRows]:
    with tempfile.TemporaryDirectory(prefix="isomorph-rows-") as folder:
        pool = ProcessPool(
            max_workers=1,
            initializer=prepare,
            initargs=((), None, MIN_WORKER_BYTES, START_S),
            context=CleanSpawnContext(),
        )
        try:
            failed = pool.schedule(_write_rows, args=(place, arguments, folder), timeout=START_S).result()
        except DeadlineExceeded:
            failed = f"loading it was not over after {START_S:g} s"
        except ProcessExpired as error:
            failed = f"its process ended: {error}"
        finally:
            pool.stop()
            pool.join()
        if failed:
            raise UserError(f"{place}: cannot be used: {failed}")
        files = {split: Path(folder) / f"{split}.arrow" for split in SPLITS}
        # a mapped file stays readable when its folder is gone
        return {split: _named(read_file(file), f"{place} ({split})") for split, file in files.items() if file.is_file()}


def _named(rows: ArrowRows, name: str) -> ArrowRows:
    rows.path = name
    return rows


def _write_rows(place: str, arguments: str, folder: str) -> str:
    """In the worker: writes an Arrow file for each split that the environment has; returns what went wrong."""
    import pyarrow

    try:
        environment = loaded(place, json.loads(arguments))
        made = {"train": environment.build_dataset(), "eval": environment.build_eval_dataset()}
        for split, rows in made.items():
            if rows is None:
                continue
            table = rows.with_format("arrow")[:]  # as selected and shuffled
            file = f"{folder}/{split}.arrow"
            with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
                out.write_table(table)
    except (Exception, SystemExit) as error:  # whatever the environment raises
        return f"{type(error).__name__}: {error}"
    return ""
