"""Many random procedures at once as arrays, with their answers and shortcuts: what the bag of numbers is fitted to.

The distribution is that of ``procedure.random_procedure``; one by one the same takes a hundred times as long.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isomorph.curriculum.tasks.procedure import SECONDS, Difficulty

NUM_FITTED = 10_000
PER_ROUND = 5_000  # candidates at a time
MOST_ROUNDS = 100

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """N procedures of n steps, in a topological order."""

    amounts: Ints  # [N, n], in the smallest unit of each procedure
    before: NDArray[np.bool_]  # [N, n, n]; [k, j, i]: step i is a predecessor of step j; i < j
    number: Ints  # [N, n], of each step as in the question

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Batch":
        return Batch(self.amounts[chosen], self.before[chosen], self.number[chosen])

    @property
    def finish(self) -> Ints:
        """[N, n]: of each step that starts as early as possible."""
        return _longest(self.amounts, self.before)

    @property
    def width(self) -> Ints:
        """[N]: the most steps that run at the same time."""
        finish = self.finish
        start = finish - self.amounts
        runs = (start[:, None, :] <= start[:, :, None]) & (start[:, :, None] < finish[:, None, :])
        return runs.sum(2).max(1)

    def features(self) -> NDArray[np.float64]:
        """[N, n + 4]: those of ``shortcuts.BagOfNumbers``."""
        counts = [self.before.sum((1, 2)), (~self.before.any(2)).sum(1), (~self.before.any(1)).sum(1)]
        ordered = np.sort(self.amounts, 1)[:, ::-1]
        return np.column_stack([np.ones(len(ordered)), ordered, *counts])


def random_batch(rng: np.random.Generator, difficulty: Difficulty, num: int, num_steps: int) -> Batch:
    """Of any width and hardness."""
    shape = num, num_steps, num_steps
    before = np.tril(rng.random(shape) < difficulty.edge_probability, -1)
    # of too many predecessors those with the highest of random ranks stay
    rank = np.where(before, rng.random(shape), -1.0).argsort(2).argsort(2)
    before &= rank >= num_steps - difficulty.max_predecessors
    values = rng.integers(difficulty.min_duration, difficulty.max_duration + 1, shape[:2])
    units = np.array([SECONDS[unit] for unit in difficulty.units])[rng.integers(len(difficulty.units), size=shape[:2])]
    amounts = values * units // units.min(1, keepdims=True)
    number = rng.random(shape[:2]).argsort(1) if difficulty.shuffled else np.tile(np.arange(num_steps), (num, 1))
    return Batch(amounts, before, number)


def _first(batch: Batch) -> Ints:
    """[N, n]: the higher, the lower the number."""
    return batch.number.shape[1] - 1 - batch.number


def _slowest(batch: Batch) -> Ints:
    """[N, n]: the higher, the longer the step; of equal ones the first by number."""
    return batch.amounts * batch.amounts.shape[1] + _first(batch)


def _most_steps(batch: Batch) -> Ints:
    n = batch.amounts.shape[1]
    first = _first(batch)
    count, total = np.ones_like(batch.amounts), batch.amounts.copy()
    for j in range(n):
        has_any = batch.before[:, j].any(1)
        one = np.where(batch.before[:, j], count * n + first, -1).argmax(1)[:, None]
        count[:, j] += np.where(has_any, np.take_along_axis(count, one, 1)[:, 0], 0)
        total[:, j] += np.where(has_any, np.take_along_axis(total, one, 1)[:, 0], 0)
    last = (count * n + first).argmax(1)[:, None]
    return np.take_along_axis(total, last, 1)[:, 0]


def _forward(batch: Batch) -> Ints:
    after = batch.before.transpose(0, 2, 1)[:, ::-1, ::-1]  # the edges turned round, in a topological order of theirs
    total = _along_one(batch.amounts[:, ::-1], after, _slowest(batch)[:, ::-1])[:, ::-1]
    return np.where(batch.before.any(2), 0, total).max(1)


def _last_numbered(batch: Batch) -> Ints:
    return np.take_along_axis(batch.finish, batch.number.argmax(1)[:, None], 1)[:, 0]


def _in_number_order(batch: Batch) -> Ints:
    known = batch.before & (batch.number[:, None, :] < batch.number[:, :, None])
    return _longest(batch.amounts, known).max(1)


# the functions of ``shortcuts.SHORTCUTS`` by their names
ANSWERS: Mapping[str, Callable[[Batch], Ints]] = {
    "most_steps": _most_steps,
    "back_along_longest": lambda batch: _along_one(batch.amounts, batch.before, _slowest(batch)).max(1),
    "forward_along_longest": _forward,
    "back_along_last_listed": lambda batch: _along_one(batch.amounts, batch.before, batch.number).max(1),
    "back_along_first_listed": lambda batch: _along_one(batch.amounts, batch.before, _first(batch)).max(1),
    "in_number_order": _in_number_order,
    "finish_of_last_numbered": _last_numbered,
    "sum_of_all": lambda batch: batch.amounts.sum(1),
    "longest_step": lambda batch: batch.amounts.max(1),
}


def unsolved(batch: Batch) -> Batch:
    """Those that none of the shortcuts answers rightly."""
    for answer in ANSWERS.values():  # each sees what those before it left
        batch = batch[answer(batch) != batch.finish.max(1)]
    return batch


def _longest(amounts: Ints, before: NDArray[np.bool_]) -> Ints:
    finish = amounts.copy()
    for j in range(amounts.shape[1]):
        finish[:, j] += np.where(before[:, j], finish, 0).max(1)
    return finish


def _along_one(amounts: Ints, before: NDArray[np.bool_], preference: Ints) -> Ints:
    """Totals where each step keeps the predecessor with the highest ``preference`` only."""
    total = amounts.copy()
    for j in range(amounts.shape[1]):
        one = np.where(before[:, j], preference, -1).argmax(1)
        kept = np.take_along_axis(total, one[:, None], 1)[:, 0]
        total[:, j] += np.where(before[:, j].any(1), kept, 0)
    return total


def fitted_weights(difficulty: Difficulty) -> dict[int, NDArray[np.float64]]:
    """Least squares from ``features`` to the answers, for each number of steps; NUM_FITTED procedures in all.

    Of them ``hard_share`` are solved by no shortcut, as far as there are any. They are of all splits, which can only
    help what is fitted to them. Deterministic.
    """
    sizes = range(difficulty.min_steps, difficulty.max_steps + 1)
    num = -(-NUM_FITTED // len(sizes))
    num_hard = round(num * difficulty.hard_share)
    weights = {}
    for size in sizes:
        rng = np.random.default_rng([size, 0])
        batches = [
            *_collected(rng, difficulty, size, num - num_hard, are_hard=False),
            *_collected(rng, difficulty, size, num_hard, are_hard=True),
        ]
        features = np.concatenate([batch.features() for batch in batches])
        if len(features):
            right = np.concatenate([batch.finish.max(1) for batch in batches]).astype(float)
            weights[size] = np.linalg.lstsq(features, right)[0]
    return weights


def _collected(
    rng: np.random.Generator, difficulty: Difficulty, num_steps: int, num: int, *, are_hard: bool
) -> Iterator[Batch]:
    for _ in range(MOST_ROUNDS):
        if num <= 0:
            return
        batch = random_batch(rng, difficulty, PER_ROUND, num_steps)
        width = batch.width
        batch = batch[(width >= difficulty.min_width) & (width <= difficulty.max_width)]
        if are_hard:
            batch = unsolved(batch)
        batch = batch[np.arange(len(batch.amounts)) < num]
        num -= len(batch.amounts)
        yield batch
