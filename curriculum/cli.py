"""``isomorph ...``: the only thing a user types.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 interrupted, with a checkpoint written.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from isomorph.curriculum.task import DataError
from isomorph.engine.config import UserError, check_tables, load_recipe
from isomorph.engine.types import RunFailed

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


def main() -> None:
    """The console script."""
    try:
        app(standalone_mode=False)
    except (UserError, DataError) as error:
        _fail(str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer.TyperException as error:
        _fail(error.format_message(), 2)
    except RunFailed as error:
        _fail(str(error), 1)


@app.callback()
def _root() -> None:
    """Carry a procedure from symbols into words by reinforcement learning."""


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, for example curriculum/recipes/quickstart.toml")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as needed")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the run; default runs/RECIPE-TIME")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this folder")] = None,
) -> None:
    """Train a model by a recipe, or go on with an interrupted run."""
    from isomorph.curriculum.assemble import run_recipe
    from isomorph.curriculum.recipe import Recipe

    if (recipe is None) == (resume is None):
        raise UserError(
            "give either a recipe or --resume DIR: isomorph train RECIPE.toml, or isomorph train --resume DIR"
        )
    if resume is not None:
        if run is not None or overrides:
            raise UserError("--resume goes on with the run as it was: --run and overrides cannot be given with it")
        loaded, folder = check_tables(_run_json(resume)["recipe"], Recipe, where=f"{resume}/run.json"), resume
    else:
        assert recipe is not None
        loaded = load_recipe(recipe, overrides or [], Recipe)
        folder = _new_folder(run or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    console.print(f"run folder: {folder}", highlight=False)
    with _stop_on_signal() as stop:
        try:
            summary = run_recipe(loaded, folder, console, stop.requested, resume=resume is not None)
        except KeyboardInterrupt:
            console.print(f"interrupted; go on with: isomorph train --resume {folder}", highlight=False)
            raise
    _print_summary(summary, folder)


class _Stop:
    """Remembers the first signal; the loop asks between steps. The second one ends the process where it is."""

    def __init__(self) -> None:
        self.signals = 0

    def requested(self) -> bool:
        return self.signals > 0

    def take(self, signum: int, frame: Any) -> None:
        self.signals += 1
        if self.signals > 1:
            raise KeyboardInterrupt
        console.print("stopping after this step (once more: at once)", highlight=False)


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_folder(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(
            f"{folder} is not empty: name another folder, or go on with it: isomorph train --resume {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be made: {error}") from None
    return folder


def _run_json(folder: Path) -> dict[str, Any]:
    import json

    try:
        described: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} must be the folder of a run, with a run.json: {error}") from None
    return described


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    table = Table(title=f"{summary['steps']} steps in {summary['wall_s']:.0f} s", title_justify="left")
    for column in ("accuracy", "before", "after", "95 % interval", "floor"):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    after = summary["intervals"].get("after", {})
    before = summary["accuracy"].get("before", {})
    for name, result in after.items():
        floor = summary["floor"][name]
        table.add_row(
            name,
            f"{before[name]:.1%}" if name in before else "-",
            f"{result['rate']:.1%}",
            f"{result['low']:.1%} to {result['high']:.1%}",
            "-" if floor is None else f"{floor:.1%}",
        )
    console.print(table)
    console.print("floor: doing one step after the other, without a plan", highlight=False)
    console.print(f"model: {folder / 'model'}    summary: {folder / 'summary.json'}", highlight=False)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
