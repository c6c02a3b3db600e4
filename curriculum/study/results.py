"""What a study keeps of its runs: small JSON Lines, from which every table and picture is made without the runs.

study.json     the design in words and numbers, as the page needs it
runs.jsonl     a row for each finished run: steps, tokens, seconds, stages, hash of the weights, versions, identity
results.jsonl  a row for each run, evaluation and representation: right answers item by item, as a string of 0 and 1
items.jsonl    a row for each list of items that evaluations ask: their keys, and what is known of their difficulty

Rows are only appended. Of a condition and seed the newest run counts, if it is one of the present design: study.json
has the identities. So no run of an earlier recipe is compared with one of the present.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.curriculum.report.run_record import read_completions, read_run_json, read_summary
from isomorph.curriculum.study.design import PlannedRun
from isomorph.curriculum.study.spec import WARM_START
from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import Row, read_steps

RUNS, RESULTS, ITEMS, STUDY = "runs.jsonl", "results.jsonl", "items.jsonl", "study.json"
DEVELOPMENT, TEST = "dev", "test"
DIFFICULTY = {  # what an evaluation may say of an item -> in words
    "steps": "steps of the item",
    "width": "width of the item",
    "path_len": "length of its longest path",
    "hard": "hard: no shortcut solves it",
    "wording": "wording of the item",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation of one run on one representation."""

    condition: str
    seed: int
    exam: str  # DEVELOPMENT or TEST
    step: int  # completed steps of the condition's stages
    representation: str
    response_tok: int  # sampled by then, without the warm start
    items: str  # which list of items
    right_I: np.ndarray  # [items] 0 or 1, float64
    row: Row

    @property
    def rate(self) -> float:
        return float(self.right_I.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResults:
    """All that a study's folder says."""

    study: dict[str, Any]
    runs: dict[tuple[str, int], Row]  # (condition, seed) -> newest
    warm: dict[int, Row]  # seed -> newest warm start
    curves: dict[tuple[str, int, str, str], list[Point]]  # condition, seed, representation, exam -> by step
    items: dict[str, Row]

    @property
    def points(self) -> list[Point]:
        """Of all curves."""
        return [point for own in self.curves.values() for point in own]

    def point(self, condition: str, seed: int, step: int, representation: str, exam: str) -> Point | None:
        """The evaluation after ``step``, or after the last step of a run that ended before it; None: there is none."""
        own = [p for p in self.curve(condition, seed, representation, exam) if p.step <= step]
        if not own or (own[-1].step < step and own[-1].step < self.runs[condition, seed]["steps"]):
            return None
        return own[-1]

    def curve(self, condition: str, seed: int, representation: str, exam: str = DEVELOPMENT) -> list[Point]:
        """All evaluations of a run on a representation, by step."""
        return self.curves.get((condition, seed, representation, exam), [])


def read_lines(file: Path) -> list[Row]:
    """All rows; a last line that a killed process left incomplete does not count. Raises UserError for another one."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: must be a row of JSON: {error}") from None
    return rows


def append_lines(file: Path, rows: Iterable[Row]) -> None:
    """Appends rows, synced to the disk; takes an incomplete last line away first."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if file.exists():
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(file, whole)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def read_results(folder: Path) -> StudyResults:
    """Raises UserError where ``folder`` is not a study's, or a file is broken."""
    file = folder / STUDY
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} must be the folder of a study, with a {STUDY}: {error}") from None
    rows = read_lines(folder / RUNS)
    runs = {(row["condition"], row["seed"]): row for row in rows if row["condition"] != WARM_START}
    runs = {
        key: row for key, row in runs.items() if study["identities"].get(f"{key[0]}-seed{key[1]}") == row["identity"]
    }
    warm = newest_warm_starts(folder)
    newest = {(*key, row["identity"]) for key, row in runs.items()}
    found: dict[tuple[Any, ...], Point] = {}
    for row in read_lines(folder / RESULTS):
        if (row["condition"], row["seed"], row["identity"]) in newest:
            key = (row["condition"], row["seed"], row["exam"], row["step"], row["representation"])
            found[key] = _point(row)  # of a test exam that was taken again, the newest
    curves: dict[tuple[str, int, str, str], list[Point]] = {}
    for point in sorted(found.values(), key=lambda p: p.step):
        curves.setdefault((point.condition, point.seed, point.representation, point.exam), []).append(point)
    items = {row["items"]: row for row in read_lines(folder / ITEMS)}
    return StudyResults(study=study, runs=runs, warm=warm, curves=curves, items=items)


def newest_warm_starts(out: Path) -> dict[int, Row]:
    """Seed -> newest row of its warm start."""
    return {row["seed"]: row for row in read_lines(out / RUNS) if row["condition"] == WARM_START}


def newest_identities(out: Path) -> dict[tuple[str, int], str]:
    """(Condition, seed) -> identity of its newest run."""
    return {(row["condition"], row["seed"]): row["identity"] for row in read_lines(out / RUNS)}


