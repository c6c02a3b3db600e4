"""What an environment's author needs: ``Done``, and what an environment is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]  # {"role": "user", "content": "..."}


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a conversation. ``reward``: of the rollout, finite; None: the environment gives none."""

    reward: float | None = None


class Environment(Protocol):
    """One conversation: an object is made for each rollout, in a worker process."""

    def reset(self, row: dict[str, Any]) -> str | Sequence[Message] | None:
        """Begins, with a row of the data; returns the messages of the prompt, or the text of one user message.

        None: the row's own prompt.

        May have a second argument ``seed``, an int. All rollouts of a prompt get the same row and seed, and must return
        the same messages.
        """
        ...

    def step(self, text: str) -> str | Sequence[Message] | Done:
        """What the model wrote in one turn -> what is said to it, or ``Done``."""
        ...
