"""Does similarity to training instances, or the agreement of traces, go with success? Estimates with intervals.

Intervals are percentile bootstraps over items (10,000 resamples, a fixed seed). They hold for the one model whose items
they are; other seeds of a run are other models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES, AT_ONCE = 10_000, 500
TINY = 1e-12  # a sum of squares that is rounding
Statistic = Callable[[np.ndarray], np.ndarray]  # of rows [..., columns, items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A statistic over ``n`` items with its 95 % interval; NaN where it is not defined, as without variance."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: NaN is None."""
        return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in asdict(self).items()}

    def __str__(self) -> str:
        return "not defined" if math.isnan(self.value) else f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def pearson(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Pearson's correlation."""
    return _bootstrap([x, y], lambda rows: _pearson_of(rows[..., 0, :], rows[..., 1, :]))


def difference(one: Sequence[float], other: Sequence[float], y: Sequence[float]) -> Estimate:
    """Correlation of ``one`` with y minus that of ``other`` with y, of the same items."""
    return _bootstrap(
        [one, other, y],
        lambda rows: _pearson_of(rows[..., 0, :], rows[..., 2, :]) - _pearson_of(rows[..., 1, :], rows[..., 2, :]),
    )


def slope(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> Estimate:
    """Least-squares slope of y over x at equal ``given``: y = a + slope * x + b * given."""
    return _bootstrap([x, given, y], _slope_of)


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(axis=-1, keepdims=True)


def _pearson_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Over the last dimension; NaN without variance."""
    x, y = _centred(x), _centred(y)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return _ratio((x * y).sum(-1), scale)


def _slope_of(rows: np.ndarray) -> np.ndarray:
    """Of rows [..., 3, n]: x, given, y. NaN where x or y does not vary, or x is a linear function of ``given``."""
    x, given, y = (_centred(rows[..., i, :]) for i in range(3))
    xx, gg, yy = ((one * one).sum(-1) for one in (x, given, y))
    xg, xy, gy = (x * given).sum(-1), (x * y).sum(-1), (given * y).sum(-1)
    has_given = gg > TINY  # else it is constant, and explains nothing
    above = np.where(has_given, xy * gg - xg * gy, xy)
    below = np.where(has_given, xx * gg - xg * xg, xx)
    is_told_apart = below > TINY * np.where(has_given, xx * gg, 1.0)
    return _ratio(above, np.where(is_told_apart & (yy > TINY), below, 0.0))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(below), math.nan), where=below > TINY)


def _bootstrap(columns: Sequence[Sequence[float]], statistic: Statistic) -> Estimate:
    rows = np.array(columns, dtype=np.float64)
    n = rows.shape[1]
    value = float(statistic(rows)) if n > 2 else math.nan
    if math.isnan(value):
        return Estimate(value=math.nan, low=math.nan, high=math.nan, n=n)
    rng = np.random.default_rng(0)
    drawn = [statistic(_resampled(rows, rng)) for _ in range(NUM_RESAMPLES // AT_ONCE)]
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975])  # NaN: resamples without variance
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def _resampled(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[AT_ONCE, columns, n]: the same items in every column."""
    picks = rng.integers(0, rows.shape[1], (AT_ONCE, rows.shape[1]))
    return np.moveaxis(rows[:, picks], 0, 1)