def _point(row: Row) -> Point:
    return Point(
        **{name: row[name] for name in ("condition", "seed", "exam", "step", "representation", "response_tok")},
        items=row["items"],
        right_I=np.array([float(c) for c in row["right"]]),
        row=row,
    )


def harvest(run: PlannedRun, identity: str, out: Path) -> None:
    """Appends what a finished run has found, unless it is the newest there of its condition and seed.

    The warm start's last evaluation is that of a condition before its first step, where the run has none of its own.
    """
    if newest_identities(out).get((run.condition, run.seed)) == identity:
        return
    summary = _summary(run.folder)
    if run.condition != WARM_START:
        exams = [(run.folder, exam["label"], exam["step"], exam) for exam in summary["exams"]]
        if run.warm is not None and all(step > 0 for _, _, step, _ in exams):
            last = _summary(run.warm)["exams"][-1]
            exams.insert(0, (run.warm, last["label"], 0, last))
        tokens = _response_tokens(run.folder)
        rows: list[Row] = []
        for folder, label, step, exam in exams:
            own = _item_rows(folder, label)
            about = {"exam": DEVELOPMENT, "label": label, "step": step, "response_tok": tokens[step]}
            found = rows_of_evaluation(run, identity, about, own, out)
            rows += [{**row, "floor": exam.get("floor", {}).get(row["representation"])} for row in found]
        _append_new(out / RESULTS, rows)
    described = read_run_json(run.folder)
    append_lines(out / RUNS, [_run_row(run, identity, summary, described)])


def _run_row(run: PlannedRun, identity: str, summary: Row, described: Row) -> Row:
    return {
        "condition": run.condition,
        "seed": run.seed,
        "identity": identity,
        "steps": summary["steps"],
        "stages": summary["stages"],
        "tokens": summary["tokens"],
        "wall_s": summary["wall_s"],
        "weights_sha256": summary["weights_sha256"],
        "versions": described["versions"],
        "machine": described["machine"].get("platform"),
        "shortcuts": summary.get("shortcuts"),
    }


def rows_of_evaluation(run: PlannedRun, identity: str, about: Row, items: Sequence[Row], out: Path) -> list[Row]:
    """Rows of results.jsonl of one evaluation. ``items``: representation, key and correct of each; others may lack.

    A list of items that items.jsonl has not yet is appended there.
    """
    by_form: dict[str, list[Row]] = {}
    for item in items:
        by_form.setdefault(item["representation"], []).append(item)
    rows = []
    for form, own in by_form.items():
        keys = _unique([str(item["key"]) for item in own])
        listed = hashlib.sha256("\n".join([form, *keys]).encode()).hexdigest()[:12]
        if listed not in {row["items"] for row in read_lines(out / ITEMS)}:
            known = {name: [item.get(name) for item in own] for name in DIFFICULTY if own[0].get(name) is not None}
            append_lines(out / ITEMS, [{"items": listed, "representation": form, "keys": keys, **known}])
        errors = Counter(str(item["error"]) for item in own if not item["correct"] and item.get("error"))
        rows.append(
            {
                "condition": run.condition,
                "seed": run.seed,
                "identity": identity,
                **about,
                "representation": form,
                "correct": sum(bool(item["correct"]) for item in own),
                "n": len(own),
                "items": listed,
                "right": "".join("1" if item["correct"] else "0" for item in own),
                **({"errors": dict(errors)} if errors else {}),
            }
        )
    return rows


def _append_new(file: Path, rows: Sequence[Row]) -> None:
    """Without those that a harvest has appended which was killed before it ended, or of an equal run."""
    names = ("condition", "seed", "identity", "exam", "step", "representation")
    there = {tuple(row[name] for name in names): row for row in read_lines(file)}
    append_lines(file, [row for row in rows if there.get(tuple(row[name] for name in names)) != row])


def _unique(keys: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        seen[key] += 1
        found.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return found


def _item_rows(run: Path, label: str) -> list[Row]:
    """Of one evaluation: evaluations/LABEL.jsonl, or the greedy responses, whose prompt is then the key."""
    file = run / "evaluations" / f"{label}.jsonl"
    if file.is_file():
        # ``set``: what its result is listed under, as in summary.json; the representation where there is one set
        return [{**row, "representation": row.get("set", row["representation"])} for row in read_lines(file)]
    file = run / "completions" / f"exam-{label}.jsonl"
    answers = read_completions(file)
    if answers is None:
        raise UserError(f"{file} must hold the responses of the evaluation, and is missing or incomplete")
    greedy = [row for row in answers if row.get("sample") is None]
    return [{**row, "key": text_key(row["prompt"])} for row in greedy]


def text_key(text: str) -> str:
    """A short key of an item that has none but its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _summary(folder: Path) -> Row:
    summary = read_summary(folder)
    assert summary is not None and summary["status"] == "done"
    return summary


def _response_tokens(run: Path) -> dict[int, int]:
    """Step -> response tokens up to then."""
    return {0: 0, **{row["step"]: int(row["tok/response_total"]) for row in read_steps(run)}}
