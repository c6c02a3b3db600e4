"""``Curriculum``: the present stage, its prompts and its stop conditions.

Satisfies the engine's ``PromptSource``. Its state is one small JSON object: every random choice is made by a generator
seeded with (run seed, prompt number), so that a resumed run gets the prompts of the uninterrupted one.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

from isomorph.curriculum.environments.open import Environments
from isomorph.curriculum.exits import Moments, StepOutcome, has_levelled_off, has_mastered
from isomorph.curriculum.lengths import LengthLimits
from isomorph.curriculum.mixing import AdaptiveMixture, part_labels, weights_at
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.run_evaluations import RunEvaluations
from isomorph.curriculum.sources import as_prompt, open_sources
from isomorph.curriculum.stage_spec import Ingredient, StageRecipe
from isomorph.curriculum.star import StarRounds
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.rollout.turns import count_failures
from isomorph.engine.types import (
    Answers,
    EnvironmentFailure,
    EvaluationRecord,
    EvaluationRequest,
    Group,
    Prompt,
    SampleRequest,
)

ROWS_SKIPPED = "rows_skipped"
MOST_UNFIT = 1000  # rows in succession that an environment cannot begin on, or whose messages are too long


class Curriculum:
    """The stages in order; ``text`` tokenises their questions."""

    def __init__(
        self,
        recipe: Recipe,
        text: TextCodec,
        max_model_len: int | None = None,
        environments: Environments | None = None,
    ) -> None:
        """``max_model_len``: the model's positions; None: lengths are not checked. ``environments``: of the recipe,
        loaded; None: prompts are the rows' own.

        Raises UserError where generated questions do not fit, or no row of a file does; other rows are left out.
        """
        self.recipe = recipe
        self.text = text
        limits = None if max_model_len is None else LengthLimits(recipe=recipe, text=text, max_model_len=max_model_len)
        self.environments, self.limits = environments, limits
        self.sources = open_sources(recipe, text, limits)
        if environments is not None:
            environments.start()
        self.stage_index = 0
        self.steps_done = 0  # of the present stage
        self.next_prompt_id = 0
        self.recent: list[StepOutcome] = []  # of the stage's last steps, for mastery and plateau
        self.adaptive: AdaptiveMixture | None = None  # of the present stage, if it has one
        self.star: StarRounds | None = None  # of the present stage, if it has them
        self.asked = 0  # prompts of the step under way
        self.response_tok = 0  # of the present stage
        self.positions: dict[str, int] = {}  # of each source and representation: rows taken or skipped so far
        self.finished: list[dict[str, Any]] = []  # name, steps and end of the stages that are over
        # rollouts by how their environment failed, evaluations included; and training rows that it did not begin on
        self.environment_failures: Counter[str] = Counter()
        self.redrawn: Counter[str] = Counter()  # generated questions that did not fit, by data
        self._num_unbegun_evaluation = 0  # rows for evaluation that it did not begin on
        self.evaluations = RunEvaluations(recipe, text, self.sources, self._begun_for_evaluation)
        self._begin_stage()
        if limits is not None:
            limits.refuse_generated()
            limits.refuse_evaluation([task for _, task in self.evaluations.tasks()])

    def stage(self) -> StageRecipe | None:
        """Of a stage in rounds with the steps of its present round, which ``stage_step`` counts."""
        if self.stage_index == len(self.recipe.stage):
            return None
        return self.recipe.stage[self.stage_index] if self.star is None else self.star.stage()

    def stage_step(self) -> int:
        return self.steps_done if self.star is None else self.star.step

    def total_steps(self) -> int:
        """Completed steps of all stages."""
        return self.steps_done + sum(done["steps"] for done in self.finished)

    def take(self, num_prompts: int) -> list[Prompt]:
        return [self._next_prompt() for _ in range(num_prompts)]

    def max_new_tok(self, prompt: Prompt) -> int:
        """The length limit of responses to ``prompt``: the present stage's, or that of evaluations."""
        if prompt.prompt_id < 0:
            return self.recipe.eval.max_new_tok
        return (self.stage() or self.recipe.stage[-1]).sampling.max_new_tok

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
        self.recent = [*self.recent, self._outcome(groups)][-stage.reward_window :]
        if self.adaptive is not None:
            self.adaptive.observe(groups)
        self.asked = 0
        self.environment_failures += Counter(count_failures(r for group in groups for r in group.rollouts))
        self.response_tok += sum(rollout.num_model_tok for group in groups for rollout in group.rollouts)
        self.steps_done += 1
        if self.star is not None:
            self.star.step += 1
        if reason := self._why_over(stage):
            self._end_stage(reason)

    def pending_samples(self) -> SampleRequest | None:
        """Of a stage in rounds, at the start of each round."""
        if self.star is None or self.stage() is None or not self.star.needs_samples:
            return None
        questions = [self._drawn() for _ in range(self.star.star.prompts)]
        return self.star.request(questions, self.recipe.stop_strings)

    def record_samples(self, groups: Sequence[Group], texts: Sequence[str]) -> str:
        assert self.star is not None
        line = self.star.record(groups, texts, [group.correct(self.is_correct) for group in groups], self.text)
        self.response_tok += sum(rollout.num_model_tok for group in groups for rollout in group.rollouts)
        if self.star.is_over:  # no right answer in the last round
            self.star.refuse_if_nothing_was_learned(self.steps_done)
            self._end_stage("rounds")
        return line

    def _end_stage(self, reason: str) -> None:
        stage = self.recipe.stage[self.stage_index]
        left = {} if self.adaptive is None else {"left_symbols_after": self.adaptive.left_after}
        rounds = {} if self.star is None else {"rounds": self.star.rounds}
        self.finished.append({"name": stage.name, "steps": self.steps_done, "ended_by": reason, **left, **rounds})
        self.stage_index += 1
        self.steps_done = 0
        if self.stage() is not None:  # those of the last stage stay: it may be extended
            self._begin_stage()

    def step_values(self) -> dict[str, float | None]:
        """Shares of a mixture that changes, ``share/LABEL``; of an adaptive one also what it has measured so far."""
        stage = self._present()
        labels = part_labels(stage.mixture)
        if self.adaptive is not None:
            counts = self.adaptive.counts()
            shares = {f"share/{label}": count / sum(counts) for label, count in zip(labels, counts, strict=True)}
            return {**shares, **self.adaptive.values()}
        if self.star is not None:
            return self.star.values()
        if stage.fade is None:
            return {}
        weights = weights_at(stage, self.steps_done)
        return {f"share/{label}": weight / sum(weights) for label, weight in zip(labels, weights, strict=True)}

    def pending_evaluation(self) -> EvaluationRequest | None:
        """The evaluation that is due, once.

        One after each stage, one before the first unless that is supervised, and one every ``eval.every`` steps.
        """
        return self.evaluations.due(self.stage_index, self.steps_done, self.total_steps())

    def record_evaluation(
        self, request: EvaluationRequest, greedy: Answers, sampled: Answers | None
    ) -> EvaluationRecord:
        for answers in (greedy, sampled):
            self.environment_failures += Counter(answers.environment_failures if answers else {})
        return self.evaluations.record(
            request, greedy, sampled, step=self.total_steps(), after_prompts=self.next_prompt_id
        )

    def environment_counts(self) -> dict[str, int]:
        """Rollouts of all ranks that their environment did not end, by how, and rows on which one did not begin.

        Those of a resumed run include what was before. {}: no data has an environment.
        """
        if self.environments is None or not self.environments.tables:
            return {}
        found = {kind: self.environment_failures[kind] for kind in (*get_args(EnvironmentFailure), ROWS_SKIPPED)}
        return {**found, ROWS_SKIPPED: found[ROWS_SKIPPED] + self._num_unbegun_evaluation}

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage_index": self.stage_index,
            "steps_done": self.steps_done,
            "next_prompt_id": self.next_prompt_id,
            "recent": [[list(moments) for moments in outcome] for outcome in self.recent],
            "adaptive": None if self.adaptive is None else self.adaptive.state_dict(),
            "star": None if self.star is None else self.star.state_dict(),
            "response_tok": self.response_tok,
            "positions": dict(self.positions),
            "left_out": {name: source.left_out_rows() for name, source in self.sources.items()},
            "exams": list(self.evaluations.done),
            "finished": list(self.finished),
            "environments": dict(self.environment_failures),
            "redrawn": dict(self.redrawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of another version, or of a recipe with more stages."""
        state = {"environments": {}, "left_out": {}, "redrawn": {}, **state}  # earlier versions did not count
        self._refuse(state)
        self.stage_index = state["stage_index"]
        self.steps_done = state["steps_done"]
        self.next_prompt_id = state["next_prompt_id"]
        self._begin_stage()
        self.recent = [StepOutcome(*(Moments(*moments) for moments in outcome)) for outcome in state["recent"]]
        self.response_tok = state["response_tok"]
        if self.adaptive is not None and state["adaptive"] is not None:
            self.adaptive.load_state_dict(state["adaptive"])
        if self.star is not None and state["star"] is not None:
            self.star.load_state_dict(state["star"])
        self.positions = dict(state["positions"])
        for name, rows in state["left_out"].items():
            self.sources[name].restore_left_out(rows)
        self.evaluations.done = list(state["exams"])
        self.finished = list(state["finished"])
        self.environment_failures = Counter(state["environments"])
        self.redrawn = Counter(state["redrawn"])

    def reopen_extended(self) -> bool:
        """Goes on with the last stage if it has ended by ``steps`` and the recipe now gives it more; whether it did.

        The evaluation at its old end is dropped, as a run with that number from the start has none there.
        """
        last = self.recipe.stage[-1]
        if self.stage() is not None or self.finished[-1]["steps"] >= last.steps:
            return False
        done = self.finished.pop()
        self.stage_index, self.steps_done = len(self.recipe.stage) - 1, done["steps"]
        self.evaluations.done = [done for done in self.evaluations.done if done["label"] != last.name]
        return True

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
        if stage.mastery and has_mastered(self.recent, self.steps_done, stage.mastery):
            return "mastery"
        if stage.plateau and has_levelled_off(self.recent, self.steps_done, stage.plateau):
            return "plateau"
        if stage.max_response_tok is not None and self.response_tok >= stage.max_response_tok:
            return "max_response_tok"
        if self.star is not None and self.star.is_over:
            return "rounds"
        return "steps" if self.steps_done == self.recipe.stage[self.stage_index].steps else None

    def _outcome(self, groups: Sequence[Group]) -> StepOutcome:
        """Mean reward of each group with rewards, and pass rate of each group."""
        rewards = [math.fsum(group.known_rewards) / len(group.known_rewards) for group in groups if group.known_rewards]
        correct = [group.correct(self.is_correct) for group in groups]
        return StepOutcome(rewards=Moments.of(rewards), passed=Moments.of([sum(c) / len(c) for c in correct if c]))

    def _begin_stage(self) -> None:
        """What is counted within a stage; of a run that is over, within its last one."""
        stage, seed = self.recipe.stage[min(self.stage_index, len(self.recipe.stage) - 1)], self.recipe.run.seed
        self.response_tok, self.recent, self.asked = 0, [], 0
        self.adaptive = AdaptiveMixture(stage, stage.adaptive, seed) if stage.adaptive else None
        self.star = StarRounds(stage, stage.star, seed) if stage.star else None

    def _part(self, rng: random.Random) -> Ingredient:
        """The part of the mixture that the next prompt is of."""
        stage = self._present()
        if self.adaptive is None:
            return rng.choices(stage.mixture, weights_at(stage, self.steps_done))[0]
        order = self.adaptive.order()
        self.asked += 1
        return stage.mixture[order[(self.asked - 1) % len(order)]]  # refills begin again

    def _next_prompt(self) -> Prompt:
        if self.star is None:
            return self._drawn()
        self.next_prompt_id += 1
        return as_prompt(self.next_prompt_id - 1, self.star.next_task(), self.text)

    def _drawn(self) -> Prompt:
        """A question from the mixture."""
        prompt_id = self.next_prompt_id
        self.next_prompt_id += 1
        rng = random.Random(f"{self.recipe.run.seed}:{prompt_id}")
        part = self._part(rng)
        for _ in range(MOST_UNFIT):
            task = self._task(part, rng)
            begun = None if task is None else self._begun(task)
            if begun is not None:
                return as_prompt(prompt_id, begun, self.text)
        what = "questions" if isinstance(self.recipe.data[part.data], GeneratedData) else "environment's first messages"
        raise UserError(
            f"data.{part.data}: in {MOST_UNFIT} draws in succession the {what} do not fit: shorten them, or raise "
            "batch.micro_batch_tok and the model's positions"
        )

    def _begun_for_evaluation(self, task: Task) -> Task | None:
        return self._begun(task, is_evaluation=True)

    def _begun(self, task: Task, *, is_evaluation: bool = False) -> Task | None:
        """``task`` as its environment begins it; None where that fails, or makes too long a prompt."""
        begun = task if self.environments is None else self.environments.begun(task)
        if begun is None and is_evaluation:
            self._num_unbegun_evaluation += 1
        elif begun is None:
            self.environment_failures[ROWS_SKIPPED] += 1
        if begun is task or begun is None or self.limits is None:
            return begun
        of = self.limits.misfit_of_evaluation if is_evaluation else self.limits.misfit_of_training
        return None if of(task.data, task.representation)(begun) else begun

    def _task(self, part: Ingredient, rng: random.Random) -> Task | None:
        """The next row, or a random question; None where that does not fit: the start saw a sample of them only."""
        data = self.recipe.data[part.data]
        if isinstance(data, GeneratedData):
            task = data.task(rng, part.representation, split="train", sequential_rate=part.sequential_rate)
            if self.limits is None or self.limits.misfit_of_training(part.data, part.representation)(task) is None:
                return task
            self.redrawn[part.data] += 1
            return None
        key = f"{part.data}:{part.representation}"
        task, self.positions[key] = self.sources[part.data].draw(
            part.representation, self.positions.get(key, 0), self.recipe.run.seed
        )
        return task
