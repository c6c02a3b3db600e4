"""The command line ``isomorph``: commands and options. What a command does is in ``curriculum/commands/``.

Exit codes: 0 done; 2 the input is wrong; 1 the run failed; 130 interrupted, with a checkpoint written.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from isomorph.curriculum.commands.exit import fail
from isomorph.curriculum.named_recipes import FOLDER, recipe_line, recipe_names
from isomorph.curriculum.rewards.builtin import BUILTINS
from isomorph.curriculum.rewards.families import FAMILIES, GENERATED
from isomorph.curriculum.tasks.task import DataError
from isomorph.curriculum.version import installed_version
from isomorph.engine.config import UserError
from isomorph.engine.foreign import PrintableConsole

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Generate tasks; check files of tasks.")
kernels = typer.Typer(no_args_is_help=True, help="Compile and check the GPU kernels; no GPU needed.")
app.add_typer(data, name="data")
app.add_typer(kernels, name="kernels")
bench = typer.Typer(no_args_is_help=True, help="Benchmark the ops against other implementations.")
app.add_typer(bench, name="bench")
console = PrintableConsole(markup=False, emoji=False)  # a user's names may hold brackets and colons


def main() -> None:
    """The console script."""
    # OpenMP's threads spin while they wait. Beside another busy process that made two threads ten times slower than one
    # (2 cores, libgomp); this many turns suffice where cores are free. libgomp reads it once, when PyTorch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        # without its standalone mode typer returns the code of an interruption or an Exit instead of ending the process
        code = app(standalone_mode=False)
        sys.stdout.flush()  # raises BrokenPipeError here, where it is handled, not at the interpreter's exit
        if code:
            sys.exit(code)
    except (UserError, DataError) as error:
        fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has ended, as head does; Python would flush again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except typer.TyperException as error:
        if not error.format_message():  # without arguments: the help has been printed
            sys.exit(2)
        fail(error.format_message(), 2)
    except RuntimeError as error:
        from isomorph.engine.types import RunFailed  # here: it imports PyTorch, which would slow --help

        if not isinstance(error, RunFailed):
            raise
        fail(str(error), 1)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"isomorph {installed_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Train language models with reinforcement learning on a curriculum."""


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(incomplete)]


@app.command()
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="Recipe (TOML), or a name of isomorph recipes, such as quickstart", autocompletion=_complete_recipe
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value; repeatable")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Run folder to create; default: runs/RECIPE-TIME")] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Resume the run in this folder; section.key=value changes some keys"),
    ] = None,
) -> None:
    """Train a model by a recipe, or resume an interrupted run with --resume."""
    if os.environ.get("RANK", "0") == "0":  # importing PyTorch may take long from a cold disk: a sign of life before
        console.print(f"isomorph {installed_version()} starts", highlight=False)
    from isomorph.curriculum.commands.train import train

    train(recipe, overrides or [], run, resume, console)


