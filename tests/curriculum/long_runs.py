"""Run folders for the report's tests: a real run, copied, with rows of steps.jsonl that were never measured.

The rows have the keys of the run's own; their numbers are noise around simple curves, and so say nothing about any
model. ``several`` makes runs that differ in their seed and their recipe.
"""

import json
import shutil
from pathlib import Path

import numpy as np


def long_run(source: Path, folder: Path, *, steps: int, seed: int = 0) -> Path:
    """A copy of the run ``source`` in ``folder`` whose last stage has as many rows as make ``steps`` in all."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("report", "model", "tensorboard"))
    rows = [json.loads(row) for row in (folder / "steps.jsonl").read_text().splitlines()]
    last, rng = rows[-1], np.random.default_rng(seed)
    num = len(rows)  # that were measured
    for i in range(num, steps):
        done = (i - num + 1) / (steps - num)
        chance = float(np.clip(0.2 + 0.6 * done + rng.normal(0, 0.08), 0, 1))
        row = {**last, "step": i + 1, "stage_step": last["stage_step"] + i + 1 - num, "reward/mean": chance}
        row |= {key: chance for key in row if key in ("reward/natural", "reward/code")}
        row |= {"entropy": float(1.2 * np.exp(-2 * done) + abs(rng.normal(0, 0.05)))}
        row |= {"grad_norm": float(rng.lognormal(-1, 0.5)), "drift/max": float(1e-6 * rng.lognormal(0, 1))}
        rows.append(row)
    described = json.loads((folder / "run.json").read_text())
    described["recipe"]["stage"][-1]["steps"] += max(0, steps - described_steps(described))
    described["recipe"]["run"]["seed"] = described["seed"] = seed
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "completions" / f"exam-{last['stage']}.jsonl"
    answers = [json.loads(row) for row in file.read_text().splitlines()]
    for row in answers:  # the seeds differ in what they got right
        row["correct"] = bool(row["correct"] or rng.random() < 0.5)
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


def described_steps(described: dict[str, dict[str, list[dict[str, int]]]]) -> int:
    """The steps of all stages of a run.json."""
    return sum(stage["steps"] for stage in described["recipe"]["stage"])


def several(source: Path, folder: Path, *, num: int, steps: int) -> list[Path]:
    """``num`` runs of two recipes, each with its own seeds."""
    runs = [long_run(source, folder / f"run-{i}", steps=steps, seed=i) for i in range(1, num + 1)]
    for run in runs[num // 2 :]:
        described = json.loads((run / "run.json").read_text())
        described["recipe"]["eval"]["max_new_tok"] -= 1
        (run / "run.json").write_text(json.dumps(described))
    return runs
