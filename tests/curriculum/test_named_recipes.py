"""Recipes by name, from the package's own files."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isomorph.curriculum.cli import app
from isomorph.curriculum.named_recipes import FOLDER, recipe_line, recipe_names, recipe_path
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import load_recipe


def test_every_name_is_a_whole_recipe_with_a_line() -> None:
    names = recipe_names()
    assert {"quickstart", "smoke", "smollm2_asynchow", "paper/graph"} <= set(names)
    assert "paper/base" not in names
    for name in names:
        assert load_recipe(recipe_path(Path(name)), [], Recipe).stage
        assert 5 < len(recipe_line(name)) < 150 and "\n" not in recipe_line(name), name


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path(Path("smoke")) == FOLDER / "smoke.toml"
    assert recipe_path(Path("smoke.toml")) == Path("smoke.toml")  # which load_recipe says is missing
    Path("smoke").write_text("")
    assert recipe_path(Path("smoke")) == Path("smoke")


@pytest.mark.parametrize(
    ("name", "expected"), [("quikstart", "did you mean 'quickstart'?"), ("paper/base", "isomorph recipes lists them")]
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(UserError, match="no such file, and no recipe of that name") as refused:
        recipe_path(Path(name))
    assert expected in str(refused.value)


def test_the_command_lists_them_and_the_shell_completes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()[:-1]] == recipe_names()
    words = {"_ISOMORPH_COMPLETE": "complete_bash", "COMP_WORDS": "isomorph train pap", "COMP_CWORD": "2"}
    completed = CliRunner().invoke(app, [], prog_name="isomorph", env=words)
    assert completed.output.split() == [name for name in recipe_names() if name.startswith("paper/")]
