"""``isomorph analogy``: likeness of evaluation to training instances against success, and agreement of traces."""

import importlib.util
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isomorph.curriculum.named_recipes import recipe_path
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.telemetry import process_memory_gib


def analogy(
    results: Path, train: Path | None, test: Path | None, label: str | None, out: Path | None, console: Console
) -> None:
    """Prints two tables and writes their rows as JSON; arguments are the command's options. Raises UserError."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("isomorph analogy needs scipy: pip install 'isomorph[study]'")
    from isomorph.curriculum.analogy import analysis, items
    from isomorph.curriculum.report.run_record import read_run

    started = time.perf_counter()
    record = read_run(results) if results.is_dir() else None
    recipe = record.recipe if record else None
    if record is not None:
        if not record.evaluations:
            raise UserError(f"{results} holds no evaluation yet")
        label = label or record.evaluations[-1].label
        asked = items.items_of_evaluation(results, label, record.recipe)
    else:
        asked = items.as_items(items.read_items(results))
    if test is not None:
        evaluated = items.structures_in_file(test)
    elif recipe is not None:
        evaluated = items.evaluated_structures(recipe)
    else:
        raise UserError(f"{results} is a file: name the file of its questions with --test")
    training = _training(train, recipe)
    rows = analysis.analogy_rows(asked, evaluated, training)
    traces = analysis.alignment_rows(record, results) if record else []
    found = {"of": str(results), "label": label, "training": len(training), "analogy": rows, "alignment": traces}
    file = out or (results / "analogy.json" if record else results.with_suffix(".analogy.json"))
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found, console)
    _, peak = process_memory_gib()
    memory = "" if peak is None else f", peak memory {peak:.2f} GiB"
    size = f"{len(evaluated)} x {len(training)} procedures"
    console.print(f"{size}, {time.perf_counter() - started:.1f} s{memory}; written: {file}", highlight=False)


def _training(train: Path | None, recipe: Recipe | None) -> list[Any]:
    from isomorph.curriculum.analogy import items

    if train is not None and train.suffix in (".jsonl", ".json"):
        return list(items.structures_in_file(train).values())
    if train is not None:
        from isomorph.curriculum.inputs import located

        return items.training_structures(located(load_recipe(recipe_path(train), [], Recipe)))
    if recipe is None:
        raise UserError("name what was trained on with --train: a file of the paper's form, or a recipe")
    return items.training_structures(recipe)


ANALOGY_COLUMNS = ("representation", "items", "right", "analogy", "frequency", "related", "analogy - frequency")
ALIGNMENT_COLUMNS = ("stages", "from", "to", "readable", "alignment", "gain", "correlation with gain", "slope")


def analogy_cells(row: dict[str, Any]) -> list[str]:
    """Of the table with ``ANALOGY_COLUMNS``."""
    estimates = (row[name] for name in ("analogy", "frequency", "related", "analogy_minus_frequency"))
    return [row["representation"], str(row["items"]), f"{row['success']:.1%}", *map(estimate_text, estimates)]


def alignment_cells(row: dict[str, Any]) -> list[str]:
    """Of the table with ``ALIGNMENT_COLUMNS``."""
    means = ("-" if row[name] is None else f"{row[name]:+.2f}" for name in ("alignment", "gain"))
    readable = f"{row['readable']} of {row['items']}"
    return [
        row["change"],
        row["from"],
        row["to"],
        readable,
        *means,
        *(estimate_text(row[n]) for n in ("with_gain", "slope")),
    ]


def estimate_text(estimate: dict[str, Any]) -> str:
    """``+0.27 (+0.14 to +0.39)``."""
    if estimate["value"] is None:
        return "not defined"
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the tables: correlations with success, and of traces where a stage brought a new representation."""
    _print("correlation with success, 95 % over items", ANALOGY_COLUMNS, map(analogy_cells, found["analogy"]), console)
    if found["alignment"]:
        title = "traces before a stage against the gain in it, 95 % over items"
        _print(title, ALIGNMENT_COLUMNS, map(alignment_cells, found["alignment"]), console)


def _print(title: str, columns: Sequence[str], rows: Iterable[list[str]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
