"""``isomorph data inspect`` of rows: a recipe's data, or a file, a folder or a hub dataset by itself."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.curriculum.commands.sanity import show_rewards
from isomorph.curriculum.inputs import located
from isomorph.curriculum.lengths import LengthLimits
from isomorph.curriculum.recipe import Data, GeneratedData, Recipe
from isomorph.curriculum.rewards.spec import RewardTable
from isomorph.curriculum.rows.dataset import Dataset, Side
from isomorph.curriculum.rows.source import RowsSource
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.rows.table import Rows, training_rows
from isomorph.curriculum.sources import open_source, tiny_vocabulary
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.foreign import printable, shortened
from isomorph.engine.model.load import read_text
from isomorph.engine.model.text import TextCodec
from isomorph.engine.recipe_file import check_tables, load_recipe

MAX_MEASURED = 20_000  # training rows whose lengths are measured
MAX_LISTED = 10
NUM_REWARDED = 3  # rows whose accepted answers are rewarded


def inspect_rows(target: str, name: str | None, keys: dict[str, Any], console: Console) -> None:
    """Prints what rows hold, and what a recipe makes of them.

    ``target``: a recipe (.toml), of which ``name`` selects one [data.NAME], or what ``path`` of one may be, with the
    ``keys`` of a [data.NAME] of kind "rows" that are given. Raises UserError and DataError.
    """
    if target.endswith(".toml"):
        if keys:
            raise UserError(f"{target} says how its rows are read: remove --{', --'.join(keys)}")
        _inspect_recipe(Path(target), name, console)
        return
    if name is not None:
        raise UserError("--data selects one of a recipe's [data.NAME]: name a recipe, which ends in .toml")
    given = {"kind": "rows", "path": target, **keys}
    data = check_tables(given, RowsData, where=target)
    data = data.model_copy(update=data.located(Path()))
    if "prompt" not in keys:
        _show_rows(training_rows(data), console)
        console.print('give --prompt COLUMN or --prompt "a template with {column}" to see prompts', highlight=False)
        return
    side = Side(training_rows(data), data, target)
    _show_rows(side.rows, console)
    _show_prompts(side, np.arange(len(side.rows)), None, console)


def _inspect_recipe(path: Path, name: str | None, console: Console) -> None:
    recipe = located(load_recipe(path, [], Recipe))
    files = {n: data for n, data in recipe.data.items() if not isinstance(data, GeneratedData)}
    if name is not None and name not in files:
        raise UserError(f"{path}: --data must be one of {', '.join(files) or 'none'}, got {name!r}")
    if not files:
        raise UserError(f"{path}: all tasks are generated: isomorph data make writes some to look at")
    text, max_model_len = read_text(recipe.model, tiny_vocabulary(recipe))
    limits = LengthLimits(recipe=recipe, text=text, max_model_len=max_model_len)
    for key, data in files.items():
        if name in (None, key):
            console.rule(Text(f"data.{key}"), style="dim")
            _show_source(data, text, key, limits, console)


def _show_source(data: Data, text: TextCodec, name: str, limits: LengthLimits, console: Console) -> None:
    assert not isinstance(data, GeneratedData)
    source = open_source(data, text, name, limits)
    if isinstance(source, RowsSource):
        _show_rows(source.dataset.side.rows, console)
        _show_dataset(source.dataset, text, console)
    else:
        for representation in data.representations or ():
            _show_task(source.draw(representation, 0, 0)[0], text, console)
    for sentence in source.left_out or ["no row is left out"]:
        console.print(Text(printable(sentence)), soft_wrap=True)
    if isinstance(data, RewardTable):
        label = next(iter(source.dataset.training if isinstance(source, RowsSource) else data.representations or ()))
        tasks, position = [], 0
        for _ in range(NUM_REWARDED):
            task, position = source.draw(label, position, 0)
            tasks.append(task)
        show_rewards(data, name, source.columns, tasks, text, console)


def _show_rows(rows: Rows, console: Console) -> None:
    console.print(
        Text(f"{len(rows):,} rows with the columns {', '.join(map(printable, rows.columns))}"), soft_wrap=True
    )
    table = Table("column", "in the first row")
    for column, value in rows.row(0).items():
        table.add_row(Text(printable(column)), Text(shortened(str(value))))
    console.print(table)


def _show_dataset(dataset: Dataset, text: TextCodec | None, console: Console) -> None:
    for what, side, found in (
        ("training", dataset.side, dataset.training),
        ("evaluation", dataset.eval_side, dataset.held_out),
    ):
        labels = ", ".join(f"{printable(label)} {len(rows):,}" for label, rows in found.items())
        console.print(Text(f"{what}: {labels}"), soft_wrap=True)
        if side is dataset.eval_side and side is not dataset.side:
            console.print(f"prompts for evaluation that are training prompts, too: {dataset.num_in_both}")
    if dataset.examples:
        numbers = [dataset.side.rows.number(i) for i in dataset.examples]
        console.print(f"examples: rows {', '.join(map(str, numbers))}", highlight=False)
    _show_prompts(dataset.side, np.concatenate(list(dataset.training.values())), text, console)


def _show_prompts(side: Side, rows: np.ndarray, text: TextCodec | None, console: Console) -> None:
    """Repetitions and lengths of the prompts of ``rows``, and the first of them."""
    console.print(f"repeated prompts: {_listed(_repeated(side))}", highlight=False, soft_wrap=True)
    console.print(_lengths([side.task(int(i)) for i in rows[:MAX_MEASURED]], text))
    _show_task(side.task(int(rows[0])), text, console)


def _show_task(task: Task, text: TextCodec | None, console: Console) -> None:
    messages = task.messages or ({"role": "user", "content": task.question},)
    if text is None:
        prompt = "\n\n".join(f"[{message['role']}] {message['content']}" for message in messages)
    else:
        prompt = text.tokenizer.decode(text.encode_messages(messages, task.data))
    console.rule(style="dim")
    console.print(Text(printable(prompt)))
    console.print(Text(printable(f"\naccepted answer: {task.answer}")))
    if task.demonstration is not None:
        console.print(Text(printable(f"demonstration: {task.demonstration}")))
    console.rule(style="dim")


def _lengths(tasks: Sequence[Task], text: TextCodec | None) -> Table:
    unit = "characters" if text is None else "tokens"
    table = Table(f"{unit}, {len(tasks):,} training rows", "shortest", "median", "longest")

    def of_prompt(task: Task) -> int:
        messages = task.messages or ({"role": "user", "content": task.question},)
        if text is None:
            return sum(len(str(message["content"])) for message in messages)
        return len(text.encode_messages(messages, task.data))

    def of_text(words: str) -> int:
        return len(words) if text is None else len(text.encode_response(words))

    for name, lengths in (
        ("prompt", [of_prompt(task) for task in tasks]),
        ("accepted answer", [of_text(task.answer) for task in tasks if task.answer]),
        ("demonstration", [of_text(task.demonstration) for task in tasks if task.demonstration is not None]),
    ):
        if lengths:
            table.add_row(name, str(min(lengths)), f"{statistics.median(lengths):.0f}", str(max(lengths)))
    return table


def _repeated(side: Side) -> list[int]:
    """Numbers of the rows whose prompt an earlier row has."""
    return [side.rows.number(int(i)) for i in np.flatnonzero(side.first != np.arange(len(side.first)))]


def _listed(rows: Sequence[int]) -> str:
    if not rows:
        return "none"
    more = ", ..." if len(rows) > MAX_LISTED else ""
    return f"{len(rows):,} (rows {', '.join(map(str, rows[:MAX_LISTED]))}{more})"
