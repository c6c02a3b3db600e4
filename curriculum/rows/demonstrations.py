"""Rows with several demonstrations: which of them fit and are accepted, and which one a pass trains on."""

import dataclasses
import random
from collections.abc import Callable, Sequence

import numpy as np

from isomorph.curriculum.lengths import Misfit
from isomorph.curriculum.rows.dataset import Side
from isomorph.curriculum.tasks.task import Task

AT_ONCE = 256  # rows whose demonstrations are judged in one call

# tasks that each have one demonstration -> whether it is right
Accepts = Callable[[Sequence[Task]], list[bool]]


class Demonstrations:
    """The demonstrations of the training rows. Before ``accept`` every one that fits is used."""

    def __init__(self, side: Side, misfit_of: Callable[[str], Misfit]) -> None:
        """``misfit_of``: of a label, why a task with a demonstration does not fit."""
        self.side, self._misfit_of = side, misfit_of
        self.num_given = self.num_accepted = 0
        self._kept: dict[int, tuple[int, ...]] = {}  # row -> numbers of its demonstrations that are used
        self._accepted: dict[int, frozenset[int]] | None = None  # row -> numbers of those that were found right
        self._pairs: dict[str, np.ndarray] = {}  # label -> [n, 2] row and number of its demonstration among the kept

    def of(self, index: int, label: str) -> tuple[Task, ...]:
        """The row's task with each demonstration that fits and is accepted; () if there is none."""
        tasks = self._all(index)
        if index not in self._kept:
            misfit = self._misfit_of(label)
            accepted = range(len(tasks)) if self._accepted is None else self._accepted.get(index, frozenset())
            self._kept[index] = tuple(i for i, task in enumerate(tasks) if i in accepted and misfit(task) is None)
        return tuple(tasks[i] for i in self._kept[index])

    def one_of(self, index: int, label: str, seed: int, epoch: int) -> Task:
        """One at random, in each pass anew."""
        return random.Random(f"{seed}:{label}:{epoch}:{index}").choice(self.of(index, label))

    def pairs(self, label: str, rows: np.ndarray) -> np.ndarray:
        """[n, 2]: every kept demonstration of ``rows``, as row and number among those that ``of`` returns."""
        if label not in self._pairs:
            found = [(int(index), k) for index in rows for k in range(len(self.of(int(index), label)))]
            self._pairs[label] = np.array(found, np.int64).reshape(-1, 2)
        return self._pairs[label]

    def accept(self, accepts: Accepts, rows: np.ndarray) -> list[int]:
        """Keeps of ``rows`` only demonstrations that ``accepts`` finds right; returns the rows that have none."""
        self._kept, self._pairs = {}, {}
        accepted: dict[int, frozenset[int]] = {}
        for start in range(0, len(rows), AT_ONCE):
            chunk = [(int(index), self._all(int(index))) for index in rows[start : start + AT_ONCE]]
            judged = iter(accepts([task for _, tasks in chunk for task in tasks]))
            for index, tasks in chunk:
                accepted[index] = frozenset(i for i in range(len(tasks)) if next(judged))
                self.num_given += len(tasks)
                self.num_accepted += len(accepted[index])
        self._accepted = {**(self._accepted or {}), **accepted}
        return [index for index, found in accepted.items() if not found]

    def counts(self) -> dict[str, object]:
        """For run.json and summary.json."""
        return {"demonstrations": {"given": self.num_given, "accepted": self.num_accepted}}

    def _all(self, index: int) -> list[Task]:
        task = self.side.task(index)
        return [dataclasses.replace(task, demonstration=text) for text in self.side.demonstrations(index)]
