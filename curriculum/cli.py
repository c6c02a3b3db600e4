"""``isomorph ...``: the only thing a user types.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 interrupted, with a checkpoint written.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
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

from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError, load_recipe
from isomorph.engine.foreign import one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Make tasks, and look at files of tasks.")
kernels = typer.Typer(no_args_is_help=True, help="The GPU kernels, as far as they can be looked at without a GPU.")
app.add_typer(data, name="data")
app.add_typer(kernels, name="kernels")
bench = typer.Typer(no_args_is_help=True, help="Measure our ops beside their peers.")
app.add_typer(bench, name="bench")
console = Console(markup=False, emoji=False)  # names of the user's are printed as they are

# SIGUSR1: as a queue's warning before its time limit
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 1.0  # one Ctrl-C comes twice where a launcher passes it on


def main() -> None:
    """The console script."""
    # OpenMP's threads spin while they wait. Beside another busy process that made two threads ten times slower than one
    # (2 cores, libgomp); this many turns are enough where the cores are free. Read once, when PyTorch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        # without its standalone mode typer returns the code of an interruption or an Exit instead of ending the process
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here a reader that has gone can still be told from a defect
        if code:
            sys.exit(code)
    except (UserError, DataError) as error:
        _fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # who read our output has gone, as head does; Python's own last flush would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except typer.TyperException as error:
        if not error.format_message():  # without arguments: the help has been printed
            sys.exit(2)
        _fail(error.format_message(), 2)
    except RuntimeError as error:
        from isomorph.engine.types import RunFailed  # imports PyTorch, for which --help does not wait

        if not isinstance(error, RunFailed):
            raise
        _fail(str(error), 1)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"isomorph {importlib.metadata.version('isomorph')}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end")
    ] = False,
) -> None:
    """Carry a procedure from symbols into words by reinforcement learning."""


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, for example curriculum/recipes/quickstart.toml")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as needed")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the run; default runs/RECIPE-TIME")] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Go on with the run in this folder; section.key=value for what may change"),
    ] = None,
) -> None:
    """Train a model by a recipe, or go on with an interrupted run, of which section.key=value may change some."""
    from isomorph.curriculum.assemble import run_recipe
    from isomorph.curriculum.recipe import Recipe
    from isomorph.curriculum.report.run_record import read_run_json
    from isomorph.curriculum.resume import resumed_recipe
    from isomorph.engine.distributed.launch import open_ranks
    from isomorph.engine.record.runlog import LOCK, locked
    from isomorph.engine.types import RunFailed

    given, changes = list(overrides or []), None
    if resume is not None and recipe is not None and "=" in str(recipe):  # the first of the overrides
        given, recipe = [str(recipe), *given], None
    if (recipe is None) == (resume is None):
        raise UserError(
            "give either a recipe or --resume DIR: isomorph train RECIPE.toml, or isomorph train --resume DIR; both "
            "take section.key=value"
        )
    if resume is not None:
        if run is not None:
            raise UserError("--resume goes on in the run's own folder: --run cannot be given with it")
        (loaded, changes), folder = resumed_recipe(read_run_json(resume), given, resume), resume
    else:
        assert recipe is not None
        loaded = load_recipe(recipe, given, Recipe)
        folder = run or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    _check_backends()
    with _stop_on_signal() as stop, open_ranks() as ranks, contextlib.ExitStack() as stack:
        console.quiet = not ranks.is_first
        if resume is None:
            folder = ranks.from_first(lambda: _new_folder(folder, is_named=run is not None))
        ranks.from_first(lambda: stack.enter_context(locked(folder)))
        console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
        try:
            summary = run_recipe(
                loaded, folder, console, stop.requested, ranks, resume=resume is not None, changes=changes
            )
        except KeyboardInterrupt:
            _say_interrupted(folder)
            raise
        except UserError:
            if resume is None and ranks.is_first:
                with contextlib.suppress(OSError):  # it may hold something by now
                    if [path.name for path in folder.iterdir()] == [LOCK]:
                        (folder / LOCK).unlink()
                        folder.rmdir()
            raise
        except RunFailed as error:
            _fail(str(error), 1)  # before signals end the process again: torchrun sends one where a rank has died
        if ranks.is_first:
            _print_result(summary, folder)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its model may be a folder with only a config.json")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as needed")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="A known GPU, for example h200; default: this machine's CPU")
    ] = None,
    device_gib: Annotated[
        float | None, typer.Option("--device-gib", min=0.1, help="Its memory, where it differs")
    ] = None,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Devices, as torchrun --nproc-per-node; the tables are of one")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    """What fits and how long a step takes, stage by stage. Loads no weights and touches no GPU."""
    import json

    from isomorph.curriculum.estimate import plan_recipe, show_plan
    from isomorph.curriculum.recipe import Recipe

    planned = plan_recipe(load_recipe(recipe, overrides or [], Recipe), device, device_gib, ranks)
    if as_json:
        sys.stdout.write(json.dumps(planned, indent=2) + "\n")
    else:
        show_plan(planned, console)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="Run folder, model folder, .gguf or hub name")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="FAMILY:REPRESENTATION[=FILE], as often as needed; default: the run's [eval]"),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", help="Per representation; default: the run's, or 100")
    ] = None,
    max_new_tok: Annotated[
        int | None, typer.Option("--max-new-tok", help="Of one response; default: the run's, or 512")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table")] = False,
) -> None:
    """Greedy accuracy of a model or a run, per representation, with 95 % intervals."""
    import json

    from isomorph.curriculum.commands.evaluate import evaluate, show_scores

    _check_backends()

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    result = evaluate(target, data or [], prompts=prompts, max_new_tok=max_new_tok, say=say)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        show_scores(result, console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the page; default RUN/report, report for several runs")
    ] = None,
) -> None:
    """One HTML page and its pictures: what a run did, or how several compare."""
    from isomorph.curriculum.report.page import write_report

    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run can stand in a report once, got one of these folders twice: " + " ".join(map(str, runs)))
    page = write_report(runs, out or (runs[0] / "report" if len(runs) == 1 else Path("report")))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run")],
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Default: the newest answers, exams included")
    ] = None,
    num: Annotated[int, typer.Option("--num", min=1, help="Answers per representation")] = 3,
) -> None:
    """Look at answers of a run: what was asked, what came, what it was worth."""
    from isomorph.curriculum.commands.show import show_answers

    show_answers(run, step, num, console)


@data.command("make")
def make_data(
    representation: Annotated[
        list[str] | None, typer.Option("--representation", help="As often as needed; default: all")
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Per representation")] = 10,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    split: Annotated[str, typer.Option("--split", help="train or eval: no procedure is in both")] = "train",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Difficulty, key=value, for example max_steps=8")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File; default: the standard output")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there")] = False,
) -> None:
    """Write asynchronous-planning tasks as JSON Lines; for a recipe's files, one representation a file."""
    from isomorph.curriculum.commands.data import make_rows, parse_difficulty, write_rows

    difficulty = parse_difficulty(settings or [])
    write_rows(make_rows(representation or [], prompts, difficulty, seed=seed, split=split), out, force=force)


