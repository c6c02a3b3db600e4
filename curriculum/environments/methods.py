"""Environments in the form of TRL's ``environment_factory``: a class whose public methods are the model's tools.

``reset(**row)`` may return a text, which is added to the prompt's last message; ``get_reward()``, where the class has
it, gives the reward when the model calls no further tool, or has no further turn.
"""

import inspect
from collections.abc import Callable
from typing import Any

from isomorph.curriculum.environments.done import Done


def has_methods(made: Any) -> bool:
    """Whether ``made``, a class or an object, is of this form: it has ``reset``, and no ``step``."""
    return callable(getattr(made, "reset", None)) and not callable(getattr(made, "step", None))


class MethodTools:
    """An environment of this form as one with ``reset`` and ``step``."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
        self.tools: dict[str, Callable[..., Any]] = {
            name: getattr(environment, name)
            for name in names
            if not name.startswith("_") and name not in ("reset", "get_reward", "close")
        }

    def reset(self, row: dict[str, Any]) -> str:
        """What is added to the prompt's last message. Raises TypeError for anything but a text or None."""
        parameters = inspect.signature(self.environment.reset).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        said = self.environment.reset(**(row if takes_all else {k: v for k, v in row.items() if k in parameters}))
        if not (said is None or isinstance(said, str)):
            raise TypeError(f"reset must return a text or None, got {said!r:.200}")
        return said or ""

    def step(self, text: str) -> Done:
        """The end: the model has called no tool."""
        reward = self.environment.get_reward() if hasattr(self.environment, "get_reward") else None
        return Done(reward)

    def close(self) -> None:
        if hasattr(self.environment, "close"):
            self.environment.close()
