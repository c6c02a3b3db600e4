"""Statistics over seeds: a claim about training is about other seeds, so the seed is the unit, not the item.

Needs scipy (extra ``study``).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
MIN_SEEDS = 5  # a bootstrap over fewer seeds has too few different resamples: Student's t instead
CHUNK = 4_000_000  # resampled items at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A mean difference over seeds and items, with its interval and tests."""

    mean: float
    low: float
    high: float
    method: str  # "bootstrap", "t", or "items" where there is one seed: then it says nothing about other seeds
    by_seed: tuple[float, ...]
    num_ahead: int  # seeds with a positive difference
    num_behind: int
    sign_p: float  # exact sign test over seeds, two-sided; ties dropped
    t_p: float | None  # paired t test over seeds, two-sided; None with one seed or without any spread

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def effect(differences: Sequence[np.ndarray], *, shared: bool) -> Effect:
    """The mean of paired differences. ``differences``: for each seed those of its items, [I] each, in -1..1.

    ``shared``: item i is the same for all seeds. Raises ValueError without seeds or items.
    """
    if not differences or any(len(d) == 0 for d in differences):
        raise ValueError("an effect needs at least one seed, and an item of each")
    means = np.array([d.mean() for d in differences])
    low, high, method = interval_over_seeds(differences, shared=shared)
    ahead, behind = int((means > 0).sum()), int((means < 0).sum())
    return Effect(
        mean=float(means.mean()),
        low=low,
        high=high,
        method=method,
        by_seed=tuple(float(m) for m in means),
        num_ahead=ahead,
        num_behind=behind,
        sign_p=sign_test(ahead, behind),
        t_p=float(stats.ttest_1samp(means, 0.0).pvalue) if len(means) > 1 and np.ptp(means) > 0 else None,
    )


def interval_over_seeds(values: Sequence[np.ndarray], *, shared: bool) -> tuple[float, float, str]:
    """95 % interval of the mean of ``values`` (per seed, [I] items each): (low, high, method).

    Five seeds or more: hierarchical bootstrap. Seeds are drawn with replacement, then items: ``shared`` ones once for
    all seeds of a resample, because seeds and items are crossed (Owen, Annals of Applied Statistics 2007), others anew
    within each drawn seed. Such a bootstrap counts the noise of single answers up to three times, and its percentiles
    are too narrow for the variance between few seeds. So it gives the shape only: deviations are scaled to
    ``variance_of_mean``, and percentiles are those at Student's t (as Hesterberg's expanded percentiles, The American
    Statistician 2015). Two to four seeds: Student's t with the same variance. One: normal, over items. NaN where each
    seed has one number and all are equal, such as of runs that never reach an accuracy: they tell no spread.
    """
    mean = float(np.mean([v.mean() for v in values]))
    variance, freedom = variance_of_mean(values, shared=shared)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    half = t * math.sqrt(variance)
    if variance == 0 and all(len(v) == 1 for v in values):
        half = math.nan
    if len(values) < MIN_SEEDS or variance == 0:
        return mean - half, mean + half, "items" if len(values) == 1 else "t"
    rng = np.random.default_rng(0)
    resampled = _crossed(np.stack(values), rng) if shared else _nested(values, rng)
    level = float(stats.norm.cdf(-t))
    low, high = np.quantile((resampled - resampled.mean()) / resampled.std(), [level, 1 - level])
    return mean + math.sqrt(variance) * float(low), mean + math.sqrt(variance) * float(high), "bootstrap"


