"""Evaluation: which tasks, greedy samples and their scores, accuracy with intervals, and the sequential baseline.

Used by a run between its stages and by ``isomorph eval``.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isomorph.curriculum.evaluation_results import Result
from isomorph.curriculum.evaluation_spec import EvalSet
from isomorph.curriculum.judge import judge
from isomorph.curriculum.lengths import at_most_in_prompt
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.rewards.pool import RewardPool, answer_found
from isomorph.curriculum.sources import Source, as_prompt
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Answers, Prompt, Sampling
from isomorph.engine.update.score import response_text, warning_of_no_answer

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
        return data.tasks(representation, most, seed=recipe.eval.seed, split="eval")
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
class ModelScore:
    """What a model reaches on one family and representation."""

    family: str
    representation: str
    result: Result
    baseline: float | None  # accuracy of the sequential baseline; None where it is not known
    warning: str  # with an example, where none of the responses states an answer; else ""
    stopped: float  # share of responses that ended before the length limit
    num_tok: int  # of the responses
    seconds: float  # of generation

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "family": self.family,
            "representation": self.representation,
            **self.result.accuracy.to_dict(),
            "floor": self.baseline,
            "reward": self.result.reward,
            "no_answer": self.result.no_answer,
            "stopped": self.stopped,
            "tokens": self.num_tok,
            "generate_s": self.seconds,
        }


def evaluate_tasks(policy: Policy, tasks: Sequence[Task], sampling: Sampling) -> ModelScore:
    """Samples one response to each task with the built-in sampler and scores it.

    All tasks are of one family and representation. Raises UserError where the tokenizer does not know their words.
    """
    prompts = [as_prompt(i, task, policy.text) for i, task in enumerate(tasks)]
    _refuse_unreadable(prompts, policy.text)
    started = time.perf_counter()
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
    seconds = time.perf_counter() - started
    texts = [response_text(policy.text.decode, rollout) for rollout in rollouts]
    with RewardPool() as score:
        rewards = score(prompts, texts)
    stopped = sum(rollout.finish == "stop" for rollout in rollouts) / len(rollouts)
    found = [answer_found(task.family, text) for task, text in zip(tasks, texts, strict=True)]
    correct = tuple(task.is_correct(reward) for task, reward in zip(tasks, rewards, strict=True))
    answers = Answers(texts=tuple(texts), rewards=tuple(rewards), correct=correct, found=tuple(found))
    family, representation = tasks[0].family, tasks[0].representation
    return ModelScore(
        family=family,
        representation=representation,
        result=Result.of(range(len(tasks)), answers, None),
        baseline=sequential_baseline(tasks),
        warning=warning_of_no_answer(f"{family}:{representation}", found, texts, 1 - stopped),
        stopped=stopped,
        num_tok=sum(rollout.num_model_tok for rollout in rollouts),
        seconds=seconds,
    )


def refuse_long(policy: Policy, tasks: Sequence[Task], max_new_tok: int, noun: str) -> None:
    """Raises UserError where a prompt and ``max_new_tok`` exceed the model's positions.

    ``noun``: what the tasks are numbered as, "row" of a file or "question".
    """
    for i, task in enumerate(tasks):
        num_tok = at_most_in_prompt(policy.text, task, policy.max_model_len - max_new_tok)
        if num_tok + max_new_tok > policy.max_model_len:
            raise UserError(
                f"{task.representation}, {noun} {i + 1}: a prompt of {num_tok} tokens and {max_new_tok} new ones make "
                f"{num_tok + max_new_tok}, the model has positions for {policy.max_model_len}: lower --max-new-tok, or "
                "take it out"
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
