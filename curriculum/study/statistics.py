"""Confidence intervals of accuracies."""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self


def interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a rate, from ``correct`` of ``n`` trials; both in 0..1.

    Raises:
        ValueError: n is not positive, correct is outside 0..n, or confidence is outside (0, 1).
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct must be in 0..n and n at least 1, got correct = {correct}, n = {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = correct + z2 / 2
    # exactly 0 for correct = 0 and exactly 1 for correct = n
    half = math.sqrt(z2 * (correct * (n - correct) / n + z2 / 4))
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
