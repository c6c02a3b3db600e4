"""A [data.NAME] of kind "rows": its rows read once from end to end, and divided into training, evaluation, examples."""

import hashlib
from collections.abc import Iterator

import numpy as np

from isomorph.curriculum.rows.order import mixed, shuffled
from isomorph.curriculum.rows.render import Renderer
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.rows.table import Rows, evaluation_rows, training_rows
from isomorph.curriculum.tasks.task import DataError, Task
from isomorph.engine.config import UserError

WORD_ROWS = 50_000  # training rows whose words make a tiny model's vocabulary


class Side:
    """Rows with one renderer: which label each has, and which have equal prompts."""

    def __init__(self, rows: Rows, data: RowsData, name: str, note: str = "") -> None:
        """Reads every row, so that a broken one is known before the first step. Raises UserError and DataError."""
        self.rows, self.render = rows, Renderer(data, rows.columns, name, note)
        self.labels: list[str] = []
        self.keys = np.empty(len(rows), np.int64)  # equal for equal prompts
        self.label_of = np.empty(len(rows), np.int16)
        known: dict[str, int] = {}
        for i, row in enumerate(rows.each(self.render.tops)):
            try:
                self.keys[i], label = self.render.scan(row)
            except DataError as error:
                raise DataError(f"{rows.place(i)}: {error}") from error
            if label not in known:
                known[label] = len(known)
                if len(known) > np.iinfo(np.int16).max:
                    raise UserError(f"data.{name}.representation_column: more than {len(known) - 1} labels")
            self.label_of[i] = known[label]
        self.labels = list(known)
        # the first row with the same prompt: a task's key
        _, first, group = np.unique(self.keys, return_index=True, return_inverse=True)
        self.first = first[group]

    def task(self, index: int, *, is_bare: bool = False) -> Task:
        """The task of row ``index``. Raises DataError, which names the row."""
        where = self.rows.place(index)
        try:
            return self.render.task(self.rows.row(index), str(self.first[index]), where, is_bare=is_bare)
        except DataError as error:
            raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from error

    def demonstrations(self, index: int) -> tuple[str, ...]:
        """All worked responses of row ``index``."""
        return self.render.demonstrations(self.rows.row(index))

    def of_label(self, among: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of ``among``, ascending, by label; a label without any is left out."""
        split = {label: among[self.label_of[among] == k] for k, label in enumerate(self.labels)}
        return {label: found for label, found in split.items() if len(found)}


class Dataset:
    """``training`` and ``held_out``: the side, and the numbers of its rows by label. ``examples``: training rows.

    A prompt that several rows have is on one side alone. Examples are not trained on, nor are rows with their prompts.
    """

    def __init__(self, data: RowsData, name: str) -> None:
        """Raises UserError and DataError."""
        self.data, self.name = data, name
        self.side = self.eval_side = Side(training_rows(data), data, name)
        if data.has_eval_rows:
            self.eval_side = Side(evaluation_rows(data), data, name, ", rows for evaluation")
            for_training, for_evaluation = np.arange(len(self.side.rows)), np.arange(len(self.eval_side.rows))
        else:
            for_training, for_evaluation = self._divided()
        self.examples, for_training = self._examples(for_training)
        shown = [self.side.task(i, is_bare=True) for i in self.examples]
        self.side.render.show(shown)
        if self.eval_side is not self.side:
            self.eval_side.render.show(shown)
        self.training = self.side.of_label(for_training)
        self.held_out = self.eval_side.of_label(for_evaluation)

    @property
    def num_in_both(self) -> int:
        """Rows for evaluation whose prompt a training row has, too; where they lie apart."""
        return 0 if self.eval_side is self.side else int(np.isin(self.eval_side.keys, self.side.keys).sum())

    def _divided(self) -> tuple[np.ndarray, np.ndarray]:
        share = self.data.share
        assert share is not None
        groups = np.unique(self.side.first)  # one for each prompt
        num_held_out = round(share * len(groups))
        if not 0 < num_held_out < len(groups):
            raise UserError(
                f"data.{self.name}: eval_share = {share} of {len(groups)} different prompts leaves no row for training "
                "or evaluation: change it, or give eval_path"
            )
        chosen = groups[shuffled(len(groups), self.data.split_seed)[:num_held_out]]
        is_held_out = np.isin(self.side.first, chosen)
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def _examples(self, for_training: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
        """Rows to show, with different prompts that the evaluation does not have; and what is left to train on."""
        if not self.data.examples:
            return (), for_training
        possible = np.unique(self.side.first[for_training])
        if self.eval_side is not self.side:
            possible = possible[~np.isin(self.side.keys[possible], self.eval_side.keys)]
        if len(possible) <= self.data.examples:
            raise UserError(
                f"data.{self.name}.examples = {self.data.examples} must leave rows to train on, there are "
                f"{len(possible)} different prompts"
            )
        chosen = possible[shuffled(len(possible), self.data.split_seed + 1)[: self.data.examples]]
        return tuple(map(int, chosen)), for_training[~np.isin(self.side.first[for_training], chosen)]

    def texts(self) -> Iterator[str]:
        """What a model reads and writes in training: of at most WORD_ROWS rows, the same ones every time."""
        rows = np.concatenate(list(self.training.values()))
        if len(rows) > WORD_ROWS:
            rows = rows[np.argsort(mixed(rows, 0), kind="stable")[:WORD_ROWS]]
        for message in self.side.render.shown:
            yield message["content"]
        for i in rows:
            task = self.side.task(int(i), is_bare=True)
            yield from (task.question, task.answer, *self.side.demonstrations(int(i)))
            yield from (m["content"] for m in task.messages or () if isinstance(m["content"], str))


def epoch_seed(seed: int, label: str, epoch: int) -> int:
    """The seed of the order of an epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{label}:{epoch}".encode(), digest_size=8).digest(), "little")
