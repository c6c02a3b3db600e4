"""Who else reads the rows. TensorBoard's files are read back with the reader of the package that wrote them."""

import importlib.util
import io
import math
import struct
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from isomorph.engine.config import LogConfig, UserError
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.record.sinks import check_sinks, numbers, open_sinks


def events(folder: Path) -> list[Event]:
    """The records of all event files: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found = []
    for file in sorted(folder.glob("events.*"), key=lambda f: f.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def write(folder: Path, steps: range, *, done: int = 0) -> None:
    log = RunLog(folder, Console(file=io.StringIO()))
    with open_sinks(LogConfig(), folder, {}, done) as log.sinks:
        for step in steps:
            log.write_step({"step": step, "stage": "a", "loss": step / 4, "kl": math.nan, "gpu/power_w": None}, "")


def test_tensorboard_gets_every_number_of_every_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    got = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    assert got == [(1, "loss", 0.25), (2, "loss", 0.5), (3, "loss", 0.75)]


def test_a_resumed_run_hides_what_was_lost(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(2, 4), done=1)
    starts = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == e.session_log.START]
    assert starts == [2]  # from here on a later event replaces an earlier one


def test_only_numbers_are_taken() -> None:
    row = {"step": 3, "stage": "a", "loss": 0.5, "updates": 1, "kl": None, "gpu/throttle": "power_cap"}
    assert numbers(row) == {"loss": 0.5, "updates": 1}


def test_nothing_is_written_where_nobody_asks(tmp_path: Path) -> None:
    with open_sinks(LogConfig(tensorboard=False), tmp_path, {}, 0) as sinks:
        assert sinks == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_refused_before_anything_starts(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_sinks(LogConfig(**{name: "project"}))  # type: ignore[arg-type]


def test_wandb_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = LogConfig(tensorboard=False, wandb="isomorph-test")
    with open_sinks(config, tmp_path, {"run": {"seed": 0}}, 0) as sinks:
        for read in sinks:
            read({"step": 1, "stage": "a", "loss": 0.5})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
