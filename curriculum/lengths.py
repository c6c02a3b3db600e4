"""Checks before the first step that all prompts and responses fit, for all stages and evaluations."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.stage_spec import StageRecipe
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, content_text

NUM_SAMPLES = 32  # questions generated for each part of a stage's mixture, of the largest number of steps

Misfit = Callable[[Task], str | None]  # why a task does not fit; None where it does


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimits:
    """The limits on prompts and responses that ``recipe`` sets, for a model with ``max_model_len`` positions."""

    recipe: Recipe
    text: TextCodec
    max_model_len: int

    def misfit_of_training(self, data: str, representation: str) -> Misfit:
        """Checks a task against all stages that train on ``data``: what does not fit in one is left out of all."""
        stages = [
            stage
            for stage in self.recipe.stage
            if any((part.data, part.representation) == (data, representation) for part in stage.mixture)
        ]

        def misfit(task: Task) -> str | None:
            return next((why for stage in stages if (why := self._in_stage(task, stage))), None)

        return misfit

    def misfit_of_evaluation(self, data: str, representation: str) -> Misfit:
        """Checks a task against [eval] where it uses ``data``; else all tasks fit."""
        is_used = any(
            one.data == data and (one.representations is None or representation in one.representations)
            for one in self.recipe.evaluation_sets
        )
        return self._in_evaluation if is_used else lambda task: None

    def refuse_generated(self) -> None:
        """Raises UserError where a stage's generated questions do not fit.

        ``NUM_SAMPLES`` questions with the most steps that the difficulty allows are generated for each stage. The few
        in a thousand that are longer than all of these are drawn again when they come up.
        """
        for stage in self.recipe.stage:
            for part in stage.mixture:
                data = self.recipe.data[part.data]
                if not isinstance(data, GeneratedData):
                    continue
                for i in range(NUM_SAMPLES):
                    rng, rate = random.Random(f"room:{i}"), part.sequential_rate
                    task = data.longest.task(rng, part.representation, split="train", sequential_rate=rate)
                    if why := self._in_stage(task, stage):
                        raise UserError(f"stage {stage.name}, a {part.representation} question of {part.data}: {why}")

    def refuse_evaluation(self, tasks: Sequence[Task]) -> None:
        """Raises UserError where one of the evaluation's ``tasks`` does not fit."""
        for i, task in enumerate(tasks):
            if why := self._in_evaluation(task):
                raise UserError(f"[eval], {task.representation} question {i + 1}: {why}")

    def _in_stage(self, task: Task, stage: StageRecipe) -> str | None:
        limits = [
            self._limit_of_model(),
            # a response's last token is only ever a target, so it needs no place in the micro-batch
            (
                stage.batch.micro_batch_tok + 1,
                f"a micro-batch must hold all but the last: batch.micro_batch_tok={stage.batch.micro_batch_tok}",
            ),
        ]
        most = stage.sampling.max_new_tok
        if stage.has_demonstrations:
            if task.demonstration is None:
                return f"has no demonstration, and stage {stage.name} is supervised"
            num_tok = at_most_in_response(self.text, task.demonstration, most)
            if num_tok > most:
                return f"a demonstration of {num_tok} tokens, sampling.max_new_tok must be at least that, got {most}"
            if self._over(task, num_tok, "", *min(limits)):  # perhaps only the bound does not fit
                num_tok = len(self.text.encode_response(task.demonstration))
            response = f"a demonstration of {num_tok}"
        else:
            num_tok, response = most, f"sampling.max_new_tok={most}"
            limits += self._limits_of_sampler()
        return self._over(task, num_tok, response, *min(limits))

    def _in_evaluation(self, task: Task) -> str | None:
        most = self.recipe.eval.max_new_tok
        limits = [self._limit_of_model(), *self._limits_of_sampler()]
        return self._over(task, most, f"eval.max_new_tok={most}", *min(limits))

    def _limit_of_model(self) -> tuple[int, str]:
        return self.max_model_len, f"the model has positions for {self.max_model_len}"

    def _limits_of_sampler(self) -> list[tuple[int, str]]:
        if self.recipe.sampler.kind != "vllm":
            return []
        longest = self.recipe.sampler.max_model_len
        return [(longest, f"vLLM is started for sampler.max_model_len={longest}")]

    def _over(self, task: Task, num_tok: int, response: str, limit: int, why: str) -> str | None:
        prompt_tok = at_most_in_prompt(self.text, task, limit - num_tok)
        if prompt_tok + num_tok <= limit:
            return None
        return f"a prompt of {prompt_tok} tokens and {response} make {prompt_tok + num_tok}, {why}"


def at_most_in_response(text: TextCodec, words: str, limit: int) -> int:
    """Number of tokens of a response; or an upper bound, where that is within ``limit``.

    A token of ASCII text is at least one character, so that texts that are short enough need not be tokenised.
    """
    bound = len(words) + 1
    return bound if words.isascii() and bound <= limit else len(text.encode_response(words))


def at_most_in_prompt(text: TextCodec, task: Task, limit: int) -> int:
    """Number of tokens of the task's prompt; or an upper bound, where that is within ``limit``."""
    messages = task.messages or ({"role": "user", "content": task.question},)
    said = [content_text(message["content"]) for message in messages]
    if all(words.isascii() for words in said):
        roles = tuple(message["role"] for message in messages)
        bound = sum(map(len, said)) + _around(text, roles, task.data if task.data in text.formats else "")
        if bound <= limit:
            return bound
    return len(text.encode_messages(messages, task.data))


@functools.lru_cache(maxsize=64)
def _around(text: TextCodec, roles: tuple[str, ...], format: str) -> int:
    """Number of tokens of a chat of these roles in which each says one letter: the template's own, and those."""
    return len(text.encode_messages([{"role": role, "content": "a"} for role in roles], format))


def left_out(path: str, total: int, reasons: dict[int, str]) -> str:
    """A sentence: how many rows of ``path`` are left out, and why the first three are."""
    first = "; ".join(f"row {row}: {reasons[row]}" for row in sorted(reasons)[:3])
    more = "; ..." if len(reasons) > 3 else ""
    return f"{path}: {len(reasons)} of {total} rows are left out: {first}{more}"
