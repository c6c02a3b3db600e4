"""Table of carry_over and the three studies after it: accuracies, differences to words only.

    python studies/carry_over_table.py [--page docs/carry-over.md]     prints, or writes between the page's markers
    python studies/carry_over_table.py --details                       the other numbers of that page

From the committed rows of the studies alone: the test exam's where it was taken, else the development exam's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isomorph.curriculum.study.analysis import Analysis, Comparison, analyse
from isomorph.curriculum.study.results import DEVELOPMENT, STUDY, TEST, StudyResults, read_results
from isomorph.curriculum.study.seeds import Effect, effect

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from markers import between  # noqa: E402

RARE, AGAIN, FREQUENT, CONTROL = (
    ROOT / "studies" / name / "results"
    for name in ("carry_over", "carry_over_again", "carry_over_frequent", "carry_over_control")
)
FIRST, COIN, BASELINE = "graph20_words40", "coin20_words40", "words"
MARKER = "carry_over"


def committed() -> str:
    """From the rows beside this file."""
    others = (read_results(folder) if (folder / STUDY).is_file() else None for folder in (FREQUENT, CONTROL, AGAIN))
    return table(read_results(RARE), *others)


def table(
    rare: StudyResults,
    frequent: StudyResults | None,
    control: StudyResults | None = None,
    again: StudyResults | None = None,
) -> str:
    """Markdown. Accuracies in %, differences in points, all means over seeds."""
    lines = _head(rare)
    for name, results in (("rare", rare), ("rare, new seeds", again), ("rare", control), ("frequent", frequent)):
        if results is not None:
            left_out = (BASELINE,) if results is control else ()  # the control's own run of it is carry_over's
            lines += _rows(name, results, analyse(results), left_out=left_out)
    lines += ["", *_says(rare)]
    if again is not None:
        lines.append(f"New seeds: {again.study['seeds'][0]} to {again.study['seeds'][-1]}, {analyse(again).exam} exam.")
    for budget in rare.study["budgets"]:
        if control is not None:
            lines.append(_against_coin(rare, control, budget))
        if frequent is not None:
            lines.append(_interaction(rare, frequent, budget))
    return "\n".join(lines)


def _head(results: StudyResults) -> list[str]:
    budgets = results.study["budgets"]
    columns = ["reward in words", "condition", "at the start", *(f"{b} steps" for b in budgets)]
    columns += [f"minus {BASELINE}, {b} steps" for b in budgets]
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def _rows(name: str, results: StudyResults, analysis: Analysis, *, left_out: Sequence[str]) -> list[str]:
    measure = results.study["measure"][0]
    lines = []
    for condition in results.study["conditions"]:
        if condition not in left_out:
            after = [_mean(results, condition, b, measure, analysis.exam) for b in results.study["budgets"]]
            against = [_find(analysis, condition, b, measure) for b in results.study["budgets"]]
            start = _mean(results, condition, 0, measure, DEVELOPMENT)
            cells = [name, f"`{condition}`", *(_percent(x) for x in (start, *after)), *(_points(c) for c in against)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _says(results: StudyResults) -> list[str]:
    """What the table's numbers are."""
    exam, measure = analyse(results).exam, results.study["measure"][0]
    points = (results.point(BASELINE, s, results.study["budgets"][0], measure, exam) for s in _seeds(results, BASELINE))
    num_items = max((len(p.right_I) for p in points if p is not None), default=0)
    seeds = results.study["seeds"]
    return [
        f"Accuracy on words, {exam} exam ({num_items} questions; at the start: the development exam's), mean over seeds"
        f" {seeds[0]} to {seeds[-1]}; differences with 95 % intervals over seeds, not adjusted, and p of a paired t"
        " test, adjusted by Holm over a study's planned comparisons. `python studies/carry_over_table.py`"
    ]


def _mean(results: StudyResults, condition: str, step: int, measure: str, exam: str) -> float | None:
    """Over the seeds that have this evaluation."""
    points = [results.point(condition, s, step, measure, exam) for s in _seeds(results, condition)]
    rates = [p.rate for p in points if p is not None]
    return float(np.mean(rates)) if rates else None


def _seeds(results: StudyResults, condition: str) -> list[int]:
    return [seed for seed in results.study["seeds"] if (condition, seed) in results.runs]


def _find(analysis: Analysis, condition: str, budget: int, measure: str) -> Comparison | None:
    for one in analysis.planned():
        if (one.first, one.second, one.budget, one.measure) == (condition, BASELINE, budget, measure):
            return one
    return None


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _points(one: Comparison | None) -> str:
    if one is None:
        return ""
    p = "" if one.holm_t_p is None else f", p {one.holm_t_p:.2g}"
    return f"{_effect(one.effect)}{p}"


def _effect(one: Effect) -> str:
    return f"{100 * one.mean:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


