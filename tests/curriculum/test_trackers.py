"""A run's rewards and evaluations, read back from what wandb (offline) and trackio (local) wrote."""

import importlib.util
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rewards_run import ALL, write
from tiny_runs import run, summary_of

from isomorph.engine.record.runlog import read_steps
from isomorph.engine.record.sinks import numbers

INSTALLED = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is not None]
Rows = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that both trackers got, as far as they are installed."""
    if not INSTALLED:
        pytest.skip("neither wandb nor trackio is installed: pip install 'isomorph[trackers]'")
    place = tmp_path_factory.mktemp("tracked")
    recipe = write(place, ALL)
    recipe.write_text(recipe.read_text().replace("max_new_tok = 4\n", "max_new_tok = 4\nevery = 2\n"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("TRACKIO_DIR", str(place / "trackio"))
        yield run(recipe, "run", *(f"log.{name}=isomorph-test" for name in INSTALLED))[0]


def of_wandb(folder: Path) -> Rows:
    """The history in the .wandb file: a header of 7 bytes, then records in blocks of 32 KiB, as LevelDB's log has them.

    A piece of a record: its checksum (4 bytes), its size (2), 1 where it is whole, 2 the first, 3 a middle, 4 the last
    piece, and its bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, at, parts, found = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                found[record.history.step.num] = row
    return found


def of_trackio(folder: Path) -> Rows:
    """The rows of its SQLite file."""
    with sqlite3.connect(folder.parent / "trackio" / "isomorph-test.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {folder.name}
    found: Rows = {}
    for _, step, metrics in rows:  # an evaluation is a row of its own
        found.setdefault(step, {}).update(json.loads(metrics))
    return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_tracker_wrote_is_what_steps_jsonl_has(name: str, folder: Path) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed: pip install 'isomorph[trackers]'")
    got = {"wandb": of_wandb, "trackio": of_trackio}[name](folder)
    rows = {row["step"]: numbers(row) for row in read_steps(folder)}
    start = summary_of(folder)["exams"][0]
    first = got.pop(0)  # the evaluation before the first step, which has no row in steps.jsonl
    assert first["exam/gsm/natural/accuracy"] == start["accuracy"]["natural"]["rate"]
    assert first["exam/gsm/natural/reward"] == start["reward"]["natural"]
    assert sorted(got) == sorted(rows) == [1, 2, 3]
    for step, row in rows.items():
        assert {"reward/mean", "reward/trl/mean", "reward/ours/std", "loss"} <= row.keys()
        assert ("exam/gsm/natural/accuracy" in row) == ("exam/gsm/natural/accuracy" in got[step]) == (step in (2, 3))
        assert {key: got[step].get(key) for key in row} == row
