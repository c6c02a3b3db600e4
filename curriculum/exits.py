"""The tests that end a stage early: mastery and plateau, on what the last steps have earned.

Responses to one prompt resemble each other, so standard errors are over groups (one value a prompt), not over samples:

    mastery   p = mean of the groups' pass rates, se = their standard deviation / sqrt(groups)
              n = p (1 - p) / se^2, the number of independent responses that are worth as much; groups where p is 0 or 1
              lower bound of Wilson's interval for n p of n >= pass_rate
    plateau   y = a + b t by least squares over the window's step means, se_b from its residuals
              (b + t(confidence, window - 2) se_b) * window <= min_gain

A step mean varies by its groups and by what a whole step shares; its residuals hold both.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple, Self

from isomorph.curriculum.stage_spec import Mastery, Plateau


class Moments(NamedTuple):
    """Number, sum and sum of squares of groups' values: of mean rewards, or of pass rates."""

    num: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(len(values), math.fsum(values), math.fsum(value * value for value in values))

    def plus(self, other: "Moments") -> "Moments":
        return Moments(self.num + other.num, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """NaN of none."""
        return self.total / self.num if self.num else math.nan

    @property
    def variance(self) -> float:
        """Of a group, n - 1 in the denominator; NaN of fewer than two."""
        if self.num < 2:
            return math.nan
        return max(0.0, self.squares - self.total * self.total / self.num) / (self.num - 1)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.variance / self.num) if self.num > 1 else math.nan


class StepOutcome(NamedTuple):
    """Of one step: moments of its groups' mean rewards and of their pass rates."""

    rewards: Moments
    passed: Moments


def summed(parts: Sequence[Moments]) -> Moments:
    """The moments of all groups together."""
    found = Moments()
    for part in parts:
        found = found.plus(part)
    return found


def has_mastered(steps: Sequence[StepOutcome], done: int, mastery: Mastery) -> bool:
    """``steps``: the stage's last ones, oldest first; ``done``: its completed steps."""
    last = steps[-mastery.window :]
    if done < mastery.min_steps or len(last) < mastery.window:
        return False
    return lower_pass_rate(summed([step.passed for step in last]), mastery.confidence) >= mastery.pass_rate


def lower_pass_rate(passed: Moments, confidence: float) -> float:
    """One-sided lower bound of a pass rate, by Wilson's interval with the number of responses that are independent."""
    rate, error = passed.mean, passed.error
    if math.isnan(error):
        return 0.0
    num = rate * (1 - rate) / (error * error) if error > 0 and 0 < rate < 1 else float(passed.num)
    z = NormalDist().inv_cdf(confidence)
    half = z * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return (rate + z * z / (2 * num) - half) / (1 + z * z / num)


def has_levelled_off(steps: Sequence[StepOutcome], done: int, plateau: Plateau) -> bool:
    """``steps``: the stage's last ones, oldest first; ``done``: its completed steps."""
    size, patience = plateau.window, plateau.patience
    last = [step.rewards for step in steps[-(size + patience - 1) :] if step.rewards.num]
    if done < plateau.min_steps or len(last) < size + patience - 1:
        return False
    if not plateau.at_zero and not _is_above_zero(last[: size // 2], plateau.confidence):
        return False  # also where it has only just left 0
    means = [step.mean for step in last]
    return all(
        upper_gain(means[start : start + size], plateau.confidence) <= plateau.min_gain for start in range(patience)
    )


def _is_above_zero(steps: Sequence[Moments], confidence: float) -> bool:
    groups = summed(steps)
    error = groups.error if groups.num > 1 else 0.0
    return groups.mean - NormalDist().inv_cdf(confidence) * error > 0


def upper_gain(means: Sequence[float], confidence: float) -> float:
    """One-sided upper confidence bound of slope times number of steps, for at least three step means."""
    num = len(means)
    middle, average = (num - 1) / 2, math.fsum(means) / num
    spread = math.fsum((t - middle) ** 2 for t in range(num))
    slope = math.fsum((t - middle) * (y - average) for t, y in enumerate(means)) / spread
    rest = math.fsum((y - average - slope * (t - middle)) ** 2 for t, y in enumerate(means))
    error = math.sqrt(rest / (num - 2) / spread)
    return (slope + t_quantile(confidence, num - 2) * error) * num


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5).

    Within 0.5 % of the exact one from 3 degrees of freedom on, for probabilities up to 0.99.
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4
