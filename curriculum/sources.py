"""Where a recipe's tasks come from: a ``Source`` for each ``[data.NAME]`` but the generated ones; tasks as prompts."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from isomorph.curriculum.lengths import LengthLimits, Misfit, at_most_in_prompt, left_out
from isomorph.curriculum.recipe import GeneratedData, JsonlData, Recipe
from isomorph.curriculum.rewards.answer import ANSWER_TAGS
from isomorph.curriculum.rows.dataset import Dataset
from isomorph.curriculum.rows.gym import GymSource
from isomorph.curriculum.rows.gym_spec import ReasoningGymData
from isomorph.curriculum.rows.source import RowsSource
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.tasks.jsonl import read_rows, read_test_rows, repeated_procedures, split_rows
from isomorph.curriculum.tasks.task import DataError, Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import WORD, TextCodec
from isomorph.engine.types import Prompt


class Source(Protocol):
    """Tasks of one [data.NAME], for training and for evaluation."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what a task's ``row`` holds."""
        ...

    @property
    def left_out(self) -> list[str]:
        """A sentence for each file of which rows were found too long before the first step."""
        ...

    @property
    def num_too_long(self) -> Mapping[str, int]:
        """Rows found too long so far, by representation."""
        ...

    def left_out_rows(self) -> dict[str, list[int]]:
        """The rows that ``num_too_long`` counts and that a resumed run would not find again: JSON-able."""
        ...

    def restore_left_out(self, rows: Mapping[str, list[int]]) -> None:
        """Counts the rows that ``left_out_rows`` told before the run was resumed."""
        ...

    def draw(self, representation: str, position: int, seed: int) -> tuple[Task, int]:
        """The next training task from ``position`` on, in a stream without end, and the position after it."""
        ...

    @property
    def held_out_labels(self) -> tuple[str, ...]:
        """The representations of its tasks for evaluation."""
        ...

    def held_out_tasks(self, representation: str, num_tasks: int) -> list[Task]:
        """At most ``num_tasks`` tasks for evaluation, always the same ones."""
        ...

    def summary(self) -> dict[str, Any]:
        """What run.json and summary.json say of it."""
        ...


def as_prompt(prompt_id: int, task: Task, text: TextCodec) -> Prompt:
    """The task's question or chat, tokenised in the chat format of its data; its payload is the task."""
    return Prompt(
        prompt_id=prompt_id,
        token_ids=(
            text.encode_messages(task.messages, task.data)
            if task.messages is not None
            else text.encode_prompt(task.question, task.data)
        ),
        task=task.family,
        representation=task.representation,
        payload=task,
    )


def tiny_vocabulary(recipe: Recipe) -> list[str]:
    """The vocabulary of a tiny model that reads words; [] for other models.

    All words of generated tasks; of files the most frequent ones of their training rows, ``model.tiny.max_words`` in
    all. Sorted where all tasks are generated, else by how often they occur.
    """
    return tiny_words(recipe)[0]


def tiny_words(recipe: Recipe) -> tuple[list[str], tuple[str, ...]]:
    """``tiny_vocabulary``, and a sentence where it lacks words of the training rows."""
    tiny = recipe.model.tiny
    if tiny is None or tiny.tokenizer == "bytes":
        return [], ()
    words: set[str] = set()
    counts: Counter[str] = Counter()
    for name, data in recipe.data.items():
        if isinstance(data, GeneratedData):
            words |= set(data.vocabulary())
        else:
            for text in _texts(data, name):
                counts.update(re.findall(WORD, text))
    if not counts:
        return sorted(words), ()
    words |= set(ANSWER_TAGS)
    frequent = sorted(counts.keys() - words, key=lambda word: (-counts[word], word))
    num_kept = max(0, tiny.max_words - len(words))
    unknown = frequent[num_kept:]
    notes: tuple[str, ...] = ()
    if unknown:
        share = sum(counts[word] for word in unknown) / counts.total()
        notes = (
            f"the tiny model reads {len(unknown):,} words of the training rows as [UNK], {share:.1%} of their text: "
            f'raise model.tiny.max_words, or set model.tiny.tokenizer = "bytes"',
        )
    return sorted(words) + frequent[:num_kept], notes


