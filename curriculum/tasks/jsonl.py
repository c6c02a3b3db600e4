"""Reads tasks from JSON Lines such as the paper's: one object a line with the keys ``question`` and ``answer``."""

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from isomorph.curriculum.rewards.families import ARITHMETIC, ASYNC_PLAN, ROUTES, check_answer, check_reward
from isomorph.curriculum.rewards.pool import unreadable_answers
from isomorph.curriculum.tasks.asynchow import (
    FORMS,
    demonstrate_plan,
    demonstrate_question,
    parse_question,
    plan_key,
    sequential_total,
    solve_question,
)
from isomorph.curriculum.tasks.task import DataError, Task

__all__ = [
    "demonstrate_question",
    "has_solver",
    "read_rows",
    "read_test_rows",
    "repeated_procedures",
    "solve_question",
    "split_rows",
]

MAX_ROW_CHARS = 1_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")  # json joins whole pairs into one character


def read_rows(
    path: str | PathLike[str], family: str, representation: str, *, reward: str = "strict", is_test: bool = False
) -> list[Task]:
    """The tasks of a file, in its order. A task's key is the number of the first row with the same procedure.

    Async-planning tasks get a demonstration and the sequential answer: worked out from questions of the paper's form,
    or read from rows of ``isomorph data make``, which have a ``key``. Two of the paper's rows are the same procedure if
    they differ only in words and numbering; other rows if their keys or questions are equal.

    Raises:
        ValueError: an unknown family, or one without this reward.
        DataError: the file cannot be read, is empty, has a broken row or an accepted answer that cannot be compared
            with (file, line and defect are named), or a package that scores its family is not installed.
    """
    check_reward(family, reward)
    first_rows: dict[str, int] = {}
    tasks: list[Task] = []
    numbers: list[int] = []  # of their lines
    for number, line in _lines(path):
        try:
            task = _task(line, family, representation, is_solved=not is_test or representation in FORMS)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        tasks.append(replace(task, reward=reward, key=str(first_rows.setdefault(task.key, len(tasks)))))
        numbers.append(number)
    _refuse_unreadable_answers(path, numbers, tasks)
    return tasks


def read_test_rows(files: Mapping[str, str], family: str, *, reward: str = "strict") -> dict[str, list[Task]]:
    """The tasks of files that are evaluated on alone, by representation.

    Where all files have equally many rows, row i of each is the same procedure: a row of a form whose questions are not
    parsed, such as a dialect, then gets the key of row i of a form whose questions are.

    Raises:
        ValueError, DataError: as ``read_rows``.
    """
    rows = {form: read_rows(path, family, form, reward=reward, is_test=True) for form, path in files.items()}
    parsed = next((tasks for form, tasks in rows.items() if form in FORMS), None)
    for form, tasks in rows.items():
        if parsed is not None and form not in FORMS and len(tasks) == len(parsed):
            rows[form] = [replace(task, key=known.key) for task, known in zip(tasks, parsed, strict=True)]
    return rows


def repeated_procedures(training: Iterable[Task], held_out: Iterable[Task]) -> list[str]:
    """Keys of the held-out tasks whose procedure is one of training, up to words and the numbering of steps.

    Both of one form; questions that are not of the paper's form count as different.
    """
    known = {_procedure(task) for task in training} - {None}
    return list(dict.fromkeys(task.key for task in held_out if _procedure(task) in known))


def _procedure(task: Task) -> str | None:
    try:
        return plan_key(parse_question(task.question, task.representation))
    except DataError:
        return None


def _refuse_unreadable_answers(path: str | PathLike[str], numbers: list[int], tasks: list[Task]) -> None:
    try:
        refused = unreadable_answers(tasks[0].family, [task.answer for task in tasks], tasks[0].reward)
    except ImportError as error:
        raise DataError(f"{path}: {error}") from error
    for number, task in zip(numbers, tasks, strict=True):
        if task.answer in refused:
            raise DataError(f"{path}, line {number}: answer: {refused[task.answer]}")


