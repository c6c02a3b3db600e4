"""Statistics over seeds: coverage of the intervals on simulated studies, null effects, tests by hand and by scipy."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from simulated_study import write_study

from isomorph.curriculum.study import page, seeds
from isomorph.curriculum.study.analysis import analyse
from isomorph.curriculum.study.results import read_results
from isomorph.curriculum.study.seeds import (
    Reach,
    band,
    effect,
    holm,
    interval_over_seeds,
    sign_test,
    steps_to_reach,
    variance_of_mean,
)

TRUTH = 0.05


def simulated(
    rng: np.random.Generator, num_seeds: int, num_items: int, *, of_seeds: float, of_items: float, shared: bool
) -> list[np.ndarray]:
    """Paired differences of right answers whose expectation over seeds, items and answers is TRUTH."""
    common = rng.uniform(-of_items, of_items, num_items)
    found = []
    for _ in range(num_seeds):
        by_item = common if shared else rng.uniform(-of_items, of_items, num_items)
        base = rng.uniform(0.35, 0.55, num_items)
        chance = base + TRUTH + rng.uniform(-of_seeds, of_seeds) + by_item
        assert chance.min() > 0 and chance.max() < 1  # no clipping: the truth stays what it is
        found.append((rng.random(num_items) < chance).astype(float) - (rng.random(num_items) < base))
    return found


@pytest.mark.parametrize(
    ("num_seeds", "num_items", "of_seeds", "of_items", "shared"),
    [
        (6, 60, 0.12, 0.0, True),
        (6, 40, 0.03, 0.2, True),
        (6, 40, 0.12, 0.1, False),
        (12, 40, 0.10, 0.1, True),
        (3, 100, 0.10, 0.1, True),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch, num_seeds: int, num_items: int, of_seeds: float, of_items: float, shared: bool
) -> None:
    monkeypatch.setattr(seeds, "NUM_RESAMPLES", 1000)
    rng, num = np.random.default_rng(7), 150
    held = 0
    for _ in range(num):
        drawn = simulated(rng, num_seeds, num_items, of_seeds=of_seeds, of_items=of_items, shared=shared)
        low, high, method = interval_over_seeds(drawn, shared=shared)
        held += low <= TRUTH <= high
    assert method == ("bootstrap" if num_seeds >= 5 else "t")
    assert 0.91 <= held / num <= 0.99  # 0.95, give or take two standard errors


def test_items_alone_would_claim_too_much() -> None:
    """What the pooled interval of a report did: all answers as independent trials."""
    rng, num, held = np.random.default_rng(8), 200, 0
    for _ in range(num):
        drawn = np.concatenate(simulated(rng, 6, 200, of_seeds=0.12, of_items=0.0, shared=True))
        half = 1.96 * drawn.std(ddof=1) / math.sqrt(len(drawn))
        held += abs(drawn.mean() - TRUTH) <= half
    assert held / num < 0.85


def test_the_variance_is_that_of_the_two_way_layout() -> None:
    """Against 6,000 simulated means of 4 seeds and 15 items with known normal effects."""
    rng, num_seeds, num_items = np.random.default_rng(9), 4, 15
    draws = [
        rng.normal(0, 0.3, (num_seeds, 1))
        + rng.normal(0, 0.5, (1, num_items))
        + rng.normal(0, 1, (num_seeds, num_items))
        for _ in range(6_000)
    ]
    truth = 0.3**2 / num_seeds + 0.5**2 / num_items + 1 / (num_seeds * num_items)
    assert np.var([d.mean() for d in draws]) == pytest.approx(truth, rel=0.05)
    estimates = [variance_of_mean(list(d), shared=True)[0] for d in draws[:2000]]
    assert np.mean(estimates) == pytest.approx(truth, rel=0.05)


def test_nested_items_give_the_t_interval_of_the_seeds_means() -> None:
    drawn = simulated(np.random.default_rng(1), 4, 50, of_seeds=0.1, of_items=0.1, shared=False)
    low, high, _ = interval_over_seeds(drawn, shared=False)
    expected = stats.ttest_1samp([d.mean() for d in drawn], 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_one_seed_speaks_of_its_items_only() -> None:
    values = np.random.default_rng(2).integers(-1, 2, 100).astype(float)
    found = effect([values], shared=True)
    half = 1.959964 * values.std(ddof=1) / 10
    assert found.method == "items" and found.t_p is None
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert math.isnan(effect([np.array([3.0])], shared=False).low)


def test_tests_over_seeds() -> None:
    assert sign_test(6, 0) == pytest.approx(2 / 64) and sign_test(5, 1) == pytest.approx(14 / 64)
    assert sign_test(0, 0) == 1.0
    drawn = simulated(np.random.default_rng(3), 6, 50, of_seeds=0.1, of_items=0.1, shared=True)
    found, means = effect(drawn, shared=True), [d.mean() for d in drawn]
    assert found.t_p == pytest.approx(2 * stats.t.sf(abs(np.mean(means)) / stats.sem(means), 5))
    assert found.mean == pytest.approx(np.mean(means)) and found.num_ahead == sum(m > 0 for m in means)
    # Holm (1979) by hand: 0.01 * 4, 0.02 * 3, max(0.03 * 2, .), max(0.9 * 1, .)
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])


def test_no_difference_between_seeds_or_items_is_no_error() -> None:
    found = effect([np.zeros(10)] * 6, shared=True)
    assert (found.mean, found.low, found.high, found.t_p, found.sign_p) == (0, 0, 0, None, 1)


def test_runs_that_all_never_reach_an_accuracy_have_no_interval() -> None:
    never = Reach(target=0.5, by_seed=(None,) * 6, end=40.0)
    for num in (2, 6):
        saved = effect([np.array([step - 40.0]) for step in never.restricted[:num]], shared=False)
        assert saved.mean == 0 and math.isnan(saved.low) and math.isnan(saved.high) and not saved.excludes_zero
    assert math.isnan(effect([np.array([20.0]), np.array([20.0])], shared=False).low)  # not 20 to 20


def test_a_band_is_the_t_interval_of_the_mean() -> None:
    values = [0.2, 0.3, 0.5]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert band(values) == pytest.approx((1 / 3, expected.low, expected.high))
    assert math.isnan(band([0.4])[1])


def test_steps_to_reach_and_runs_that_never_do() -> None:
    assert steps_to_reach([0, 20, 40], [0.1, 0.3, 0.7], 0.5) == pytest.approx(30)
    assert steps_to_reach([0, 20, 40], [0.1, 0.3, 0.7], 0.1) == 0
    assert steps_to_reach([0, 20, 40], [0.1, 0.6, 0.4], 0.6) == 20  # the first time counts
    assert steps_to_reach([0, 20], [0.1, 0.3], 0.31) is None
    reach = Reach(target=0.5, by_seed=(10.0, 30.0, None), end=40.0)
    assert reach.num_reached == 2 and reach.median == 30 and reach.restricted == (10, 30, 40)
    assert Reach(target=0.5, by_seed=(10.0, None, None), end=40.0).median is None
    assert Reach(target=0.5, by_seed=(10.0, None), end=40.0).median is None  # the curve stays at one half


def test_an_effect_is_called_and_a_null_effect_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "NUM_RESAMPLES", 2000)
    write_study(tmp_path, {"words": 0.0, "graph_words": 0.2, "same": 0.0}, spread=0.04)
    found = {(c.name, c.budget): c for c in analyse(read_results(tmp_path)).planned()}
    first = found["graph_words - words", 20]
    assert first.effect.low > 0.1 and first.effect.num_ahead == 6 and first.effect.sign_p == pytest.approx(2 / 64)
    assert first.effect.low <= 0.2 <= first.effect.high
    assert first.holm_t_p is not None and first.holm_t_p < 0.05
    assert first.holm_sign_p == pytest.approx(6 * 2 / 64)
    nulls = [one for (name, _), one in found.items() if name == "same - words"]
    assert len(nulls) == 3 and not any(one.effect.excludes_zero for one in nulls)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Each row of results.jsonl becomes what ``change`` returns; None: it is left out."""
    file = folder / "results.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def test_holm_counts_planned_comparisons_without_a_t_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "NUM_RESAMPLES", 200)
    write_study(tmp_path, {"words": 0.0, "graph_words": 0.1, "same": 0.0}, num_items=60)
    words = {}
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        words[row["condition"], row["seed"], row["step"], row["representation"]] = row["right"]

    def like_words(row: dict[str, Any]) -> dict[str, Any]:
        right = words["words", row["seed"], row["step"], row["representation"]]
        return {**row, "right": right} if row["condition"] == "same" else row

    rewritten(tmp_path, like_words)
    planned = analyse(read_results(tmp_path)).planned()
    assert [c.effect.t_p is None for c in planned] == [c.first == "same" for c in planned] and len(planned) == 6
    assert [c.holm_t_p is None for c in planned] == [c.effect.t_p is None for c in planned]
    least = min((c for c in planned if c.effect.t_p is not None), key=lambda c: c.effect.t_p or 0.0)
    assert least.effect.t_p is not None and least.holm_t_p == pytest.approx(min(1.0, 6 * least.effect.t_p))


def test_seeds_that_were_never_evaluated_after_the_same_step_have_no_curve(tmp_path: Path) -> None:
    write_study(tmp_path, {"words": 0.0, "graph_words": 0.1}, seeds=(1, 2), num_items=20, representations=("natural",))
    rewritten(tmp_path, lambda row: {**row, "step": row["step"] - row["seed"]} if row["step"] else None)
    found = analyse(read_results(tmp_path))
    assert not found.curves and not found.reached
    assert page.write_study(tmp_path).is_file()
