"""Reads a run folder: a finished run, an unfinished one, or one with half-written files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.curriculum.evaluation_results import Sampled
from isomorph.curriculum.evaluation_spec import START, step_of
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.schema import Described, Response, Step, Summary, check, fits
from isomorph.curriculum.stage_spec import StageRecipe
from isomorph.curriculum.study.statistics import Accuracy
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import check_tables
from isomorph.engine.record.checkpoint import latest_checkpoint, read_state
from isomorph.engine.record.runlog import Row, read_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Accuracy in one evaluation."""

    label: str  # the stage it follows; "start" before the first; step-NNNNNNNN within a stage
    step: int  # completed steps by then
    accuracy: dict[str, Accuracy]  # representation -> result
    no_answer: dict[str, float]  # representation -> share of responses without any answer; {} where not measured
    answers: dict[str, dict[str, bool]]  # representation -> question -> whether the greedy answer is right
    sampled: dict[str, Sampled]  # representation -> avg@k and pass@k; {} where there were no samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The rows of one stage: ``first`` and ``last`` step, both included."""

    stage: StageRecipe
    first: int
    last: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run folder."""

    name: str
    folder: Path
    described: dict[str, Any]  # run.json
    recipe: Recipe
    rows: tuple[Row, ...]  # of steps.jsonl, at least one
    spans: tuple[Span, ...]  # in order; only stages that have rows
    evaluations: tuple[EvaluationResult, ...]  # in order
    baseline: dict[str, float | None]  # accuracy of the sequential baseline; {} where it is not known yet
    shortcuts: dict[str, dict[str, float]]  # shortcut -> its accuracy, of each representation; {} in older runs
    summary: dict[str, Any] | None  # None: the run has not ended
    notes: tuple[str, ...]  # what could not be read, in sentences

    @property
    def status(self) -> str:
        return "unfinished" if self.summary is None else str(self.summary["status"])

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    @property
    def boundaries(self) -> tuple[EvaluationResult, ...]:
        """The evaluations at the start and at the ends of stages, without those of ``eval.every``."""
        return tuple(done for done in self.evaluations if step_of(done.label) is None)

    @property
    def before(self) -> EvaluationResult | None:
        """The evaluation before the first RL step: after the supervised warm-up, or at the start without one."""
        return next((done for done in self.evaluations if done.label == self.recipe.warm_up_label), None)

    @property
    def latest(self) -> EvaluationResult | None:
        """The last evaluation, unless that is ``before``."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1] != self.before else None

    @property
    def representations(self) -> tuple[str, ...]:
        """All that the recipe trains or evaluates on."""
        trained = (part.representation for stage in self.recipe.stage for part in stage.mixture)
        evaluated = (form for one in self.recipe.evaluation_sets for form in one.representations or ())
        return tuple(dict.fromkeys((*evaluated, *trained)))


def read_run(folder: Path) -> RunRecord:
    """The record of ``folder``.

    Raises:
        UserError: it is not a run folder, it holds no step yet, or a file in it is broken.
    """
    described = read_run_json(folder)
    recipe = check_tables(described["recipe"], Recipe, where=f"{folder}/run.json")
    check(Described, described, f"{folder}/run.json", "the description of a run")
    rows, notes = _rows(folder)
    spans = _spans(recipe, rows, folder)
    evaluations, further_notes = _evaluations(folder, spans)
    summary = read_summary(folder)
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        described=described,
        recipe=recipe,
        rows=rows,
        spans=spans,
        evaluations=evaluations,
        baseline=_of_evaluation(folder, summary, "floor"),
        shortcuts=_of_evaluation(folder, summary, "shortcuts"),
        summary=summary,
        notes=(*notes, *further_notes),
    )


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json. Raises UserError where ``folder`` is not the folder of a run."""
    described = _json_object(folder / "run.json", f"{folder} must be the folder of a run, with a run.json")
    if not isinstance(described.get("recipe"), dict):
        raise UserError(f"{folder}/run.json must hold the run's recipe, which it lacks: name another run")
    return described


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json; None before the run has ended. Raises UserError where it is broken."""
    file = folder / "summary.json"
    if not file.exists():
        return None
    summary = _json_object(file, f"{file} must be the summary of a run")
    check(Summary, summary, str(file), "the summary of a run")
    return summary


def series(rows: Sequence[Row], key: str) -> np.ndarray:
    """[len(rows)] float64 of one column; NaN where a row lacks it or nothing was measured."""
    values = [np.nan if row.get(key) is None else row[key] for row in rows]
    try:
        return np.array(values, dtype=np.float64).reshape(len(rows))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"steps.jsonl: {key} must be a number or null in every row") from None


def trained_on(stages: Sequence[StageRecipe]) -> str:
    """``sft graph+natural -> graph -> natural``: what the stages trained on, in order; ``nothing`` for none."""
    return " -> ".join(_ingredients(stage) for stage in stages) or "nothing"