@app.command()
def plan(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Recipe (TOML) or its name; its model may be a folder with only a config.json",
            autocompletion=_complete_recipe,
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value; repeatable")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="GPU type, for example h200; default: this machine's CPU")
    ] = None,
    device_gib: Annotated[
        float | None,
        typer.Option(
            "--device-gib",
            min=0.1,
            help="Memory of the device in GiB; default: what that GPU has, or what is free here",
        ),
    ] = None,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Number of ranks, as torchrun --nproc-per-node; results are per rank")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    """Estimate memory, and the least time per step, of each stage. Loads no weights and uses no GPU."""
    from isomorph.curriculum.commands.plan import plan

    plan(recipe, overrides or [], device, device_gib, ranks, console, as_json=as_json)


@app.command()
def recipes() -> None:
    """List the recipes that come with isomorph; each is trained by its name: isomorph train quickstart."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        console.print(f"{name:{width}}  {recipe_line(name)}", highlight=False, soft_wrap=True)
    console.print(f"their files: {FOLDER}", highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_RUN...",
            help="Run folder, RUN/best, a checkpoint of a run, model folder, .gguf file or hub name; several: compared",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="NAME of a set of the recipe, or FAMILY:REPRESENTATION[=FILE]; repeatable; default: the run's [eval]",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe whose sets are asked; default: the first run's")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", help="Prompts per representation; default: the run's, or 100")
    ] = None,
    max_new_tok: Annotated[
        int | None, typer.Option("--max-new-tok", help="Most tokens of a response; default: the run's, or 512")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Further responses to each question, for avg@k and pass@k")
    ] = 0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the samples; default: the run's, or 1")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="String that ends a response; repeatable; default: the run's")
    ] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="builtin or vllm")] = "builtin",
    split: Annotated[
        str | None, typer.Option("--split", help="Of generated questions: dev or test; default: the run's, or dev")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write every response here, JSON Lines")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table")] = False,
) -> None:
    """Measure accuracy of a model or a run, with 95 % intervals; compare several on the same questions."""
    from isomorph.curriculum.commands.evaluate import Options, evaluate

    options = Options(
        wanted=tuple(data or ()),
        recipe=recipe,
        prompts=prompts,
        max_new_tok=max_new_tok,
        samples=samples,
        temperature=temperature,
        stop=tuple(stop or ()),
        sampler=sampler,
        split=split,
        out=out,
    )
    evaluate(targets, options, console, as_json=as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the page; default: RUN/report, or report for several runs")
    ] = None,
) -> None:
    """Write an HTML page with learning curves, accuracy and time per phase, of one run or comparing several."""
    from isomorph.curriculum.commands.report import report

    report(runs, out, console)


@app.command()
def analogy(
    results: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ITEMS", help="A run folder, or a file of per-item results")
    ],
    train: Annotated[
        Path | None,
        typer.Option("--train", help="What was trained on: a file (JSON Lines) or a recipe; default: the run's"),
    ] = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="The questions (JSON Lines); default: those of the run's [eval]")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="Which evaluation: a stage's name; default: the last one")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file; default: RUN/analogy.json")] = None,
) -> None:
    """Correlate success with likeness to training procedures, and gain with the agreement of traces."""
    from isomorph.curriculum.commands.analogy import analogy

    analogy(results, train, test, label, out, console)


@app.command()
def study(
    file: Annotated[Path | None, typer.Argument(metavar="STUDY", help="The study's file (TOML)")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The study's folder; default: its name, beside its file")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Runs of this condition only; repeatable")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seeds", help="Runs of this seed only; repeatable")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; default: study.jobs, or as many as fit")
    ] = None,
    stop_after: Annotated[
        float | None, typer.Option("--stop-after", min=0, help="Minutes; runs then write a checkpoint and end")
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Take the test exam: once, after all runs")] = False,
    test_again: Annotated[
        bool, typer.Option("--test-again", help="Take the test exam although it was taken; the page will say so")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Only make the page of this study's folder, from its rows")
    ] = None,
) -> None:
    """Run conditions x seeds at equal budgets, compare them with intervals over seeds; resume what is unfinished."""
    from isomorph.curriculum.commands.study import Options, report_study
    from isomorph.curriculum.commands.study import study as run_study

    if (file is None) == (report is None):
        raise UserError("give either a study's file or --report DIR: isomorph study STUDY.toml")
    if report is not None:
        if any((out, only, seeds, jobs, stop_after is not None, test, test_again)):
            raise UserError("--report makes the page from the rows alone: remove the other options")
        report_study(report, console)
        return
    if (test or test_again) and any((only, seeds, jobs, stop_after is not None)):
        raise UserError("--test asks the models of all runs: remove --only, --seeds, --jobs and --stop-after")
    assert file is not None
    options = Options(
        out=out,
        only=tuple(only or ()),
        seeds=tuple(seeds or ()),
        jobs=jobs,
        stop_after_min=stop_after,
        test=test,
        test_again=test_again,
    )
    run_study(file, options, console)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    step: Annotated[
        int | None,
        typer.Option("--step", min=1, help="Step to show; default: the newest responses, of a step or an evaluation"),
    ] = None,
    num: Annotated[int, typer.Option("--num", min=1, help="Responses per representation")] = 3,
) -> None:
    """Print responses of a run with their prompts and rewards."""
    from isomorph.curriculum.commands.show import show_responses

    show_responses(run, step, num, console)


