"""``RunEvaluations``: which evaluations of a run are due, what they ask, and what they found."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from isomorph.curriculum.evaluation import evaluation_keys, evaluation_tasks, sequential_baseline
from isomorph.curriculum.evaluation_results import (
    best_shortcut,
    item_rows,
    results_by_key,
    results_record,
    row_keys,
    row_values,
)
from isomorph.curriculum.evaluation_spec import START, label_of, place_of
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.sources import Source, TaskFiles, as_prompt
from isomorph.curriculum.stage_spec import StageRecipe
from isomorph.curriculum.tasks.facts import rates_of
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Answers, EvaluationRecord, EvaluationRequest, Prompt

VALIDATION = "validation"  # of the keys of steps.jsonl


class RunEvaluations:
    """The evaluations of [eval]. The questions are the same ones in every evaluation."""

    def __init__(
        self,
        recipe: Recipe,
        text: TextCodec,
        sources: Mapping[str, Source],
        begin: Callable[[Task], Task | None],
    ) -> None:
        """``begin``: the task as its environment begins it; None where that fails."""
        self.recipe, self.text, self.sources = recipe, text, sources
        self.done: list[dict[str, Any]] = []  # results so far
        self._begin = begin
        self._keys = evaluation_keys(recipe, sources)
        self._prompts: tuple[Prompt, ...] | None = None
        self._validation: tuple[Prompt, ...] | None = None
        self._baseline: dict[str, float | None] | None = None
        self._shortcuts: dict[str, dict[str, float]] | None = None

    def due(self, stage_index: int, steps_done: int, total_steps: int) -> EvaluationRequest | None:
        """The evaluation of this moment, if there is one and it has not been done.

        ``steps_done``: of the present stage; ``total_steps``: of all.
        """
        label, wanted = self._label(stage_index, steps_done, total_steps), self.recipe.eval
        if label is None or label in {done["label"] for done in self.done}:
            return None
        return EvaluationRequest(
            label=label,
            prompts=self.prompts(),
            max_new_tok=wanted.max_new_tok,
            samples=wanted.samples,
            temperature=wanted.temperature,
            seed=wanted.seed,
            stop=self.recipe.stop_strings,
            validation=self.validation(),
            validation_batch_tok=min((s.batch.micro_batch_tok for s in self._supervised()), default=0),
        )

    def record(
        self, request: EvaluationRequest, greedy: Answers, sampled: Answers | None, *, step: int, after_prompts: int
    ) -> EvaluationRecord:
        """Records results and baseline; ``best_by`` and ``score`` are of the set that ``eval.keep_best`` names."""
        keys = [prompt.representation for prompt in request.prompts]
        results = results_by_key(keys, greedy, sampled)
        of_sets = results_by_key([self._keys[key][0].name for key in keys], greedy, sampled)
        self.done.append(
            {
                "label": request.label,
                "step": step,
                "after_prompts": after_prompts,
                **results_record(results),
                "sets": {name: result.accuracy.to_dict() for name, result in of_sets.items()},
                "floor": self.sequential_baseline(),
                "shortcuts": self.shortcuts(),
                **({"validation_loss": dict(greedy.validation_loss)} if greedy.validation_loss else {}),
            }
        )
        best_by = self.recipe.eval.keep_best
        return EvaluationRecord(
            line=f"eval after {place_of(request.label)}: "
            + "  ".join(f"{key} {result}{best_shortcut(self.shortcuts()[key])}" for key, result in results.items())
            + "".join(f"  validation loss {key} {loss:.4f}" for key, loss in greedy.validation_loss.items()),
            values=row_values(self._keys, results, of_sets)
            | {f"{VALIDATION}/{key}/loss": loss for key, loss in greedy.validation_loss.items()},
            best_by=best_by or "",
            score=of_sets[best_by].accuracy.rate if best_by else math.nan,
            items=tuple(item_rows(request.prompts, greedy)),
        )

    def row_keys(self) -> tuple[str, ...]:
        """The keys of an evaluation in steps.jsonl."""
        keys = dict.fromkeys(prompt.representation for prompt in self.validation())
        return (*row_keys(self._keys, self.recipe.eval.samples), *(f"{VALIDATION}/{key}/loss" for key in keys))

    def sequential_baseline(self) -> dict[str, float | None]:
        """Accuracy of the sequential baseline by what results are listed under; None where it is not known."""
        if self._baseline is None:
            self._baseline = {key: sequential_baseline(tasks) for key, tasks in self._by_key().items()}
        return dict(self._baseline)

    def shortcuts(self) -> dict[str, dict[str, float]]:
        """By what results are listed under: shortcut -> share of the questions that it answers; {} of other data."""
        if self._shortcuts is None:
            self._shortcuts = {key: rates_of(tasks) for key, tasks in self._by_key().items()}
        return dict(self._shortcuts)

    def accuracy(self) -> dict[str, dict[str, Any]]:
        """Results by representation, of ``boundaries``."""
        return {when: done["accuracy"] for when, done in self.boundaries().items()}

    def boundaries(self) -> dict[str, dict[str, Any]]:
        """``before``: at the end of the supervised warm-up, or at the start without one; ``after``: at the end."""
        by_label = {done["label"]: done for done in self.done}
        found = {"before": by_label.get(self.recipe.warm_up_label), "after": by_label.get(self.recipe.stage[-1].name)}
        return {when: done for when, done in found.items() if done is not None}

    def prompts(self) -> tuple[Prompt, ...]:
        """Their ids are negative, those of training are not; ``representation`` is what a result is listed under.

        Raises UserError where an environment begins on none of the rows.
        """
        if self._prompts is None:
            begun = [(key, self._begin(task)) for key, task in self.tasks()]
            if empty := self._keys.keys() - {key for key, task in begun if task is not None}:
                raise UserError(
                    f"[eval] {min(empty)}: its environment begins on none of the rows, or its messages fit on none: "
                    "see the warning above"
                )
            self._prompts = tuple(
                dataclasses.replace(as_prompt(-1 - i, task, self.text), representation=key)
                for i, (key, task) in enumerate(begun)
                if task is not None
            )
        return self._prompts

    def tasks(self) -> list[tuple[str, Task]]:
        """Each with what its result is listed under."""
        return [
            (key, task)
            for key, (one, form) in self._keys.items()
            for task in evaluation_tasks(self.recipe, self.sources, one, form)
        ]

    def validation(self) -> tuple[Prompt, ...]:
        """Of the rows that ``validation_share`` keeps, what a supervised stage would train on; ``representation`` is
        what their loss is listed under: NAME/FORM."""
        if self._validation is None:
            parts = dict.fromkeys((p.data, p.representation) for s in self._supervised() for p in s.mixture)
            kept = [(f"{data}/{form}", task) for data, form in parts for task in self._kept(data, form)]
            self._validation = tuple(
                dataclasses.replace(as_prompt(-1 - i, task, self.text), representation=key)
                for i, (key, task) in enumerate(kept)
            )
        return self._validation

    def _kept(self, data: str, form: str) -> list[Task]:
        source = self.sources.get(data)
        return source.validation[form] if isinstance(source, TaskFiles) else []

    def _supervised(self) -> list[StageRecipe]:
        return [stage for stage in self.recipe.stage if stage.has_demonstrations]

    def _by_key(self) -> dict[str, list[Task]]:
        asked = self.prompts()
        return {key: [prompt.payload for prompt in asked if prompt.representation == key] for key in self._keys}

    def _label(self, stage_index: int, steps_done: int, total_steps: int) -> str | None:
        """The label of the evaluation that belongs to this moment; None if there is none."""
        if steps_done:
            every = self.recipe.eval.every
            return label_of(total_steps) if every and total_steps % every == 0 else None
        if stage_index:
            return self.recipe.stage[stage_index - 1].name
        return None if self.recipe.stage[0].has_demonstrations else START
