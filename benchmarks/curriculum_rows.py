"""Rows of curriculum_gpu.py: what its runs have written by now, one row for an exam and one for the end of a run."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from isomorph.curriculum.evaluation_spec import START, step_of
from isomorph.curriculum.report.run_record import read_run_json, read_summary
from isomorph.curriculum.study.execute import DONE, FAILED, RUNNING, STOPPED, Execution, Job
from isomorph.curriculum.study.results import append_lines, read_lines
from isomorph.curriculum.study.spec import WARM_START

ROWS = "curriculum_gpu.jsonl"
LOOK_S = 0.5
Row = dict[str, Any]


class Follower:
    """Appends to a file of rows what the runs of an execution have found since it looked last."""

    def __init__(self, execution: Execution, file: Path, say: Callable[[str], None]) -> None:
        """An exam that ``file`` has already is left out, unless a resumed run has repeated it with another result."""
        self._execution, self._file, self._say = execution, file, say
        rows = read_lines(file)
        self._there = {_key(row): row["right"] for row in rows if row["kind"] == "exam"}
        self._read: dict[Path, int] = {}  # file of an exam -> when it was written, ns
        self._has_shortcuts = any(row["kind"] == "shortcuts" for row in rows)
        self._ended: set[str] = set()
        self._looked = 0.0

    def look(self, *, ended: bool = False) -> None:
        """At most every LOOK_S seconds. ``ended``: now, and the last time."""
        if not ended and time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        for job in self._execution.jobs:
            has_ended = job.status in (DONE, FAILED, STOPPED)
            if job.was_done or job.run.name in self._ended or not (has_ended or job.status == RUNNING):
                continue
            if not job.run.folder.is_dir():
                continue
            self._look_at(job)
            if has_ended:
                self._ended.add(job.run.name)
                append_lines(self._file, [run_row(job)])

    def _look_at(self, job: Job) -> None:
        run = job.run
        ends = dict(zip((s.name for s in run.recipe.stage), accumulate(s.steps for s in run.recipe.stage), strict=True))
        for items in sorted((run.folder / "evaluations").glob("*.jsonl")):
            written = items.stat().st_mtime_ns
            if items.name.startswith(".") or self._read.get(items) == written:
                continue
            self._read[items] = written
            row = exam_row(job, items, 0 if items.stem == START else step_of(items.stem) or ends[items.stem])
            if self._there.get(_key(row)) == row["right"]:
                continue
            append_lines(self._file, [row])
            self._there[_key(row)] = row["right"]
            listed = "  ".join(f"{form} {right.count('1')}/{len(right)}" for form, right in row["right"].items())
            self._say(f"{run.name} after {row['step']} steps: {listed}")
        summary = read_summary(run.folder) if run.condition == WARM_START and not self._has_shortcuts else None
        if summary is not None and summary.get("shortcuts"):
            append_lines(self._file, [{"kind": "shortcuts", "rates": summary["shortcuts"]}])
            self._has_shortcuts = True


def _key(row: Row) -> tuple[str, int, str, int]:
    return row["condition"], row["seed"], row["identity"], row["step"]


def exam_row(job: Job, file: Path, step: int) -> Row:
    """Of one file of evaluations/."""
    run, items = job.run, read_lines(file)
    by_form: dict[str, list[Row]] = {}
    for item in items:
        by_form.setdefault(item["representation"], []).append(item)
    steps = {row["step"]: row for row in read_lines(run.folder / "steps.jsonl")}
    last = steps.get(step)
    return {
        "kind": "exam",
        "condition": run.condition,
        "seed": run.seed,
        "identity": job.identity,
        "step": step,
        "of_steps": run.steps,
        "right": {form: "".join("1" if one["correct"] else "0" for one in own) for form, own in by_form.items()},
        "errors": {form: _errors(own) for form, own in by_form.items()},
        "items": {form: _hash(own) for form, own in by_form.items()},
        "wall_s": last["wall_s"] if last else None,  # of the run up to its step, exams included; None: before the first
        "response_tok": int(last["tok/response_total"]) if last else 0,
        **machine_of(run.folder, job),
    }


def machine_of(folder: Path, job: Job) -> Row:
    """Device, dtype, sampler and versions, as the run itself says them."""
    described = read_run_json(folder)
    gpus = described["machine"]["gpus"]
    return {
        "device": "cuda" if gpus else "cpu",
        "device_name": gpus[0] if gpus else described["machine"]["cpu_capability"],
        "dtype": job.run.recipe.model.dtype,
        "sampler": described["sampler"],
        "versions": described["versions"],
    }


def run_row(job: Job) -> Row:
    """How a run ended. Seconds are those of its process since it started or resumed, but for ``wall_s``."""
    steps = read_lines(job.run.folder / "steps.jsonl")
    first = steps[0] if steps else None
    return {
        "kind": "run",
        "condition": job.run.condition,
        "seed": job.run.seed,
        "identity": job.identity,
        "status": job.status,
        "why": job.why,
        "step": steps[-1]["step"] if steps else 0,
        "of_steps": job.run.steps,
        "wall_s": steps[-1]["wall_s"] if steps else None,
        "process_s": time.monotonic() - job.started if job.started else None,
        # loading, the first weight sync and the first exam; imports of the process come on top
        "before_first_step_s": first["wall_s"] - first["time/step_s"] if first else None,
        "step_s": _median([row["time/step_s"] for row in steps]),
        "response_tok": int(steps[-1]["tok/response_total"]) if steps else None,
    }


def _errors(items: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(str(one["error"]) for one in items if not one["correct"] and one.get("error")))


def _hash(items: Sequence[Row]) -> str:
    return hashlib.sha256("\n".join(str(one["key"]) for one in items).encode()).hexdigest()[:12]


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
