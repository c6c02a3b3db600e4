"""Does the quickstart's graph stage help? The same recipe and seeds, with natural language in place of graphs.

    python studies/quickstart_control.py --seeds 1 2 3 [--at-once 2]      trains, appends to quickstart_control.jsonl
    python studies/quickstart_control.py --table                          writes README's table from that file

For further runs: isomorph study studies/quickstart/STUDY.toml, where both conditions begin from one warm start.
Each run takes minutes on one core. The latest run of each seed and condition counts. All have the same evaluation.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.tasks.facts import rates_of
from isomorph.engine.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from markers import between  # noqa: E402

RECIPE = "curriculum/recipes/quickstart.toml"
RESULTS = Path(__file__).with_suffix(".jsonl")
CONDITIONS: dict[str, list[str]] = {
    "symbols first": [],
    "words only": ["stage.1.name=words-first", 'stage.1.mixture=[{data="plans",representation="natural"}]'],
}
MOMENTS = ("warm-up", "20 steps", "100 steps")  # RL steps
Row = dict[str, Any]


def train(seed: int, condition: str) -> Row:
    """One complete run; the row with its evaluation results."""
    overrides = [f"run.seed={seed}", "run.threads=1", *CONDITIONS[condition]]
    program = "from isomorph.curriculum.cli import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = ["train", RECIPE, *overrides, "--run", str(run)]
        subprocess.run([sys.executable, "-c", program, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "summary.json").read_text())
        described = json.loads((run / "run.json").read_text())
    exams = [exam["accuracy"] for exam in summary["exams"]]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": described["machine"]["platform"],
        "torch": described["versions"]["torch"],
        "recipe": RECIPE,
        "overrides": overrides,
        "seed": seed,
        "condition": condition,
        "exams": dict(zip(MOMENTS, exams, strict=True)),
    }


def floors() -> dict[str, float]:
    """Accuracy of each shortcut on the evaluation's tasks."""
    recipe = load_recipe(ROOT / RECIPE, [], Recipe)
    (asked,) = recipe.eval.all_sets
    data = recipe.data[asked.data]
    assert isinstance(data, GeneratedData)
    return rates_of(data.tasks("graph", asked.prompts, seed=recipe.eval.seed, split=recipe.eval.split))


def section(rows: list[Row]) -> str:
    """What belongs between the README's markers."""
    latest = {(row["seed"], row["condition"]): row for row in rows}
    seeds = sorted({seed for seed, _ in latest if all((seed, name) in latest for name in CONDITIONS)})

    def rates(condition: str, moment: str, representation: str) -> list[float]:
        return [latest[seed, condition]["exams"][moment][representation]["rate"] for seed in seeds]

    start, end = MOMENTS[0], MOMENTS[-1]
    moments = [_line(f"natural, {m}", *(rates(c, m, "natural") for c in CONDITIONS)) for m in MOMENTS]
    others = [name for name in latest[seeds[0], "symbols first"]["exams"][end] if name != "natural"]
    parts = [_line(f"{name}, {end}", *(rates(c, end, name) for c in CONDITIONS)) for name in others]
    head = ["| Greedy accuracy | symbols first | words only | difference, points |", "| --- | --- | --- | --- |"]
    floor = floors()
    best = max(floor, key=floor.__getitem__)
    command = f"python studies/quickstart_control.py --seeds {' '.join(map(str, seeds))} --table"
    newest = max(row["time"] for row in latest.values())[:10]
    says = (
        f"Accuracy on 300 held-out procedures after the {start} and after 20 and 100 RL steps; mean over seeds "
        f"{', '.join(map(str, seeds))} (least to greatest); the difference with its 95 % interval over the seeds "
        f"(paired, Student's t); {newest}, `{command}`. Without planning: the shortcut `{best}` solves "
        f"{floor[best]:.0%} of them, the sum of all durations {floor['sum_of_all']:.0%} "
        "(curriculum/tasks/shortcuts.py)."
    )
    return "\n".join([*head, *moments, *parts, "", says])


def _line(what: str, symbols: list[float], words: list[float]) -> str:
    gaps = [100 * (a - b) for a, b in zip(symbols, words, strict=True)]
    half = student_t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    mean = statistics.mean(gaps)
    gap = "same run" if not any(gaps) else f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
    return f"| {what} | {_spread(symbols)} | {_spread(words)} | {gap} |"


def _spread(rates: list[float]) -> str:
    return f"{statistics.mean(rates):.1%} ({min(rates):.1%} to {max(rates):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other, one core each")
    parser.add_argument("--table", action="store_true", help="write README's table")
    args = parser.parse_args()
    runs = [(seed, name) for seed in args.seeds for name in CONDITIONS]
    with ThreadPoolExecutor(args.at_once) as pool:
        for row in pool.map(lambda run: train(*run), runs):
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["seed"], row["condition"], {m: e["natural"]["rate"] for m, e in row["exams"].items()}, flush=True)
    if args.table:
        rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        readme = ROOT / "README.md"
        readme.write_text(between(readme.read_text(), "quickstart", section(rows)))


if __name__ == "__main__":
    main()
