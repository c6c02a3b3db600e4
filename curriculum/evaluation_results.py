"""What an evaluation found, by what results are listed under: accuracy, mean reward, avg@k and pass@k."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isomorph.curriculum.evaluation_spec import EvalSet
from isomorph.curriculum.study.statistics import Accuracy, Mean, pass_at
from isomorph.curriculum.tasks.facts import item_record
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.types import Answers, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Of ``samples`` responses to each question, drawn at a temperature."""

    samples: int
    average: Mean  # avg@k: share of right ones
    passes: dict[int, Mean]  # k -> pass@k

    @classmethod
    def of(cls, correct: Sequence[bool], samples: int) -> "Sampled":
        """``correct``: whether each response is right; ``samples`` of a question next to each other."""
        counts = [sum(correct[i : i + samples]) for i in range(0, len(correct), samples)]
        return cls(
            samples=samples,
            average=Mean.of([count / samples for count in counts], samples),
            passes={k: Mean.of([pass_at(k, count, samples) for count in counts], samples) for k in _ks(samples)},
        )

    def means(self) -> dict[str, Mean]:
        """``avg@8``, ``pass@2``, ... -> value."""
        return {f"avg@{self.samples}": self.average, **{f"pass@{k}": mean for k, mean in self.passes.items()}}


def _ks(samples: int) -> list[int]:
    """2, 4, 8, ... below ``samples``, and ``samples``; pass@1 is avg."""
    return [*(2**i for i in range(1, samples.bit_length()) if 2**i < samples), *([samples] if samples > 1 else [])]


def sampled_names(samples: int) -> list[str]:
    """The names of ``Sampled.means``."""
    return [f"avg@{samples}", *(f"pass@{k}" for k in _ks(samples))] if samples else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result on some questions."""

    accuracy: Accuracy  # of greedy responses; partial credit counts as wrong
    reward: float | None  # mean, of the greedy responses that a reward applies to; None: to none of them
    no_answer: float | None  # share of greedy responses that state no answer, as ``judge/no_answer`` of a step
    sampled: Sampled | None  # None: none were asked for

    @classmethod
    def of(cls, at: Sequence[int], greedy: Answers, sampled: Answers | None) -> "Result":
        """``at``: the numbers of the questions, among those of ``greedy`` and ``sampled``."""
        num = len(greedy.rewards)
        samples = 0 if sampled is None else len(sampled.rewards) // num
        drawn = [] if sampled is None else [sampled.correct[i * samples + j] for i in at for j in range(samples)]
        rewards = [greedy.rewards[i] for i in at if not math.isnan(greedy.rewards[i])]
        told = [greedy.found[i] for i in at] if greedy.found else []
        found = [is_found for is_found in told if is_found is not None]
        return cls(
            accuracy=Accuracy.of(sum(greedy.correct[i] for i in at), len(at)),
            reward=sum(rewards) / len(rewards) if rewards else None,
            no_answer=1 - sum(found) / len(found) if found else None,
            sampled=Sampled.of(drawn, samples) if samples else None,
        )

    def values(self) -> dict[str, float | None]:
        """Its numbers, as in the row of a step."""
        means = self.sampled.means() if self.sampled else {}
        return {
            "accuracy": self.accuracy.rate,
            "reward": self.reward,
            "no_answer": self.no_answer,
            **{name: mean.rate for name, mean in means.items()},
        }

    def __str__(self) -> str:
        parts = [str(self.accuracy)]
        if self.reward not in (None, self.accuracy.rate):
            parts.append(f"reward {self.reward:.3f}")
        if self.sampled is not None:
            parts += [f"{name} {mean.rate:.1%}" for name, mean in self.sampled.means().items()]
        if self.no_answer:
            parts.append(f"(no answer {self.no_answer:.0%})")
        return " ".join(parts)


def results_by_key(keys: Sequence[str], greedy: Answers, sampled: Answers | None) -> dict[str, Result]:
    """A result for each key, in order of first appearance. ``keys``: one for each question."""
    at: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        at.setdefault(key, []).append(i)
    return {key: Result.of(own, greedy, sampled) for key, own in at.items()}


def row_keys(keys: Mapping[str, tuple[EvalSet, str]], samples: int) -> tuple[str, ...]:
    """The keys of ``row_values``."""
    names = ["accuracy", "reward", "no_answer", *sampled_names(samples)]
    sets = dict.fromkeys(one.name for one, _ in keys.values())
    of_sets = [f"exam/{name}/{what}" for name in sets for what in ("accuracy", "reward")]
    return (*of_sets, *(f"exam/{one.name}/{form}/{name}" for one, form in keys.values() for name in names))


def row_values(
    keys: Mapping[str, tuple[EvalSet, str]], results: Mapping[str, Result], of_sets: Mapping[str, Result]
) -> dict[str, float | None]:
    """What goes into the row of a step. ``of_sets``: set -> result on all its questions."""
    values: dict[str, float | None] = {}
    for name, result in of_sets.items():
        values |= {f"exam/{name}/accuracy": result.accuracy.rate, f"exam/{name}/reward": result.reward}
    for key, (one, form) in keys.items():
        if key in results:
            values |= {f"exam/{one.name}/{form}/{what}": value for what, value in results[key].values().items()}
    return values


def best_shortcut(rates: Mapping[str, float]) -> str:
    """`` (shortcut 31.0%)``, to stand beside an accuracy; "" where none is known."""
    return f" (shortcut {max(rates.values()):.1%})" if rates else ""


def item_rows(prompts: Sequence[Prompt], greedy: Answers) -> Iterator[dict[str, Any]]:
    """Of each question what ``item_record`` keeps, and ``set``: what its result is listed under."""
    for i, prompt in enumerate(prompts):
        task: Task = prompt.payload
        has_answer = None if greedy.found is None else greedy.found[i]
        record = item_record(task, greedy.texts[i], is_correct=greedy.correct[i], has_answer=has_answer)
        yield {"set": prompt.representation, **record}


def results_record(results: Mapping[str, Result]) -> dict[str, Any]:
    """JSON-able, as in ``exams`` of summary.json."""
    return {
        "accuracy": {key: result.accuracy.to_dict() for key, result in results.items()},
        "reward": {key: result.reward for key, result in results.items()},
        "no_answer": {key: result.no_answer for key, result in results.items() if result.no_answer is not None},
        "sampled": {
            key: {name: mean.to_dict() for name, mean in result.sampled.means().items()}
            for key, result in results.items()
            if result.sampled is not None
        },
    }