def _ingredients(stage: StageRecipe) -> str:
    names = "+".join(sorted({part.representation for part in stage.mixture}))
    return f"{stage.objective.name} {names}" if stage.objective.name in ("sft", "rft") else names


def _rows(folder: Path) -> tuple[tuple[Row, ...], list[str]]:
    file = folder / "steps.jsonl"
    try:
        num_lines = sum(1 for line in file.read_text().splitlines() if line.strip())
        rows = read_steps(folder)
    except FileNotFoundError:
        num_lines, rows = 0, []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} must be a readable file of JSON Lines: {error}") from error
    if not rows:
        raise UserError(f"{folder} holds no completed step yet: wait for the first row of steps.jsonl")
    for number, row in enumerate(rows, 1):
        check(Step, row, f"{file}, line {number}:", "one step's row")
    lost = num_lines - len(rows)
    notes = [f"steps.jsonl: {lost} row(s) from line {len(rows) + 1} on cannot be read and are left out"] if lost else []
    return tuple(rows), notes


def _spans(recipe: Recipe, rows: Sequence[Row], folder: Path) -> tuple[Span, ...]:
    by_name: dict[str, list[Row]] = {stage.name: [] for stage in recipe.stage}
    for row in rows:
        if row["stage"] not in by_name:
            raise UserError(
                f"{folder}/steps.jsonl, step {row['step']}: stage {row['stage']!r} is not in the recipe of run.json: "
                "the two files must be of one run"
            )
        by_name[row["stage"]].append(row)
    return tuple(
        Span(stage=stage, first=own[0]["step"], last=own[-1]["step"], rows=tuple(own))
        for stage in recipe.stage
        if (own := by_name[stage.name])
    )


def _evaluations(folder: Path, spans: Sequence[Span]) -> tuple[tuple[EvaluationResult, ...], list[str]]:
    ends = {START: spans[0].first - 1, **{span.stage.name: span.last for span in spans}}
    files = (folder / "completions").glob("exam-step-*.jsonl")
    within = {label: step for file in files if (step := step_of(label := file.stem.removeprefix("exam-"))) is not None}
    found, notes = [], []
    for label, step in sorted((ends | within).items(), key=lambda item: item[1]):
        file = folder / "completions" / f"exam-{label}.jsonl"
        if not file.is_file():
            continue
        answers = read_completions(file)
        if answers is None:
            notes.append(f"completions/{file.name} is incomplete and left out")
        else:
            greedy = [row for row in answers if row.get("sample") is None]
            found.append(
                EvaluationResult(
                    label=label,
                    step=step,
                    accuracy=_accuracy(greedy),
                    no_answer=_without_answer(greedy),
                    answers=_answers(greedy),
                    sampled=_sampled(answers),
                )
            )
    return tuple(found), notes


def read_completions(file: Path) -> list[Row] | None:
    """The rows of a file under completions/; None where it is incomplete."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError, RecursionError):
        return None
    if not rows or not fits(Response, rows):
        return None
    for row in rows:  # files of older versions lack the column; their rewards are 0 or 1
        row.setdefault("correct", row["reward"] == 1)
    return rows


def reward_text(row: Row) -> str:
    """The reward of a row of a file under completions/; it is null where none applies to the response."""
    return "no reward applies" if row["reward"] is None else f"reward {row['reward']:g}"


def _accuracy(answers: Sequence[Row]) -> dict[str, Accuracy]:
    correct: dict[str, list[bool]] = {}
    for row in answers:
        correct.setdefault(row["representation"], []).append(row["correct"])
    return {name: Accuracy.of(sum(got), len(got)) for name, got in correct.items()}


def _answers(answers: Sequence[Row]) -> dict[str, dict[str, bool]]:
    found: dict[str, dict[str, bool]] = {}
    for row in answers:
        found.setdefault(row["representation"], {})[f"{row.get('prompt_id')} {row.get('prompt')}"] = row["correct"]
    return found


def _sampled(answers: Sequence[Row]) -> dict[str, Sampled]:
    correct: dict[str, list[bool]] = {}
    samples = 0
    for row in answers:
        if row.get("sample") is not None:
            correct.setdefault(row["representation"], []).append(row["correct"])
            samples = max(samples, row["sample"] + 1)
    return {name: Sampled.of(got, samples) for name, got in correct.items()}


def _without_answer(answers: Sequence[Row]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for row in answers:
        if row.get("answered") is not None:
            found.setdefault(row["representation"], []).append(row["answered"])
    return {name: 1 - sum(got) / len(got) for name, got in found.items()}


def _of_evaluation(folder: Path, summary: dict[str, Any] | None, key: str) -> dict[str, Any]:
    """``key`` of the summary, or else of the newest checkpoint's last evaluation; {} where neither has it."""
    if summary is not None and key in summary:
        return dict(summary[key])
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return {}
    done = read_state(newest)["source"].get("exams", [])
    return dict(done[-1].get(key, {})) if done else {}


def _json_object(file: Path, must: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{must}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{must}: {file} holds {type(value).__name__} instead of an object")
    return value
