"""``isomorph data``: generates tasks as JSON Lines, by a difficulty or a recipe; checks such files."""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, create_model
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.curriculum.judge import judge
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.rewards.families import ASYNC_PLAN, FAMILIES
from isomorph.curriculum.tasks.jsonl import has_solver, read_rows
from isomorph.curriculum.tasks.kinds import GENERATORS, AnyGenerator
from isomorph.curriculum.tasks.task import Split, Task
from isomorph.engine.config import Section, UserError
from isomorph.engine.foreign import printable
from isomorph.engine.recipe_file import check_tables, load_recipe, toml_value

PROMPTS = 10
NUM_SAMPLES = 3
MAX_LISTED = 10


def make(
    representations: Sequence[str],
    num_tasks: int,
    settings: Sequence[str],
    out: Path | None,
    *,
    kind: str,
    seed: int,
    split: str,
    force: bool,
) -> None:
    """Writes generated tasks to ``out`` or the standard output. Raises UserError and DataError."""
    difficulty = parse_difficulty(settings, kind)
    write_rows(make_rows(representations, num_tasks, difficulty, kind=kind, seed=seed, split=split), out, force=force)


def _kind(name: str) -> AnyGenerator:
    if name not in GENERATORS:
        raise UserError(f"--kind must be one of {', '.join(GENERATORS)}, got {name!r}")
    return GENERATORS[name]


def make_of_recipe(
    file: Path,
    name: str | None,
    representations: Sequence[str],
    num_tasks: int | None,
    out: Path | None,
    *,
    split: str,
    force: bool,
) -> None:
    """Writes what a recipe asks: of ``train`` the tasks that its stages draw, else those of an exam of its [eval].

    ``name``: of the [data.NAME]; None: the one that is generated. ``num_tasks``: None: as many as [eval] asks. Raises
    UserError and DataError.
    """
    recipe = load_recipe(file, [], Recipe)
    data = _generated(recipe, name, file)
    part = _checked_split(split)
    most = num_tasks or next((one.prompts for one in recipe.eval.all_sets if recipe.data[one.data] is data), PROMPTS)
    seed = recipe.run.seed if part == "train" else recipe.eval.seed
    rows = make_rows(representations, most, data.difficulty, kind=data.kind, seed=seed, split=part)
    write_rows(rows, out, force=force)


def _generated(recipe: Recipe, name: str | None, file: Path) -> GeneratedData:
    known = {key: data for key, data in recipe.data.items() if isinstance(data, GeneratedData)}
    if name is None and len(known) != 1:
        raise UserError(
            f"{file} has {len(known)} generated [data.NAME]: name one by --data ({', '.join(known) or '-'})"
        )
    chosen = next(iter(known)) if name is None else name
    if chosen not in known:
        raise UserError(f"{file}: --data must be one of {', '.join(known) or 'none'}, got {name!r}")
    return known[chosen]


def inspect(file: Path, family: str, representation: str, console: Console) -> None:
    """Prints what a file of tasks holds. Raises UserError and DataError."""
    show_inspection(inspect_file(file, family, representation), file, console)


def parse_difficulty(settings: Sequence[str], kind: str = ASYNC_PLAN.name) -> BaseModel:
    """``key=value`` texts, values as in a recipe. Raises UserError, which names the nearest key for an unknown one."""
    tables: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set must read key=value, for example --set max_steps=8; got {setting!r}")
        tables[key.strip()] = toml_value(value.strip())
    schema = create_model("Settings", __base__=_Settings, difficulty=(_kind(kind).difficulty, ...))
    found: BaseModel = check_tables({"difficulty": tables}, schema, where="--set").difficulty
    return found


class _Settings(Section):
    difficulty: Any


def make_rows(
    representations: Sequence[str],
    num_tasks: int,
    difficulty: BaseModel,
    *,
    kind: str = ASYNC_PLAN.name,
    seed: int,
    split: str,
) -> list[str]:
    """JSON lines with the keys question, answer, representation, key, demonstration and sequential_answer.

    One representation after the other, all where none is named; row i of each is the same instance. ``difficulty``: of
    the ``kind``.

    Raises:
        UserError: an unknown kind, representation or split, or fewer than one task.
        DataError: the difficulty allows no instance.
    """
    generator = _kind(kind)
    if unknown := [name for name in representations if name not in generator.representations]:
        raise UserError(f"--representation must be one of {', '.join(generator.representations)}, got {unknown[0]!r}")
    if num_tasks < 1:
        raise UserError(f"--prompts must be at least 1, got {num_tasks}")
    names = representations or generator.representations
    part = _checked_split(split)
    return [
        _row(task) for name in names for task in generator.tasks(difficulty, name, num_tasks, seed=seed, split=part)
    ]