def _against_coin(rare: StudyResults, control: StudyResults, budget: int) -> str:
    """How much the reward's being right matters, on the exam of both studies."""
    exam = _exam(rare, control)
    first, coin = _rights(rare, FIRST, budget, exam), _rights(control, COIN, budget, exam)
    return _line(f"`{FIRST}` minus `{COIN}` after {budget} steps", _minus(first, coin), exam)


def _interaction(rare: StudyResults, frequent: StudyResults, budget: int) -> str:
    """How much greater the difference is where reward is rare, over the seeds and on the exam of both studies."""
    exam = _exam(rare, frequent)
    gains = [
        _minus(_rights(results, FIRST, budget, exam), _rights(results, BASELINE, budget, exam))
        for results in (rare, frequent)
    ]
    says = f"`{FIRST}` minus `{BASELINE}` after {budget} steps, where reward is rare minus where it is frequent"
    return _line(says, _minus(*gains), exam)


def _exam(*studies: StudyResults) -> str:
    return TEST if all(analyse(results).exam == TEST for results in studies) else DEVELOPMENT


def _rights(results: StudyResults, condition: str, budget: int, exam: str) -> dict[int, np.ndarray]:
    """Seed -> 0 or 1 for each item."""
    measure = results.study["measure"][0]
    points = {seed: results.point(condition, seed, budget, measure, exam) for seed in _seeds(results, condition)}
    return {seed: np.asarray(point.right_I) for seed, point in points.items() if point is not None}


def _minus(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def _line(says: str, differences: dict[int, np.ndarray], exam: str) -> str:
    if not differences:
        return f"{says}: no seed has both."
    found = effect(list(differences.values()), shared=True)
    return f"{says}: {_effect(found)} points, {len(differences)} seeds, {exam} exam."


def details() -> str:
    """By wording of the question, what graphs alone do, the adaptive switch beside the best fixed one, steps saved."""
    rare = read_results(RARE)
    exam, budgets, measure = analyse(rare).exam, rare.study["budgets"], rare.study["measure"][0]
    lines = _of_wordings(rare)
    for step in (0, 20, 40):
        rights = _rights(rare, "graph40_words20", step, DEVELOPMENT)
        mean = effect(list(rights.values()), shared=True)
        lines.append(f"graphs alone, {step} steps, {DEVELOPMENT} exam: {_effect(mean)} %")
    fixed = [name for name in rare.study["conditions"] if name.startswith("graph") and "_words" in name]
    best = max(fixed, key=lambda name: _mean(rare, name, budgets[-1], measure, DEVELOPMENT) or 0.0)
    last = (_rights(rare, name, budgets[-1], exam) for name in ("adaptive", best))
    lines.append(_line(f"`adaptive` minus `{best}` after {budgets[-1]} steps", _minus(*last), exam))
    lines += _saved(rare)
    if (AGAIN / STUDY).is_file():
        again = read_results(AGAIN)
        lines += ["", "New seeds:", *_of_wordings(again), *_saved(again)]
        for step in (0, 20):
            mean = effect(list(_rights(again, FIRST, step, DEVELOPMENT).values()), shared=True)
            lines.append(f"graphs alone, {step} steps, {DEVELOPMENT} exam: {_effect(mean)} %")
    return "\n".join(lines)


def _of_wordings(results: StudyResults) -> list[str]:
    exam = analyse(results).exam
    return [
        f"{name}, {exam} exam, {wording} wordings: " + ", ".join(f"{r:.1%} after {b} steps" for b, r in rates.items())
        for name in results.study["conditions"]
        for wording, rates in _by_wording(results, name, exam).items()
    ]


def _saved(results: StudyResults) -> list[str]:
    return [
        f"`{FIRST}` reaches {one.target:.0%} earlier than `{BASELINE}` by {one.saved[FIRST].mean:.1f} steps "
        f"({one.saved[FIRST].low:.1f} to {one.saved[FIRST].high:.1f}), {DEVELOPMENT} exam"
        for one in analyse(results).reached
    ]


def _by_wording(results: StudyResults, condition: str, exam: str) -> dict[str, dict[int, float]]:
    """Wording -> budget -> accuracy, mean over seeds."""
    found: dict[str, dict[int, float]] = {}
    measure = results.study["measure"][0]
    for budget in results.study["budgets"]:
        points = [results.point(condition, seed, budget, measure, exam) for seed in _seeds(results, condition)]
        for wording in sorted({w for p in points if p is not None for w in results.items[p.items]["wording"]}):
            rates = [
                p.right_I[np.array(results.items[p.items]["wording"]) == wording].mean()
                for p in points
                if p is not None
            ]
            found.setdefault(wording, {})[budget] = float(np.mean(rates))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help=f"a page with the markers <!-- {MARKER}:start --> and :end")
    parser.add_argument("--details", action="store_true")
    args = parser.parse_args(argv)
    text = details() if args.details else committed()
    if args.page is None:
        print(text)
    else:
        args.page.write_text(between(args.page.read_text(), MARKER, text))


if __name__ == "__main__":
    main()
