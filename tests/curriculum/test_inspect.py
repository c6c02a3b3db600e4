"""``isomorph data inspect`` of recipes and rows."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isomorph.curriculum.commands.inspect import inspect_rows
from isomorph.engine.config import UserError

ROWS = [
    {"question": f"What is {n} + 1?", "answer": f"{n + 1}", "level": "easy" if n % 2 else "hard"} for n in range(20)
]
ROWS += [ROWS[3], {"question": "long " * 40, "answer": "0", "level": "easy"}]
RECIPE = """
[model.tiny]
tokenizer = "bytes"
[data.sums]
kind = "rows"
path = "rows.jsonl"
prompt = "question"
answer = "answer"
rewards = [{ function = "exact" }]
representation_column = "level"
system = "Add."
examples = 1
max_prompt_tok = 150
[[stage]]
name = "rl"
steps = 1
mixture = [{ data = "sums", representation = "easy" }]
[eval]
data = "sums"
representations = ["hard"]
prompts = 1
"""


def printed(target: str, name: str | None = None, **keys: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    inspect_rows(target, name, keys, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.toml").write_text(RECIPE)
    return tmp_path


def test_a_recipes_data_are_shown_as_it_will_read_them(folder: Path) -> None:
    said = printed(str(folder / "run.toml"))
    assert "22 rows with the columns question, answer, level" in said
    assert "repeated prompts: 1 (rows 21)" in said
    (number,) = [line for line in said.splitlines() if line.startswith("examples: rows ")]
    shown = ROWS[int(number.removeprefix("examples: rows ")) - 1]
    assert f"[BOS]Add.\n\n{shown['question']}\n\n{shown['answer']}\n\nWhat is " in said.replace("[BOS] ", "[BOS]")
    assert "rows.jsonl: 1 of 22 rows are left out: row 22: a prompt of " in said and "max_prompt_tok=150" in said
    assert "tokens, " in said and "accepted answer" in said


def test_rows_without_a_recipe(folder: Path) -> None:
    file = str(folder / "rows.jsonl")
    assert "22 rows with the columns question, answer, level" in printed(file)
    said = printed(file, prompt="{question} Say the number.", answer="answer")
    assert "Say the number." in said and "characters, " in said and "repeated prompts: 1 (rows 21)" in said


def test_what_cannot_be_inspected_is_one_sentence(folder: Path) -> None:
    recipe = str(folder / "run.toml")
    for said, given in (
        ("--data must be one of sums, got 'other'", dict(target=recipe, name="other")),
        ("says how its rows are read: remove --prompt", dict(target=recipe, prompt="question")),
        ("--data selects one of a recipe's", dict(target=str(folder / "rows.jsonl"), name="sums")),
        ("there is no column 'q'", dict(target=str(folder / "rows.jsonl"), prompt="q")),
    ):
        with pytest.raises(UserError, match=said):
            printed(**given)  # type: ignore[arg-type]
