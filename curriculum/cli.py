"""``isomorph ...``: the only thing a user types.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 interrupted, with a checkpoint written.
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from isomorph.curriculum.commands.exit import fail
from isomorph.curriculum.rewards.families import FAMILIES
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Make tasks, and look at files of tasks.")
kernels = typer.Typer(no_args_is_help=True, help="The GPU kernels, as far as they can be looked at without a GPU.")
app.add_typer(data, name="data")
app.add_typer(kernels, name="kernels")
bench = typer.Typer(no_args_is_help=True, help="Measure our ops beside their peers.")
app.add_typer(bench, name="bench")
console = Console(markup=False, emoji=False)  # names of the user's are printed as they are


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
        fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # who read our output has gone, as head does; Python's own last flush would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except typer.TyperException as error:
        if not error.format_message():  # without arguments: the help has been printed
            sys.exit(2)
        fail(error.format_message(), 2)
    except RuntimeError as error:
        from isomorph.engine.types import RunFailed  # imports PyTorch, for which --help does not wait

        if not isinstance(error, RunFailed):
            raise
        fail(str(error), 1)


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
    from isomorph.curriculum.commands.train import train

    train(recipe, overrides or [], run, resume, console)


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
    from isomorph.curriculum.commands.plan import plan

    plan(recipe, overrides or [], device, device_gib, ranks, console, as_json=as_json)


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
    from isomorph.curriculum.commands.evaluate import evaluate

    evaluate(target, data or [], prompts, max_new_tok, console, as_json=as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the page; default RUN/report, report for several runs")
    ] = None,
) -> None:
    """One HTML page and its pictures: what a run did, or how several compare."""
    from isomorph.curriculum.commands.report import report

    report(runs, out, console)


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
    from isomorph.curriculum.commands.data import make

    make(representation or [], prompts, settings or [], out, seed=seed, split=split, force=force)


@data.command("inspect")
def inspect_data(
    file: Annotated[Path, typer.Argument(help="JSON Lines with the keys question and answer")],
    family: Annotated[str, typer.Option("--family", help=" or ".join(FAMILIES))],
    representation: Annotated[str, typer.Option("--representation", help="natural, graph, code, ...")],
) -> None:
    """Check a file of tasks: broken rows, lengths, duplicates, answers that our solver does not find, samples."""
    from isomorph.curriculum.commands.data import inspect

    inspect(file, family, representation, console)


@app.command()
def doctor() -> None:
    """What this machine has and lacks, and what to do about it."""
    from isomorph.curriculum.commands.doctor import doctor

    doctor(console)


@kernels.command("compile")
def compile_kernels(
    arch: Annotated[list[int] | None, typer.Option("--arch", help="90 is sm_90; repeatable; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table")] = False,
) -> None:
    """Compile every GPU kernel in every configuration, without a GPU, and check its machine code."""
    from isomorph.curriculum.commands.kernels import compile_kernels

    compile_kernels(arch, as_json=as_json)


@bench.command("kernels")
def bench_kernels(
    op: Annotated[str | None, typer.Option("--op", help="One op, for example linear_loss; default: all")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON Lines, one row per op, size and provider")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest size of each op, three rounds")] = False,
) -> None:
    """Every op beside its peers: time, memory and error. Needs the repository, not only the package."""
    from isomorph.curriculum.commands.kernels import bench_kernels

    bench_kernels(op, out, quick=quick)
