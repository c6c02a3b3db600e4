"""The tasks of a [data.NAME] of kind "rows", drawn one at a time.

Lengths: of at most CHECKED_AT_ONCE rows every one is measured before the first step. Of more rows each is measured when
it is drawn, because tokenising a million takes minutes before the first step; a row that does not fit is replaced by
the next one, and counted. Either way the same rows are trained on, in the same order.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isomorph.curriculum.lengths import LengthLimits, Misfit, at_most_in_prompt, left_out
from isomorph.curriculum.rows.dataset import Dataset, Side, epoch_seed
from isomorph.curriculum.rows.demonstrations import Accepts, Demonstrations
from isomorph.curriculum.rows.order import shuffled
from isomorph.curriculum.rows.render import refuse_unknown_label
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import ChatFormat, TextCodec

CHECKED_AT_ONCE = 20_000
UNKNOWN, FITS, DOES_NOT_FIT = 0, 1, 2
NUM_NAMED = 20  # rows that did not fit, as the summary lists them


class RowsSource:
    """Training tasks of each label in an infinite stream of epochs, and the tasks for evaluation."""

    def __init__(self, data: RowsData, text: TextCodec, name: str, limits: LengthLimits | None = None) -> None:
        """Adds the data's chat format to ``text``. Raises UserError and DataError."""
        _add_format(text, data, name)
        self.dataset = Dataset(data, name)
        self._data, self._text, self._name, self._limits = data, text, name, limits
        self.columns = self.dataset.side.rows.columns
        self.left_out: list[str] = []  # a sentence for the rows of which some are too long
        self.misfits: dict[str, dict[int, str]] = {}  # label -> number of the row -> why it is left out
        # of the rows of either side, by whether it is training: UNKNOWN, FITS or DOES_NOT_FIT
        self._measured = {True: _unmeasured(self.dataset.side), False: _unmeasured(self.dataset.eval_side)}
        self._orders: dict[str, tuple[tuple[int, int], np.ndarray]] = {}  # label -> (seed, epoch), its order
        self._demonstrations = Demonstrations(self.dataset.side, lambda label: self._misfit(label, is_training=True))
        if data.has_eval_rows and self.dataset.num_in_both:
            self.left_out.append(
                f"{data.eval_path or data.origin}: {self.dataset.num_in_both} of its "
                f"{len(self.dataset.eval_side.rows)} prompts for evaluation are training prompts, too"
            )
        if len(self.dataset.side.rows) <= CHECKED_AT_ONCE:
            self._check_all()

    @property
    def num_too_long(self) -> dict[str, int]:
        """Rows found not to fit so far, by label."""
        return {label: len(rows) for label, rows in self.misfits.items()}

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.dataset.training, *self.dataset.held_out)))

    def draw(self, representation: str, position: int, seed: int) -> tuple[Task, int]:
        """The next task of an infinite stream of epochs, from ``position`` on, and the position after it.

        Each epoch is a permutation of the training rows, seeded with (seed, representation, epoch).
        """
        refuse_unknown_label(representation, tuple(self.dataset.training), self._name, "training")
        rows = self.dataset.training[representation]
        pairs = None
        if self._data.demonstration_choice == "all" and len(self._demonstrations.pairs(representation, rows)):
            pairs = self._demonstrations.pairs(representation, rows)
        count = len(rows) if pairs is None else len(pairs)
        for at in range(position, position + count + 1):
            epoch, inside = divmod(at, count)
            number = int(self._order(representation, count, seed, epoch)[inside])
            index = int(rows[number] if pairs is None else pairs[number, 0])
            task = self._fitting(index, representation, is_training=True)
            if task is None:
                continue
            if pairs is not None:
                return self._demonstrations.of(index, representation)[pairs[number, 1]], at + 1
            if task.demonstration is not None:
                return self._demonstrations.one_of(index, representation, seed, epoch), at + 1
            return task, at + 1
        raise UserError(self._none_fits(representation, len(rows)))

    @property
    def wants_accepted(self) -> bool:
        """Whether only demonstrations that are right are to be trained on: ``accept`` must be called."""
        return self._data.demonstrations_accepted

    def accept(self, accepts: Accepts) -> str:
        """Leaves out demonstrations that ``accepts`` does not find right, and rows without a right one.

        Returns a sentence with the counts. Raises UserError where a label is left without rows.
        """
        num_rows = num_without = 0
        for label, rows in self.dataset.training.items():
            without = self._demonstrations.accept(accepts, rows)
            for index in without:
                self._measured[True][index] = DOES_NOT_FIT
                reason = "none of its demonstrations is accepted by the reward"
                self.misfits.setdefault(label, {})[self.dataset.side.rows.number(index)] = reason
            if len(without) == len(rows):
                raise UserError(self._none_fits(label, len(rows)))
            num_rows, num_without = num_rows + len(rows), num_without + len(without)
        found = self._demonstrations
        return (
            f"{self._data.origin}: {found.num_accepted} of {found.num_given} demonstrations are accepted by the "
            f"reward; {num_without} of {num_rows} rows have none and are left out"
        )

    @property
    def held_out_labels(self) -> tuple[str, ...]:
        """The labels of the rows for evaluation."""
        return tuple(self.dataset.held_out)

    def held_out_tasks(self, representation: str, num_tasks: int) -> list[Task]:
        """The first ``num_tasks`` tasks for evaluation that fit, always the same ones."""
        refuse_unknown_label(representation, tuple(self.dataset.held_out), self._name, "evaluation")
        found: list[Task] = []
        for index in map(int, self.dataset.held_out[representation]):
            if len(found) == num_tasks:
                break
            if (task := self._fitting(index, representation, is_training=False)) is not None:
                found.append(task)
        if not found:
            raise UserError(self._none_fits(representation, len(self.dataset.held_out[representation])))
        return found

    def left_out_rows(self) -> dict[str, list[int]]:
        """The numbers of rows that were found not to fit when they were drawn, by label."""
        if len(self.dataset.side.rows) <= CHECKED_AT_ONCE:
            return {}  # all rows are measured before the first step
        return {label: sorted(rows) for label, rows in self.misfits.items()}

    def restore_left_out(self, rows: Mapping[str, list[int]]) -> None:
        """Counts what ``left_out_rows`` told before the run was resumed."""
        for label, numbers in rows.items():
            known = self.misfits.setdefault(label, {})
            self.misfits[label] = {number: "found before the run was resumed" for number in numbers} | known

    def summary(self) -> dict[str, object]:
        """Which rows were shown as examples, and which were found not to fit: for run.json and summary.json."""
        number = self.dataset.side.rows.number
        rows = {label: sorted(found)[:NUM_NAMED] for label, found in self.misfits.items()}
        return {
            "left_out": self.num_too_long,
            "left_out_rows": rows,
            "examples": [number(i) for i in self.dataset.examples],
            **(self._demonstrations.counts() if self.wants_accepted else {}),
        }

    def _order(self, label: str, count: int, seed: int, epoch: int) -> np.ndarray:
        known = self._orders.get(label)
        if known is None or known[0] != (seed, epoch):
            known = self._orders[label] = (seed, epoch), shuffled(count, epoch_seed(seed, label, epoch))
        return known[1]

    def _check_all(self) -> None:
        for label, rows in self.dataset.training.items():
            if not sum(self._fitting(int(i), label, is_training=True) is not None for i in rows):
                raise UserError(self._none_fits(label, len(rows)))
        if self.misfits:
            reasons = {row: why for found in self.misfits.values() for row, why in found.items()}
            self.left_out.append(left_out(self._data.origin, len(self.dataset.side.rows), reasons))

    def _fitting(self, index: int, label: str, *, is_training: bool) -> Task | None:
        """The task of a row; None where it does not fit."""
        measured, side = self._measured[is_training], self.dataset.side if is_training else self.dataset.eval_side
        if measured[index] == DOES_NOT_FIT:
            return None
        task = side.task(index)
        if measured[index] == UNKNOWN:
            why = self._why_too_long(task, self._misfit(label, is_training=is_training))
            if why and is_training and self._demonstrations.of(index, label):
                why = self._why_too_long(task, lambda task: None)  # another demonstration fits
            measured[index] = DOES_NOT_FIT if why else FITS
            if why:
                self.misfits.setdefault(label, {})[side.rows.number(index)] = why
                return None
        return task

    def _why_too_long(self, task: Task, misfit: Misfit) -> str | None:
        most = self._data.max_prompt_tok
        num_tok = at_most_in_prompt(self._text, task, most)
        return f"a prompt of {num_tok} tokens, max_prompt_tok={most}" if num_tok > most else misfit(task)

    def _misfit(self, label: str, *, is_training: bool) -> Misfit:
        if self._limits is None:
            return lambda task: None
        of = self._limits.misfit_of_training if is_training else self._limits.misfit_of_evaluation
        return of(self._name, label)

    def _none_fits(self, label: str, count: int) -> str:
        return f"no {label} row fits: {left_out(self._data.origin, count, self.misfits.get(label, {}))}"


def _unmeasured(side: Side) -> np.ndarray:
    return np.zeros(len(side.rows), np.uint8)


def _add_format(text: TextCodec, data: RowsData, name: str) -> None:
    template = None
    try:
        if data.chat_template is not None:
            template = Path(data.chat_template).read_text(encoding="utf-8")
        text.add_format(name, ChatFormat(template=template, arguments=data.chat_arguments))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.{name}.chat_template: must be a readable file: {error}") from error
    except UserError as error:
        raise UserError(f"data.{name}: {error}") from error
