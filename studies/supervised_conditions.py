"""SFT, distillation, STaR and rejection sampling on the standard exam, from one warm start, beside reinforcement.

    python studies/supervised_conditions.py [--seeds 1 2]     trains; goes on where it was stopped; writes the table
    python studies/supervised_conditions.py --table           only writes the table in docs/curriculum.md
    python studies/supervised_conditions.py --rehearse        two steps a stage of the smallest model

The recipes of curriculum/recipes/conditions/ with graphs and words only. The warm start is that of ``warm_up``: right
demonstrations, then a habit of the sum of all durations, always in words. About half an hour of one core a seed, of
which the warm start takes two thirds. Runs stay in ``--folder``; a finished one is not repeated while its recipe and
its warm start's weights are the same. A row a condition and seed in supervised_conditions.jsonl.
"""

import argparse
import datetime
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.study.statistics import paired_difference
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from markers import between  # noqa: E402

CONDITIONS = ROOT / "curriculum" / "recipes" / "conditions"
RESULTS = Path(__file__).with_suffix(".jsonl")
PAGE = ROOT / "docs" / "curriculum.md"
FORMS = ("natural", "graph")
COMMON = (
    *("run.threads=1", "run.checkpoint_every=20", "log.tensorboard=false"),
    *("eval.prompts=200", 'eval.representations=["natural","graph"]', "eval.every=0"),
)
SMALLEST = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
SEED_OF_WARM_START = 1_000_000  # added to the conditions' seed, so that they do not begin with its tasks
# of the teacher, who is right on three of four; a tenth is kept apart. 60 steps of 16 are two passes over the rest
QUESTIONS = 712
WORDS = '[{data="plans",representation="natural"}]'
GRAPHS = '[{data="plans",representation="graph"}]'
# condition -> recipe, and what differs
RUNS: dict[str, tuple[str, list[str]]] = {
    "sft_words": ("sft_graph_words", ["stage.0.name=words-first", f"stage.0.mixture={WORDS}"]),
    "sft_graph_words": ("sft_graph_words", []),
    "distillation": (
        "sft_graph_words",
        ['stage.0.mixture=[{data="teacher"}]', 'stage.1.mixture=[{data="teacher"}]', "stage.0.name=first"],
    ),
    "graph_distillation": (
        "graph_words",
        [
            'stage.1.mixture=[{data="teacher"}]',
            "stage.1.objective.name=sft",
            'stage.1.optim={lr=5e-4,schedule="cosine",warmup_steps=0,warmup_share=0.05}',
            "stage.1.sampling={max_new_tok=160,samples_per_prompt=1}",
            "stage.1.optimizer_state=reset",
        ],
    ),
    "star": ("star", []),
    "star_from_start": ("star", ["stage.0.star.start_from=start"]),
    "rejection": ("rejection", []),
    "words": ("words", []),
    "graph_words": ("graph_words", []),
}
SAYS = {
    "sft_words": "SFT on right demonstrations in words",
    "sft_graph_words": "SFT on graphs, then words",
    "distillation": "SFT in words on a teacher's right answers",
    "graph_distillation": "RL on graphs, then distillation",
    "star": "STaR in words",
    "star_from_start": "STaR, each round from the warm start",
    "rejection": "rejection sampling in words",
    "words": "RL on words",
    "graph_words": "RL on graphs, then words",
}
Row = dict[str, Any]


