"""From a study's rows to its comparisons: at equal steps, at equal tokens, steps to reach, by difficulty."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isomorph.curriculum.study.results import DEVELOPMENT, DIFFICULTY, TEST, Point, StudyResults
from isomorph.curriculum.study.seeds import Effect, Reach, band, effect, holm, steps_to_reach
from isomorph.engine.record.runlog import Row

MAX_GROUPS = 4  # of items by difficulty
STEPS, TOKENS = "steps", "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One contrast at one budget on one representation, paired by seed and item."""

    first: str
    second: str
    kind: str  # STEPS or TOKENS
    budget: int
    measure: str
    exam: str
    seeds: tuple[int, ...]
    num_items: int
    rates: tuple[float, float]  # mean accuracy of first and second over these seeds
    effect: Effect
    num_carried: int  # runs that had ended before the budget, with their last evaluation
    is_planned: bool  # belongs to the family that Holm's adjustment is over
    holm_sign_p: float | None = None
    holm_t_p: float | None = None

    @property
    def name(self) -> str:
        return f"{self.first} - {self.second}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Accuracy of a condition over its steps, at the evaluations that all its seeds have, at least one."""

    condition: str
    measure: str
    steps: tuple[int, ...]
    tokens: tuple[float, ...]  # response tokens by then, mean over seeds
    mean: tuple[float, ...]
    low: tuple[float, ...]  # NaN with one seed
    high: tuple[float, ...]
    by_seed: dict[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Steps to reach an accuracy, for each condition, and restricted means against the baseline's."""

    target: float
    of_condition: dict[str, Reach]
    saved: dict[str, Effect]  # condition -> min(steps, end) of the baseline minus its own, over the seeds of both


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Items of one difficulty, at the last budget."""

    by: str  # a key of DIFFICULTY
    name: str
    num_items: int
    rates: dict[str, float]  # condition -> mean over seeds
    effects: dict[str, Effect]  # contrast -> effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """All that the page shows."""

    comparisons: tuple[Comparison, ...]
    curves: tuple[Curve, ...]
    reached: tuple[Reached, ...]
    groups: tuple[Group, ...]
    token_budget: int | None
    exam: str  # whose comparisons are the claims
    missing: tuple[str, ...]  # runs without results

    def planned(self) -> list[Comparison]:
        """What the study is about: the contrasts at equal steps on the first representation."""
        return [c for c in self.comparisons if c.is_planned]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN as None."""
        return _jsonable(asdict(self))


def analyse(results: StudyResults) -> Analysis:
    """Everything, from the rows alone. Conditions and seeds without results are left out and listed."""
    study = results.study
    exam = TEST if _has_whole_test(results) else DEVELOPMENT
    tokens = study["max_response_tok"] or _least_tokens(results)
    comparisons = _family([*_at_steps(results, exam), *_at_tokens(results, tokens)])
    curves = [
        curve
        for measure in _representations(results)
        for name in study["conditions"]
        if (curve := _curve(results, name, measure)) is not None
    ]
    expected = [(name, seed) for seed in study["seeds"] for name in study["conditions"]]
    return Analysis(
        comparisons=tuple(comparisons),
        curves=tuple(curves),
        reached=tuple(_reached(results)),
        groups=tuple(_groups(results, exam)),
        token_budget=tokens,
        exam=exam,
        missing=tuple(f"{name}-seed{seed}" for name, seed in expected if (name, seed) not in results.runs),
    )


def _has_whole_test(results: StudyResults) -> bool:
    taken = {(p.condition, p.seed) for p in results.points if p.exam == TEST}
    return bool(taken) and taken >= results.runs.keys()


def _representations(results: StudyResults) -> list[str]:
    """The study's measures, then whatever else was evaluated."""
    return list(dict.fromkeys((*results.study["measure"], *(p.representation for p in results.points))))


def _least_tokens(results: StudyResults) -> int | None:
    """Response tokens of the run that has sampled the fewest: all runs can be compared there."""
    totals: dict[tuple[str, int], int] = {}
    for p in results.points:
        key = (p.condition, p.seed)
        totals[key] = max(totals.get(key, 0), p.response_tok)
    return min(totals.values()) if totals else None


def _at_steps(results: StudyResults, exam: str) -> list[Comparison]:
    budgets = results.study["test_budgets"] if exam == TEST else results.study["budgets"]
    found = []
    for measure in results.study["measure"]:
        for first, second in results.study["contrasts"]:
            for budget in budgets:
                one = compare(results, (first, second), (STEPS, budget), measure, exam)
                found += [one] if one else []
    return found


def _at_tokens(results: StudyResults, tokens: int | None) -> list[Comparison]:
    if tokens is None:
        return []
    pairs = [(measure, pair) for measure in results.study["measure"] for pair in results.study["contrasts"]]
    found = [compare(results, tuple(pair), (TOKENS, tokens), measure, DEVELOPMENT) for measure, pair in pairs]
    return [one for one in found if one]


def compare(
    results: StudyResults, pair: tuple[str, str], at: tuple[str, int], measure: str, exam: str
) -> Comparison | None:
    """None where no seed has both."""
    kind, budget = at
    seeds, differences, rates, lists, carried = [], [], [], set(), 0
    for seed in results.study["seeds"]:
        both = [_values(results, name, seed, at, measure, exam) for name in pair]
        if both[0] is None or both[1] is None:
            continue
        one, other = _aligned(results, both[0], both[1])
        if not len(one):
            continue
        seeds.append(seed)
        differences.append(one - other)
        rates.append((one.mean(), other.mean()))
        lists.add((both[0].items, both[1].items))
        carried += both[0].is_carried + both[1].is_carried
    if not seeds:
        return None
    return Comparison(
        first=pair[0],
        second=pair[1],
        kind=kind,
        budget=budget,
        measure=measure,
        exam=exam,
        seeds=tuple(seeds),
        num_items=min(len(d) for d in differences),
        rates=(float(np.mean([r[0] for r in rates])), float(np.mean([r[1] for r in rates]))),
        effect=effect(differences, shared=len(lists) == 1),
        num_carried=carried,
        is_planned=kind == STEPS and measure == results.study["measure"][0],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    right_I: np.ndarray
    items: str
    is_carried: bool


def _values(
    results: StudyResults, name: str, seed: int, at: tuple[str, int], measure: str, exam: str
) -> _Values | None:
    kind, budget = at
    if (name, seed) not in results.runs:
        return None
    if kind == STEPS:
        point = results.point(name, seed, budget, measure, exam)
        if point is None:
            return None
        return _Values(right_I=point.right_I, items=point.items, is_carried=point.step < budget)
    curve = results.curve(name, seed, measure, exam)
    for before, after in zip(curve, [*curve[1:], None], strict=True):
        if before.response_tok == budget:
            return _Values(right_I=before.right_I, items=before.items, is_carried=False)
        if after is not None and before.response_tok < budget < after.response_tok and before.items == after.items:
            share = (budget - before.response_tok) / (after.response_tok - before.response_tok)
            right_I = (1 - share) * before.right_I + share * after.right_I
            return _Values(right_I=right_I, items=before.items, is_carried=False)
    return None


def _aligned(results: StudyResults, one: _Values, other: _Values) -> tuple[np.ndarray, np.ndarray]:
    """By key, where the two were not asked the same list of items."""
    if one.items == other.items:
        return one.right_I, other.right_I
    keys, others = (results.items[v.items]["keys"] for v in (one, other))
    place = {key: i for i, key in enumerate(others)}
    pairs = [(i, place[key]) for i, key in enumerate(keys) if key in place]
    return one.right_I[[i for i, _ in pairs]], other.right_I[[j for _, j in pairs]]


def _family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With Holm's p values over the planned ones: all count, those without a t test as p = 1."""
    planned = [c for c in comparisons if c.is_planned]
    sign = dict(zip(map(id, planned), holm([c.effect.sign_p for c in planned]), strict=True))
    tested = holm([1.0 if c.effect.t_p is None else c.effect.t_p for c in planned])
    t = {id(c): None if c.effect.t_p is None else p for c, p in zip(planned, tested, strict=True)}
    return [Comparison(**{**_fields(c), "holm_sign_p": sign.get(id(c)), "holm_t_p": t.get(id(c))}) for c in comparisons]


def _fields(one: Comparison) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Comparison.__dataclass_fields__}


def _curve(results: StudyResults, name: str, measure: str) -> Curve | None:
    curves = {seed: results.curve(name, seed, measure) for seed in results.study["seeds"]}
    curves = {seed: points for seed, points in curves.items() if points}
    if not curves:
        return None
    steps = sorted(set.intersection(*({p.step for p in points} for points in curves.values())))
    if not steps:  # each seed's stages ended at steps of their own
        return None
    at = {seed: {p.step: p for p in points} for seed, points in curves.items()}
    bands = [band([at[seed][step].rate for seed in at]) for step in steps]
    return Curve(
        condition=name,
        measure=measure,
        steps=tuple(steps),
        tokens=tuple(float(np.mean([at[seed][step].response_tok for seed in at])) for step in steps),
        mean=tuple(b[0] for b in bands),
        low=tuple(b[1] for b in bands),
        high=tuple(b[2] for b in bands),
        by_seed={seed: tuple(at[seed][step].rate for step in steps) for seed in at},
    )


def _reached(results: StudyResults) -> list[Reached]:
    study = results.study
    measure, baseline, end = study["measure"][0], study["baseline"], study["budgets"][-1]
    curve = _curve(results, baseline, measure)
    targets = study["reach"] or _default_targets(curve)
    return [_reached_at(results, target, measure, baseline, end) for target in targets]


def _default_targets(curve: Curve | None) -> list[float]:
    """What the baseline has at its end, and half of the way there."""
    if curve is None or curve.mean[-1] <= curve.mean[0]:
        return []
    return [round((curve.mean[0] + curve.mean[-1]) / 2, 3), round(curve.mean[-1], 3)]


def _reached_at(results: StudyResults, target: float, measure: str, baseline: str, end: int) -> Reached:
    of_condition, by_seed = {}, {}
    for name in results.study["conditions"]:
        curves = {seed: results.curve(name, seed, measure) for seed in results.study["seeds"]}
        found = {
            seed: steps_to_reach(*_until([p.step for p in own], [p.rate for p in own], end), target)
            for seed, own in curves.items()
            if own
        }
        if found:
            of_condition[name] = Reach(target=target, by_seed=tuple(found.values()), end=float(end))
            by_seed[name] = dict(zip(found, of_condition[name].restricted, strict=True))
    saved = {}
    for name, own in by_seed.items():
        both = [seed for seed in own if seed in by_seed.get(baseline, {})]
        if name != baseline and both:
            differences = [np.array([by_seed[baseline][seed] - own[seed]]) for seed in both]
            saved[name] = effect(differences, shared=False)
    return Reached(target=target, of_condition=of_condition, saved=saved)


def _until(steps: Sequence[int], rates: Sequence[float], end: int) -> tuple[list[int], list[float]]:
    num = sum(step <= end for step in steps)
    return list(steps[:num]), list(rates[:num])


def _groups(results: StudyResults, exam: str) -> list[Group]:
    """Of the first representation's items, by each thing that is known of them."""
    study = results.study
    measure = study["measure"][0]
    budgets = study["test_budgets"] if exam == TEST else study["budgets"]
    last: dict[tuple[str, int], Point] = {}
    for name, seed in results.runs:
        point = results.point(name, seed, budgets[-1], measure, exam)
        if point is not None:
            last[name, seed] = point
    lists = {p.items for p in last.values()}
    if len(lists) != 1:
        return []
    (listed,) = lists
    found = []
    for by in DIFFICULTY:
        values = results.items[listed].get(by)
        if values and None not in values and len(set(values)) > 1:
            found += [_group(results, last, by, name, at) for name, at in _bins(values)]
    return found


def _bins(values: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """Each value, or where there are many, groups of about equal size; with the indices of the items."""
    known = np.asarray(values)
    distinct = np.unique(known)
    if len(distinct) <= MAX_GROUPS:
        words = {"True": "yes", "False": "no"}
        return [(words.get(str(v), str(v)), np.flatnonzero(known == v)) for v in distinct]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, MAX_GROUPS + 1), method="inverted_cdf"))
    found = []
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = (known >= low if i == 0 else known > low) & (known <= high)
        own = known[inside]
        name = str(own.min()) if own.min() == own.max() else f"{own.min()} to {own.max()}"
        found.append((name, np.flatnonzero(inside)))
    return found


