"""A few hundred cases of tests/fuzz.py, and what the thousands have found."""

import importlib.util
import json
from pathlib import Path

import pytest

from isomorph.curriculum.inputs import located
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.rewards.answer import Answer
from isomorph.curriculum.rewards.builtin import physics
from isomorph.curriculum.rows.dataset import Side
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.rows.table import training_rows
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import load_recipe

SMOKE = Path(__file__).parents[1] / "curriculum" / "recipes" / "smoke.toml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stage.².steps=1", "must be a stage's number"),  # int() reads no superscripts, isdigit() does
        ("stage.0.name=" + "[" * 5000, "match pattern"),  # TOML's reader raises RecursionError
        ("stage.0.steps=" + "9" * 5000, "must be a number"),  # and ValueError for a number of so many digits
        ("batch.prompts=1" + "0" * 400, "64 bits"),
        ("run.seed=4294967296", "less than"),  # PyTorch's generator takes 64 bits, numpy's 32
        ("model.tiny.hidden_size=1000000000", "fewer than 2 billion weights"),
    ],
)
def test_an_override_that_had_a_traceback_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(SMOKE, [override], Recipe)


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000, 'extends = "a\\u0000b"'])
def test_a_recipe_that_had_a_traceback_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UserError, match="recipe.toml"):
        load_recipe(tmp_path / "recipe.toml", [], Recipe)


def test_the_home_of_nobody_is_a_path_like_others(tmp_path: Path) -> None:
    text = SMOKE.read_text()
    before, after = text.partition("[model]")[0], text[text.index("[run]") :]
    (tmp_path / "recipe.toml").write_text(f'{before}[model]\npath = "~nobody-here/x"\n{after}')
    recipe = load_recipe(tmp_path / "recipe.toml", [], Recipe)
    assert located(recipe).model.path == "~nobody-here/x"


@pytest.mark.parametrize("content", [5, {"text": "a"}, ["a"], [{"text": 5}], [{"image": "a"}]])
def test_a_message_of_no_text_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": [{"role": "user", "content": content}]}) + "\n")
    data = RowsData(kind="rows", path=str(path), prompt="q")
    with pytest.raises(DataError, match="must be messages of text"):
        Side(training_rows(data), data, "rows")


def test_a_unit_that_is_no_unit_is_wrong() -> None:
    for unit in ("m (", "((", "m)", "m^(2"):
        assert physics(Answer(prompt="", text=f"<answer>5 {unit}</answer>", gold="5 m")) == 0.0


def test_wrong_input_is_refused_in_a_sentence() -> None:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    counts, wrong = fuzz.fuzz(300, 1, ["recipes", "overrides", "rows", "answers", "checkpoints", "runs"])
    if wrong:
        pytest.fail("\n\n".join(wrong.values())[:8000])
    assert sum(found.total() for found in counts.values()) >= 295
    assert all(counts[name]["accepted"] and counts[name]["refused"] for name in ("recipes", "overrides", "rows"))
