"""What does not fit is named before the first step: for all stages and evaluations, files and generated questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from isomorph.curriculum.lengths import at_most_in_prompt, at_most_in_response
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.stage import Curriculum
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.recipe_file import check_tables

TEXT = TextCodec(word_tokenizer(["a", "b"]), chat_template=False, stop_ids=[1])  # [BOS], then a token a word


def task(words: str) -> Task:
    return Task(family="math", representation="natural", question=words, answer="1", key="0")


def row(words: int, key: int, demonstration: int | None = 1) -> str:
    written = {"key": f"k{key}", "sequential_answer": None}
    shown = None if demonstration is None else " ".join(["b"] * demonstration)
    return json.dumps({"question": " ".join(["a"] * words), "answer": "7 min", "demonstration": shown, **written})


def curriculum(
    folder: Path, rows: list[str], *stages: dict[str, Any], max_model_len: int = 64, **eval_: Any
) -> Curriculum:
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    files = {"natural": str(folder / "rows.jsonl")}
    mixture = [{"data": "rows", "representation": "natural"}]
    tables = {
        "model": {"path": "a/model"},
        "data": {"rows": {"kind": "jsonl", "family": "async_plan", "files": files, "eval_share": 0.5}},
        "stage": [{"name": f"s{i}", "steps": 1, "mixture": mixture, **stage} for i, stage in enumerate(stages)],
        "eval": {"data": "rows", "representations": ["natural"], "max_new_tok": 8, **eval_},
    }
    return Curriculum(check_tables(tables, Recipe, where="test"), TEXT, max_model_len)


SHORT = {"sampling": {"max_new_tok": 8, "samples_per_prompt": 2}}
SFT = {"objective": {"name": "sft"}, "sampling": {"max_new_tok": 8, "samples_per_prompt": 1}}


def kept(source: Curriculum) -> int:
    files = source.sources["rows"]
    return len(files.training["natural"]) + len(files.held_out["natural"])


def test_a_row_that_fits_exactly_stays_and_one_token_more_is_left_out_by_number(tmp_path: Path) -> None:
    rows = [row(3 + n, n) for n in range(6)]
    fits = 64 - 8 - 1  # [BOS]
    source = curriculum(tmp_path, [*rows, row(fits, 6), row(fits - 1, 7)], SHORT)
    assert source.sources["rows"].left_out == [] and kept(source) == 8
    source = curriculum(tmp_path, [*rows, row(fits + 1, 6), row(fits - 1, 7)], SHORT)
    (told,) = source.sources["rows"].left_out
    assert f"{tmp_path}/rows.jsonl: 1 of 8 rows are left out: row 7: a prompt of 57 tokens" in told
    assert "make 65, the model has positions for 64" in told and kept(source) == 7


def test_the_strictest_stage_decides_and_demonstrations_count(tmp_path: Path) -> None:
    """Whichever half a row is in: in the other one nobody asks for its demonstration."""
    rows = [row(3 + n, n, demonstration=40 if n % 2 else 2) for n in range(8)]
    plain = curriculum(tmp_path, rows, SHORT)
    assert plain.sources["rows"].left_out == []
    source = curriculum(tmp_path, rows, SHORT, SFT)
    held_out = len(source.sources["rows"].held_out["natural"])
    assert held_out == 4 and 0 < len(source.sources["rows"].training["natural"]) < 4
    assert "a demonstration of 41 tokens, sampling.max_new_tok must be at least that, got 8" in str(
        source.sources["rows"].left_out
    )
    with pytest.raises(UserError, match="no natural row fits.*has no demonstration, and stage s1 is supervised"):
        curriculum(tmp_path, [row(3 + n, n, None) for n in range(8)], SHORT, SFT)


def test_a_demonstration_counts_with_its_tokens_not_with_its_characters(tmp_path: Path) -> None:
    rows = [row(10 + n, n, demonstration=30) for n in range(8)]  # 31 tokens with the stop token, 59 characters
    stage = {**SFT, "sampling": {"max_new_tok": 60, "samples_per_prompt": 1}}
    assert curriculum(tmp_path, rows, stage).sources["rows"].left_out == []


def test_a_micro_batch_must_hold_a_prompt_and_its_longest_response(tmp_path: Path) -> None:
    rows = [row(9 + n, n) for n in range(4)]
    assert kept(curriculum(tmp_path, rows, {**SHORT, "batch": {"micro_batch_tok": 1 + 12 + 8 - 1}})) == 4
    with pytest.raises(UserError, match="batch.micro_batch_tok=9"):
        curriculum(tmp_path, rows, {**SHORT, "batch": {"micro_batch_tok": 9}})


@pytest.mark.parametrize("max_model_len", [60, 4096])
def test_generated_questions_are_drawn_before_the_first_step(max_model_len: int) -> None:
    tables = {
        "model": {"path": "a/model"},
        "data": {"plans": {"kind": "async_plan"}},
        "stage": [{"name": "s", "steps": 1, "mixture": [{"data": "plans", "representation": "graph"}]}],
        "eval": {"data": "plans", "representations": ["graph"], "prompts": 2},
    }
    recipe = check_tables(tables, Recipe, where="test")
    if max_model_len == 4096:
        Curriculum(recipe, TEXT, max_model_len)
    else:
        with pytest.raises(UserError, match="stage s, a graph question of plans: .* positions for 60"):
            Curriculum(recipe, TEXT, max_model_len)


def test_a_longer_question_than_those_seen_at_the_start_is_drawn_again() -> None:
    form = {"form": "terse", "demonstration": "compact", "min_steps": 5, "max_steps": 6, "max_duration": 9}
    difficulty = {**form, "edge_probability": 0.5, "max_predecessors": 3, "shuffled": True}
    tables = {
        "model": {"path": "a/model"},
        "data": {"plans": {"kind": "async_plan", "difficulty": difficulty}},
        "stage": [{"name": "s", "steps": 1, "mixture": [{"data": "plans"}], "sampling": {"max_new_tok": 100}}],
        "eval": {"data": "plans", "representations": ["natural"], "prompts": 2, "max_new_tok": 1},
    }
    recipe = check_tables(tables, Recipe, where="test")
    positions = 200
    while True:  # the fewest that the start accepts
        try:
            source = Curriculum(recipe, TEXT, positions)
            break
        except UserError:
            positions += 1
    roomy = [len(prompt.token_ids) for prompt in Curriculum(recipe, TEXT, 4096).take(3000)]
    drawn = source.take(3000)
    assert all(len(prompt.token_ids) + 100 <= positions for prompt in drawn)
    assert source.redrawn == {"plans": sum(length + 100 > positions for length in roomy)} != {"plans": 0}
    assert [prompt.prompt_id for prompt in drawn] == list(range(3000))
    resumed = Curriculum(recipe, TEXT, positions)
    resumed.load_state_dict(source.state_dict())
    assert resumed.redrawn == source.redrawn


@pytest.mark.parametrize("words", ["a", "a b a", "", "aaaa bbbb cccc", "ä b", "日本 語"])
def test_the_bound_on_the_number_of_tokens_is_one(words: str) -> None:
    for is_prompt in (True, False):
        exact = len(TEXT.encode_prompt(words) if is_prompt else TEXT.encode_response(words))
        for limit in (0, 1000):
            bound = (
                at_most_in_prompt(TEXT, task(words), limit) if is_prompt else at_most_in_response(TEXT, words, limit)
            )
            assert exact == bound if limit == 0 else exact <= bound
