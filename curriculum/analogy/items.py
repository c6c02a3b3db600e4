"""What the analyses read: per-item results of a run, and the procedures it was trained and evaluated on."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from isomorph.curriculum.analogy.structure import Structure, structures_of
from isomorph.curriculum.evaluation import evaluation_tasks
from isomorph.curriculum.recipe import GeneratedData, JsonlData, PlansData, Recipe
from isomorph.curriculum.report.run_record import read_completions
from isomorph.curriculum.rewards.families import ASYNC_PLAN
from isomorph.curriculum.sources import read_files
from isomorph.curriculum.tasks.asynchow import FORMS
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.curriculum.tasks.task import DataError, Task
from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import Row

Key = TypeVar("Key")
NUM_GENERATED = 1_000  # training procedures of generated data, which has no end


@dataclass(frozen=True, slots=True)
class Item:
    """One question of an evaluation and what came of it."""

    key: str
    representation: str
    is_correct: bool
    text: str | None  # the response; None where it is not recorded


def items_of_evaluation(run: Path, label: str, recipe: Recipe) -> list[Item]:
    """The greedy results of one evaluation. Raises UserError where their keys or themselves are not recorded."""
    answers = read_completions(run / "completions" / f"exam-{label}.jsonl")
    greedy = [row for row in answers or () if row.get("sample") is None]
    file = run / "evaluations" / f"{label}.jsonl"
    if file.is_file():
        rows = read_items(file)
        listed = [row.get("set", row["representation"]) for row in rows]
        has_texts = listed == [row["representation"] for row in greedy]
        texts = [row["text"] for row in greedy] if has_texts else [None] * len(rows)
        return [_item(row, text) for row, text in zip(rows, texts, strict=True)]
    if answers is None:
        raise UserError(f"{run}: the evaluation {label} is missing or incomplete: no {file.name} in evaluations/")
    keys = _keys_asked(recipe)
    if len(keys) != len(greedy):
        raise UserError(
            f"{file}: is missing, and of the {len(greedy)} responses in completions/exam-{label}.jsonl the keys are "
            f"not known ({len(keys)} questions were generated): evaluate the run again with this version"
        )
    return [_item({**row, "key": key}, row["text"]) for row, key in zip(greedy, keys, strict=True)]


def read_items(file: Path) -> list[Row]:
    """Rows of per-item results, with ``key``, ``representation`` and ``correct``. Raises UserError."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: must be a readable file of JSON Lines: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"key", "representation", "correct"} <= row.keys():
            raise UserError(f"{file}, line {number}: must have key, representation and correct, got {str(row)[:80]}")
    if not rows:
        raise UserError(f"{file}: must hold at least one item, is empty")
    return [row for row in rows if row.get("sample") is None]


def as_items(rows: Iterable[Row]) -> list[Item]:
    return [_item(row, None) for row in rows]


def _item(row: Row, text: str | None) -> Item:
    return Item(str(row["key"]), str(row["representation"]), bool(row["correct"]), text)


def _keys_asked(recipe: Recipe) -> list[str]:
    """Of generated questions, in the order in which an evaluation asks them."""
    found: list[str] = []
    for one in recipe.evaluation_sets:
        if isinstance(recipe.data[one.data], GeneratedData):
            for form in one.representations or ():
                found += [task.key for task in evaluation_tasks(recipe, {}, one, form)]
    return found


def evaluated_structures(recipe: Recipe) -> dict[str, Structure]:
    """Key -> procedure, of all planning questions that [eval] asks. Raises UserError, DataError."""
    found: dict[str, Structure] = {}
    for one in recipe.evaluation_sets:
        data = recipe.data[one.data]
        if isinstance(data, PlansData):
            form = (one.representations or data.representations)[0]
            found |= structures_of(evaluation_tasks(recipe, {}, one, form))
        elif isinstance(data, JsonlData) and data.family == ASYNC_PLAN.name:
            found |= structures_of(task for file in read_files(data) for task in file.held_out or ())
    return _some(found, "[eval] asks no planning question whose procedure can be read")


def training_structures(recipe: Recipe) -> list[Structure]:
    """The procedures of what the stages train on; of generated data a sample. Raises UserError, DataError."""
    found: dict[tuple[str, str], Structure] = {}
    for name, form in dict.fromkeys((part.data, part.representation) for s in recipe.stage for part in s.mixture):
        data, tasks = recipe.data[name], list[Task]()
        if isinstance(data, PlansData):
            tasks = data.tasks(form, NUM_GENERATED, seed=recipe.run.seed, split="train")
        elif isinstance(data, JsonlData) and data.family == ASYNC_PLAN.name:
            tasks = [task for file in read_files(data) if file.form == form for task in file.training or ()]
        found |= {(name, key): one for key, one in structures_of(tasks).items()}
    return list(_some(found, "no stage trains on planning questions whose procedures can be read").values())


def structures_in_file(file: Path) -> dict[str, Structure]:
    """Row number of the first row with the same procedure -> procedure; the file's form is found out. Raises UserError.

    Rows of ``isomorph data make`` have keys of their own, which are kept.
    """
    reasons: Sequence[str] = ()
    for form in FORMS:
        try:
            return structures_of(read_rows(file, ASYNC_PLAN.name, form))
        except DataError as error:
            reasons = (*reasons, f"as {form}: {error}")
    raise UserError(f"{file}: must hold planning questions of one form; {'; '.join(reasons)}")


def _some(found: dict[Key, Structure], otherwise: str) -> dict[Key, Structure]:
    if not found:
        raise UserError(f"{otherwise}: name a file of the paper's form with --train or --test")
    return found
