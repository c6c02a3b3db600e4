"""``isomorph train``: the run folder, stopping on a signal, and what is printed at the end."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.commands.exit import fail
from isomorph.curriculum.environment import check_backends
from isomorph.curriculum.evaluation_spec import place_of
from isomorph.curriculum.named_recipes import recipe_path
from isomorph.curriculum.nodes import refuse_other_folder
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.page import PHASE_COLUMNS, phase_rows
from isomorph.curriculum.report.run_record import read_run, read_run_json
from isomorph.curriculum.resume import Changes, resumed_recipe
from isomorph.curriculum.tasks.battery import best_of
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError
from isomorph.engine.distributed.launch import open_ranks
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.checkpoint import latest_checkpoint
from isomorph.engine.record.runlog import LOCK, locked
from isomorph.engine.types import RunFailed

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # schedulers send SIGUSR1 before a job's time limit
AGAIN_S = 1.0  # a launcher that passes Ctrl-C on makes one of it two signals, this close to each other


def train(recipe: Path | None, overrides: Sequence[str], run: Path | None, resume: Path | None, out: Console) -> None:
    """Trains by ``recipe`` in the folder ``run``, or resumes the run in ``resume``.

    Exactly one of ``recipe`` and ``resume`` is given; with ``resume``, ``recipe`` may be the first override.

    Raises:
        UserError, DataError: the input is wrong.
        KeyboardInterrupt: the run was stopped, with a checkpoint where there was one.
    """
    loaded, changes, folder = _what_to_run(recipe, list(overrides), run, resume)
    train_in(folder, loaded, out, changes=changes, is_named=run is not None, resume=resume is not None)


def train_in(
    folder: Path,
    recipe: Recipe,
    out: Console,
    *,
    changes: Changes | None = None,
    is_named: bool,
    resume: bool,
    report: bool = True,
) -> None:
    """Trains by ``recipe`` in ``folder``, a new one or with ``resume`` that of a run. Raises as ``train`` does.

    ``is_named``: the folder has to have that name; ``changes``: what ``recipe`` changes of the resumed run's own;
    ``report``: also write the HTML report.
    """
    check_backends()
    with _stop_on_signal(out) as stop, open_ranks() as ranks, contextlib.ExitStack() as stack:
        out.quiet = not ranks.is_first
        if not resume:
            folder = ranks.from_first(lambda: new_folder(folder, is_named=is_named))
        ranks.from_first(lambda: stack.enter_context(locked(folder)))
        out.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
        try:
            refuse_other_folder(folder, ranks)
            summary = run_recipe(
                recipe, folder, out, stop.requested, ranks, resume=resume, changes=changes, report=report
            )
        except KeyboardInterrupt:
            _say_interrupted(folder, out)
            raise
        except (UserError, DataError):
            if not resume:
                _remove_if_empty(folder, ranks)
            raise
        except RunFailed as error:
            fail(str(error), 1)  # before signals end the process again: torchrun sends one where a rank has died
        if ranks.is_first:
            _print_result(summary, folder, out)


def _what_to_run(
    recipe: Path | None, overrides: list[str], run: Path | None, resume: Path | None
) -> tuple[Recipe, Changes | None, Path]:
    """The recipe, what a resumed run changes of its own, and the folder."""
    if resume is not None and recipe is not None and "=" in str(recipe):  # the first of the overrides
        overrides, recipe = [str(recipe), *overrides], None
    if (recipe is None) == (resume is None):
        raise UserError(
            "give either a recipe or --resume DIR: isomorph train RECIPE.toml, or isomorph train --resume DIR; both "
            "take section.key=value"
        )
    if resume is not None:
        if run is not None:
            raise UserError("--run cannot be given with --resume, which continues in the run's own folder")
        loaded, changes = resumed_recipe(read_run_json(resume), overrides, resume)
        return loaded, changes, resume
    assert recipe is not None
    recipe = recipe_path(recipe)
    folder = run or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return load_recipe(recipe, overrides, Recipe), None, folder


class Stop:
    """Records a stop signal; the run polls ``requested`` every few tokens and between micro-batches.

    Before the first poll there is nothing to save, and a signal ends the process at once. So does a second SIGINT,
    which a person sends; a second SIGTERM may come from a launcher that passes on what its ranks got, too.
    """

    def __init__(self, out: Console) -> None:
        self.out = out
        self.first: float | None = None  # when the first signal came, by the monotonic clock
        self.is_polled = False

    def requested(self) -> bool:
        self.is_polled = True
        return self.first is not None

    def take(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.is_polled:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = now
            if not self.out.quiet:
                name = signal.Signals(signum).name
                text = f"{name}: stop requested; will write a checkpoint and exit (Ctrl-C again: exit now)\n"
                with contextlib.suppress(OSError):  # not by print: the signal may have interrupted one
                    os.write(sys.__stdout__.fileno(), text.encode())  # type: ignore[union-attr]
        elif signum == signal.SIGINT and now - self.first > AGAIN_S:
            raise KeyboardInterrupt


@contextmanager
def _stop_on_signal(out: Console) -> Iterator[Stop]:
    stop = Stop(out)
    before = {number: signal.signal(number, stop.take) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def new_folder(folder: Path, *, is_named: bool) -> Path:
    """Makes the run's folder. Of two runs that start in the same second the second gets another name.

    ``is_named``: the user named it, so it is used as it is. Raises UserError where it is in use or cannot be made.
    """
    if folder.is_file():
        raise UserError(f"--run must name a folder, {folder} is a file")
    if is_named and folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()):
        return folder
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if is_named:
            raise UserError(
                f"{folder} is not empty: name another folder, or resume the run in it: isomorph train --resume {folder}"
            ) from None
        return new_folder(folder.with_name(f"{folder.name}-{os.getpid()}"), is_named=True)
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be made: {error}") from None
    return folder


def _remove_if_empty(folder: Path, ranks: Ranks) -> None:
    """So that a start that is refused leaves nothing; other files may be there by now."""
    if ranks.is_first:
        with contextlib.suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def _say_interrupted(folder: Path, out: Console) -> None:
    if latest_checkpoint(folder / "checkpoints") is None:
        text = "interrupted before the first step: start the run again"
    else:
        text = f"interrupted; resume with: isomorph train --resume {folder}"
    out.print(text, highlight=False, soft_wrap=True)


def _print_result(summary: dict[str, Any], folder: Path, out: Console) -> None:
    _print_summary(summary, out)
    _print_phases(folder, out)
    out.print(f"model: {folder / 'model'}", highlight=False, soft_wrap=True)
    if best := summary.get("best"):
        where = f"by {best['set']}, {best['score']:.1%} after {place_of(best['label'])}"
        out.print(f"best model {where}: {folder / 'best' / 'model'}", highlight=False, soft_wrap=True)
    out.print(f"summary: {folder / 'summary.json'}", highlight=False, soft_wrap=True)
    if (page := folder / "report" / "report.html").is_file():
        out.print(f"report: {page}", highlight=False, soft_wrap=True)


def _print_summary(summary: dict[str, Any], out: Console) -> None:
    after = summary["intervals"].get("after", {})
    before = summary["accuracy"].get("before", {})
    no_answer = summary["no_answer"].get("after", {})
    baselines = {name: value for name, value in summary["floor"].items() if name in after and value is not None}
    solved = {name: rates for name, rates in summary.get("shortcuts", {}).items() if rates}
    shortcuts = {name: max(rates.values()) for name, rates in solved.items() if name in after}
    # columns that not all data have; all of them together are 80 characters wide
    some = {"baseline": baselines, "shortcut": shortcuts, "no answer": no_answer}
    extra = {column: found for column, found in some.items() if found}
    table = Table(title=f"{summary['steps']} steps in {summary['wall_s']:.0f} s", title_justify="left")
    for column in ("accuracy", "before", "after", "95 % interval", *extra):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    for name, result in after.items():
        table.add_row(
            name,
            f"{before[name]:.1%}" if name in before else "-",
            f"{result['rate']:.1%}",
            f"{result['low']:.1%} to {result['high']:.1%}",
            *(f"{found[name]:.1%}" if name in found else "-" for found in extra.values()),
        )
    out.print(table)
    if baselines:
        out.print("sequential baseline: the accuracy of answering with the sum of all durations", highlight=False)
    for best in dict.fromkeys(_named_shortcut(rates) for rates in solved.values()):
        out.print(f"best shortcut, which does not plan: {best}", highlight=False)


def _named_shortcut(rates: dict[str, float]) -> str:
    name = best_of(rates)
    return f"{name}, {rates[name]:.1%}"


def _print_phases(folder: Path, out: Console) -> None:
    table = Table(title="time per phase", title_justify="left")
    for i, column in enumerate(PHASE_COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in phase_rows(read_run(folder)):
        table.add_row(*row, end_section=row[1] == "step")
    out.print(table)
