"""The files that a run reads: their absolute paths, and whether they changed since the run began."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.paths import resolve
from isomorph.curriculum.recipe import JsonlData, Recipe
from isomorph.curriculum.rewards.spec import RewardTable
from isomorph.curriculum.rows.spec import HUB, RowsData
from isomorph.curriculum.rows.table import files_of
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import Ranks

# of a model folder: what determines tokenisation; the weights are in the checkpoints
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)

REWARDS, ENVIRONMENT = ".rewards/", ".environment/"  # in the place of a file of reward functions, of an environment


def located(recipe: Recipe) -> Recipe:
    """``recipe`` with absolute paths: those of its data, and of a model that is not a hub name.

    Paths of data are relative to the recipe's folder, that of a model to the working folder. Variables of the
    environment and ``~`` are replaced; a variable makes it a path. Raises UserError where one is not set.
    """
    tables = recipe.model_dump()
    for name, data in recipe.data.items():
        if hasattr(data, "located"):
            tables["data"][name] |= data.located(recipe.folder)
    tables["model"]["path"] = located_model(recipe.model.path)
    return Recipe.model_validate(tables, context={"folder": recipe.folder})


def located_model(path: str | None) -> str | None:
    """``model.path`` as an absolute path where it is one; a hub name stays. Raises UserError as ``located`` does."""
    if path is not None and ("$" in path or os.path.exists(os.path.expanduser(path))):
        return resolve(path, Path())
    return path


def pinned(recipe: Recipe, ranks: Ranks) -> Recipe:
    """``recipe`` with the present commit of each dataset of the hub, so that a resumed run reads the same rows.

    Raises UserError where the hub has no such dataset. A collective.
    """
    paths = _hub_paths(recipe)
    if not paths:
        return recipe
    from isomorph.curriculum.rows.hub import with_revision

    found = ranks.from_first(lambda: {at: HUB + with_revision(path.removeprefix(HUB)) for at, path in paths.items()})
    tables = recipe.model_dump()
    for place, path in found.items():
        _, name, key = place.split(".")
        tables["data"][name][key] = path
    return Recipe.model_validate(tables, context={"folder": recipe.folder})


def _hub_paths(recipe: Recipe) -> dict[str, str]:
    """Place in the recipe -> path of a dataset of the hub."""
    rows = {name: data for name, data in recipe.data.items() if isinstance(data, RowsData)}
    found = {f"data.{n}.{key}": getattr(data, key) or "" for n, data in rows.items() for key in ("path", "eval_path")}
    return {place: path for place, path in found.items() if path.startswith(HUB)}


def input_files(recipe: Recipe) -> dict[str, Path]:
    """Place in the recipe -> file: data files, and the model's configuration and tokenizer."""
    found: dict[str, Path] = {}
    for name, data in recipe.data.items():
        if isinstance(data, RowsData):
            found |= {f"data.{name}.{place}": file for place, file in _files_of_rows(data).items()}
        if isinstance(data, RewardTable):
            files = [Path(entry.function.rpartition(":")[0]) for entry in data.rewards if entry.is_file]
            found |= {f"data.{name}{REWARDS}{place}": file for place, file in _told_apart(files).items()}
        if isinstance(data, EnvironmentTable):
            own = _told_apart(data.files_of_code())
            found |= {f"data.{name}{ENVIRONMENT}{place}": file for place, file in own.items()}
        if isinstance(data, JsonlData):
            found |= {f"data.{name}.files.{form}": Path(path) for form, path in data.files.items()}
            found |= {f"data.{name}.eval_files.{form}": Path(path) for form, path in data.eval_files.items()}
    if recipe.model.path is not None:
        folder = Path(recipe.model.path)
        found |= {f"model.path/{name}": folder / name for name in MODEL_FILES if (folder / name).is_file()}
    return found


def _told_apart(files: Sequence[Path]) -> dict[str, Path]:
    """Each file by its name; by as many folders before it as tell it from others of the name, where there are some."""
    found: dict[str, Path] = {}
    for file in dict.fromkeys(files):
        others = [other for other in files if other != file]
        count = next(n for n in range(1, len(file.parts) + 1) if all(o.parts[-n:] != file.parts[-n:] for o in others))
        found["/".join(file.parts[-count:])] = file
    return found


def _files_of_rows(data: RowsData) -> dict[str, Path]:
    found = {"chat_template": Path(data.chat_template)} if data.chat_template else {}
    wanted = {"path": (data.path, data.split)}
    if data.has_eval_rows:
        wanted["eval_path"] = (data.eval_path or data.path, data.eval_split)
    for place, (path, split) in wanted.items():
        if path is None:  # rows of the environment
            continue
        files = files_of(path, split)
        found |= {place: files[0]} if files == [Path(path)] else {f"{place}/{f.relative_to(path)}": f for f in files}
    return found


def describe_files(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Path and SHA-256 of each of ``input_files``, for run.json; of a dataset of the hub hub:NAME@COMMIT, and None.

    Raises UserError for a file that cannot be read.
    """
    of_hub = {place: {"path": path, "sha256": None} for place, path in _hub_paths(recipe).items()}
    return of_hub | {
        place: {"path": str(path), "sha256": sha256_of(path)} for place, path in input_files(recipe).items()
    }


def changed_files(recorded: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> list[str]:
    """A sentence for each file whose content differs from what ``describe_files`` recorded when the run began."""
    found, sentences, of_hub = input_files(recipe), [], _hub_paths(recipe)
    for place in sorted({*recorded, *(found if recorded else ())}):
        if REWARDS in place or ENVIRONMENT in place:
            continue
        if place in recorded and recorded[place]["path"].startswith(HUB):
            if of_hub.get(place) != (before := recorded[place]["path"]):
                sentences.append(f"{place} is {of_hub.get(place)}, and was {before} when the run began")
            continue
        if place not in recorded:
            sentences.append(f"{found[place]} did not exist when the run began")
        elif place not in found or not found[place].is_file():
            sentences.append(f"{found.get(place, recorded[place]['path'])} no longer exists")
        elif sha256_of(found[place]) != recorded[place]["sha256"]:
            sentences.append(f"{found[place]} has changed since the run began")
    return sentences


def changed_rewards(recorded: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> list[str]:
    """A sentence for each file of reward functions or environments that differs from what the run began with.

    It may have been mended.
    """
    found = {place: p for place, p in input_files(recipe).items() if REWARDS in place or ENVIRONMENT in place}
    return [
        f"{path} has changed since the run began: {'rewards' if REWARDS in place else 'turns'} are not those of the "
        "steps before"
        for place, path in sorted(found.items())
        if place in recorded and sha256_of(path) != recorded[place]["sha256"]
    ]


def sha256_of(path: Path) -> str:
    """Of a file's content. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: must be a readable file: {error}") from error