def _texts(data: JsonlData | RowsData | ReasoningGymData, name: str) -> Iterator[str]:
    """What a model reads and writes in training on ``data``."""
    if isinstance(data, RowsData):
        yield from Dataset(data, name).texts()
        return
    if isinstance(data, ReasoningGymData):
        raise UserError(
            f'the words of data.{name} are not known before they are generated: set model.tiny.tokenizer = "bytes"'
        )
    for task in itertools.chain.from_iterable(file.training or () for file in read_files(data)):
        yield from (task.question, task.answer, task.demonstration or "")


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A file's rows of one representation, in order, and which of them train or are held out."""

    form: str
    path: str
    tasks: list[Task]
    training: list[Task] | None  # None: the file is for evaluation alone
    held_out: list[Task] | None  # None: the file is for training alone
    validation: tuple[Task, ...] = ()  # left out of training; the loss of their demonstrations is logged


def read_files(data: JsonlData) -> list[TaskFile]:
    """Every file of the table. Raises DataError."""
    rows = {form: read_rows(path, data.family, form, reward=data.reward) for form, path in data.files.items()}
    if data.eval_files:
        tests = read_test_rows(data.eval_files, data.family, reward=data.reward)
        train, validation = _validation_split(data, rows)
        return [
            *(TaskFile(form, data.files[form], rows[form], train[form], None, validation[form]) for form in rows),
            *(TaskFile(form, data.eval_files[form], tasks, None, tasks) for form, tasks in tests.items()),
        ]
    train, held_out = split_rows(rows, eval_share=data.eval_share, seed=data.split_seed)
    train, validation = _validation_split(data, train)
    return [
        TaskFile(form, data.files[form], rows[form], train[form], held_out[form], validation[form]) for form in rows
    ]


def _validation_split(
    data: JsonlData, rows: dict[str, list[Task]]
) -> tuple[dict[str, list[Task]], dict[str, tuple[Task, ...]]]:
    """What is trained on, and what the loss is logged of; no procedure is on both sides."""
    if not data.validation_share:
        return rows, {form: () for form in rows}
    try:
        train, validation = split_rows(rows, eval_share=data.validation_share, seed=data.split_seed)
    except DataError as error:
        raise DataError(f"validation_share, of the training rows: {error}") from error
    return train, {form: tuple(tasks) for form, tasks in validation.items()}


def _repeated(files: list[TaskFile]) -> list[str]:
    """Keys of the test rows whose procedure is also a training row's, by the first form that is on both sides."""
    training = {file.form: file.training for file in files if file.training is not None}
    for file in files:
        if file.held_out is not None and file.form in training:
            return repeated_procedures(training[file.form], file.held_out)
    return []


def open_sources(recipe: Recipe, text: TextCodec, limits: LengthLimits | None) -> dict[str, Source]:
    """The source of each ``[data.NAME]`` whose tasks are not generated.

    Raises UserError and DataError, also where no row of one fits or has the label that a stage trains on.
    """
    sources = {
        name: open_source(data, text, name, limits)
        for name, data in recipe.data.items()
        if not isinstance(data, GeneratedData)
    }
    for part in (part for stage in recipe.stage for part in stage.mixture if part.data in sources):
        sources[part.data].draw(part.representation, 0, recipe.run.seed)
    return sources


def open_source(
    data: JsonlData | RowsData | ReasoningGymData, text: TextCodec, name: str, limits: LengthLimits | None
) -> Source:
    """The tasks of ``[data.NAME]``. Raises UserError and DataError."""
    if isinstance(data, RowsData):
        return RowsSource(data, text, name, limits)
    if isinstance(data, ReasoningGymData):
        return GymSource(data, text, name, limits)
    return TaskFiles(data, text, name, limits)


