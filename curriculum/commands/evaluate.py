"""``isomorph eval``: accuracy of models and runs, and their differences question by question."""

import contextlib
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from isomorph.curriculum.candidates import Candidate, find_candidate
from isomorph.curriculum.commands.evaluate_tables import show_comparison, show_scores
from isomorph.curriculum.environment import check_backends
from isomorph.curriculum.evaluation import Asked, ModelScore, evaluate_tasks, refuse_long
from isomorph.curriculum.evaluation_results import best_shortcut
from isomorph.curriculum.inputs import located
from isomorph.curriculum.lengths import at_most_in_prompt
from isomorph.curriculum.questions import SEED, check_wanted, open_exam
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.study.statistics import mcnemar, paired_difference
from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.foreign import printable
from isomorph.engine.model.policy import Policy
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.stop_strings import check_stop_strings
from isomorph.engine.types import Sampler, Sampling

MODEL_MAX_NEW_TOK = 512  # where no recipe says how many
SAMPLERS = ("builtin", "vllm")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked, and how; None or empty: what the run's recipe says, or a default."""

    wanted: tuple[str, ...] = ()  # see curriculum/questions.py
    recipe: Path | None = None  # whose sets are asked, in place of the run's
    prompts: int | None = None  # per representation
    max_new_tok: int | None = None
    samples: int = 0  # further responses to each question
    temperature: float | None = None  # of these
    stop: tuple[str, ...] = ()  # strings that end a response
    sampler: str = "builtin"
    out: Path | None = None  # file for every response
    split: str | None = None  # of generated questions: "dev" or "test"

    def check(self) -> None:
        """Raises UserError, before minutes are spent on loading a model."""
        for name, value in (("--prompts", self.prompts), ("--max-new-tok", self.max_new_tok)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.samples < 0:
            raise UserError(f"--samples must not be negative, got {self.samples}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature must be positive, got {self.temperature}")
        if self.split not in (None, "dev", "test"):
            raise UserError(f"--split must be dev or test, got {self.split!r}")
        if self.sampler not in SAMPLERS:
            raise UserError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")

    @property
    def num_samples(self) -> int:
        """``samples``, or one where only a temperature is given."""
        return self.samples or (0 if self.temperature is None else 1)


def evaluate(targets: Sequence[str], options: Options, console: Console, *, as_json: bool) -> None:
    """Prints a table of ``evaluate_targets``, or its JSON; each result also goes to the standard error as it comes."""
    check_backends()
    results = evaluate_targets(targets, options, say=_to_stderr)
    if as_json:
        shown = results if len(targets) > 1 else results["models"][0]
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    elif len(targets) > 1:
        show_comparison(results, console)
    else:
        show_scores(results["models"][0], console)


def _to_stderr(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")


def evaluate_targets(targets: Sequence[str], options: Options, *, say: Say) -> dict[str, Any]:
    """``models``: the results of each target; ``comparisons``: of each later one with the first. JSON-able.

    All are asked the same questions: those of ``options``, or of the first target that is a run, or generated ones.
    ``say`` gets each result as a line.

    Raises:
        UserError: a target cannot be loaded, the data cannot be found or do not suit a model.
        DataError: a file of tasks is broken.
    """
    options.check()
    candidates = [find_candidate(target) for target in targets]
    recipe = next((one.recipe for one in candidates if one.recipe is not None), None)
    if options.recipe is not None:
        recipe = located(load_recipe(options.recipe, [], Recipe))
    if options.split is not None and recipe is not None:
        recipe = _with_split(recipe, options.split)
    for text in options.wanted:
        check_wanted(text, recipe)
    asked: list[Asked] = []
    models: list[dict[str, Any]] = []
    scores: list[list[ModelScore]] = []
    with _responses_file(options.out) as out:
        for candidate in candidates:
            described, own = _evaluated(candidate, asked, recipe, options, say)
            asked = [score.asked for score in own]
            models.append(described)
            scores.append(own)
            if out is not None:
                rows = ({"model": candidate.target, **row} for score in own for row in score.rows())
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            gc.collect()  # before the next model is loaded
    pairs = zip(targets[1:], scores[1:], strict=True)
    return {"models": models, "comparisons": [_compared(targets[0], scores[0], *pair) for pair in pairs]}


def _with_split(recipe: Recipe, split: str) -> Recipe:
    """Raises UserError where none of the recipe's questions are generated."""
    if not any(isinstance(recipe.data[one.data], GeneratedData) for one in recipe.eval.all_sets):
        raise UserError("--split chooses generated questions, and the recipe's [eval] has none: leave it out")
    changed = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"split": split})})
    return changed


def _opened(candidate: Candidate, say: Say) -> Policy:
    policy = candidate.load()
    for note in policy.notes:
        say(f"note: {note}")
    for sentence in candidate.changed:
        say(f"warning: {sentence}: the questions may differ from the run's, and training may have used them")
    return policy


