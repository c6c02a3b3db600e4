"""Evaluation: which tasks, greedy samples and their scores, accuracy with intervals, and the sequential baseline.

Used by a run between its stages and by ``isomorph eval``.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isomorph.curriculum.evaluation_results import Result
from isomorph.curriculum.evaluation_spec import EvalSet
from isomorph.curriculum.judge import judge
from isomorph.curriculum.lengths import at_most_in_prompt
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.rewards.pool import answer_found
from isomorph.curriculum.rows.spec import ROWS
from isomorph.curriculum.sources import Source, as_prompt
from isomorph.curriculum.tasks.facts import item_record, rates_of
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Answers, Dialogue, Judge, Prompt, Rollout, Sampler, Sampling
from isomorph.engine.update.score import checked_scores, response_text, warning_of_no_answer

MAX_UNKNOWN_SHARE = 0.01  # of the questions' tokens: with more the model cannot read the questions


def evaluation_tasks(
    recipe: Recipe, sources: Mapping[str, Source], one: EvalSet, representation: str, num_prompts: int | None = None
) -> list[Task]:
    """The tasks of one set of the recipe's [eval] in one representation, always the same ones.

    ``sources``: of the recipe's tables, but for generated tasks. ``num_prompts``: in place of the set's ``prompts``.
    """
    most = num_prompts or one.prompts
    data = recipe.data[one.data]
    if isinstance(data, GeneratedData):
        return data.tasks(representation, most, seed=recipe.eval.seed, split=recipe.eval.split)
    return sources[one.data].held_out_tasks(representation, most)


def evaluation_keys(recipe: Recipe, sources: Mapping[str, Source]) -> dict[str, tuple[EvalSet, str]]:
    """What results are listed under -> set of [eval] and representation, in order."""
    sets = [
        one
        if one.representations is not None
        else one.model_copy(update={"representations": sources[one.data].held_out_labels})
        for one in recipe.evaluation_sets
    ]
    return {one.key(form, len(sets)): (one, form) for one in sets for form in one.representations or ()}


def sequential_baseline(tasks: Sequence[Task]) -> float | None:
    """Accuracy of answering with the total of all steps, one after the other; None where no task has that answer."""
    known = [task for task in tasks if task.sequential_answer is not None]
    if not known:
        return None
    rewards = (
        judge(task.family, f"<answer>{task.sequential_answer}</answer>", task.answer, reward=task.reward)
        for task in known
    )
    return sum(task.is_correct(reward) for task, reward in zip(known, rewards, strict=True)) / len(known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Questions whose results are listed together."""

    key: str  # under which they are
    tasks: tuple[Task, ...]  # at least one, all of one family and representation
    noun: str = "question"  # what they are numbered as: "row" of a file, or "question"

    @property
    def family(self) -> str:
        return self.tasks[0].family

    @property
    def representation(self) -> str:
        return self.tasks[0].representation


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScore:
    """What a model reaches on some questions."""

    asked: Asked
    result: Result
    greedy: Answers
    sampled: Answers | None
    baseline: float | None  # accuracy of the sequential baseline; None where it is not known
    shortcuts: dict[str, float]  # shortcut -> its accuracy; {} where the questions are not generated
    warning: str  # with an example, where none of the greedy responses states an answer; else ""
    stopped: float  # share of all responses that ended before the length limit
    num_tok: int  # of all responses
    seconds: float  # of generation

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        means = self.result.sampled.means() if self.result.sampled else {}
        return {
            "data": self.asked.key,
            "family": self.asked.family,
            "representation": self.asked.representation,
            **self.result.accuracy.to_dict(),
            "reward": self.result.reward,
            **{name: mean.to_dict() for name, mean in means.items()},
            "floor": self.baseline,
            "shortcuts": self.shortcuts,
            "no_answer": self.result.no_answer,
            "stopped": self.stopped,
            "tokens": self.num_tok,
            "generate_s": self.seconds,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for every response, JSON-able; ``sample`` is None for a greedy one."""
        for is_greedy, answers in ((True, self.greedy), (False, self.sampled)):
            for i in range(0 if answers is None else len(answers.texts)):
                assert answers is not None
                size = len(answers.texts) // len(self.asked.tasks)
                task, reward = self.asked.tasks[i // size], answers.rewards[i]
                yield {
                    "data": self.asked.key,
                    "label": task.representation,
                    "question": i // size,
                    "sample": None if is_greedy else i % size,
                    "prompt": task.question if task.messages is None else list(task.messages),
                    "text": answers.texts[i],
                    "reward": None if math.isnan(reward) else reward,
                    **item_record(
                        task,
                        answers.texts[i],
                        is_correct=answers.correct[i],
                        has_answer=None if answers.found is None else answers.found[i],
                    ),
                }


def evaluate_tasks(
    policy: Policy,
    sampler: Sampler,
    judge: Judge,
    asked: Asked,
    samplings: Sequence[Sampling],
    dialogue: Dialogue | None = None,
    *,
    num_before: int = 0,
) -> ModelScore:
    """Samples responses to all tasks by each of ``samplings``, greedy first, and scores them.

    ``dialogue``: replies to responses in several turns. ``num_before``: tasks that the same evaluation asks before
    these; prompts are numbered as in a run's evaluations, and sampling noise is seeded by the numbers.

    Raises UserError where the tokenizer does not know the questions' words.
    """
    tasks = asked.tasks
    prompts = [as_prompt(-1 - i, task, policy.text) for i, task in enumerate(tasks, num_before)]
    _refuse_unreadable(prompts, policy.text)
    answers: list[Answers] = []
    rollouts: list[Rollout] = []
    seconds = 0.0
    for sampling in samplings:
        started = time.perf_counter()
        drawn = sampler.generate(prompts, sampling, dialogue=dialogue)
        seconds += time.perf_counter() - started
        answers.append(_scored(policy, judge, prompts, drawn))
        rollouts += drawn
    greedy, sampled = answers[0], answers[1] if len(answers) > 1 else None
    stopped = sum(rollout.finish == "stop" for rollout in rollouts) / len(rollouts)
    return ModelScore(
        asked=asked,
        result=Result.of(range(len(tasks)), greedy, sampled),
        greedy=greedy,
        sampled=sampled,
        baseline=sequential_baseline(tasks),
        shortcuts=rates_of(tasks),
        warning=warning_of_no_answer(asked.key, greedy.found, greedy.texts, 1 - stopped),
        stopped=stopped,
        num_tok=sum(rollout.num_model_tok for rollout in rollouts),
        seconds=seconds,
    )


def _scored(policy: Policy, judge: Judge, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Answers:
    """``rollouts``: the same number of each prompt, in the order of the prompts."""
    asked = [prompt for prompt in prompts for _ in range(len(rollouts) // len(prompts))]
    texts = [response_text(policy.text.decode, rollout) for rollout in rollouts]
    scores = checked_scores(judge, asked, texts, rollouts)
    tasks: list[Task] = [prompt.payload for prompt in asked]
    correct = scores.correct or [task.is_correct(reward) for task, reward in zip(tasks, scores.rewards, strict=True)]
    return Answers(
        texts=tuple(texts),
        rewards=tuple(scores.rewards),
        correct=tuple(correct),
        # what an answer to a row is, its rewards know
        found=None
        if any(task.family == ROWS for task in tasks)
        else tuple(answer_found(task.family, text) for task, text in zip(tasks, texts, strict=True)),
    )


def refuse_long(policy: Policy, asked: Asked, max_new_tok: int) -> None:
    """Raises UserError where a prompt and ``max_new_tok`` exceed the model's positions."""
    for i, task in enumerate(asked.tasks):
        num_tok = at_most_in_prompt(policy.text, task, policy.max_model_len - max_new_tok)
        if num_tok + max_new_tok > policy.max_model_len:
            raise UserError(
                f"{task.representation}, {asked.noun} {i + 1}: a prompt of {num_tok} tokens and {max_new_tok} new ones "
                f"make {num_tok + max_new_tok}, the model has positions for {policy.max_model_len}: lower "
                "--max-new-tok, or take it out"
            )


def _refuse_unreadable(prompts: Sequence[Prompt], text: TextCodec) -> None:
    unknown = text.tokenizer.unk_token_id
    tokens = [token for prompt in prompts for token in prompt.token_ids]
    share = tokens.count(unknown) / len(tokens)
    if share > MAX_UNKNOWN_SHARE:
        raise UserError(
            f"the model's tokenizer does not know {share:.0%} of the {prompts[0].representation} questions' words: "
            "evaluate a tiny model by its run folder, whose recipe draws questions from its vocabulary"
        )