class TaskFiles:
    """The rows of one ``[data.NAME]`` of kind "jsonl", split by procedure into ``training`` and ``held_out``.

    Both map a representation to its tasks; so does ``validation``, which is taken from the rows for training, and whose
    demonstrations' loss is logged. ``left_out`` has a sentence for each file of which rows are too long;
    ``num_too_long`` counts them by representation.
    """

    def __init__(self, data: JsonlData, text: TextCodec, name: str = "", limits: LengthLimits | None = None) -> None:
        self.columns: tuple[str, ...] = ()  # tasks of a reward family have no row
        self.num_too_long: dict[str, int] = {}
        self.left_out: list[str] = []
        self.training: dict[str, list[Task]] = {}
        self.held_out: dict[str, list[Task]] = {}
        self.validation: dict[str, list[Task]] = {}
        self._data, self._text, self._name, self._limits = data, text, name, limits
        files = read_files(data)
        for file in files:
            self._keep_fitting(file)
        self._repeated = _repeated(files) if data.eval_files else None
        self._epochs: dict[str, tuple[tuple[int, int], list[int]]] = {}  # representation -> (seed, epoch), its order

    def _keep_fitting(self, file: TaskFile) -> None:
        number = {id(task): i for i, task in enumerate(file.tasks, start=1)}
        limits, form, reasons = self._limits, file.form, dict[int, str]()
        if file.training is not None:
            misfit = limits.misfit_of_training(self._name, form) if limits else _always_fits
            self.training[form] = self._fitting(file.training, misfit, number, reasons)
            self.validation[form] = self._fitting(list(file.validation), misfit, number, reasons)
        if file.held_out is not None:
            misfit = limits.misfit_of_evaluation(self._name, form) if limits else _always_fits
            self.held_out[form] = self._fitting(file.held_out, misfit, number, reasons)
        if not (self.training.get(form, True) and self.held_out.get(form, True)):
            raise UserError(f"no {form} row fits: {left_out(file.path, len(number), reasons)}")
        self.num_too_long[form] = self.num_too_long.get(form, 0) + len(reasons)
        if reasons:
            self.left_out.append(left_out(file.path, len(number), reasons))

    def _fitting(
        self, tasks: list[Task], misfit: Misfit, number: dict[int, int], reasons: dict[int, str]
    ) -> list[Task]:
        """The tasks that fit; ``reasons`` gets the row numbers of the others."""
        most, kept = self._data.max_prompt_tok, []
        for task in tasks:
            num_tok = at_most_in_prompt(self._text, task, most)
            why = misfit(task)
            if num_tok > most:
                why = f"a prompt of {num_tok} tokens, max_prompt_tok={most}"
            if why:
                reasons[number[id(task)]] = why
            else:
                kept.append(task)
        return kept

    def left_out_rows(self) -> dict[str, list[int]]:
        """{}: all rows are measured before the first step."""
        return {}

    def restore_left_out(self, rows: Mapping[str, list[int]]) -> None:
        """All rows are measured again."""

    def summary(self) -> dict[str, Any]:
        """Rows that are left out, by representation; of ``eval_files`` also the keys of ``repeated`` procedures."""
        return {"left_out": self.num_too_long} | ({} if self._repeated is None else {"repeated": self._repeated})

    @property
    def held_out_labels(self) -> tuple[str, ...]:
        """The representations, in the order of the recipe."""
        return tuple(self.held_out)

    def held_out_tasks(self, representation: str, num_tasks: int) -> list[Task]:
        """The first ``num_tasks`` held-out tasks."""
        return self.held_out[representation][:num_tasks]

    def draw(self, representation: str, position: int, seed: int) -> tuple[Task, int]:
        """Row ``position`` of an infinite stream of epochs, and the next position.

        Each epoch is a permutation of the training rows, seeded with (seed, representation, epoch).
        """
        tasks = self.training[representation]
        epoch, index = divmod(position, len(tasks))
        known = self._epochs.get(representation)
        if known is None or known[0] != (seed, epoch):  # kept: a permutation for each row would cost the file's length
            order = random.Random(f"{seed}:{representation}:{epoch}").sample(range(len(tasks)), len(tasks))
            known = self._epochs[representation] = (seed, epoch), order
        return tasks[known[1][index]], position + 1


def _always_fits(task: Task) -> str | None:
    return None