@data.command("inspect")
def inspect_data(
    file: Annotated[Path, typer.Argument(help="JSON Lines with the keys question and answer")],
    family: Annotated[str, typer.Option("--family", help="async_plan, math or physics")],
    representation: Annotated[str, typer.Option("--representation", help="natural, graph, code, ...")],
) -> None:
    """Check a file of tasks: broken rows, lengths, duplicates, answers that our solver does not find, samples."""
    from isomorph.curriculum.commands.data import inspect_file, show_inspection

    show_inspection(inspect_file(file, family, representation), file, console)


@app.command()
def doctor() -> None:
    """What this machine has and lacks, and what to do about it."""
    from isomorph.curriculum.commands.doctor import examine, is_sound, show_findings

    findings = examine()
    show_findings(findings, console)
    if not is_sound(findings):
        sys.exit(1)


@kernels.command("compile")
def compile_kernels(
    arch: Annotated[list[int] | None, typer.Option("--arch", help="90 is sm_90; repeatable; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table")] = False,
) -> None:
    """Compile every GPU kernel in every configuration, without a GPU, and check its machine code."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("compiling kernels needs Triton, which is not installed: pip install triton==3.9.0")
    from isomorph.kernels import aot

    unknown = sorted(set(arch or ()) - set(aot.ARCHS))
    if unknown:
        raise UserError(f"--arch must be one of {', '.join(map(str, aot.ARCHS))}, got {unknown[0]}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 makes kernels that cannot be compiled: unset it")
    code = aot.report(arch or aot.ARCHS, as_json=as_json)
    if code:
        sys.exit(code)


@bench.command("kernels")
def bench_kernels(
    op: Annotated[str | None, typer.Option("--op", help="One op, for example linear_loss; default: all")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON Lines, one row per op, size and provider")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest size of each op, three rounds")] = False,
) -> None:
    """Every op beside its peers: time, memory and error. Needs the repository, not only the package."""
    import subprocess

    script = Path(__file__).resolve().parents[1] / "benchmarks" / "all_ops.py"
    if not script.is_file():
        raise UserError(
            f"the benchmarks are not part of the installed package ({script} is missing): clone the repository and "
            "run python benchmarks/all_ops.py there"
        )
    if importlib.util.find_spec("pytest") is None:
        raise UserError('the benchmarks need the extra dev: pip install -e ".[dev,bench]"')
    options = [*(["--op", op] if op else []), *(["--out", str(out)] if out else []), *(["--quick"] if quick else [])]
    code = subprocess.run([sys.executable, str(script), *options], check=False).returncode
    if code:
        sys.exit(code)


class _Stop:
    """Remembers a signal; the run asks every few tokens, and between micro-batches.

    Before it asks for the first time there is nothing to write down, and a signal ends the process at once. So does a
    second SIGINT, a person's; a second SIGTERM may come from a launcher that passes on what its ranks got, too.
    """

    def __init__(self) -> None:
        self.first: float | None = None  # when the first one came
        self.is_asked = False

    def requested(self) -> bool:
        self.is_asked = True
        return self.first is not None

    def take(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.is_asked:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = now
            if not console.quiet:
                name = signal.Signals(signum).name
                text = f"{name}: stopping as soon as a checkpoint is written (once more, by SIGINT: at once)\n"
                with contextlib.suppress(OSError):  # past Python's buffers, which it may be in the midst of
                    os.write(sys.__stdout__.fileno(), text.encode())  # type: ignore[union-attr]
        elif signum == signal.SIGINT and now - self.first > AGAIN_S:
            raise KeyboardInterrupt


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.take) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_folder(folder: Path, *, is_named: bool) -> Path:
    """Made, and nobody else's: of two runs that start in one second the second gets a name of its own."""
    from isomorph.engine.record.runlog import LOCK

    if folder.is_file():
        raise UserError(f"--run must name a folder, {folder} is a file")
    if is_named and folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()):
        return folder
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if is_named:
            raise UserError(
                f"{folder} is not empty: name another folder, or go on with it: isomorph train --resume {folder}"
            ) from None
        return _new_folder(folder.with_name(f"{folder.name}-{os.getpid()}"), is_named=True)
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be made: {error}") from None
    return folder


