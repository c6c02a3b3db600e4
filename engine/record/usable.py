"""Which checkpoint a run goes on from: the newest, or, where that is damaged or of another run or version, one before.

Every checkpoint that is passed over is named, with what is wrong with it, and renamed to damaged-step-N: it does not
count as one of the newest any more, which later ones push out, and nothing that it holds is deleted.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.record.checkpoint import (
    REPLACED,
    UnusableCheckpoint,
    complete_checkpoints,
    read_by_all,
    read_state,
    restore_replaced,
)

T = TypeVar("T")

ASIDE = "damaged-"


def load_newest(root: Path, load: Callable[[Path], T], ranks: Ranks, say: Callable[[str], None]) -> tuple[Path, T]:
    """The newest checkpoint under ``root`` that ``load`` takes, and what it returns. A collective.

    ``load`` raises UnusableCheckpoint where an earlier checkpoint may do better. Raises UserError where it raises
    another one, or there is no checkpoint that it takes; then nothing is renamed.
    """
    refused: list[UnusableCheckpoint] = []
    for folder in reversed(_all(root)):
        try:
            found = read_by_all(ranks, partial(load, folder))
        except UnusableCheckpoint as error:
            refused.append(error)
            continue
        for passed in refused:
            aside = ranks.from_first(partial(_set_aside, passed.folder))
            say(f"warning: {passed.folder}: {passed.why}; it is kept as {aside.name}, and {folder} is used instead")
        if folder.name.startswith(REPLACED):  # a process was killed while it gave the successor this name
            folder = folder.with_name(folder.name.removeprefix(REPLACED))
            ranks.from_first(partial(restore_replaced, folder))
        return folder, found
    if not refused:
        raise UserError(f"{root} holds no complete checkpoint: start a new run with isomorph train RECIPE")
    whys = "; ".join(f"{passed.folder.name}: {passed.why}" for passed in refused)
    raise UserError(
        f"{root} holds no checkpoint that can be used ({whys}): restore one of them, or start a new run with isomorph "
        "train RECIPE"
    )


def newest_state(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state.json can be used, and what that holds; None where there is none."""
    for folder in reversed(_all(root)):
        try:
            return folder, read_state(folder)
        except UnusableCheckpoint:
            continue  # named when the run resumes
    return None


def _all(root: Path) -> list[Path]:
    """Complete checkpoints of steps, and folders of their names that have lost their state.json; oldest first."""
    complete = complete_checkpoints(root)
    names = {path.name.removeprefix(REPLACED) for path in complete}
    torn = [path for path in root.glob("step-*") if path.is_dir() and path.name not in names]
    return sorted([*complete, *torn], key=lambda path: path.name.removeprefix(REPLACED))


def _set_aside(folder: Path) -> Path:
    name = f"{ASIDE}{folder.name.removeprefix(REPLACED)}"
    aside, i = folder.with_name(name), 2
    while aside.exists():
        aside, i = folder.with_name(f"{name}-{i}"), i + 1
    try:
        return folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be renamed to {aside.name}: {error}") from error
