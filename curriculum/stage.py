"""``Curriculum``: the present stage, its prompts and its stop conditions, and the evaluations between stages.

Satisfies the engine's ``PromptSource``. Its state is one small JSON object: every random choice is made by a generator
seeded with (run seed, prompt number), so that a resumed run gets the prompts of the uninterrupted one.
"""

import random
from collections.abc import Sequence
from typing import Any

from isomorph.curriculum.evaluation import evaluation_tasks, scores_by_representation, sequential_baseline
from isomorph.curriculum.lengths import LengthLimits
from isomorph.curriculum.recipe import START, GeneratedData, Ingredient, Mastery, Plateau, Recipe, StageRecipe
from isomorph.curriculum.sources import as_prompt, open_sources
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import EvaluationRequest, Group, Prompt


class Curriculum:
    """The stages in order; ``text`` tokenises their questions."""

    def __init__(self, recipe: Recipe, text: TextCodec, max_model_len: int | None = None) -> None:
        """``max_model_len``: the model's positions; None: lengths are not checked.

        Raises UserError where generated questions do not fit, or no row of a file does; other rows are left out.
        """
        self.recipe = recipe
        self.text = text
        limits = None if max_model_len is None else LengthLimits(recipe=recipe, text=text, max_model_len=max_model_len)
        self.sources = open_sources(recipe, text, limits)
        self.stage_index = 0
        self.steps_done = 0  # of the present stage
        self.next_prompt_id = 0
        self.recent_rewards: list[float] = []  # mean of each of the last steps, for mastery and plateau
        self.response_tok = 0  # of the present stage
        self.positions: dict[str, int] = {}  # of each source and representation: rows taken or skipped so far
        self.evaluations: list[dict[str, Any]] = []  # results so far
        self.finished: list[dict[str, Any]] = []  # name, steps and end of the stages that are over
        self._evaluation_prompts: tuple[Prompt, ...] | None = None
        if limits is not None:
            limits.refuse_generated()
            limits.refuse_evaluation(self._evaluation_tasks())

    def stage(self) -> StageRecipe | None:
        stages = self.recipe.stage
        return stages[self.stage_index] if self.stage_index < len(stages) else None

    def stage_step(self) -> int:
        return self.steps_done

    def take(self, num_prompts: int) -> list[Prompt]:
        return [self._next_prompt() for _ in range(num_prompts)]

    def demonstrate(self, prompt: Prompt) -> str | None:
        task: Task = prompt.payload
        return task.demonstration

    def is_correct(self, prompt: Prompt, reward: float) -> bool:
        task: Task = prompt.payload
        return task.is_correct(reward)

    def label(self, prompt: Prompt) -> str:
        return prompt.representation

    def observe(self, groups: Sequence[Group]) -> None:
        stage = self._present()
        if rewards := [reward for group in groups for reward in group.known_rewards]:
            self.recent_rewards = [*self.recent_rewards, sum(rewards) / len(rewards)][-stage.reward_window :]
        self.response_tok += sum(rollout.num_model_tok for group in groups for rollout in group.rollouts)
        self.steps_done += 1
        if reason := self._why_over(stage):
            self.finished.append({"name": stage.name, "steps": self.steps_done, "ended_by": reason})
            self.stage_index += 1
            self.steps_done = self.response_tok = 0
            self.recent_rewards = []

    def pending_evaluation(self) -> EvaluationRequest | None:
        """The evaluation that is due: one after each stage, and one before the first unless that is supervised."""
        label = self.recipe.stage[self.stage_index - 1].name if self.stage_index else START
        is_due = self.steps_done == 0 and label not in {done["label"] for done in self.evaluations}
        if not is_due or (label == START and self.recipe.stage[0].objective.is_supervised):
            return None
        return EvaluationRequest(
            label=label, prompts=self._prompts_of_evaluation(), max_new_tok=self.recipe.eval.max_new_tok
        )

    def record_evaluation(
        self, request: EvaluationRequest, rewards: Sequence[float], found: Sequence[bool] | None
    ) -> str:
        """Records accuracy, share without an answer and baseline by representation; returns a line for the console."""
        results = scores_by_representation([prompt.payload for prompt in request.prompts], rewards, found)
        self.evaluations.append(
            {
                "label": request.label,
                "after_prompts": self.next_prompt_id,
                "accuracy": {name: result.accuracy.to_dict() for name, result in results.items()},
                "no_answer": {n: result.no_answer for n, result in results.items() if result.no_answer is not None},
                "floor": self.sequential_baseline(),
            }
        )
        return f"eval after {request.label}: " + "  ".join(f"{name} {result}" for name, result in results.items())

    def sequential_baseline(self) -> dict[str, float | None]:
        """Accuracy of the sequential baseline per representation of [eval]; None where it is not known."""
        tasks: list[Task] = [prompt.payload for prompt in self._prompts_of_evaluation()]
        return {
            name: sequential_baseline([task for task in tasks if task.representation == name])
            for name in self.recipe.eval.representations
        }

    def accuracy(self) -> dict[str, dict[str, Any]]:
        """Results by representation, of ``boundary_evaluations``."""
        return {when: done["accuracy"] for when, done in self.boundary_evaluations().items()}

    def boundary_evaluations(self) -> dict[str, dict[str, Any]]:
        """``before``: at the end of the supervised warm-up, or at the start without one; ``after``: at the end."""
        by_label = {done["label"]: done for done in self.evaluations}
        found = {"before": by_label.get(self.recipe.warm_up_label), "after": by_label.get(self.recipe.stage[-1].name)}
        return {when: done for when, done in found.items() if done is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage_index": self.stage_index,
            "steps_done": self.steps_done,
            "next_prompt_id": self.next_prompt_id,
            "recent_rewards": list(self.recent_rewards),
            "response_tok": self.response_tok,
            "positions": dict(self.positions),
            "exams": list(self.evaluations),
            "finished": list(self.finished),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of another version, or of a recipe with more stages."""
        self._refuse(state)
        self.stage_index = state["stage_index"]
        self.steps_done = state["steps_done"]
        self.next_prompt_id = state["next_prompt_id"]
        self.recent_rewards = list(state["recent_rewards"])
        self.response_tok = state["response_tok"]
        self.positions = dict(state["positions"])
        self.evaluations = list(state["exams"])
        self.finished = list(state["finished"])

    def _refuse(self, state: dict[str, Any]) -> None:
        expected, stages = self.state_dict().keys(), len(self.recipe.stage)
        if unknown := sorted(state.keys() ^ expected):
            found = f"its curriculum has other fields ({', '.join(unknown)})"
        elif state["stage_index"] > stages:
            found = f"it is in stage {state['stage_index'] + 1} of {stages}"
        else:
            return
        raise UserError(
            f"the checkpoint does not match this recipe or version: {found}; resume with the recipe and the version "
            "that wrote it"
        )

    def _present(self) -> StageRecipe:
        stage = self.stage()
        assert stage is not None, "all stages have ended"
        return stage

    def _why_over(self, stage: StageRecipe) -> str | None:
        if stage.mastery and self._has_mastered(stage.mastery):
            return "mastery"
        if stage.plateau and self._has_levelled_off(stage.plateau):
            return "plateau"
        if stage.max_response_tok is not None and self.response_tok >= stage.max_response_tok:
            return "max_response_tok"
        return "steps" if self.steps_done == stage.steps else None

    def _has_mastered(self, mastery: Mastery) -> bool:
        last = self.recent_rewards[-mastery.window :]
        return len(last) == mastery.window and sum(last) / mastery.window >= mastery.pass_rate

    def _has_levelled_off(self, plateau: Plateau) -> bool:
        size = plateau.window
        last, before = self.recent_rewards[-size:], self.recent_rewards[-2 * size : -size]
        return len(before) == size and (sum(last) - sum(before)) / size < plateau.min_gain

    def _next_prompt(self) -> Prompt:
        prompt_id = self.next_prompt_id
        self.next_prompt_id += 1
        rng = random.Random(f"{self.recipe.run.seed}:{prompt_id}")
        mixture = self._present().mixture
        part = rng.choices(mixture, [p.weight for p in mixture])[0]
        return as_prompt(prompt_id, self._task(part, rng), self.text)

    def _task(self, part: Ingredient, rng: random.Random) -> Task:
        data = self.recipe.data[part.data]
        if isinstance(data, GeneratedData):
            return data.task(rng, part.representation, split="train", sequential_rate=part.sequential_rate)
        key = f"{part.data}:{part.representation}"
        task, self.positions[key] = self.sources[part.data].draw(
            part.representation, self.positions.get(key, 0), self.recipe.run.seed
        )
        return task

    def _prompts_of_evaluation(self) -> tuple[Prompt, ...]:
        """The same ones in every evaluation; their ids are negative, those of training are not."""
        if self._evaluation_prompts is None:
            tasks = self._evaluation_tasks()
            self._evaluation_prompts = tuple(as_prompt(-1 - i, task, self.text) for i, task in enumerate(tasks))
        return self._evaluation_prompts

    def _evaluation_tasks(self) -> list[Task]:
        names = self.recipe.eval.representations
        return [task for name in names for task in evaluation_tasks(self.recipe, self.sources, name)]
