"""Which share of an exam's questions each shortcut answers: the table of one or more recipes, as JSON Lines.

    python benchmarks/shortcut_table.py curriculum/recipes/quickstart.toml curriculum/recipes/exam.toml --out FILE

A row for each recipe's [data.NAME] and split: the rates of all shortcuts over ``--prompts`` procedures, the best one,
the number of structures, and the share of procedures that no shortcut solves. Not a shortcut, but the reason why
"most_steps" takes the first of equally long paths: ``longest_of_most_steps``, the longest among all paths with the
most steps, which compares totals as the procedure does. Where an exam has fewer procedures, the row says how many.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from isomorph.curriculum.recipe import GeneratedData, PlansData, Recipe
from isomorph.curriculum.tasks.battery import BAG, best_of
from isomorph.curriculum.tasks.canonical import canonical_key
from isomorph.curriculum.tasks.facts import rates_of, view_of
from isomorph.curriculum.tasks.shortcuts import StepGraph
from isomorph.curriculum.tasks.sieve import SievedGenerator
from isomorph.curriculum.tasks.task import Split
from isomorph.engine.recipe_file import load_recipe

SPLITS: tuple[Split, ...] = ("dev", "test")


def longest_of_most_steps(graph: StepGraph) -> int:
    best: dict[int, tuple[int, int]] = {}
    for j in graph.order:
        count, total = max((best[i] for i in graph.predecessors[j]), default=(0, 0))
        best[j] = count + 1, total + graph.amounts[j]
    return max(best.values())[1]


def row_of(recipe: str, name: str, data: GeneratedData, split: Split, num: int, seed: int) -> dict[str, Any]:
    tasks = data.tasks("graph", num, seed=seed, split=split)
    views = [view_of(task) for task in tasks]
    rates = rates_of(tasks)
    others = [answer for shortcut, answer in data.generator.battery(data.difficulty).items() if shortcut != BAG]
    row = {
        "recipe": Path(recipe).name,
        "data": name,
        "split": split,
        "procedures": len(tasks),
        "best": best_of(rates),
        "shortcuts": {key: round(rate, 4) for key, rate in rates.items()},
        "hard": sum(not any(answer(view) == view.total for answer in others) for view in views) / len(views),
        "difficulty": data.difficulty.model_dump(mode="json", exclude_defaults=True),
    }
    if isinstance(data, PlansData):
        structures = {canonical_key([0] * len(view.amounts), view.predecessors) for view in views}
        longest = sum(longest_of_most_steps(view) == view.total for view in views) / len(views)
        return {**row, "structures": len(structures), "longest_of_most_steps": longest}
    assert isinstance(data.generator, SievedGenerator)
    return {**row, "structures": len({data.generator.structure_of(view) for view in views})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="JSON Lines; default: only the table")
    args = parser.parse_args()
    rows = []
    for path in args.recipes:
        recipe = load_recipe(Path(path), [], Recipe)
        for name, data in recipe.data.items():
            if isinstance(data, GeneratedData):
                rows += [row_of(path, name, data, split, args.prompts, recipe.eval.seed) for split in SPLITS]
    if args.out is not None:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for batteries in dict.fromkeys(tuple(row["shortcuts"]) for row in rows):  # kinds of tasks have their own
        print_table([row for row in rows if tuple(row["shortcuts"]) == batteries])


def print_table(rows: list[dict[str, Any]]) -> None:
    heads = [f"{row['recipe']} {row['data']} {row['split']}" for row in rows]
    sys.stdout.write("| shortcut | " + " | ".join(heads) + " |\n")
    for shortcut in rows[0]["shortcuts"]:
        sys.stdout.write(f"| {shortcut} | " + " | ".join(f"{row['shortcuts'][shortcut]:.1%}" for row in rows) + " |\n")
    sys.stdout.write("| no shortcut but the bag | " + " | ".join(f"{row['hard']:.1%}" for row in rows) + " |\n")


if __name__ == "__main__":
    main()
