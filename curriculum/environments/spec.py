"""The keys of a ``[data.NAME]`` table that make its rollouts conversations with an environment or with tools.

    environment = "maze.py:Maze"                # reset(row) -> messages, step(text) -> messages or Done(reward)
    tools = ["maze.py:look", "maze.py:count"]   # plain functions, described to the model by signature and docstring

    environment = "verifiers:gsm8k"             # an installed environment of the package verifiers, with its own rows
    environment = "verifiers:maze.py"           # a file with load_environment

A path is relative to the recipe's folder; ``package.module:Maze`` is a package's. A class of TRL's
``environment_factory`` works as an environment: see environments/methods.py.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from isomorph.curriculum.paths import resolve
from isomorph.engine.config import Section
from isomorph.engine.effect import KeyPath

VERIFIERS = "verifiers:"  # before an environment of that package
VERIFIERS_VERSION = "0.1.10"  # the last one whose packages go with those of vLLM and TRL


class EnvironmentTable(Section):
    """What a ``[data.NAME]`` table says of several turns; without ``environment`` and ``tools`` there is one turn."""

    environment: str | None = None  # "file.py:Maze", "package.module:Maze"
    tools: tuple[str, ...] = ()  # "file.py:look", "package.module:look"
    max_turns: int = Field(8, ge=1)  # of the model
    # of one call of reset or step, or of the tool calls of one turn
    turn_deadline_s: float = Field(10.0, gt=0, allow_inf_nan=False)
    environment_arguments: dict[str, Any] = {}  # given to the environment's class as keywords

    @property
    def is_of_verifiers(self) -> bool:
        """Whether the environment is one of the package verifiers, which has rows of its own."""
        return self.environment is not None and self.environment.startswith(VERIFIERS)

    @property
    def has_turns(self) -> bool:
        """Whether its rollouts are conversations."""
        return self.environment is not None or bool(self.tools)

    def idle(self) -> dict[KeyPath, str]:
        keys = super().idle()
        if not self.has_turns:
            keys |= {(key,): "there is no environment and no tool" for key in ("max_turns", "turn_deadline_s")}
        if self.environment is None:
            keys[("environment_arguments",)] = "there is no environment"
        return keys

    def located_code(self, folder: Path) -> dict[str, Any]:
        """``environment`` and ``tools`` with the absolute paths of their files; ``folder``: of the recipe."""
        environment = None if self.environment is None else _located(self.environment, folder)
        return {"environment": environment, "tools": [_located(tool, folder) for tool in self.tools]}

    def files_of_code(self) -> list[Path]:
        """The Python files that ``environment`` and ``tools`` stand in."""
        places = [_file_of(place) for place in (self.environment, *self.tools) if place is not None]
        return [Path(home) for home in dict.fromkeys(places) if home.endswith(".py")]

    @model_validator(mode="after")
    def _locations_name_something(self) -> "EnvironmentTable":
        for key, places in (("environment", (self.environment,)), ("tools", self.tools)):
            for place in places:
                if place is not None and not all(place.rpartition(":")[::2]):
                    raise ValueError(f'{key} must be "file.py:NAME" or "package.module:NAME", got {place!r}')
        if self.is_of_verifiers and self.tools:
            raise ValueError("tools cannot be given with an environment of verifiers, which has its own")
        called = [tool.rpartition(":")[2] for tool in self.tools]
        if twice := sorted({name for name in called if called.count(name) > 1}):
            raise ValueError(f"two of tools would be called {twice[0]!r} by the model: give one function another name")
        return self


def _located(place: str, folder: Path) -> str:
    if place.startswith(VERIFIERS):
        name = place.removeprefix(VERIFIERS)
        return f"{VERIFIERS}{resolve(name, folder)}" if name.endswith(".py") else place
    home, _, name = place.rpartition(":")
    return f"{resolve(home, folder)}:{name}" if home.endswith(".py") else place


def _file_of(place: str) -> str:
    """The file of a place; another text where it is none."""
    return place.removeprefix(VERIFIERS) if place.startswith(VERIFIERS) else place.rpartition(":")[0]