def _say_interrupted(folder: Path) -> None:
    from isomorph.engine.record.checkpoint import latest_checkpoint

    if latest_checkpoint(folder / "checkpoints") is None:
        text = "interrupted before anything was learned: start it again"
    else:
        text = f"interrupted; go on with: isomorph train --resume {folder}"
    console.print(text, highlight=False, soft_wrap=True)


def _check_backends() -> None:
    """What ISOMORPH_BACKEND asks for, before anything is loaded."""
    import torch

    from isomorph.kernels import backend

    try:
        backend.table("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise UserError(str(error)) from None


def _print_result(summary: dict[str, Any], folder: Path) -> None:
    _print_summary(summary, folder)
    _print_anatomy(folder)
    console.print(f"model: {folder / 'model'}", highlight=False, soft_wrap=True)
    console.print(f"summary: {folder / 'summary.json'}", highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report' / 'report.html'}", highlight=False, soft_wrap=True)


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    table = Table(title=f"{summary['steps']} steps in {summary['wall_s']:.0f} s", title_justify="left")
    for column in ("accuracy", "before", "after", "95 % interval", "floor", "no answer"):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    after = summary["intervals"].get("after", {})
    before = summary["accuracy"].get("before", {})
    no_answer = summary["no_answer"].get("after", {})
    for name, result in after.items():
        floor = summary["floor"][name]
        table.add_row(
            name,
            f"{before[name]:.1%}" if name in before else "-",
            f"{result['rate']:.1%}",
            f"{result['low']:.1%} to {result['high']:.1%}",
            "-" if floor is None else f"{floor:.1%}",
            f"{no_answer[name]:.1%}" if name in no_answer else "-",
        )
    console.print(table)
    console.print("floor: doing one step after the other, without a plan", highlight=False)


def _print_anatomy(folder: Path) -> None:
    from isomorph.curriculum.report.page import ANATOMY_COLUMNS, step_anatomy
    from isomorph.curriculum.report.run_record import read_run

    table = Table(title="anatomy of a step", title_justify="left")
    for i, column in enumerate(ANATOMY_COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in step_anatomy(read_run(folder)):
        table.add_row(*row, end_section=row[1] == "step")
    console.print(table)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.exit(code)
