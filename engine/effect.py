"""Finds keys of a recipe that have no effect ("idle" keys), so that a recipe that sets one can be refused.

``Section.idle()`` returns the keys of a table that have no effect with the values of the others. A top-level key that
stages share has no effect if no stage takes it, or if it has none in every stage that does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

KeyPath = tuple[str | int, ...]  # ("stage", 0, "optim", "lr")


def leaves(tables: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Yields the path of every value in ``tables``; a list without tables is one value."""
    if isinstance(tables, dict):
        items: Iterator[tuple[Any, Any]] = iter(tables.items())
    elif isinstance(tables, list) and any(isinstance(item, dict) for item in tables):
        items = iter(enumerate(tables))
    else:
        yield at
        return
    for key, value in items:
        yield from leaves(value, (*at, key))


def idle_paths(section: Any, at: KeyPath = ()) -> dict[KeyPath, str]:
    """Returns every key under ``section`` that has no effect, and why. ``at``: path of ``section``."""
    if isinstance(section, BaseModel):
        found = {(*at, *path): why for path, why in section.idle().items()} if hasattr(section, "idle") else {}
        for key in type(section).model_fields:
            found |= idle_paths(getattr(section, key), (*at, key))
        return found
    items = enumerate(section) if isinstance(section, tuple) else section.items() if isinstance(section, dict) else ()
    return {path: why for key, value in items for path, why in idle_paths(value, (*at, key)).items()}


def idle_sentences(
    given: Iterable[KeyPath], idle: Mapping[KeyPath, str], takers: Callable[[KeyPath], list[KeyPath] | None]
) -> list[str]:
    """Returns a sentence for each path of ``given`` that has no effect.

    ``takers(path)``: the paths in the stages that take a shared top-level value; None if ``path`` is not shared.
    """
    found = []
    for path in given:
        places = takers(path)
        reasons = [_why_idle(place, idle) for place in ([path] if places is None else places)]
        if all(why is not None for why in reasons):
            why = reasons[0] if reasons else "every stage has a value of its own"
            found.append(f"{'.'.join(map(str, path))} has no effect, because {why}: remove it")
    return found


def _why_idle(path: KeyPath, idle: Mapping[KeyPath, str]) -> str | None:
    """Returns why ``path``, or a table that contains it, has no effect; None if it has one."""
    return next((idle[path[:end]] for end in range(1, len(path) + 1) if path[:end] in idle), None)
