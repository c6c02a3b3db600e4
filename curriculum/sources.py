"""Tasks from the files of a recipe's ``[data.NAME]`` tables, split into training and held-out, and tasks as prompts."""

import random

from isomorph.curriculum.lengths import LengthLimits, Misfit, at_most, left_out
from isomorph.curriculum.recipe import JsonlData, Recipe
from isomorph.curriculum.tasks.jsonl import read_rows, split_rows
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Prompt


def as_prompt(prompt_id: int, task: Task, text: TextCodec) -> Prompt:
    """The task's question, tokenised; its payload is the task."""
    return Prompt(
        prompt_id=prompt_id,
        token_ids=text.encode_prompt(task.question),
        task=task.family,
        representation=task.representation,
        payload=task,
    )


def tiny_vocabulary(recipe: Recipe) -> list[str]:
    """The vocabulary of a tiny model, sorted; [] for other models."""
    words: set[str] = set()
    if recipe.model.tiny is not None:
        for name, data in recipe.data.items():
            if isinstance(data, JsonlData):
                raise UserError(
                    f"[model.tiny] has a vocabulary for generated tasks only: [data.{name}] is of another kind"
                )
            words |= set(data.vocabulary())
    return sorted(words)


def open_files(recipe: Recipe, text: TextCodec, limits: LengthLimits | None) -> dict[str, "TaskFiles"]:
    """The ``[data.NAME]`` tables of kind "jsonl", by name. Raises UserError where no row of a file fits."""
    return {
        name: TaskFiles(data, text, name, limits) for name, data in recipe.data.items() if isinstance(data, JsonlData)
    }


class TaskFiles:
    """The rows of one ``[data.NAME]`` of kind "jsonl", split by procedure into ``training`` and ``held_out``.

    Both map a representation to its tasks. ``left_out`` has a sentence for each file of which rows are too long;
    ``num_too_long`` counts them by representation.
    """

    def __init__(self, data: JsonlData, text: TextCodec, name: str = "", limits: LengthLimits | None = None) -> None:
        rows = {form: read_rows(path, data.family, form, reward=data.reward) for form, path in data.files.items()}
        train, held_out = split_rows(rows, eval_share=data.eval_share, seed=data.split_seed)
        self.num_too_long: dict[str, int] = {}
        self.left_out: list[str] = []
        self.training: dict[str, list[Task]] = {}
        self.held_out: dict[str, list[Task]] = {}
        self._data, self._text = data, text
        for form, tasks in rows.items():
            reasons: dict[int, str] = {}
            number = {id(task): i for i, task in enumerate(tasks, start=1)}
            for_training, for_evaluation = (
                (limits.misfit_of_training(name, form), limits.misfit_of_evaluation(name, form))
                if limits
                else (_always_fits, _always_fits)
            )
            self.training[form] = self._fitting(train[form], for_training, number, reasons)
            self.held_out[form] = self._fitting(held_out[form], for_evaluation, number, reasons)
            if not (self.training[form] and self.held_out[form]):
                raise UserError(f"no {form} row fits: {left_out(data.files[form], len(tasks), reasons)}")
            self.num_too_long[form] = len(reasons)
            if reasons:
                self.left_out.append(left_out(data.files[form], len(tasks), reasons))
        self._epochs: dict[str, tuple[tuple[int, int], list[int]]] = {}  # representation -> (seed, epoch), its order

    def _fitting(
        self, tasks: list[Task], misfit: Misfit, number: dict[int, int], reasons: dict[int, str]
    ) -> list[Task]:
        """The tasks that fit; ``reasons`` gets the row numbers of the others."""
        most, kept = self._data.max_prompt_tok, []
        for task in tasks:
            num_tok = at_most(self._text, task.question, most, is_prompt=True)
            why = misfit(task)
            if num_tok > most:
                why = f"a prompt of {num_tok} tokens, max_prompt_tok={most}"
            if why:
                reasons[number[id(task)]] = why
            else:
                kept.append(task)
        return kept

    def training_task(self, representation: str, position: int, seed: int) -> Task:
        """Row ``position`` of an infinite stream of epochs.

        Each epoch is a permutation of the training rows, seeded with (seed, representation, epoch).
        """
        tasks = self.training[representation]
        epoch, index = divmod(position, len(tasks))
        known = self._epochs.get(representation)
        if known is None or known[0] != (seed, epoch):  # kept: a permutation for each row would cost the file's length
            order = random.Random(f"{seed}:{representation}:{epoch}").sample(range(len(tasks)), len(tasks))
            known = self._epochs[representation] = (seed, epoch), order
        return tasks[known[1][index]]


def _always_fits(task: Task) -> str | None:
    return None
