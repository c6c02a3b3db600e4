"""Paths in a recipe: relative to the recipe's folder, with ``$NAME`` and ``~`` replaced."""

import os
from pathlib import Path

from isomorph.engine.config import UserError


def resolve(path: str, folder: Path) -> str:
    """The absolute path of ``path`` as a recipe in ``folder`` writes it.

    ``$NAME`` and ``${NAME}`` are variables of the environment, ``~`` is the home folder. Nothing is looked up: the file
    need not exist. Raises UserError where a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise UserError(f"{path!r}: set the environment variable it names to the folder that holds the file")
    return os.path.abspath(folder / expanded)
