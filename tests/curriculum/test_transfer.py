"""Intervals and the transfer matrix."""

import math

import pytest

from isomorph.curriculum.report.transfer import Measurement, transfer_matrix
from isomorph.curriculum.study.statistics import Accuracy, interval


def _coverage(rate: float, n: int) -> float:
    probabilities = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
    inside = [low <= rate <= high for low, high in (interval(k, n) for k in range(n + 1))]
    return sum(p for p, is_in in zip(probabilities, inside, strict=True) if is_in)


@pytest.mark.parametrize(("correct", "n"), [(10, 20), (0, 10), (10, 10), (1, 300), (97, 300), (1, 1)])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963985), (0.99, 2.575829304)])
def test_ends_are_where_the_score_test_just_rejects(correct: int, n: int, confidence: float, z: float) -> None:
    for end in interval(correct, n, confidence):
        assert (end - correct / n) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=1e-7, abs=1e-12)


def test_all_right_and_all_wrong_have_exact_ends() -> None:
    assert interval(0, 10)[0] == 0.0
    assert interval(10, 10)[1] == 1.0


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_covers_the_true_rate_about_as_often_as_it_says(rate: float) -> None:
    # exact binomial coverage; Wilson's oscillates around the nominal level, by less than this at n = 300
    assert 0.93 <= _coverage(rate, 300) <= 0.975


def test_more_confidence_is_wider_and_more_data_narrower() -> None:
    low, high = interval(30, 100)
    assert interval(30, 100, 0.99)[0] < low < 0.3 < high < interval(30, 100, 0.99)[1]
    assert interval(300, 1000)[1] - interval(300, 1000)[0] < high - low


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="correct must be in"):
        interval(correct, n)


def test_confidence_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        interval(1, 2, 1.0)


def test_accuracy_carries_its_interval() -> None:
    accuracy = Accuracy.of(97, 300)
    assert accuracy.to_dict() == {
        "correct": 97,
        "n": 300,
        "low": accuracy.low,
        "high": accuracy.high,
        "rate": 97 / 300,
    }
    assert str(accuracy) == "32.3% [27.3%, 37.8%]"


def _measured(trained_on: str, evaluated_on: str, correct: int) -> Measurement:
    return Measurement(trained_on=trained_on, evaluated_on=evaluated_on, accuracy=Accuracy.of(correct, 100))


def test_matrix_pools_seeds_and_leaves_unmeasured_cells_empty() -> None:
    matrix = transfer_matrix(
        [_measured("graph", "natural", 20), _measured("graph", "natural", 30), _measured("natural", "graph", 40)]
    )
    assert matrix.cell("graph", "natural") == Accuracy.of(50, 200)
    assert matrix.cell("graph", "graph") is None
    assert matrix.trained_on == ("graph", "natural")
    assert matrix.evaluated_on == ("natural", "graph")


def test_matrix_as_text_lines_up() -> None:
    text = str(transfer_matrix([_measured("graph -> natural", "natural", 20), _measured("code", "graph", 40)]))
    head, first, second = text.splitlines()
    assert head.index("natural") == first.index("20.0%")
    assert head.index("graph") == second.index("40.0%")
    assert second.split() == ["code", "-", "40.0%", "[30.9%,", "49.8%]"]
