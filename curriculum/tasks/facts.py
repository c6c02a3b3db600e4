"""What is known of generated tasks besides their texts: rates of shortcuts, records of items, kinds of errors."""

import re
from collections.abc import Sequence
from typing import Any

from isomorph.curriculum.rewards.answer import last_answer
from isomorph.curriculum.tasks.battery import BAG, Solvable, rates
from isomorph.curriculum.tasks.kinds import AnyGenerator, generator_of
from isomorph.curriculum.tasks.task import Task

# of whole numbers; in "2 + 3 + 4 = 9", "-3 + 5 = 2", "1.5 + 2 = 3.5" and "10 / 2 + 3 = 8" the last sign is not all
_STEP = re.compile(r"(?<![-+*/] )(?<![-\w.,])(\d+) ([-+*]) (\d+) = (-?\d+)(?![\d.,]*\d)")
_RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def view_of(task: Task) -> Any:
    """What shortcuts see of a generated task; None of another task."""
    generator = generator_of(task)
    return None if generator is None else generator.view(task.row)


def rates_of(tasks: Sequence[Task]) -> dict[str, float]:
    """Shortcut -> share of the generated ones among ``tasks`` that it solves; {} without any.

    Raises ValueError where they are of several kinds, whose shortcuts differ.
    """
    groups: dict[tuple[str, str], list[tuple[Task, Any]]] = {}
    for task in tasks:
        if (view := view_of(task)) is not None:
            groups.setdefault((task.family, repr(task.difficulty)), []).append((task, view))
    if len({family for family, _ in groups}) > 1:
        raise ValueError(f"tasks must be of one kind, got {sorted({family for family, _ in groups})}")
    total = sum(map(len, groups.values()))
    found: dict[str, float] = {}
    for own in groups.values():
        shortcuts = _battery(own[0][0])
        for name, rate in rates([view for _, view in own], shortcuts).items():
            found[name] = found.get(name, 0.0) + rate * len(own) / total
    return found


def _generator(task: Task) -> AnyGenerator:
    generator = generator_of(task)
    if generator is None:
        raise ValueError(f"a generated task is needed, got one of {task.family}")
    return generator


def _battery(task: Task) -> Any:
    generator = _generator(task)
    return generator.battery(generator.difficulty.model_validate(task.difficulty))


def item_record(task: Task, text: str, *, is_correct: bool, has_answer: bool | None) -> dict[str, Any]:
    """What is kept of the response to one question of an evaluation; None where it is not known.

    ``error``: what a wrong response shows. "format": it states no answer of the kind; "arithmetic": one of its
    sums, differences or products is wrong; "shortcut:NAME": its answer is that of a shortcut; "wrong path" (of
    arithmetic "wrong value"): another answer. "none": it is right.
    ``hard``: no shortcut solves the question. ``wording``: "kept" where its wordings are the test exam's own.
    ``path_len``: steps on the longest path, the fewest where several are longest; roads of the cheapest route;
    operations that wait for each other.
    """
    answer = last_answer(text)
    view = view_of(task)
    known: dict[str, Any] = dict.fromkeys(("steps", "width", "path_len", "hard", "wording"))
    error = None
    if view is not None:
        known |= _generator(task).sizes(view, task.row)
        known["hard"] = not any(shortcut(view) == view.total for shortcut in _battery(task).values())
        known["wording"] = task.row["wording"]
        error = "none" if is_correct else error_of(task, view, text)
    elif is_correct:
        error = "none"
    elif has_answer is False:
        error = "format"
    return {
        "representation": task.representation,
        "key": task.key,
        **known,
        "gold": task.answer,
        "answer": answer,
        "correct": is_correct,
        "error": error,
    }


def error_of(task: Task, view: Solvable, text: str) -> str:
    """The kind of a wrong response; see ``item_record``."""
    generator = _generator(task)
    stated = generator.stated(task.row, last_answer(text) or "")
    if stated is None:
        return "format"
    if any(_RESULT[sign](int(a), int(b)) != int(c) for a, sign, b, c in _STEP.findall(text)):
        return "arithmetic"
    low, high = stated
    for name, answer in _battery(task).items():
        if name != BAG and answer(view) == low == high:
            return f"shortcut:{name}"
    return generator.wrong
