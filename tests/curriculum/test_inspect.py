"""``isomorph data inspect`` of recipes and rows."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from rich.console import Console

from isomorph.curriculum.cli import app
from isomorph.curriculum.commands.inspect import inspect_rows
from isomorph.curriculum.rewards.builtin import BUILTINS
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


def test_each_reward_is_tried_on_the_accepted_answers(folder: Path) -> None:
    (folder / "mine.py").write_text("def mine(answer):\n    return 1 / len(answer.text)\n")
    rewards = 'rewards = [{ function = "exact" }, { function = "formatted" }, { function = "mine.py:mine" }]'
    (folder / "run.toml").write_text(RECIPE.replace('rewards = [{ function = "exact" }]', rewards))
    said = printed(str(folder / "run.toml"))
    assert "reward exact, weight 1: 1.0 where the stated answer, or without one the whole response, is" in said
    assert f"reward mine, weight 1: {folder / 'mine.py'}:mine" in said
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│ line " in line]
    assert len(cells) == 9
    for row, response, exact, formatted, mine in cells:
        answer = ROWS[int(row.removeprefix("line ")) - 1]["answer"]
        exp = {
            f"the accepted answer: {answer}": ("1", "0", f"{1 / len(answer):g}"),
            f"it in tags: <answer>{answer}</answer>": ("1", "1", f"{1 / len(f'<answer>{answer}</answer>'):g}"),
            "nothing": ("0", "0", "error"),
        }
        assert (exact, formatted, mine) == exp[response]
    assert "mine.py, line 2, in mine: ZeroDivisionError" in said
    (folder / "mine.py").write_text("def other(answer):\n    return 1\n")
    with pytest.raises(UserError, match="it has no 'mine'; it has other"):
        printed(str(folder / "run.toml"))


def test_every_built_in_reward_says_what_it_is_in_a_line() -> None:
    for name, known in BUILTINS.items():
        assert 20 < len(known.line) < 140 and known.line.endswith((".", "and")), name
    said = typer.testing.CliRunner().invoke(app, ["data", "inspect", "--help"]).output
    assert all(f"{name}: {known.line[:20]}" in said for name, known in BUILTINS.items())
