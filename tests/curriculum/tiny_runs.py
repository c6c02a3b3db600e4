"""Whole runs of a tiny model in this process: what the tests of rows, rewards, tools and evaluations share."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import resumed_recipe
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe

TINY = """
[model.tiny]
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 16
"""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    recipe: Path, name: str = "run", *overrides: str, resume: bool = False, report: bool = False
) -> tuple[Path, str]:
    """Runs the recipe in the folder ``name`` beside it; returns the folder, and what was printed."""
    folder, out = recipe.parent / name, io.StringIO()
    folder.mkdir(exist_ok=True)
    loaded = load_recipe(recipe, list(overrides), Recipe)
    if resume:
        loaded, _ = resumed_recipe(read_run_json(folder), list(overrides), folder)
    threads = torch.get_num_threads()
    try:
        run_recipe(loaded, folder, Console(file=out, width=300), lambda: False, ALONE, resume=resume, report=report)
    finally:
        torch.set_num_threads(threads)  # recipes ask for one
    return folder, out.getvalue()


def summary_of(folder: Path) -> dict[str, Any]:
    """summary.json of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def completions(folder: Path) -> list[dict[str, Any]]:
    """The responses of all steps."""
    files = sorted((folder / "completions").glob("step-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
