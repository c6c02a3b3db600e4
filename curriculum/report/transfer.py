"""What carries over: accuracies with confidence intervals, and the matrix trained on x evaluated on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self


def interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for the rate of which ``correct`` of ``n`` is a sample; both ends in 0..1.

    Raises:
        ValueError: n is not positive, correct is outside 0..n, or confidence is outside (0, 1).
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct must be in 0..n and n at least 1, got correct = {correct}, n = {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = correct + z2 / 2
    # written so that 0 and n give exactly 0 and 1 at their ends
    half = math.sqrt(z2 * (correct * (n - correct) / n + z2 / 4))
    low = 0.0 if correct == 0 else (centre - half) / (n + z2)
    high = 1.0 if correct == n else (centre + half) / (n + z2)
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A share of right answers with its 95 % confidence interval."""

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
class Evaluation:
    """One cell: what a policy trained on ``trained_on`` got right on ``evaluated_on``."""

    trained_on: str  # such as "graph" or "graph -> natural"
    evaluated_on: str  # a representation
    accuracy: Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferMatrix:
    """Accuracies by what was trained on (rows) and evaluated on (columns). A cell nobody measured is None."""

    trained_on: tuple[str, ...]
    evaluated_on: tuple[str, ...]
    cells: Mapping[tuple[str, str], Accuracy]

    def cell(self, trained_on: str, evaluated_on: str) -> Accuracy | None:
        return self.cells.get((trained_on, evaluated_on))

    def __str__(self) -> str:
        """A text table, one line per row."""
        body = [[row, *(_shown(self.cell(row, column)) for column in self.evaluated_on)] for row in self.trained_on]
        return _aligned([["trained on \\ evaluated on", *self.evaluated_on], *body])


def transfer_matrix(evaluations: Iterable[Evaluation]) -> TransferMatrix:
    """Rows and columns in order of first appearance; several runs of one condition (seeds) are pooled.

    Pooling adds up the counts, so its interval speaks of these runs' questions, not of the spread between seeds.
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for evaluation in evaluations:
        at = (evaluation.trained_on, evaluation.evaluated_on)
        correct, n = counts.get(at, (0, 0))
        counts[at] = (correct + evaluation.accuracy.correct, n + evaluation.accuracy.n)
    return TransferMatrix(
        trained_on=tuple(dict.fromkeys(row for row, _ in counts)),
        evaluated_on=tuple(dict.fromkeys(column for _, column in counts)),
        cells={at: Accuracy.of(correct, n) for at, (correct, n) in counts.items()},
    )


def _shown(accuracy: Accuracy | None) -> str:
    return "-" if accuracy is None else str(accuracy)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
