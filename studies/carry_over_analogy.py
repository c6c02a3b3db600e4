"""Do traces before the switch predict the gain after it, and does success go with likeness to training procedures?

    python studies/carry_over_analogy.py [--page docs/carry-over.md]     prints, or writes between the page's markers
    python studies/carry_over_analogy.py --read                          from the runs, which are not committed

`--read` analyses every run of `graph20_words40` of studies/carry_over_again as `isomorph analogy` does and writes a row
a seed to analogy.jsonl beside its results. What is computed was written down in that study's PLAN.md before any of
its results had been looked at. The seed is the unit: intervals are Student's t over seeds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from isomorph.curriculum.analogy.analysis import alignment_rows, analogy_rows
from isomorph.curriculum.analogy.items import evaluated_structures, items_of_evaluation, training_structures
from isomorph.curriculum.report.run_record import read_run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from markers import between  # noqa: E402

RESULTS = ROOT / "studies" / "carry_over_again" / "results"
ROWS = RESULTS / "analogy.jsonl"
CONDITION, FORM = "graph20_words40", "natural"
DEMONSTRATIONS = "mixed"  # stage of the warm start before the habit
MARKER = "carry_over_analogy"


def read(results: Path) -> list[dict[str, Any]]:
    """A JSON-able row for each run of ``CONDITION``. Raises UserError where an evaluation is missing."""
    rows = []
    for folder in sorted((results / "runs").glob(f"{CONDITION}-seed*")):
        seed = int(folder.name.rpartition("seed")[2])
        record = read_run(folder)
        last = items_of_evaluation(folder, record.evaluations[-1].label, record.recipe)
        likeness = analogy_rows(last, evaluated_structures(record.recipe), training_structures(record.recipe))
        (words,) = (row for row in likeness if row["representation"] == FORM)
        (switch,) = (row for row in alignment_rows(record, folder) if row["to"] == FORM)
        known = before_the_habit(results / "warm" / f"seed{seed}")
        rows.append({"seed": seed, "before_the_habit": known, "analogy": words, "alignment": switch})
    return rows


def before_the_habit(warm: Path) -> dict[str, float]:
    """Accuracy by form, development exam, after the right demonstrations."""
    rights: dict[str, list[bool]] = {}
    for item in items_of_evaluation(warm, DEMONSTRATIONS, read_run(warm).recipe):
        rights.setdefault(item.representation, []).append(item.is_correct)
    return {form: sum(right) / len(right) for form, right in rights.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a number, its mean over seeds with the interval."""
    switch, words = [row["alignment"] for row in rows], [row["analogy"] for row in rows]
    seeds = [row["seed"] for row in rows]
    before = sorted(row["before_the_habit"][FORM] for row in rows)
    lines = ["| of each seed, words, development exam | mean over seeds (95 %) | seeds |", "| --- | --- | --- |"]
    for name, found in (
        ("share of responses whose traces can be read, at the switch", [a["readable"] / a["items"] for a in switch]),
        ("alignment of a question's traces, words and graph, at the switch", [a["alignment"] for a in switch]),
        ("slope of an item's gain over its alignment, at equal success before", [a["slope"]["value"] for a in switch]),
        ("correlation of success with the nearest training procedure", [w["analogy"]["value"] for w in words]),
        ("correlation of success with the mean over training procedures", [w["frequency"]["value"] for w in words]),
        ("nearest minus mean", [w["analogy_minus_frequency"]["value"] for w in words]),
    ):
        known = [x for x in found if x is not None]
        lines.append(f"| {name} | {over_seeds(known)} | {len(known)} |")
    both = [(a["alignment"], a["gain"]) for a in switch if a["alignment"] is not None]
    said = f"{across(both)} Seeds {seeds[0]} to {seeds[-1]}; after their demonstrations, before the habit, they solved "
    said += ", ".join(f"{rate:.0%}" for rate in before)
    lines += ["", f"{said} of the words. `python studies/carry_over_analogy.py`"]
    return "\n".join(lines)


def over_seeds(values: Sequence[float]) -> str:
    """Mean and Student's t interval; the value alone where there is one, a dash where there is none."""
    if len(values) < 2:
        return f"{values[0]:+.3f}" if values else "-"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def across(both: Sequence[tuple[float, float]]) -> str:
    """A seed's mean alignment against its gain, with Fisher's interval."""
    name = "Correlation over seeds of mean alignment at the switch with the gain after it"
    if len(both) < 4 or min(np.ptp(np.array(both), axis=0)) == 0:
        return f"{name}: not defined for {len(both)} seeds (four and a spread are needed)."
    found = stats.pearsonr(*np.array(both).T)
    low, high = found.confidence_interval(0.95)
    return f"{name}: {found.statistic:+.2f} ({low:+.2f} to {high:+.2f}), p {found.pvalue:.2g}, {len(both)} seeds."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", action="store_true")
    parser.add_argument("--page", type=Path, help=f"a page with the markers <!-- {MARKER}:start --> and :end")
    args = parser.parse_args(argv)
    if args.read:
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in read(RESULTS)), encoding="utf-8")
    text = table([json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()])
    if args.page is None:
        print(text)
    else:
        args.page.write_text(between(args.page.read_text(), MARKER, text))


if __name__ == "__main__":
    main()