@data.command("make")
def make_data(
    representation: Annotated[
        list[str] | None, typer.Option("--representation", help="Repeatable; default: all")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Write what this recipe asks, in place of --seed and --set")
    ] = None,
    name: Annotated[str | None, typer.Option("--data", help="Of a recipe: one [data.NAME]")] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", help="Tasks per representation; default: the recipe's, or 10")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the generator; default: the recipe's, or 0")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="train, dev or test; no procedure is in two; eval is dev")
    ] = "train",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Difficulty as key=value, for example max_steps=8; repeatable")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help=f"{', '.join(GENERATED)}; default: {GENERATED[0]}, or the recipe's")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output file; default: standard output")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
) -> None:
    """Generate tasks as JSON Lines. For a recipe of kind "jsonl" write one file per representation."""
    from isomorph.curriculum.commands.data import PROMPTS, make, make_of_recipe

    asked = representation or []
    if recipe is not None:
        if settings or seed is not None or kind is not None:
            raise UserError("--recipe says how its tasks are drawn: remove --set, --seed and --kind")
        make_of_recipe(recipe, name, asked, prompts, out, split=split, force=force)
        return
    if name is not None:
        raise UserError("--data selects one of a recipe's [data.NAME]: name the recipe by --recipe")
    num = PROMPTS if prompts is None else prompts
    chosen = GENERATED[0] if kind is None else kind
    make(asked, num, settings or [], out, kind=chosen, seed=seed or 0, split=split, force=force)


_REWARDS = ("Reward functions of rows by name:", *(f"{name}: {known.line}" for name, known in BUILTINS.items()))


@data.command("inspect", epilog="\n\n".join(_REWARDS))
def inspect_data(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_ROWS", help="Recipe (TOML), or a file, a folder or hub:NAME as data.NAME.path of one"
        ),
    ],
    name: Annotated[str | None, typer.Option("--data", help="Of a recipe: one [data.NAME]; default: all")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Of rows: a column, or a template over columns")
    ] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="Of rows: the column of the accepted answer")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a folder or a hub dataset")] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Of a hub dataset")] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", help=f"Of a file of kind jsonl: its reward family, {', '.join(FAMILIES)}"),
    ] = None,
    representation: Annotated[
        str | None,
        typer.Option("--representation", help="With --family: form of the questions: natural, graph, code, ..."),
    ] = None,
) -> None:
    """Check data: columns, the first prompt, lengths, duplicates, broken rows, and what would be left out.

    Of a recipe also what each reward gives for the accepted answers of some rows.
    """
    keys = {k: v for k, v in (("prompt", prompt), ("answer", answer), ("split", split), ("subset", subset)) if v}
    if family is not None or representation is not None:
        if family is None or representation is None or keys or name is not None:
            raise UserError("--family and --representation are given together, and without the other options")
        from isomorph.curriculum.commands.data import inspect

        inspect(Path(target), family, representation, console)
        return
    from isomorph.curriculum.commands.inspect import inspect_rows

    inspect_rows(target, name, keys, console)


@app.command()
def doctor() -> None:
    """Check packages, devices, threads, memory and disk of this machine, with advice for each problem."""
    from isomorph.curriculum.commands.doctor import doctor

    doctor(console)


@kernels.command("compile")
def compile_kernels(
    arch: Annotated[
        list[int] | None, typer.Option("--arch", help="Compute capability, 90 for sm_90; repeatable; default: all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table")] = False,
) -> None:
    """Compile every GPU kernel in every configuration, without a GPU, and check its machine code."""
    from isomorph.curriculum.commands.kernels import compile_kernels

    compile_kernels(arch, as_json=as_json)


@bench.command("kernels")
def bench_kernels(
    op: Annotated[str | None, typer.Option("--op", help="One op, for example linear_loss; default: all")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output file: JSON Lines, one row per op, size and implementation")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the smallest size of each op, three rounds")] = False,
) -> None:
    """Measure time, memory and error of every op against other implementations. Needs a clone of the repository."""
    from isomorph.curriculum.commands.kernels import bench_kernels

    bench_kernels(op, out, quick=quick)
