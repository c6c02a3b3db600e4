"""Tasks of the package reasoning-gym, and its own scorers."""

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

from isomorph.curriculum.lengths import LengthLimits, at_most_in_prompt
from isomorph.curriculum.rewards.answer import Answer, stated_answer
from isomorph.curriculum.rows.gym_answers import harmless
from isomorph.curriculum.rows.gym_spec import ReasoningGymData
from isomorph.curriculum.rows.spec import ROWS
from isomorph.curriculum.rows.template import Source
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.foreign import foreign
from isomorph.engine.model.text import TextCodec

COLUMNS = ("question", "answer", "metadata")
# Entry i of seed s is drawn from s + i: the seeds of the two splits lie further apart than any run goes
NUM_ENTRIES = EVAL_OFFSET = 2**30
HELD_OUT_SHARE = 8  # one question in so many is for evaluation only, by its hash
MAX_TRIES = 2_000  # entries looked at for one task


class GymSource:
    """Tasks of one [data.NAME] of kind "reasoning_gym"."""

    def __init__(self, data: ReasoningGymData, text: TextCodec, name: str, limits: LengthLimits | None = None) -> None:
        """Raises UserError where the package is missing, or a task's name or arguments are wrong."""
        self._data, self._text, self._name, self._limits = data, text, name, limits
        self._prompt = Source(data.prompt, COLUMNS, f"data.{name}.prompt")
        self._training = {task: self._generator(task, data.seed) for task in data.tasks}
        self._evaluation = {task: self._generator(task, data.seed + EVAL_OFFSET) for task in data.tasks}
        self.columns = COLUMNS
        self.left_out: list[str] = []
        self._too_long: dict[str, set[int]] = {}  # task -> entries of training; of evaluation negative, from -1 on

    @property
    def num_too_long(self) -> dict[str, int]:
        """Questions found too long so far, by task."""
        return {name: len(entries) for name, entries in self._too_long.items()}

    def left_out_rows(self) -> dict[str, list[int]]:
        """The entries that ``num_too_long`` counts, by task."""
        return {name: sorted(entries) for name, entries in self._too_long.items()}

    def restore_left_out(self, rows: Mapping[str, list[int]]) -> None:
        """Counts what ``left_out_rows`` told before the run was resumed."""
        for name, entries in rows.items():
            self._too_long.setdefault(name, set()).update(entries)

    def draw(self, representation: str, position: int, seed: int) -> tuple[Task, int]:
        """The next training task from entry ``position`` on, and the position after it."""
        return self._next(representation, position, is_training=True)

    @property
    def held_out_labels(self) -> tuple[str, ...]:
        """The names of its tasks."""
        return self._data.representations

    def held_out_tasks(self, representation: str, num_tasks: int) -> list[Task]:
        """``num_tasks`` tasks for evaluation, always the same ones."""
        found, position = [], 0
        for _ in range(num_tasks):
            task, position = self._next(representation, position, is_training=False)
            found.append(task)
        return found

    def summary(self) -> dict[str, Any]:
        """Questions found too long so far, by task."""
        return {"left_out": self.num_too_long}

    def _next(self, name: str, position: int, *, is_training: bool) -> tuple[Task, int]:
        entries = (self._training if is_training else self._evaluation)[name]
        for at in range(position, position + MAX_TRIES):
            with foreign(f"data.{self._name}.tasks.{name}: reasoning-gym fails on entry {at}"):
                entry = _plain(entries[at])
            place = f"data.{self._name}.tasks.{name}, entry {at} of {'training' if is_training else 'evaluation'}"
            is_held_out = int(_digest(entry["question"]), 16) % HELD_OUT_SHARE == 0
            if is_held_out == is_training:
                continue
            task = self._task(name, entry, place)
            if self._fits(task, is_training=is_training):
                return task, at + 1
            self._too_long.setdefault(name, set()).add(at if is_training else -1 - at)
        side = "training" if is_training else "evaluation"
        raise UserError(
            f"data.{self._name}.tasks.{name}: none of {MAX_TRIES} questions is for {side} and fits: give it arguments "
            "that generate more different or shorter questions"
        )

    def _task(self, name: str, entry: dict[str, Any], place: str) -> Task:
        question = self._prompt.text(entry)
        user, system = {"role": "user", "content": question}, self._data.system
        return Task(
            family=ROWS,
            representation=name,
            question=question,
            answer=str(entry["answer"]),
            key=_digest(entry["question"]),
            data=self._name,
            row=entry,
            messages=None if system is None else ({"role": "system", "content": system}, user),
            place=place,
        )

    def _fits(self, task: Task, *, is_training: bool) -> bool:
        is_short = at_most_in_prompt(self._text, task, self._data.max_prompt_tok) <= self._data.max_prompt_tok
        if is_short and self._limits is not None:
            of = self._limits.misfit_of_training if is_training else self._limits.misfit_of_evaluation
            is_short = of(self._name, task.representation)(task) is None
        return is_short

    def _generator(self, name: str, seed: int) -> Any:
        gym = _package()
        if name not in gym.factory.DATASETS:
            raise UserError(
                f"data.{self._name}.tasks: reasoning-gym has no task {name!r}; it has {', '.join(gym.factory.DATASETS)}"
            )
        with foreign(f"data.{self._name}.tasks.{name}: reasoning-gym refuses its arguments"):
            return gym.create_dataset(name, seed=seed, size=NUM_ENTRIES, **self._data.tasks[name])


class Scorer:
    """A task's own scorer, on what the response states between ``<answer>`` tags or in ``\\boxed{...}``; else 0."""

    def __init__(self) -> None:
        self._gym = _package()
        self._scorers: dict[str, Any] = {}

    def __call__(self, answer: Answer) -> float:
        stated = stated_answer(answer.text, reads_boxed=True)
        if stated is None:
            return 0.0
        name = answer.row["metadata"]["source_dataset"]
        if name not in self._scorers:
            self._scorers[name] = self._gym.get_score_answer_fn(name)
        known = harmless(name, stated, str(answer.row["answer"]))
        return float(self._scorers[name](known, dict(answer.row)))


def _package() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UserError(f"kind = \"reasoning_gym\" needs {error.name}: pip install 'isomorph[gym]'") from None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
