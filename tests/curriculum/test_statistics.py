"""Intervals of accuracies and means, pass@k, and the comparison of two models on the same questions."""

import itertools
import math

import numpy as np
import pytest

from isomorph.curriculum.study.statistics import Accuracy, Mean, mcnemar, paired_difference, pass_at


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(samples: int, correct: int) -> None:
    responses = [i < correct for i in range(samples)]
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(responses, k))
        assert pass_at(k, correct, samples) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias() -> None:
    """Against 1 - (1 - p)^k, of 8 responses each; the plug-in estimate 1 - (1 - c/n)^k is 0.02 below it."""
    rng, p, k, samples = np.random.default_rng(1), 0.15, 4, 8
    counts = rng.binomial(samples, p, size=200_000)
    assert np.mean([pass_at(k, int(c), samples) for c in counts]) == pytest.approx(1 - (1 - p) ** k, abs=0.003)
    assert np.mean(1 - (1 - counts / samples) ** k) < 1 - (1 - p) ** k - 0.02


@pytest.mark.parametrize(("k", "correct", "samples"), [(0, 1, 4), (5, 1, 4), (2, 5, 4), (2, -1, 4)])
def test_pass_at_k_refuses_what_cannot_be(k: int, correct: int, samples: int) -> None:
    with pytest.raises(ValueError, match="need 1 <= k <= samples"):
        pass_at(k, correct, samples)


@pytest.mark.parametrize(("a", "b", "samples", "questions"), [(1, 1, 8, 100), (0.3, 1.5, 4, 60), (8, 2, 16, 100)])
def test_the_interval_of_a_mean_over_questions_holds_the_truth(
    a: float, b: float, samples: int, questions: int
) -> None:
    """Questions of unequal difficulty: in at least 93 of 100 evaluations; with all responses as trials in fewer."""
    rng, truth, num = np.random.default_rng(2), a / (a + b), 600
    held = naive = 0
    for _ in range(num):
        counts = rng.binomial(samples, rng.beta(a, b, size=questions))
        mean = Mean.of((counts / samples).tolist(), samples)
        held += mean.low <= truth <= mean.high
        pooled = Accuracy.of(int(counts.sum()), questions * samples)
        naive += pooled.low <= truth <= pooled.high
    assert held / num > 0.93 and naive < held


def test_the_interval_of_a_mean_at_its_ends() -> None:
    for value in (0.0, 1.0):
        mean, known = Mean.of([value] * 20, 8), Accuracy.of(int(20 * value), 20)
        assert (mean.low, mean.high) == pytest.approx((known.low, known.high))
    even = Mean.of([0.5] * 20, 2)  # no spread between questions: at most as sure as of 40 responses
    known = Accuracy.of(20, 40)
    assert (even.rate, even.low, even.high) == pytest.approx((0.5, known.low, known.high))
    single = Mean.of([0.25], 4)
    assert single.low < 0.1 and single.high > 0.8
    with pytest.raises(ValueError, match="at least one question"):
        Mean.of([], 4)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (2, 9), (10, 1)])
def test_mcnemar_counts_all_ways_the_questions_could_have_fallen(first: int, second: int) -> None:
    n = first + second
    ways = [sum(way) for way in itertools.product((0, 1), repeat=n)]
    extreme = sum(abs(way - n / 2) >= abs(first - n / 2) for way in ways) / len(ways)
    assert mcnemar(first, second) == pytest.approx(min(1.0, extreme))


def test_a_paired_difference_is_surer_than_one_of_two_samples() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(0, 2, size=2_000)
    second = np.where(rng.random(2_000) < 0.1, 1 - first, first)
    gain, low, high = paired_difference(first.tolist(), second.tolist())
    error = float((second - first).std(ddof=1)) / math.sqrt(2_000)
    assert gain == pytest.approx(float(second.mean() - first.mean()))
    assert (low, high) == pytest.approx((gain - 1.96 * error, gain + 1.96 * error), abs=0.1 * error)
    assert high - low < 0.6 * 2 * 1.96 * math.sqrt(2 * 0.25 / 2_000)
    assert paired_difference(first.tolist(), second.tolist()) == (gain, low, high)
    with pytest.raises(ValueError, match="the same questions"):
        paired_difference([1.0], [1.0, 0.0])