def variance_of_mean(values: Sequence[np.ndarray], *, shared: bool) -> tuple[float, float]:
    """Variance of the mean over seeds and items, without bias, and its degrees of freedom.

    ``shared`` items: two-way random effects, (MS_seed + MS_item - MS_rest) / (seeds * items), Satterthwaite's degrees
    of freedom. Else: variance between the seeds' means over their number. One seed: over its items.
    """
    n = len(values)
    if n == 1:
        return (float(values[0].var(ddof=1)) / len(values[0]) if len(values[0]) > 1 else 0.0), math.inf
    between = float(np.var([v.mean() for v in values], ddof=1)) / n
    if not shared or len(values[0]) == 1:
        return between, n - 1.0
    values_SI = np.stack(values)
    m = values_SI.shape[1]
    of_items = float(values_SI.mean(axis=0).var(ddof=1)) / m
    rest_SI = values_SI - values_SI.mean(axis=0) - values_SI.mean(axis=1, keepdims=True) + values_SI.mean()
    rest = float((rest_SI**2).sum()) / ((n - 1) * (m - 1)) / (n * m)
    variance = between + max(0.0, of_items - rest)
    if variance == 0:
        return 0.0, n - 1.0
    parts = between**2 / (n - 1) + (of_items > rest) * (of_items**2 / (m - 1) + rest**2 / ((n - 1) * (m - 1)))
    return variance, variance**2 / parts if parts else n - 1.0


def _crossed(values_SI: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[NUM_RESAMPLES] means of resampled seeds and, independently, of resampled items."""
    num_seeds, num_items = values_SI.shape
    found = []
    for rows in _chunks(num_items):
        weights_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=rows) / num_seeds
        drawn_RI = rng.integers(num_items, size=(rows, num_items))
        found.append(np.take_along_axis(weights_RS @ values_SI, drawn_RI, axis=1).mean(axis=1))
    return np.concatenate(found)


def _nested(values: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """[NUM_RESAMPLES] means of resampled seeds, each with its items resampled."""
    sums = np.zeros(NUM_RESAMPLES)
    drawn_RS = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    for seed, own in enumerate(values):
        at = np.repeat(np.arange(NUM_RESAMPLES), (drawn_RS == seed).sum(axis=1))
        size = max(1, CHUNK // len(own))
        for start in range(0, len(at), size):
            part = at[start : start + size]
            np.add.at(sums, part, own[rng.integers(len(own), size=(len(part), len(own)))].mean(axis=1))
    return sums / len(values)


def _chunks(num_items: int) -> list[int]:
    size = max(1, min(NUM_RESAMPLES, CHUNK // num_items))
    return [min(size, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, size)]


def sign_test(ahead: int, behind: int) -> float:
    """Two-sided p of the exact sign test; 1.0 without any difference."""
    return float(stats.binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: each at most alpha keeps the family's error at alpha."""
    order = np.argsort(p_values)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its pointwise 95 % interval by Student's t; NaN ends with one seed."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def steps_to_reach(steps: Sequence[float], rates: Sequence[float], target: float) -> float | None:
    """The first step at which a curve of evaluations is at ``target``, linear between them; None: it never is."""
    for i, (step, rate) in enumerate(zip(steps, rates, strict=True)):
        if rate >= target:
            if i == 0 or rate == rates[i - 1]:
                return float(step)
            share = (target - rates[i - 1]) / (rate - rates[i - 1])
            return float(steps[i - 1] + share * (step - steps[i - 1]))
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Steps to reach an accuracy, over seeds; a run that never reaches it counts as censored at ``end``."""

    target: float
    by_seed: tuple[float | None, ...]
    end: float  # the last step that is looked at

    @property
    def num_reached(self) -> int:
        return sum(step is not None for step in self.by_seed)

    @property
    def median(self) -> float | None:
        """Of the Kaplan-Meier curve, all runs being censored at the same step; None: half of the runs or more never."""
        ordered = sorted(math.inf if step is None else step for step in self.by_seed)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return None if math.isinf(middle) else middle

    @property
    def restricted(self) -> tuple[float, ...]:
        """min(steps, end) of each seed: its mean over seeds is defined whether or not all reach the target."""
        return tuple(self.end if step is None else min(step, self.end) for step in self.by_seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "num_reached": self.num_reached, "median": self.median}
