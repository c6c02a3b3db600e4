"""Shares of a mixture that change within a stage: fading, and adaptive on simulated learners."""

import json
import math
from typing import Any

import pytest
from test_stage import curriculum, do_step, group, stage

from isomorph.curriculum.exits import Moments
from isomorph.curriculum.mixing import difference, weights_at
from isomorph.curriculum.stage_spec import Adaptive, StageRecipe
from isomorph.engine.config import UserError
from studies import load_study

SWITCH = load_study("adaptive_switch")
RUNS = 8
PARTS = [{"data": "plans", "representation": "graph"}, {"data": "plans", "representation": "natural"}]
FADING = [{**PARTS[0], "weight": 1.0, "weight_end": 0.0}, {**PARTS[1], "weight": 0.0, "weight_end": 1.0}]


# -- fading
@pytest.mark.parametrize(("fade", "quarter"), [("linear", 0.75), ("cosine", (1 + math.cos(math.pi / 4)) / 2)])
def test_the_weights_go_from_one_end_to_the_other(fade: str, quarter: float) -> None:
    recipe = StageRecipe.model_validate(stage("one", steps=9, fade=fade, mixture=FADING))
    graph = [weights_at(recipe, step)[0] for step in range(9)]
    assert graph[0] == 1 and graph[2] == pytest.approx(quarter) and graph[4] == pytest.approx(0.5)
    assert graph[8] == pytest.approx(0) and graph == sorted(graph, reverse=True)


def test_a_part_without_weight_end_keeps_its_weight() -> None:
    recipe = StageRecipe.model_validate(stage("one", steps=5, fade="linear", mixture=[FADING[0], PARTS[1]]))
    assert [weights_at(recipe, step) for step in (0, 2, 4)] == [[1, 1], [0.5, 1], [0, 1]]


def test_prompts_fade_as_their_shares_say_and_the_shares_are_told() -> None:
    source = curriculum(stage("one", steps=20, fade="cosine", mixture=FADING, batch={"prompts": 20}))
    drawn, told = [], []
    for _ in range(20):
        told.append(source.step_values()["share/graph"])
        prompts = source.take(20)
        drawn.append(sum(p.representation == "graph" for p in prompts))
        source.observe([group(p, 0.0) for p in prompts])
    assert told[0] == 1 and told[-1] == pytest.approx(0) and drawn[0] == 20 and drawn[-1] == 0
    expected = 20 * sum(share or 0 for share in told)
    assert abs(sum(drawn) - expected) < 4 * math.sqrt(sum(20 * s * (1 - s) for s in told if s is not None))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixture": FADING}, "weight_end needs the form of the change"),
        ({"mixture": [{**PARTS[0], "weight": 0.0}, PARTS[1]]}, "weight must be above 0"),
        ({"mixture": [FADING[0], {**PARTS[1], "weight_end": 0.0}], "fade": "linear"}, "must not all be 0"),
        ({"mixture": FADING, "fade": "linear", "adaptive": {}}, "adaptive is not supported with fade"),
    ],
)
def test_a_fade_that_cannot_be_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        curriculum(stage("one", steps=60, **changes))


# -- adaptive
def left_of(name: str) -> list[int | None]:
    return [SWITCH.run(SWITCH.LEARNERS[name], seed, Adaptive()).left_after for seed in range(RUNS)]


def test_the_statistic_is_welchs() -> None:
    from scipy import stats

    one, other = [0.1, 0.5, 0.4, 0.9], [0.2, 0.1, 0.3]
    expected = stats.ttest_ind(one, other, equal_var=False).statistic
    assert difference(Moments.of(one), Moments.of(other)) == pytest.approx(expected)
    assert difference(Moments.of([1.0, 1.0]), Moments.of([0.0, 0.0])) == math.inf
    assert difference(Moments.of([1.0, 1.0]), Moments.of([1.0, 1.0])) == 0.0
    assert math.isnan(difference(Moments.of([1.0]), Moments.of([1.0, 1.0])))


def test_symbols_are_left_when_they_teach_no_more_and_not_before() -> None:
    left = left_of("symbols rise to step 50, words by their own practice")
    assert all(step is not None and 60 <= step <= 140 for step in left)
    assert sum(step is not None for step in left_of("symbols rise throughout, words stay at 0")) <= 0.1 * RUNS
    assert all(step is not None and step <= 60 for step in left_of("symbols teach nothing, words rise"))
    assert left_of("both stay at 0") == [None] * RUNS


def test_the_shares_do_not_flap_and_no_side_is_starved() -> None:
    for name, learner in SWITCH.LEARNERS.items():
        for seed in range(2):
            found = SWITCH.run(learner, seed, Adaptive())
            left = SWITCH.STEPS if found.left_after is None else found.left_after
            changed = [i for i, (a, b) in enumerate(zip(found.shares, found.shares[1:], strict=False), 1) if a != b]
            assert all(step >= left and (step - left) % Adaptive().window == 0 for step in changed), name
            assert min(found.shares) >= 2 / 16 and max(found.shares) <= 14 / 16, name


def test_what_is_forgotten_is_replayed() -> None:
    forgetful, steady = "symbols are forgotten without practice", "symbols rise to step 50 and carry into words"

    def replay(name: str) -> float:
        found = [SWITCH.run(SWITCH.LEARNERS[name], seed, Adaptive()) for seed in range(4)]
        return sum(max(one.shares[(one.left_after or 0) + 20 :]) for one in found) / 4

    assert replay(forgetful) > 0.3 > replay(steady)


def test_an_adaptive_stage_goes_on_where_its_checkpoint_was(monkeypatch: pytest.MonkeyPatch) -> None:
    adaptive = {"window": 2, "patience": 1, "least_share": 0.25}
    stages = stage("one", steps=30, adaptive=adaptive, mixture=PARTS, batch={"prompts": 8})
    first, second = curriculum(stages), curriculum(stages)

    def step(source: Any, n: int) -> tuple[list[str], dict[str, float | None]]:
        told = source.step_values()
        prompts = source.take(8)
        rates = {"graph": min(n, 8) / 8, "natural": 0.1 * (n % 3)}
        source.observe([group(p, rates[p.representation], 0.0) for p in prompts])
        return [p.payload.question for p in prompts], told

    for n in range(20):
        if n in (3, 15):
            second = curriculum(stages)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        one = step(first, n)
        if n >= 3:
            assert repr(step(second, n)) == repr(one)  # NaN is not equal to itself
    assert first.adaptive is not None and first.adaptive.left_after is not None
    assert repr(first.state_dict()) == repr(second.state_dict())
    while first.stage() is not None:
        do_step(first)
    assert first.finished[0]["left_symbols_after"] == first.adaptive.left_after
