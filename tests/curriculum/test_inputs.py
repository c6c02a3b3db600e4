"""Where a run's files lie, and whether they are what they were."""

from pathlib import Path

import pytest

from isomorph.curriculum.inputs import changed_files, describe_files, located
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import check_tables, load_recipe

RECIPE = """
model.tiny.num_layers = 1
data.rows = { kind = "jsonl", family = "math", files = { text = "a.jsonl" } }
stage = [{ name = "only", steps = 1, mixture = [{ data = "rows", representation = "text" }] }]
eval = { data = "rows", representations = ["text"] }
"""


def recipe_of(path: str, model: str = "") -> Recipe:
    tables = {
        "model": {"path": model} if model else {"tiny": {}},
        "data": {"rows": {"kind": "jsonl", "family": "math", "files": {"text": path}}},
        "stage": [{"name": "only", "steps": 1, "mixture": [{"data": "rows", "representation": "text"}]}],
        "eval": {"data": "rows", "representations": ["text"]},
    }
    return check_tables(tables, Recipe, where="test")


def test_paths_become_absolute_and_a_hub_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROWS", "below")
    (tmp_path / "model").mkdir()
    local, hub = (located(recipe_of("$ROWS/a.jsonl", model)) for model in ("model", "someone/model"))
    for recipe in (local, hub):
        assert recipe.data["rows"].files == {"text": str(tmp_path / "below" / "a.jsonl")}  # type: ignore[union-attr]
    assert (local.model.path, hub.model.path) == (str(tmp_path / "model"), "someone/model")
    assert located(local) == local
    monkeypatch.setenv("MODEL", "elsewhere/model")
    by_variable = located(recipe_of("$ROWS/a.jsonl", "$MODEL"))
    assert by_variable.model.path == str(tmp_path / "elsewhere" / "model")  # although nothing is there
    for name in ("in a folder", "elsewhere"):  # a recipe's data lies beside it, wherever the command starts
        (tmp_path / name).mkdir()
    (tmp_path / "in a folder" / "run.toml").write_text(RECIPE)
    beside = located(load_recipe(tmp_path / "in a folder" / "run.toml", [], Recipe))
    assert beside.data["rows"].files == {"text": str(tmp_path / "in a folder" / "a.jsonl")}  # type: ignore[union-attr]
    assert located(beside) == beside
    monkeypatch.delenv("ROWS")
    for recipe in (recipe_of("$ROWS/a.jsonl"), recipe_of("a.jsonl", "$ROWS")):
        with pytest.raises(UserError, match="environment variable"):
            located(recipe)


def test_a_file_with_another_content_is_named(tmp_path: Path) -> None:
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text("one\n")
    model.mkdir()
    (model / "config.json").write_text("{}")
    recipe = recipe_of(str(rows), str(model))
    recorded = describe_files(recipe)
    assert changed_files(recorded, recipe) == [] == changed_files({}, recipe)
    rows.touch()  # a newer file of the same content has not changed
    (model / "model.safetensors").touch()  # nor are other weights: those of a run stand in its checkpoints
    assert changed_files(recorded, recipe) == []
    rows.write_text("two\n")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    changed = changed_files(recorded, recipe)
    assert changed == [
        f"{rows} has changed since the run began",
        f"{model / 'chat_template.jinja'} did not exist when the run began",
    ]
    rows.unlink()
    assert f"{rows} no longer exists" in changed_files(recorded, recipe)


def test_the_same_rows_elsewhere_are_the_same(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("one\n")
    first, moved = (recipe_of(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert changed_files(describe_files(first), moved) == []


def test_files_of_rows_are_recorded_with_the_run(tmp_path: Path) -> None:
    """Rows, their files for evaluation, the chat template and the files of rewards; of a hub dataset its path."""
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    for name in ("chat.jinja", "score.py"):
        (tmp_path / name).write_text(name)
    table = {"kind": "rows", "rewards": [{"function": "score.py:right"}, {"function": "exact"}]}
    here = {**table, "path": ".", "split": "train", "eval_split": "test", "chat_template": "chat.jinja"}
    tables = {
        "model": {"tiny": {"tokenizer": "bytes"}},
        "data": {"rows": here, "hub": {**table, "path": "hub:a/b", "eval_share": 0.5}},
        "stage": [{"name": "only", "steps": 1, "mixture": [{"data": name} for name in ("rows", "hub")]}],
        "eval": {"data": "rows", "representations": ["natural"]},
    }
    recipe = located(check_tables(tables, Recipe, where="test", folder=tmp_path))
    assert recipe.data["hub"].path == "hub:a/b"  # type: ignore[union-attr]
    recorded = describe_files(recipe)
    assert {Path(file["path"]).name for file in recorded.values()} == {
        *("train-0.jsonl", "train-1.jsonl", "test.jsonl", "chat.jinja", "score.py", "b")
    }
    (tmp_path / "train-1.jsonl").write_text('{"prompt": "b"}\n')
    (tmp_path / "train-2.jsonl").write_text('{"prompt": "c"}\n')
    changed = changed_files(recorded, recipe)
    assert changed == [
        f"{tmp_path / 'train-1.jsonl'} has changed since the run began",
        f"{tmp_path / 'train-2.jsonl'} did not exist when the run began",
    ]
    (tmp_path / "train-1.jsonl").unlink()
    assert f"{tmp_path / 'train-1.jsonl'} no longer exists" in changed_files(recorded, recipe)
