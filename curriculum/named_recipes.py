"""The recipes that come with the package, by name: ``quickstart``, ``paper/graph``. They are package data."""

import difflib
from pathlib import Path

from isomorph.engine.config import UserError

FOLDER = Path(__file__).parent / "recipes"
SUFFIX = ".toml"


def recipe_path(recipe: Path) -> Path:
    """Returns the recipe's file: ``recipe`` if there is such a file, else the package's recipe of that name.

    Raises UserError for a name (no ``.toml`` at its end) that is neither.
    """
    if recipe.suffix == SUFFIX or recipe.is_file():
        return recipe
    names = recipe_names()
    if recipe.as_posix() in names:
        return FOLDER / f"{recipe.as_posix()}{SUFFIX}"
    near = difflib.get_close_matches(recipe.as_posix(), names, n=1, cutoff=0.5)
    raise UserError(
        f"{recipe}: no such file, and no recipe of that name"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + " (isomorph recipes lists them; a file of your own ends in .toml)"
    )


def recipe_names() -> list[str]:
    """Names of the package's recipes, those in a folder last; a file without stages is only there to be extended."""
    whole = (path for path in FOLDER.rglob(f"*{SUFFIX}") if "[[stage]]" in path.read_text(encoding="utf-8"))
    names = (path.relative_to(FOLDER).with_suffix("").as_posix() for path in whole)
    return sorted(names, key=lambda name: ("/" in name, name))


def recipe_line(name: str) -> str:
    """What a recipe is: the first comment of its file, up to the end of its first sentence."""
    lines = (FOLDER / f"{name}{SUFFIX}").read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# ").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")
