"""Accuracies and other means over questions with confidence intervals; two models compared on the same questions."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np

NUM_RESAMPLES = 10_000


def interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a rate, from ``correct`` of ``n`` trials; both in 0..1.

    Raises:
        ValueError: n is not positive, correct is outside 0..n, or confidence is outside (0, 1).
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct must be in 0..n and n at least 1, got correct = {correct}, n = {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return _wilson(correct, n, confidence)


def _wilson(correct: float, n: float, confidence: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = correct + z2 / 2
    # exactly 0 for correct = 0 and exactly 1 for correct = n
    half = math.sqrt(z2 * (max(0.0, correct * (n - correct) / n) + z2 / 4))
    low = 0.0 if correct == 0 else (centre - half) / (n + z2)
    high = 1.0 if correct == n else (centre + half) / (n + z2)
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of right answers with its 95 % confidence interval."""

    correct: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, n: int) -> Self:
        """Raises ValueError where ``interval`` does."""
        low, high = interval(correct, n)
        return cls(correct=correct, n=n, low=low, high=high)

    @property
    def rate(self) -> float:
        return self.correct / self.n

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: correct, n, rate, low, high."""
        return {**asdict(self), "rate": self.rate}

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean over ``n`` questions of a number in 0..1, with its 95 % confidence interval."""

    rate: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], samples: int) -> Self:
        """``values``: one in 0..1 for each question, from ``samples`` responses to it.

        Wilson's interval for as many yes-or-no trials as would vary as the questions' values do: m (1 - m) / (s^2 / n)
        with their mean m and variance s^2, at most ``n * samples``; ``n`` where all are 0 or all are 1. (Effective
        sample size, as of surveys in clusters: Korn and Graubard 1998.) Raises ValueError without values.
        """
        n = len(values)
        if n < 1:
            raise ValueError("a mean needs at least one question")
        mean = math.fsum(values) / n
        variance = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1) / n
        trials = float(n)
        if 0 < mean < 1 and n > 1:
            trials = n * samples if variance == 0 else min(n * samples, mean * (1 - mean) / variance)
        low, high = _wilson(mean * trials, trials, 0.95) if 0 < mean < 1 else _wilson(round(mean) * n, n, 0.95)
        return cls(rate=mean, n=n, low=low, high=high)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: rate, n, low, high."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


def pass_at(k: int, correct: int, samples: int) -> float:
    """The probability that at least one of ``k`` responses to a question is right, without bias.

    Estimated from ``correct`` of ``samples`` responses: 1 - C(samples - correct, k) / C(samples, k) (arXiv 2107.03374).
    Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"need 1 <= k <= samples and 0 <= correct <= samples, got {k}, {correct} of {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p value of the exact McNemar test: do two models solve equally many of the same questions.

    From the questions that only one of them solves: a binomial test with probability 1/2.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second - first over the same questions, and its 95 % interval (low, high).

    Percentile bootstrap over questions, always with the same seed. Raises ValueError for lists of other lengths.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"both need the same questions, got {len(first)} and {len(second)}")
    difference_Q = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    rng, size = np.random.default_rng(0), len(difference_Q)
    # in parts, so that memory does not grow with questions times resamples
    num = max(1, min(NUM_RESAMPLES, 4_000_000 // size))
    means = []
    for start in range(0, NUM_RESAMPLES, num):
        rows = min(num, NUM_RESAMPLES - start)
        means.append(difference_Q[rng.integers(size, size=(rows, size))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(difference_Q.mean()), float(low), float(high)
