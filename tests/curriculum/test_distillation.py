"""SFT on a file of a teacher's answers: several to a question, only right ones."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.rows.source import RowsSource
from isomorph.curriculum.rows.spec import RowsData
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.recipe_file import load_recipe

RECIPE = """
[model]
tiny = { tokenizer = "bytes", hidden_size = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1, max_model_len = 128 }
[data.teacher]
kind = "rows"
path = "answers.jsonl"
prompt = "question"
answer = "gold"
demonstration = "answers"
demonstrations_accepted = true
rewards = [{ function = "exact" }]
eval_share = 0.2
[[stage]]
name = "distillation"
steps = 3
objective.name = "sft"
batch = { prompts = 4 }
sampling = { max_new_tok = 48, samples_per_prompt = 1 }
mixture = [{ data = "teacher" }]
[eval]
data = "teacher"
prompts = 2
max_new_tok = 4
[run]
completions_every = 1
"""


def rows() -> list[dict[str, Any]]:
    """Of row n: n % 4 right answers and two wrong ones."""
    return [
        {
            "question": f"what is {n} + 1?",
            "gold": str(n + 1),
            "answers": [*(f"way {k}: <answer>{n + 1}</answer>" for k in range(n % 4)), "<answer>0</answer>", "no"],
        }
        for n in range(20)
    ]


def written(folder: Path) -> Path:
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder / "answers.jsonl"


def source(path: Path, **changes: Any) -> RowsSource:
    keys = {"prompt": "question", "answer": "gold", "demonstration": "answers", "rewards": [{"function": "exact"}]}
    data = RowsData.model_validate({"kind": "rows", "path": str(path), "eval_share": 0.2, **keys, **changes})
    return RowsSource(data, TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[1]), "teacher")


def drawn(found: RowsSource, number: int) -> list[tuple[str, str]]:
    position, pairs = 0, []
    for _ in range(number):
        task, position = found.draw("natural", position, 7)
        pairs.append((task.question, task.demonstration or ""))
    return pairs


def test_a_run_trains_on_accepted_answers_only_and_counts_them(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "run").mkdir()
    console = Console(file=io.StringIO(), width=500)
    recipe = load_recipe(tmp_path / "recipe.toml", [], Recipe)
    run_recipe(recipe, tmp_path / "run", console, lambda: False, ALONE, resume=False)
    counted = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]["teacher"]
    trained = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [row["reward/mean"] for row in trained] == [1.0] * 3
    training = [row for row in rows() if not _is_held_out(tmp_path, row)]
    given = sum(len(row["answers"]) for row in training)
    accepted = sum(len(row["answers"]) - 2 for row in training)
    assert counted["demonstrations"] == {"given": given, "accepted": accepted}
    without = sum(len(row["answers"]) == 2 for row in training)
    assert counted["left_out"] == {"natural": without}
    assert isinstance(console.file, io.StringIO)
    said = f"{accepted} of {given} demonstrations are accepted by the reward; {without} of 16 rows have none"
    assert said in console.file.getvalue()


def _is_held_out(folder: Path, row: dict[str, Any]) -> bool:
    return row["question"] in {task.question for task in source(folder / "answers.jsonl").held_out_tasks("natural", 4)}


def test_one_answer_a_pass_is_another_one_in_another_pass(tmp_path: Path) -> None:
    found = source(written(tmp_path))
    found.accept(lambda tasks: [f"<answer>{task.answer}</answer>" in (task.demonstration or "") for task in tasks])
    usable = {question for question, _ in drawn(found, 60)}
    pairs = drawn(found, 60 * len(usable))
    counts = Counter(question for question, _ in pairs)
    assert max(counts.values()) - min(counts.values()) <= 60 // len(usable) + 60  # each question once a pass
    answers = {q: {a for other, a in pairs if other == q} for q in usable}
    right = {row["question"]: {a for a in row["answers"] if a.startswith("way")} for row in rows()}
    assert answers == {question: right[question] for question in usable}
    assert drawn(found, 20) == pairs[:20]  # deterministic


def test_all_answers_come_once_in_each_pass(tmp_path: Path) -> None:
    found = source(written(tmp_path), demonstration_choice="all")
    found.accept(lambda tasks: [f"<answer>{task.answer}</answer>" in (task.demonstration or "") for task in tasks])
    held_out = {task.question for task in found.held_out_tasks("natural", 4)}
    every = sorted((r["question"], a) for r in rows() if r["question"] not in held_out for a in r["answers"][:-2])
    pairs = drawn(found, 2 * len(every))
    assert sorted(pairs[: len(every)]) == sorted(pairs[len(every) :]) == every
    assert pairs[: len(every)] != pairs[len(every) :]


def test_a_file_without_an_accepted_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its demonstrations is accepted by the reward"):
        source(written(tmp_path)).accept(lambda tasks: [False] * len(tasks))


def test_acceptance_needs_rewards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demonstrations_accepted needs rewards"):
        source(written(tmp_path), demonstrations_accepted=True, rewards=[])
