"""The tests that end a stage, on curves of which the truth is known: studies/stage_ends.py prints more of them."""

import math

import numpy as np
import pytest
from scipy import stats

from isomorph.curriculum.exits import Moments, StepOutcome, has_mastered, lower_pass_rate, t_quantile, upper_gain
from isomorph.curriculum.stage_spec import Mastery, Plateau
from studies import load_study

ENDS = load_study("stage_ends")
RUNS = 40


@pytest.mark.parametrize("freedom", [3, 8, 38])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_quantile_is_students(confidence: float, freedom: int) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(stats.t.ppf(confidence, freedom), rel=5e-3)


def test_the_gain_and_its_bound_are_those_of_a_linear_regression() -> None:
    means = np.random.default_rng(0).normal(0.3, 0.1, 12).cumsum()
    fitted = stats.linregress(np.arange(12), means)
    upper = 12 * (fitted.slope + stats.t.ppf(0.95, 10) * fitted.stderr)
    assert upper_gain(means.tolist(), 0.95) == pytest.approx(upper, rel=1e-4)


def test_the_bound_of_a_pass_rate_is_wilsons_over_as_many_responses_as_are_independent() -> None:
    groups = [1.0] * 30 + [0.0] * 10  # responses to one prompt all agree: 40 independent ones, whatever their number
    wilson = stats.binomtest(30, 40).proportion_ci(confidence_level=0.9, method="wilson").low  # one-sided 95 %
    assert lower_pass_rate(Moments.of(groups), 0.95) == pytest.approx(wilson, abs=3e-3)
    assert lower_pass_rate(Moments.of([1.0] * 40), 0.95) == pytest.approx(40 / (40 + 1.6449**2), abs=1e-4)
    assert lower_pass_rate(Moments.of([1.0]), 0.95) == 0.0  # one group has no standard error


@pytest.mark.parametrize("spread", [0.0, ENDS.SPREAD])
def test_a_rising_curve_runs_to_its_end_and_a_flat_one_stops(spread: float) -> None:
    rising = ENDS.ends_of(ENDS.RISING, Plateau(), RUNS, spread)
    flat = ENDS.ends_of(ENDS.CURVES["flat at 0.5"], Plateau(), RUNS, spread)
    assert sum(end is None for end in rising) >= 0.95 * RUNS
    assert sum(end is not None for end in flat) >= 0.9 * RUNS and min(end for end in flat if end) >= 50


def test_a_curve_at_0_does_not_stop_unless_asked() -> None:
    zero, late = ENDS.CURVES["0 throughout"], ENDS.CURVES["0 to step 80, then rises to 0.6"]
    assert ENDS.ends_of(zero, Plateau(), 2) == [None, None]
    assert ENDS.ends_of(zero, Plateau(at_zero=True), 2) == [50, 50]
    assert sum(end is None for end in ENDS.ends_of(late, Plateau(), RUNS)) >= 0.95 * RUNS


def test_mastery_is_reached_where_the_bound_is_the_rate() -> None:
    passed = Moments.of([1.0] * 7 + [0.5] * 2 + [0.0])
    steps = [StepOutcome(rewards=passed, passed=passed)] * 3
    bound = lower_pass_rate(passed.plus(passed).plus(passed), 0.95)
    assert 0.5 < bound < 0.8
    reached = Mastery(pass_rate=bound, window=3, min_steps=3)
    assert has_mastered(steps, 3, reached)
    assert not has_mastered(steps, 3, reached.model_copy(update={"pass_rate": math.nextafter(bound, 1)}))
    assert not has_mastered(steps[:2], 3, reached) and not has_mastered(steps, 2, reached)


def test_mastery_is_seldom_found_where_there_is_none() -> None:
    mastery = Mastery(pass_rate=0.8)
    below, above = (ENDS.ends_of(lambda step, rate=rate: rate, mastery, RUNS) for rate in (0.75, 0.9))
    assert sum(end is not None for end in below) <= 0.1 * RUNS
    assert None not in above
