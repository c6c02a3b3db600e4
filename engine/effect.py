"""Which keys of a recipe have no effect, and who wrote them.

Every ``Section`` says by ``idle()`` which of its keys, or of the tables in it, change nothing in the present context.
A key that the user wrote and that is idle is refused by name. A key at the top level that stages share is idle where
no stage takes it, or where it is idle in every stage that does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

KeyPath = tuple[str | int, ...]  # ("stage", 0, "optim", "lr")


def leaves(tables: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value in ``tables``; a list of plain values is one."""
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
    """Every key under ``section`` that changes nothing there, and why."""
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
    """A sentence for each path of ``given`` that is idle.

    ``takers``: where the value at a path that several stages share comes to lie; None for a path of its own.
    """
    found = []
    for path in given:
        places = takers(path)
        reasons = [_why_idle(place, idle) for place in ([path] if places is None else places)]
        if all(why is not None for why in reasons):
            why = reasons[0] if reasons else "every stage has a value of its own"
            found.append(f"{'.'.join(map(str, path))} has no effect, because {why}: leave it out")
    return found


def _why_idle(path: KeyPath, idle: Mapping[KeyPath, str]) -> str | None:
    """A table can be idle as a whole."""
    return next((idle[path[:end]] for end in range(1, len(path) + 1) if path[:end] in idle), None)
