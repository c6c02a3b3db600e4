"""Stand-ins for the paper's files: the same names, keys and forms of rows, other content, made from a seed.

    python studies/paper_rows.py FOLDER [--train 40] [--test 8] [--seed 0]

With ISOMORPH_ASYNCHOW and ISOMORPH_PHYSICS_MATH set to FOLDER the recipes of the paper run without its data. Questions
are of the authors' form (repository fangru-lin/procedure_generalization_llm), so that they can be parsed; the file that
stands in for the dialect has other words, and is none.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ACTIVITIES = ("Boil water", "Cut the bread", "Set the table", "Call a friend", "Sweep the floor", "Fold the napkins")
ASKED = "Think step by step. Then, encode your final answer in <answer></answer> (e.g. <answer>1 min</answer>)"
CODE = """Below is a python function to search for the longest path from source node to target node.
Suppose your inputs are as follows:
```python
adj_list = {edges}
source = {source}
target = {target}
```
Think step by step. Then, encode the output of the function in <answer></answer> (e.g. <answer>1</answer>)."""


@dataclass(frozen=True)
class Procedure:
    """Steps 0 .. n-1 in a feasible order, their minutes, and the steps that come right after each."""

    minutes: list[int]
    after: list[list[int]]

    @property
    def longest(self) -> int:
        """Of all paths, in minutes."""
        rest = [0] * len(self.minutes)
        for i in reversed(range(len(self.minutes))):
            rest[i] = self.minutes[i] + max((rest[j] for j in self.after[i]), default=0)
        return max(rest)


def draw(rng: random.Random) -> Procedure:
    num_steps = rng.randint(3, 7)
    after = [
        sorted(rng.sample(range(i + 1, num_steps), min(num_steps - i - 1, rng.randint(1, 2)))) for i in range(num_steps)
    ]
    return Procedure([5 * rng.randint(1, 12) for _ in range(num_steps)], after)


def natural(it: Procedure, verb: str = "must precede") -> str:
    steps = [f"Step {i}. {ACTIVITIES[i % 6]} ({m} min)" for i, m in enumerate(it.minutes, 1)]
    order = [
        f"Step {i} {verb} step {' and '.join(str(j + 1) for j in after)}."
        for i, after in enumerate(it.after, 1)
        if after
    ]
    return "\n".join(
        [
            "To prepare a meal, here are the steps and the times needed for each step.",
            *steps,
            "\n\nThese ordering constraints need to be obeyed when executing above steps:",
            *order,
            "\n\nQuestion: Assume that you need to execute all the steps to complete the task and that infinite "
            f"resources are available. What is the shortest possible time to prepare a meal? {ASKED}",
        ]
    )


def other_words(it: Procedure) -> str:
    return natural(it, "has to be done ahead of")


def _ends(it: Procedure) -> tuple[list[int], list[int]]:
    """Steps without a predecessor, and steps without a successor."""
    later = {j for after in it.after for j in after}
    return [i for i in range(len(it.minutes)) if i not in later], [i for i, after in enumerate(it.after) if not after]


def graph(it: Procedure) -> str:
    first, last = _ends(it)
    edges = {str(i + 1): [str(j + 1) for j in after] or ["END"] for i, after in enumerate(it.after)}
    edges |= {"END": [], "START": [str(i + 1) for i in first]}
    times = {str(i + 1): f"{m} min" for i, m in enumerate(it.minutes)}
    return (
        f"You have a graph whose adjacency list representation is as follows:\n{edges}\n\nThe graph is a directed "
        f"graph, and the nodes are labelled as follows (START and END are special nodes which takes no time to "
        f"traverse):\n"
        f"{times}\n\nSuppose you have to traverse from node 'START' to node 'END', how long does the longest path "
        f"take? {ASKED}"
    )


def code(it: Procedure) -> str:
    first, last = _ends(it)
    num_steps = len(it.minutes)
    seconds = [60.0 * m for m in it.minutes]
    edges = {i: [(j, seconds[j]) for j in after] or [(num_steps, 0.0)] for i, after in enumerate(it.after)}
    edges |= {num_steps: [], num_steps + 1: [(i, seconds[i]) for i in first]}
    return CODE.format(edges=edges, source=num_steps + 1, target=num_steps)


def as_timedeltas(it: Procedure) -> str:
    delta = f"datetime.timedelta(seconds={60 * it.longest})"
    return f"[{delta}, {delta}]"


def as_seconds(it: Procedure) -> float:
    return 60.0 * it.longest


def sums(rng: random.Random, count: int, unit: str) -> dict[str, list[tuple[str, str]]]:
    """Sums in words and as code, with their answers."""
    pairs = [(rng.randint(1, 50), rng.randint(1, 50)) for _ in range(count)]
    tags = "Think step by step. Then, encode your final answer in <answer></answer>."
    return {
        "natural": [(f"What is {a}{unit} and {b}{unit} together? {tags}", f"{a + b}{unit}") for a, b in pairs],
        "python": [(f"x = {a}  #{unit}\nprint(x + {b}) {tags}", f"{a + b}{unit}") for a, b in pairs],
    }


def write(folder: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Every file that the paper's recipes name, into ``folder``."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    forms: dict[str, tuple[Callable[[Procedure], str], Callable[[Procedure], object]]] = {
        "natural": (natural, as_timedeltas),
        "graph": (graph, as_timedeltas),
        "python": (code, as_seconds),
        "aave": (other_words, as_timedeltas),
    }
    for split, count in (("train", num_train), ("test", num_test)):
        procedures = [draw(rng) for _ in range(count)]
        for form, (ask, answer) in forms.items():
            if (form, split) != ("aave", "train"):
                _write(folder / f"asynchow_{form}_{split}.jsonl", [(ask(it), answer(it)) for it in procedures])
        if split == "train":
            _write_teacher(folder / "teacher.jsonl", procedures)
        for subject, unit in (("math", ""), ("physics", " m")):
            for form, rows in sums(rng, count, unit).items():
                _write(folder / f"{subject}_long_{form}_{split}.jsonl", rows)


def _write_teacher(file: Path, procedures: Sequence[Procedure]) -> None:
    """Answers of a teacher: a wrong one and a right one to each question."""
    rows = []
    for it in procedures:
        gold = f"{it.longest} min"
        answers = [f"It takes <answer>{minutes} min</answer>" for minutes in (it.longest + 1, it.longest)]
        rows.append(json.dumps({"question": natural(it), "gold": gold, "answers": answers}))
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write(file: Path, rows: Sequence[tuple[str, object]]) -> None:
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=40)
    parser.add_argument("--test", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.folder, num_train=given.train, num_test=given.test, seed=given.seed)