def split_rows(
    rows: Mapping[str, list[Task]], *, eval_share: float, seed: int
) -> tuple[dict[str, list[Task]], dict[str, list[Task]]]:
    """Training and held-out tasks of each representation; row i of all files is the same procedure.

    No procedure is on both sides in any form: rows with a common key stay together.

    Raises:
        ValueError: eval_share is not between 0 and 1.
        DataError: the files differ in their number of rows, or the share leaves one side empty.
    """
    if not 0 < eval_share < 1:
        raise ValueError(f"eval_share must be between 0 and 1, got {eval_share}")
    counts = {name: len(tasks) for name, tasks in rows.items()}
    if len(set(counts.values())) != 1:
        raise DataError(f"row i of all files must be the same procedure, got different numbers of rows: {counts}")
    procedures = _procedures(list(rows.values()))
    names = sorted(set(procedures))
    num_held_out = round(eval_share * len(names))
    if not 0 < num_held_out < len(names):
        raise DataError(
            f"eval_share = {eval_share} of {len(names)} procedures leaves no task for training or evaluation: change it"
        )
    held_out = set(random.Random(seed).sample(names, num_held_out))

    def side(wanted: bool) -> dict[str, list[Task]]:
        return {
            name: [t for t, p in zip(tasks, procedures, strict=True) if (p in held_out) == wanted]
            for name, tasks in rows.items()
        }

    return side(False), side(True)


def _procedures(files: list[list[Task]]) -> list[int]:
    """For each row the number of the first row that shares a key with it, directly or through other rows."""
    first = list(range(len(files[0])))

    def root(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    for tasks in files:
        seen: dict[str, int] = {}
        for i, task in enumerate(tasks):
            one, other = sorted((root(i), root(seen.setdefault(task.key, i))))
            first[other] = one
    return [root(i) for i in range(len(first))]


def _lines(path: str | PathLike[str]) -> list[tuple[int, str]]:
    """(number, line) of every line that is not blank; a byte order mark and any line ends are accepted."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a readable file of JSON Lines in UTF-8: {error}") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: must hold at least one row, is empty")
    return rows


def _task(line: str, family: str, representation: str, *, is_solved: bool) -> Task:
    record = _record(line)
    question, answer = _question_and_answer(record)
    try:
        check_answer(family, answer)
    except ValueError as error:
        raise DataError(f"answer: {error}") from error
    task = Task(family=family, representation=representation, question=question, answer=answer, key=question)
    solve = _SOLVERS.get(family) if is_solved or "key" in record else None
    return task if solve is None else solve(task, record)


def has_solver(family: str) -> bool:
    """Whether ``read_rows`` gives this family's tasks demonstrations, worked out from their questions."""
    return family in _SOLVERS


def _with_plan_solved(task: Task, record: dict[str, Any]) -> Task:
    if "key" in record:
        return _with_own_solution(task, record)
    plan = parse_question(task.question, task.representation)
    return replace(
        task, key=plan_key(plan), demonstration=demonstrate_plan(plan), sequential_answer=sequential_total(plan)
    )


def _with_own_solution_if_any(task: Task, record: dict[str, Any]) -> Task:
    return _with_own_solution(task, record) if "key" in record else task


# family -> (task, its row) -> the task with key, demonstration and sequential answer
_SOLVERS: Mapping[str, Callable[[Task, dict[str, Any]], Task]] = {
    ASYNC_PLAN.name: _with_plan_solved,
    ROUTES.name: _with_own_solution_if_any,
    ARITHMETIC.name: _with_own_solution_if_any,
}


def _with_own_solution(task: Task, record: dict[str, Any]) -> Task:
    """The task with the key, demonstration and sequential answer of a row of ``isomorph data make``."""
    if record.get("representation", task.representation) != task.representation:
        raise DataError(f"must be of the representation {task.representation}, got {_brief(record['representation'])}")
    if "naive_answer" in record:
        raise DataError("naive_answer is now called sequential_answer: rename the column")
    own: dict[str, Any] = {name: record.get(name) for name in ("key", "demonstration", "sequential_answer")}
    for name, value in own.items():
        if not isinstance(value, str) and (value is not None or name == "key"):
            raise DataError(f"{name} must be text, got {_brief(value)}")
    return replace(task, **own)


def _question_and_answer(record: dict[str, Any]) -> tuple[str, str]:
    question, answer = (record.get(name) for name in ("question", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"question must be text, got {_brief(question)}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"answer must be text or a number, got {_brief(answer)}")
    return question, str(answer)


def _record(line: str) -> dict[str, Any]:
    if len(line) > MAX_ROW_CHARS:
        raise DataError(f"a row has at most {MAX_ROW_CHARS} characters, got {len(line)}")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"must be a JSON object, got {line[:80]!r}: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"must be a JSON object, got {_brief(record)}")
    for name, value in record.items():
        if isinstance(value, str) and _SURROGATE.search(value):  # no tokenizer and no file can encode it
            raise DataError(f"{name} holds half a surrogate pair, which is no Unicode text: {_brief(value)}")
    return record


def _brief(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]