def _group(results: StudyResults, last: dict[tuple[str, int], Point], by: str, name: str, at: np.ndarray) -> Group:
    study = results.study
    rate: Callable[[str], float] = lambda condition: float(  # noqa: E731
        np.mean([last[condition, seed].right_I[at].mean() for seed in study["seeds"] if (condition, seed) in last])
    )
    effects = {}
    for first, second in study["contrasts"]:
        both = [seed for seed in study["seeds"] if (first, seed) in last and (second, seed) in last]
        if both:
            differences = [last[first, seed].right_I[at] - last[second, seed].right_I[at] for seed in both]
            effects[f"{first} - {second}"] = effect(differences, shared=True)
    known = [condition for condition in study["conditions"] if any(key[0] == condition for key in last)]
    return Group(by=by, name=name, num_items=len(at), rates={c: rate(c) for c in known}, effects=effects)


def shortcut_rates(results: StudyResults) -> dict[str, float]:
    """Shortcut -> share of the first representation's items that it answers; {} where the runs do not say."""
    measure = results.study["measure"][0]
    rates: Row = {}
    for row in results.runs.values():
        rates |= (row.get("shortcuts") or {}).get(measure) or {}
    if not rates:
        floors = [p.row["floor"] for p in results.points if p.representation == measure and p.row.get("floor")]
        rates = {"sum of all durations": floors[0]} if floors else {}
    return {name: float(rate) for name, rate in rates.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value