def inline(value: Any) -> str:
    """``value`` as TOML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)


def warm_up_stages(*, rehearse: bool) -> list[dict[str, Any]]:
    """Those of the recipe ``warm_up`` without code, which nothing here asks: 2,000 + 400 steps."""
    demonstrations, habit = tomllib.loads((CONDITIONS / "warm_up.toml").read_text())["stage"]
    weights = {"demonstrations": {"graph": 0.6, "natural": 0.4}, "habit": {"graph": 0.5, "natural": 0.5}}
    for stage in (demonstrations, habit):
        shares = weights[stage["name"]]
        parts = [part for part in stage["mixture"] if part["representation"] in shares]
        stage["mixture"] = [{**part, "weight": shares[part["representation"]]} for part in parts]
    demonstrations["steps"] = 2000
    return [{**stage, "steps": 2} if rehearse else stage for stage in (demonstrations, habit)]


def shortened(recipe: str, overrides: list[str]) -> list[str]:
    """Overrides that leave two steps of each stage, or one round of two questions."""
    found = ["eval.prompts=2", "eval.max_new_tok=4"]
    for i, stage in enumerate(load_recipe(CONDITIONS / f"{recipe}.toml", overrides, Recipe).stage):
        found += [f"stage.{i}.steps=2", f"stage.{i}.batch.prompts=2"]
        if not stage.objective.is_supervised:
            found += [f"stage.{i}.sampling.max_new_tok=8", f"stage.{i}.sampling.samples_per_prompt=2"]
    return found


def overrides_of(condition: str, seed: int, folder: Path, *, rehearse: bool) -> list[str]:
    """Of the condition's recipe; ``folder``: of the seed."""
    name, own = RUNS[condition]
    table = {
        **{"kind": "rows", "path": str(folder / "answers.jsonl"), "prompt": "question", "answer": "gold"},
        **{"demonstration": "answers", "demonstrations_accepted": True, "rewards": [{"function": "async_plan"}]},
    }
    teacher = [f"data.teacher={inline(table)}"] if "teacher" in " ".join(own) else []
    found = [*COMMON, f"run.seed={seed}", f"model.path={folder / 'habit' / 'model'}", *teacher, *own]
    return [*found, *(shortened(name, found) if rehearse else [])]


def write_answers(seed: int, folder: Path, num_questions: int) -> None:
    """A teacher's answers: to each question the sequential one, to three of four also the right one."""
    plans = load_recipe(CONDITIONS / "words.toml", [], Recipe).data["plans"]
    assert isinstance(plans, GeneratedData)
    lines = []
    for i in range(num_questions):
        right, other = (
            plans.task(random.Random(f"teacher:{seed}:{i}"), "natural", split="train", sequential_rate=rate)
            for rate in (0.0, 1.0)
        )
        answers = [other.demonstration] + ([right.demonstration] if i % 4 else [])
        lines.append(json.dumps({"question": right.question, "gold": right.answer, "answers": answers}) + "\n")
    (folder / "answers.jsonl").write_text("".join(lines))


def train(recipe: str, overrides: list[str], run: Path) -> dict[str, Any]:
    """Trains in the folder ``run``, or goes on there; its summary. A finished run is not repeated."""
    summary = run / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "done":
        if latest_checkpoint(run / "checkpoints") is None:
            shutil.rmtree(run, ignore_errors=True)
            what = [str(CONDITIONS / f"{recipe}.toml"), *overrides, "--run", str(run)]
        else:
            what = ["--resume", str(run)]
        run.parent.mkdir(parents=True, exist_ok=True)
        with run.with_suffix(".log").open("a") as log:
            program = "from isomorph.curriculum.cli import main; main()"
            command = [sys.executable, "-P", "-c", program, "train", *what]
            subprocess.run(command, cwd=run.parent, check=True, stdout=log, stderr=subprocess.STDOUT)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def identity(condition: str, overrides: list[str], weights: str) -> str:
    """What makes a run the same: its recipe without the places of files, and the weights it begins with."""
    recipe = load_recipe(CONDITIONS / f"{RUNS[condition][0]}.toml", overrides, Recipe).model_dump(mode="json")
    recipe["model"]["path"] = weights
    if "teacher" in recipe["data"]:
        recipe["data"]["teacher"]["path"] = None
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def right(run: Path, label: str, form: str) -> list[int]:
    """1 for each question of an evaluation that is answered rightly, else 0."""
    items = [json.loads(line) for line in (run / "evaluations" / f"{label}.jsonl").read_text().splitlines()]
    return [int(item["correct"]) for item in items if item["representation"] == form]


def compare(run: Path, labels: tuple[str, str]) -> dict[str, Any]:
    """Of each form: right before and after, and the change with its interval over the questions."""
    found = {}
    for form in FORMS:
        before, after = (right(run, label, form) for label in labels)
        mean, low, high = paired_difference(before, after)
        counts = {"before": sum(before), "after": sum(after), "questions": len(before)}
        found[form] = {**counts, "change": mean, "low": low, "high": high}
    return found