@contextlib.contextmanager
def _responses_file(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"--out {path} exists: name another file, or delete it") from None
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error}") from error
    with file:
        yield file


def _evaluated(
    candidate: Candidate, asked: Sequence[Asked], recipe: Recipe | None, options: Options, say: Say
) -> tuple[dict[str, Any], list[ModelScore]]:
    """What is told of one model, and its scores. ``asked``: what the first model was asked; empty for the first."""
    policy = _opened(candidate, say)
    greedy, *sampled = samplings = _samplings(policy, recipe, options)
    check_stop_strings(greedy.stop, policy.text)
    most = greedy.max_new_tok
    scores: list[ModelScore] = []
    with open_exam(
        policy,
        recipe,
        options.wanted,
        prompts=options.prompts,
        max_new_tok=most,
        split="test" if options.split == "test" else "dev",
        say=say,
    ) as exam:
        for one in asked or exam.asked:
            refuse_long(policy, one, most)
        with _open_sampler(policy, asked or exam.asked, most, recipe, options) as sampler:
            for one in asked or exam.asked:
                num_before = sum(len(score.asked.tasks) for score in scores)
                score = evaluate_tasks(
                    policy, sampler, exam.judge, one, samplings, exam.dialogue, num_before=num_before
                )
                scores.append(score)
                say(f"{one.key} {scores[-1].result}{best_shortcut(scores[-1].shortcuts)}")
                if scores[-1].warning:
                    say(scores[-1].warning)
    described = {
        "target": candidate.target,
        "weights": candidate.source,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "device": str(policy.device),
        "sampler": options.sampler,
        "temperature": 0.0,
        "samples": options.num_samples,
        "sample_temperature": sampled[0].temperature if sampled else None,
        "max_new_tok": greedy.max_new_tok,
        "stop": list(greedy.stop),
        "results": [score.to_dict() for score in scores],
    }
    return described, scores


def _samplings(policy: Policy, recipe: Recipe | None, options: Options) -> list[Sampling]:
    """Greedy, and that of the samples if there are any."""
    temperature = options.temperature or (recipe.eval.temperature if recipe else 1.0)
    drawn = [(0.0, 1), *([(temperature, options.num_samples)] if options.num_samples else [])]
    return [
        Sampling(
            temperature=heat,
            max_new_tok=options.max_new_tok or (recipe.eval.max_new_tok if recipe else MODEL_MAX_NEW_TOK),
            samples_per_prompt=num,
            stop_ids=policy.text.stop_ids,
            stop=options.stop or (recipe.stop_strings if recipe else ()),
            seed=recipe.eval.seed if recipe else SEED,
        )
        for heat, num in drawn
    ]


@contextlib.contextmanager
def _open_sampler(
    policy: Policy, asked: Sequence[Asked], max_new_tok: int, recipe: Recipe | None, options: Options
) -> Iterator[Sampler]:
    limits = SamplerConfig() if recipe is None else recipe.sampler
    if options.sampler == "builtin":
        yield BuiltinSampler(policy, SamplerConfig(max_seqs=limits.max_seqs, kv_tok=limits.kv_tok))
        return
    from isomorph.engine.rollout.vllm import start_vllm  # importing vLLM takes seconds and a lot of memory

    longest = max(at_most_in_prompt(policy.text, task, 0) for one in asked for task in one.tasks) + max_new_tok
    config = SamplerConfig(
        kind="vllm", memory_frac=limits.memory_frac, max_seqs=limits.max_seqs, max_model_len=max(16, longest)
    )
    sampler = start_vllm(policy, config, seed=SEED)
    try:
        yield sampler
    finally:
        sampler.close()


def _compared(first: str, firsts: Sequence[ModelScore], second: str, seconds: Sequence[ModelScore]) -> dict[str, Any]:
    """How ``second`` differs from ``first`` on the same questions."""
    rows = []
    for one, other in zip(firsts, seconds, strict=True):
        pairs = list(zip(one.greedy.correct, other.greedy.correct, strict=True))
        only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
        row: dict[str, Any] = {
            "data": one.asked.key,
            "accuracy": _difference([float(was) for was, _ in pairs], [float(now) for _, now in pairs]),
            "only_first": only_first,
            "only_second": only_second,
            "p": mcnemar(only_first, only_second),
        }
        if one.result.sampled and other.result.sampled:
            row[f"avg@{one.result.sampled.samples}"] = _difference(_shares(one), _shares(other))
        rows.append(row)
    return {"first": first, "second": second, "results": rows}


def _difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    difference, low, high = paired_difference(first, second)
    return {"difference": difference, "low": low, "high": high}


def _shares(score: ModelScore) -> list[float]:
    """Of each question the share of right samples."""
    assert score.sampled is not None
    correct, size = score.sampled.correct, len(score.sampled.correct) // len(score.asked.tasks)
    return [sum(correct[i : i + size]) / size for i in range(0, len(correct), size)]