def _checked_split(split: str) -> Split:
    splits: tuple[Split, ...] = ("train", "dev", "test", "eval")
    for known in splits:
        if split == known:
            return known
    raise UserError(f"--split must be train, dev or test, got {split!r}")


def _row(task: Task) -> str:
    row = {
        "question": task.question,
        "answer": task.answer,
        "representation": task.representation,
        "key": task.key,
        "demonstration": task.demonstration,
        "sequential_answer": task.sequential_answer,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_rows(rows: Sequence[str], out: Path | None, *, force: bool = False) -> None:
    """Writes to ``out``, or to the standard output without one. Raises UserError where the file cannot be written.

    ``force``: also over a file that is there.
    """
    if out is None:
        _print_rows(rows)
        return
    if out.is_file() and not force:
        raise UserError(f"--out {out}: the file exists; give --force to overwrite it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: the file cannot be written: {error}") from error


def _print_rows(rows: Sequence[str]) -> None:
    try:
        sys.stdout.writelines(rows)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has ended, as head does; Python would fail when it flushes again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The contents of a file of tasks. Rows are numbered from 1."""

    tasks: tuple[Task, ...]
    duplicates: tuple[int, ...]  # rows whose question an earlier row has, too
    contradictions: tuple[int, ...]  # of these, rows whose answer differs from the earlier row's
    unsolved: tuple[int, ...] | None  # rows whose answer differs from the solver's; None: the family has no solver

    @property
    def num_procedures(self) -> int:
        return len({task.key for task in self.tasks})


def inspect_file(file: Path, family: str, representation: str) -> Inspection:
    """Reads and checks a file of JSON Lines.

    Raises:
        UserError: an unknown family.
        DataError: the file cannot be read, is empty, or has a broken row: file, line and defect are named.
    """
    if family not in FAMILIES:
        raise UserError(f"--family must be one of {', '.join(FAMILIES)}, got {family!r}")
    tasks = read_rows(file, family, representation)
    answers: dict[str, str] = {}
    duplicates, contradictions = [], []
    for number, task in enumerate(tasks, 1):
        if task.question in answers:
            duplicates.append(number)
        if answers.setdefault(task.question, task.answer) != task.answer:
            contradictions.append(number)
    return Inspection(
        tasks=tuple(tasks),
        duplicates=tuple(duplicates),
        contradictions=tuple(contradictions),
        unsolved=_unsolved(tasks) if has_solver(family) and any(task.demonstration for task in tasks) else None,
    )


def _unsolved(tasks: Sequence[Task]) -> tuple[int, ...]:
    return tuple(
        number
        for number, task in enumerate(tasks, 1)
        if not task.is_correct(judge(task.family, task.demonstration or "", task.answer))
    )


def show_inspection(inspection: Inspection, file: Path, console: Console) -> None:
    """Prints counts, lengths and a few rows."""
    tasks = inspection.tasks
    found = f"{file}: {len(tasks)} rows, {inspection.num_procedures} different procedures"
    console.print(Text(printable(found)), soft_wrap=True)
    console.print(_lengths(tasks))
    console.print(f"repeated questions: {_listed(inspection.duplicates)}", highlight=False)
    console.print(f"of these with a different answer: {_listed(inspection.contradictions)}", highlight=False)
    if inspection.unsolved is not None:
        share = 1 - len(inspection.unsolved) / len(tasks)
        console.print(f"answers confirmed by the solver: {share:.2%}", highlight=False)
        console.print(f"answers not confirmed: {_listed(inspection.unsolved)}", highlight=False)
    for task in tasks[:: max(1, len(tasks) // NUM_SAMPLES)][:NUM_SAMPLES]:
        console.rule(style="dim")
        console.print(Text(printable(f"{task.question}\n\nanswer: {task.answer}")))


def _lengths(tasks: Sequence[Task]) -> Table:
    table = Table("characters", "shortest", "median", "longest")
    texts = {
        "question": [task.question for task in tasks],
        "answer": [task.answer for task in tasks],
        "demonstration": [task.demonstration for task in tasks if task.demonstration is not None],
    }
    for name, found in texts.items():
        if found:
            lengths = sorted(map(len, found))
            table.add_row(name, str(lengths[0]), f"{statistics.median(lengths):.0f}", str(lengths[-1]))
    return table


def _listed(rows: Sequence[int]) -> str:
    if not rows:
        return "none"
    more = ", ..." if len(rows) > MAX_LISTED else ""
    return f"{len(rows)} (rows {', '.join(map(str, rows[:MAX_LISTED]))}{more})"
