"""Tables of carry_over and carry_over_frequent: accuracies, differences to words only, what rarity does to them.

    python studies/carry_over_table.py [--page README.md]     prints, or writes between the page's markers

From the committed rows of both studies alone: the test exam's where it was taken, else the development exam's.
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

RARE, FREQUENT = ROOT / "studies" / "carry_over" / "results", ROOT / "studies" / "carry_over_frequent" / "results"
FIRST, BASELINE = "graph20_words40", "words"
MARKER = "carry_over"


def table(rare: StudyResults, frequent: StudyResults | None) -> str:
    """Markdown. Accuracies in %, differences in points, all means over seeds."""
    lines = []
    for name, results in (("rare", rare), ("frequent", frequent)):
        if results is not None:
            lines += _rows(name, results, analyse(results), with_head=not lines)
    if frequent is not None:
        lines += ["", *(_interaction(rare, frequent, budget) for budget in rare.study["budgets"])]
    return "\n".join(lines)


def _rows(name: str, results: StudyResults, analysis: Analysis, *, with_head: bool) -> list[str]:
    budgets, exam = results.study["budgets"], analysis.exam
    measure = results.study["measure"][0]
    lines = []
    if with_head:
        columns = ["reward in words", "condition", "at the start", *(f"{b} steps" for b in budgets)]
        columns += [f"minus {BASELINE}, {b} steps" for b in budgets]
        lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for condition in results.study["conditions"]:
        start = _mean(results, condition, 0, measure, DEVELOPMENT)
        after = [_mean(results, condition, b, measure, exam) for b in budgets]
        against = [_find(analysis, condition, b, measure) for b in budgets]
        cells = [name, condition, *(_percent(x) for x in (start, *after)), *(_points(c) for c in against)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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


def _interaction(rare: StudyResults, frequent: StudyResults, budget: int) -> str:
    """How much greater the difference is where reward is rare, over the seeds and on the exam of both studies."""
    is_tested = all(analyse(results).exam == TEST for results in (rare, frequent))
    exam = TEST if is_tested else DEVELOPMENT
    gains = [_gains(results, budget, exam) for results in (rare, frequent)]
    both = [seed for seed in gains[0] if seed in gains[1]]
    if not both:
        return f"After {budget} steps: no seed has both."
    found = effect([gains[0][seed] - gains[1][seed] for seed in both], shared=True)
    return (
        f"`{FIRST}` minus `{BASELINE}` after {budget} steps, where reward is rare minus where it is frequent: "
        f"{_effect(found)} points, {len(both)} seeds, {exam} exam."
    )


def _gains(results: StudyResults, budget: int, exam: str) -> dict[int, np.ndarray]:
    """Seed -> difference of each item."""
    measure = results.study["measure"][0]
    found = {}
    for seed in sorted({*_seeds(results, FIRST)} & {*_seeds(results, BASELINE)}):
        first, other = (results.point(name, seed, budget, measure, exam) for name in (FIRST, BASELINE))
        if first is not None and other is not None:
            found[seed] = first.right_I - other.right_I
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help=f"a page with the markers <!-- {MARKER}:start --> and :end")
    args = parser.parse_args(argv)
    text = table(read_results(RARE), read_results(FREQUENT) if (FREQUENT / STUDY).is_file() else None)
    if args.page is None:
        print(text)
    else:
        args.page.write_text(between(args.page.read_text(), MARKER, text))


if __name__ == "__main__":
    main()