def warm_start(seed: int, folder: Path, given: Path | None, *, rehearse: bool) -> str:
    """Trains the seed's warm start; the hash of its weights. ``given``: a model that has seen the demonstrations."""
    demonstrations, habit = warm_up_stages(rehearse=rehearse)
    chosen = [*COMMON, f"run.seed={seed + SEED_OF_WARM_START}", *(["eval.prompts=2"] if rehearse else [])]
    sizes = [f"model.tiny.{key}={value}" for key, value in SMALLEST.items()] if rehearse else []
    if given is None:
        train("warm_up", [*chosen, *sizes, f"stage={inline([demonstrations])}"], folder / "demonstrations")
        given = folder / "demonstrations" / "model"
    own = [f"model.path={given}", "model.dtype=float32", f"stage={inline([habit])}"]
    weights: str = train("words", [*chosen, *own], folder / "habit")["weights_sha256"]
    return weights


def study(seed: int, folder: Path, given: Path | None, results: Path, *, rehearse: bool) -> None:
    """All conditions of one seed."""
    weights = warm_start(seed, folder, given, rehearse=rehearse)
    write_answers(seed, folder, 8 if rehearse else QUESTIONS)
    done = {row["identity"] for row in read(results)}
    for condition in RUNS:
        if rehearse and RUNS[condition][0] in ("star", "rejection"):
            continue  # a random model has no right answers
        overrides = overrides_of(condition, seed, folder, rehearse=rehearse)
        known = identity(condition, overrides, weights)
        if known in done:
            continue
        run = folder / f"{condition}-{known}"
        summary = train(RUNS[condition][0], overrides, run)
        labels = summary["exams"][0]["label"], summary["exams"][-1]["label"]
        versions = json.loads((run / "run.json").read_text())["versions"]
        row = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{"condition": condition, "seed": seed, "identity": known, "torch": versions["torch"]},
            **{"recipe": RUNS[condition][0], "overrides": RUNS[condition][1], "warm_start": weights},
            **{"exam": compare(run, labels), "shortcuts": summary["shortcuts"], "stages": summary["stages"]},
            **{"rows": summary["rows"], "tokens": summary["tokens"]},
        }
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(seed, condition, json.dumps(row["exam"]), flush=True)


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def trained_on(row: Row) -> str:
    """What a row's stages did: steps, and answers of rounds or of a teacher."""
    rounds = [one for stage in row["stages"] for one in stage.get("rounds", [])]
    if rounds:
        counts = [str(one["trained_on"]) for one in rounds]
        return f"{sum(one['sampled'] for one in rounds):,} sampled; {', '.join(counts)} kept"
    counts = row["rows"].get("teacher", {}).get("demonstrations")
    teacher = f"; {counts['accepted']} of {counts['given']} answers accepted" if counts else ""
    return " + ".join(str(stage["steps"]) for stage in row["stages"]) + " steps" + teacher


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of the page: the latest row of each seed and condition."""
    latest = {(row["seed"], row["condition"]): row for row in rows}
    seeds = sorted({seed for seed, _ in latest})
    if not latest:
        yield "It was not run to its end yet."
        return
    yield "| condition | seed | trained on | words | change, points | graphs |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for seed in seeds:
        for name in RUNS:
            if (seed, name) not in latest:
                continue
            row = latest[seed, name]
            words, graph = (row["exam"][form] for form in FORMS)
            before, after, graphs = (
                f"{count / words['questions']:.1%}" for count in (words["before"], words["after"], graph["after"])
            )
            change = f"{100 * words['change']:+.1f} ({100 * words['low']:+.1f} to {100 * words['high']:+.1f})"
            yield f"| {SAYS[name]} | {seed} | {trained_on(row)} | {before} -> {after} | {change} | {graphs} |"
    newest = max(row["time"] for row in latest.values())[:10]
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    yield ""
    yield f"{count}, {newest}; intervals are over the questions of one run and say nothing about other seeds."


def write_table() -> None:
    PAGE.write_text(between(PAGE.read_text(), "supervised", "\n".join(table(read(RESULTS)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, default=Path("runs/supervised_conditions"), help="where the runs stay")
    parser.add_argument("--demonstrated", type=Path, help="a model that has seen the demonstrations; one seed")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.table:
        write_table()
        return
    given = args.demonstrated.resolve() if args.demonstrated else None
    for seed in args.seeds:
        place = args.folder.resolve() / ("rehearsal" if args.rehearse else f"seed-{seed}")
        results = args.folder.resolve() / "rehearsal.jsonl" if args.rehearse else RESULTS
        study(seed, place, given, results, rehearse=args.rehearse)
    if not args.rehearse:
        write_table()


if __name__ == "__main__":
    main()
