"""The curriculum: which stage is on, what it asks, when it is over, and what was known at its boundaries.

Satisfies the engine's ``PromptSource``. Its whole memory is one small JSON object: every random choice is made by a
generator seeded with (run seed, prompt number), so a resumed run asks what the uninterrupted one would have asked.
"""

import random
from collections.abc import Sequence
from typing import Any

from isomorph.curriculum.judge import judge
from isomorph.curriculum.lengths import Misfit, Room, at_most, left_out
from isomorph.curriculum.recipe import GeneratedData, Ingredient, JsonlData, Mastery, Plateau, Recipe, StageRecipe
from isomorph.curriculum.report.transfer import Accuracy
from isomorph.curriculum.tasks.async_plan import draw_tasks, make_task
from isomorph.curriculum.tasks.jsonl import read_rows, split_rows
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Exam, Group, Prompt

START = "start"  # the exam before the first stage


class Curriculum:
    """Stages in order; ``text`` turns questions into token ids."""

    def __init__(self, recipe: Recipe, text: TextCodec, max_model_len: int | None = None) -> None:
        """``max_model_len``: the model's positions; None: whether questions fit is not looked at.

        Raises UserError where generated questions cannot fit, or no row of a file does; other rows are left out.
        """
        self.recipe = recipe
        self.text = text
        room = None if max_model_len is None else Room(recipe=recipe, text=text, max_model_len=max_model_len)
        self.files = {
            name: TaskFiles(data, text, name, room) for name, data in recipe.data.items() if isinstance(data, JsonlData)
        }
        self.stage_index = 0
        self.steps_done = 0  # of the present stage
        self.next_prompt_id = 0
        self.recent_rewards: list[float] = []  # mean of each of the last steps, for mastery and plateau
        self.response_tok = 0  # of the present stage
        self.positions: dict[str, int] = {}  # of each file: rows taken so far
        self.exams: list[dict[str, Any]] = []
        self.finished: list[dict[str, Any]] = []  # stages that are over, and why
        self._exam_prompts: tuple[Prompt, ...] | None = None
        if room is not None:
            room.refuse_generated()
            room.refuse_exam([task for name in recipe.eval.representations for task in self._exam_tasks(name)])

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

    def observe(self, groups: Sequence[Group]) -> None:
        stage = self._present()
        rewards = [reward for group in groups for reward in group.rewards]
        self.recent_rewards = [*self.recent_rewards, sum(rewards) / len(rewards)][-stage.reward_window :]
        self.response_tok += sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
        self.steps_done += 1
        if reason := self._why_over(stage):
            self.finished.append({"name": stage.name, "steps": self.steps_done, "ended_by": reason})
            self.stage_index += 1
            self.steps_done = self.response_tok = 0
            self.recent_rewards = []

    def exam(self) -> Exam | None:
        """Due after every stage; before the first one only where that is not supervised."""
        label = self.recipe.stage[self.stage_index - 1].name if self.stage_index else START
        is_due = self.steps_done == 0 and label not in {exam["label"] for exam in self.exams}
        if not is_due or (label == START and self.recipe.stage[0].objective.is_supervised):
            return None
        return Exam(label=label, prompts=self._questions(), max_new_tok=self.recipe.eval.max_new_tok)

    def grade(self, exam: Exam, rewards: Sequence[float], found: Sequence[bool] | None) -> str:
        by_representation: dict[str, list[bool]] = {}
        unanswered: dict[str, list[bool]] = {}
        for i, prompt in enumerate(exam.prompts):
            by_representation.setdefault(prompt.representation, []).append(self.is_correct(prompt, rewards[i]))
            if found is not None:
                unanswered.setdefault(prompt.representation, []).append(not found[i])
        no_answer = {name: sum(missing) / len(missing) for name, missing in unanswered.items()}
        results = {name: Accuracy.of(sum(got), len(got)) for name, got in by_representation.items()}
        self.exams.append(
            {
                "label": exam.label,
                "after_prompts": self.next_prompt_id,
                "accuracy": {name: result.to_dict() for name, result in results.items()},
                "no_answer": no_answer,
                "floor": self.floor(),
            }
        )
        parts = (
            f"{name} {r.rate:.1%} [{r.low:.1%}, {r.high:.1%}]"
            + (f" (no answer {no_answer[name]:.0%})" if no_answer.get(name) else "")
            for name, r in results.items()
        )
        return f"exam after {exam.label}: " + "  ".join(parts)

    def floor(self) -> dict[str, float | None]:
        """Share of the exam's questions that doing one step after the other answers rightly; None where unknown."""
        known: dict[str, list[float]] = {}
        for prompt in self._questions():
            task: Task = prompt.payload
            if task.sequential_answer is not None:
                answered = f"<answer>{task.sequential_answer}</answer>"
                known.setdefault(prompt.representation, []).append(
                    judge(task.family, answered, task.answer, reward=task.reward)
                )
        return {
            name: sum(known[name]) / len(known[name]) if name in known else None
            for name in self.recipe.eval.representations
        }

    def accuracy(self) -> dict[str, dict[str, Any]]:
        """Results by representation at the exams of ``boundary_exams``."""
        return {when: exam["accuracy"] for when, exam in self.boundary_exams().items()}

    def boundary_exams(self) -> dict[str, dict[str, Any]]:
        """``before``: at the end of the supervised warm-up, or at the start without one; ``after``: at the end."""
        supervised = 0
        while supervised < len(self.recipe.stage) and self.recipe.stage[supervised].objective.is_supervised:
            supervised += 1
        label = self.recipe.stage[supervised - 1].name if supervised else START
        by_label = {exam["label"]: exam for exam in self.exams}
        found = {"before": by_label.get(label), "after": by_label.get(self.recipe.stage[-1].name)}
        return {when: exam for when, exam in found.items() if exam is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage_index": self.stage_index,
            "steps_done": self.steps_done,
            "next_prompt_id": self.next_prompt_id,
            "recent_rewards": list(self.recent_rewards),
            "response_tok": self.response_tok,
            "positions": dict(self.positions),
            "exams": list(self.exams),
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
        self.exams = list(state["exams"])
        self.finished = list(state["finished"])

    def _refuse(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state_dict().keys() or state["stage_index"] > len(self.recipe.stage):
            raise UserError(
                f"the checkpoint's curriculum is in stage {state.get('stage_index', 0) + 1} and remembers "
                f"{', '.join(state)}; this one has {len(self.recipe.stage)} stages and remembers "
                f"{', '.join(self.state_dict())}: resume with the recipe and the version that wrote it"
            )

    def _present(self) -> StageRecipe:
        stage = self.stage()
        assert stage is not None, "all stages are over"
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
        return self._prompt(prompt_id, self._task(part, rng))

    def _task(self, part: Ingredient, rng: random.Random) -> Task:
        data = self.recipe.data[part.data]
        if isinstance(data, GeneratedData):
            return make_task(
                rng, data.difficulty, part.representation, split="train", sequential_rate=part.sequential_rate
            )
        key = f"{part.data}:{part.representation}"
        position = self.positions.get(key, 0)
        self.positions[key] = position + 1
        return self.files[part.data].training_task(part.representation, position, self.recipe.run.seed)

    def _questions(self) -> tuple[Prompt, ...]:
        """The exam's questions, always the same ones; their ids are negative, training's are not."""
        if self._exam_prompts is None:
            wanted = self.recipe.eval
            tasks = [t for name in wanted.representations for t in self._exam_tasks(name)]
            self._exam_prompts = tuple(self._prompt(-1 - i, task) for i, task in enumerate(tasks))
        return self._exam_prompts

    def _exam_tasks(self, representation: str) -> list[Task]:
        wanted = self.recipe.eval
        data = self.recipe.data[wanted.data]
        if isinstance(data, JsonlData):
            return self.files[wanted.data].held_out[representation][: wanted.prompts]
        return draw_tasks(data.difficulty, representation, wanted.prompts, seed=wanted.seed, split="eval")

    def _prompt(self, prompt_id: int, task: Task) -> Prompt:
        return Prompt(
            prompt_id=prompt_id,
            token_ids=self.text.encode_prompt(task.question),
            task=task.family,
            representation=task.representation,
            payload=task,
        )


class TaskFiles:
    """A [data.NAME] of kind jsonl: its rows, split into training and held out by procedure."""

    def __init__(self, data: JsonlData, text: TextCodec, name: str = "", room: Room | None = None) -> None:
        rows = {name: read_rows(path, data.family, name, reward=data.reward) for name, path in data.files.items()}
        train, held_out = split_rows(rows, eval_share=data.eval_share, seed=data.split_seed)
        self.num_too_long: dict[str, int] = {}
        self.left_out: list[str] = []  # sentences
        self.training: dict[str, list[Task]] = {}
        self.held_out: dict[str, list[Task]] = {}
        for form, tasks in rows.items():
            reasons: dict[int, str] = {}
            number = {id(task): i for i, task in enumerate(tasks, start=1)}
            never: Misfit = lambda task: None  # noqa: E731
            for part, kept, misfit in (
                (train, self.training, room.misfit_of_training(name, form) if room else never),
                (held_out, self.held_out, room.misfit_of_exam(name, form) if room else never),
            ):
                kept[form] = []
                for task in part[form]:
                    num_tok = at_most(text, task.question, data.max_prompt_tok, is_prompt=True)
                    why = misfit(task)
                    if num_tok > data.max_prompt_tok:
                        why = f"a prompt of {num_tok} tokens, max_prompt_tok={data.max_prompt_tok}"
                    if why:
                        reasons[number[id(task)]] = why
                    else:
                        kept[form].append(task)
                if not kept[form]:
                    raise UserError(f"no {form} row fits: {left_out(data.files[form], len(tasks), reasons)}")
            self.num_too_long[form] = len(reasons)
            if reasons:
                self.left_out.append(left_out(data.files[form], len(tasks), reasons))
        self._passes: dict[str, tuple[tuple[int, int], list[int]]] = {}  # representation -> (seed, pass), its order

    def training_task(self, representation: str, position: int, seed: int) -> Task:
        """Row ``position`` of an endless sequence of passes, each in an order of its own."""
        tasks = self.training[representation]
        turn, index = divmod(position, len(tasks))
        known = self._passes.get(representation)
        if known is None or known[0] != (seed, turn):  # permuting the whole file for each row would take its length
            order = random.Random(f"{seed}:{representation}:{turn}").sample(range(len(tasks)), len(tasks))
            known = self._passes[representation] = (seed, turn), order
        return tasks[known[1][index]]
