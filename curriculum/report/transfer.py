"""The transfer matrix: accuracy by what was trained on (rows) and evaluated on (columns)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from isomorph.curriculum.study.statistics import Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Accuracy on ``evaluated_on`` of a policy that was trained on ``trained_on``."""

    trained_on: str  # such as "graph" or "graph -> natural"
    evaluated_on: str  # a representation
    accuracy: Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferMatrix:
    """Accuracies by what was trained on (rows) and evaluated on (columns). A cell without a measurement is None."""

    trained_on: tuple[str, ...]
    evaluated_on: tuple[str, ...]
    cells: Mapping[tuple[str, str], Accuracy]

    def cell(self, trained_on: str, evaluated_on: str) -> Accuracy | None:
        return self.cells.get((trained_on, evaluated_on))

    def __str__(self) -> str:
        """A text table, one line per row."""
        body = [[row, *(_shown(self.cell(row, column)) for column in self.evaluated_on)] for row in self.trained_on]
        return _aligned([["trained on \\ evaluated on", *self.evaluated_on], *body])


def transfer_matrix(measurements: Iterable[Measurement]) -> TransferMatrix:
    """Rows and columns in order of first appearance; several runs of one condition (seeds) are pooled.

    Pooling adds up the counts: the interval covers the sampling of questions, not the spread between seeds.
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for measured in measurements:
        at = (measured.trained_on, measured.evaluated_on)
        correct, n = counts.get(at, (0, 0))
        counts[at] = (correct + measured.accuracy.correct, n + measured.accuracy.n)
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
