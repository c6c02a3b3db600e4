"""STaR, rejection sampling, distillation and SFT of a tiny model, from one warm start: accuracy before and after.

    python studies/supervised_conditions.py [--seeds 1 2] [--folder FOLDER]

The recipes of curriculum/recipes/conditions/ on procedures of two and three steps, a smaller model and fewer steps:
a minute or two a run. Appends a row a condition to supervised_conditions.jsonl. It shows what the machinery does, not
which condition is better: no budget is equal.
"""

import argparse
import datetime
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.engine.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = "curriculum/recipes/conditions"
RESULTS = Path(__file__).with_suffix(".jsonl")
DATA = ["min_steps=2", "max_steps=3", "max_duration=9"]
COMMON = [
    *(f"data.plans.difficulty.{key}" for key in DATA),
    *("run.threads=1", "log.tensorboard=false"),
    *("eval.prompts=200", 'eval.representations=["natural", "graph"]', "eval.max_new_tok=48"),
]
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64}
WARM_UP = [
    *(f"model.tiny.{key}={value}" for key, value in TINY.items()),
    *("stage.0.steps=200", "stage.0.batch.prompts=16", "stage.0.optim.lr=1e-2", "stage.0.optim.warmup_steps=5"),
]
ROUNDS = ["stage.0.sampling.max_new_tok=48"]
RUNS: dict[str, list[str]] = {
    "star": ["stage.0.star.rounds=4", *ROUNDS],
    "star from the start": ["stage.0.star.rounds=4", "stage.0.star.start_from=start", *ROUNDS],
    "rejection": ["stage.0.star.samples=16", *ROUNDS],
    "sft_graph_words": ["stage.0.steps=20", "stage.1.steps=20"],
}
TEACHER = """
[data.teacher]
kind = "rows"
path = "{path}"
prompt = "question"
answer = "gold"
demonstration = "answers"
demonstrations_accepted = true
rewards = [{{ function = "async_plan" }}]

[[stage]]
name = "distillation"
steps = 40
objective.name = "sft"
optim = {{ lr = 5e-4, schedule = "cosine", warmup_share = 0.05 }}
sampling = {{ max_new_tok = 48, samples_per_prompt = 1 }}
mixture = [{{ data = "teacher" }}]
"""


def train(recipe: str, overrides: list[str], run: Path) -> dict[str, Any]:
    program = "from isomorph.curriculum.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, "train", recipe, *COMMON, *overrides, "--run", str(run)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def teacher(folder: Path, seed: int) -> str:
    """A recipe on answers of a teacher, each question with a right answer and the sequential one."""
    recipe = load_recipe(ROOT / CONDITIONS / "words.toml", [f"data.plans.difficulty.{key}" for key in DATA], Recipe)
    plans = recipe.data["plans"]
    assert isinstance(plans, GeneratedData)
    lines = []
    for i in range(256):
        right, other = (
            plans.task(random.Random(f"{seed}:{i}"), "natural", split="train", sequential_rate=rate)
            for rate in (0.0, 1.0)
        )
        row = {"question": right.question, "gold": right.answer, "answers": [right.demonstration, other.demonstration]}
        lines.append(json.dumps(row) + "\n")
    (folder / "answers.jsonl").write_text("".join(lines))
    base = f'extends = "{ROOT / CONDITIONS / "base.toml"}"\n[model]\npath = "{folder / "warm_up" / "model"}"\n'
    (folder / "distillation.toml").write_text(base + TEACHER.format(path=folder / "answers.jsonl"))
    return str(folder / "distillation.toml")


def rates(summary: dict[str, Any]) -> dict[str, float]:
    return {name: result["rate"] for name, result in summary["exams"][-1]["accuracy"].items()}


def study(seed: int, folder: Path) -> None:
    """All conditions of one seed."""
    chosen = f"run.seed={seed}"
    before = rates(train(f"{CONDITIONS}/warm_up.toml", [chosen, *WARM_UP], folder / "warm_up"))
    model = f"model.path={folder / 'warm_up' / 'model'}"
    for name, overrides in [*RUNS.items(), ("distillation", [])]:
        recipe = f"{CONDITIONS}/{name.split()[0]}.toml" if name in RUNS else teacher(folder, seed)
        summary = train(recipe, [chosen, model, *overrides], folder / name.replace(" ", "_"))
        row = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "condition": name,
            "seed": seed,
            "overrides": [*COMMON, *overrides],
            "before": before,
            "after": rates(summary),
            "stages": summary["stages"],
            "rows": summary["rows"],
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(seed, name, "before", before, "after", row["after"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, help="where the runs stay; else they are deleted")
    args = parser.parse_args()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.folder or Path(temporary)) / f"seed-{seed}"
            folder.mkdir(parents=True)
            study(seed, folder)


if __name__ == "__main__":
    main()
