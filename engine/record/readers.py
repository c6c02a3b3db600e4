"""Who else reads a run's rows: TensorBoard, Weights & Biases, Trackio. steps.jsonl stays the truth.

A reader gets each row after it has been written, and takes the numbers out of it.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from isomorph.engine.config import LogConfig, UserError
from isomorph.engine.record.runlog import Reader, Row


@contextlib.contextmanager
def open_readers(config: LogConfig, folder: Path, recipe: Mapping[str, Any], done: int) -> Iterator[list[Reader]]:
    """The readers that the recipe asks for, in a run that has ``done`` steps behind it."""
    with contextlib.ExitStack() as stack:
        readers: list[Reader] = []
        if config.tensorboard:
            readers.append(stack.enter_context(_tensorboard(folder / "tensorboard", done)))
        if config.wandb is not None:
            readers.append(stack.enter_context(_wandb(config.wandb, folder, recipe)))
        if config.trackio is not None:
            readers.append(stack.enter_context(_trackio(config.trackio, folder, recipe)))
        yield readers


def check_readers(config: LogConfig) -> None:
    """Raises UserError where a package is missing: before a model is loaded, not after the first step."""
    for name, project in (("wandb", config.wandb), ("trackio", config.trackio)):
        if project is not None and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name} needs the package {name}, which is not installed: pip install {name}")


@contextlib.contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[Reader]:
    # what a lost process wrote after the checkpoint is hidden by TensorBoard
    with SummaryWriter(str(folder), purge_step=done + 1 if done else None) as writer:

        def read(row: Row) -> None:
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, row["step"])

        yield read


@contextlib.contextmanager
def _wandb(project: str, folder: Path, recipe: Mapping[str, Any]) -> Iterator[Reader]:
    wandb = importlib.import_module("wandb")
    name = folder.resolve().name
    run = wandb.init(project=project, name=name, id=name, dir=str(folder), config=dict(recipe), resume="allow")
    try:
        yield lambda row: run.log(numbers(row), step=row["step"])
    finally:
        run.finish()


@contextlib.contextmanager
def _trackio(project: str, folder: Path, recipe: Mapping[str, Any]) -> Iterator[Reader]:
    trackio = importlib.import_module("trackio")
    run = trackio.init(project=project, name=folder.resolve().name, config=dict(recipe), resume="allow")
    try:
        yield lambda row: run.log(numbers(row), step=row["step"])
    finally:
        run.finish()


def numbers(row: Row) -> dict[str, float]:
    """The row's numbers by name; what was not measured is left out."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
