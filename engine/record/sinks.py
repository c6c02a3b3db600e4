"""Sends a run's rows to TensorBoard, Weights & Biases or Trackio, besides steps.jsonl.

A sink is called with each row after it has been written to steps.jsonl, and logs the numbers in it.
"""

import contextlib
import importlib.util
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from isomorph.engine.config import LogConfig, UserError
from isomorph.engine.foreign import foreign
from isomorph.engine.record.runlog import Row, Sink
from isomorph.engine.types import RunFailed

FLUSH_S = 10.0  # seconds between flushes of the event file


@contextlib.contextmanager
def open_sinks(config: LogConfig, folder: Path, recipe: Mapping[str, Any], done: int) -> Iterator[list[Sink]]:
    """Context with the sinks that ``config`` names. ``done``: completed steps of a resumed run, else 0."""
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = []
        if config.tensorboard:
            sinks.append(stack.enter_context(_tensorboard(folder / "tensorboard", done)))
        if config.wandb is not None:
            sinks.append(stack.enter_context(_wandb(config.wandb, folder, recipe)))
        if config.trackio is not None:
            sinks.append(stack.enter_context(_trackio(config.trackio, folder, recipe)))
        yield sinks


def check_sinks(config: LogConfig) -> None:
    """Raises UserError if a package that ``config`` needs is missing; called before the model is loaded."""
    for name, project in (("wandb", config.wandb), ("trackio", config.trackio)):
        if project is not None and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name} needs the package {name}, which is not installed: pip install {name}")


@contextlib.contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[Sink]:
    """Writes one event file. Not by SummaryWriter, whose writer thread would swallow the error of a full disk."""
    folder.mkdir(exist_ok=True)
    file = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"))
    flushed = time.monotonic()

    def write(**what: Any) -> None:
        file.write(Event(wall_time=time.time(), **what).SerializeToString())

    def sink(row: Row) -> None:
        nonlocal flushed
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        with _disk_errors(folder):
            write(step=row["step"], summary=Summary(value=values))
            if time.monotonic() - flushed > FLUSH_S:
                file.flush()
                flushed = time.monotonic()

    write(file_version="brain.Event:2")
    if done:  # makes TensorBoard hide what was written after the checkpoint
        write(step=done + 1, session_log=SessionLog(status=SessionLog.START))
    try:
        yield sink
    except BaseException:
        with contextlib.suppress(OSError):  # on a full disk, raise the first error
            file.close()
        raise
    with _disk_errors(folder):
        file.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{folder} cannot be written: {error}") from error


@contextlib.contextmanager
def _wandb(project: str, folder: Path, recipe: Mapping[str, Any]) -> Iterator[Sink]:
    wandb = importlib.import_module("wandb")
    name = folder.resolve().name
    with foreign("log.wandb: wandb.init failed"):
        run = wandb.init(project=project, name=name, id=name, dir=str(folder), config=dict(recipe), resume="allow")
    try:
        yield lambda row: run.log(numbers(row), step=row["step"])
    finally:
        run.finish()


@contextlib.contextmanager
def _trackio(project: str, folder: Path, recipe: Mapping[str, Any]) -> Iterator[Sink]:
    trackio = importlib.import_module("trackio")
    with foreign("log.trackio: trackio.init failed"):
        run = trackio.init(project=project, name=folder.resolve().name, config=dict(recipe), resume="allow")
    try:
        yield lambda row: run.log(numbers(row), step=row["step"])
    finally:
        run.finish()


def numbers(row: Row) -> dict[str, float]:
    """Returns the row's numbers by key, without those that were not measured."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
