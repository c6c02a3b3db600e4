"""The test exam of a study: taken once, after all runs, and not before the plan was committed."""

import datetime
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isomorph.curriculum.assemble import open_sampler
from isomorph.curriculum.candidates import find_candidate
from isomorph.curriculum.evaluation import ModelScore, evaluate_tasks
from isomorph.curriculum.inputs import located
from isomorph.curriculum.questions import open_exam
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_summary
from isomorph.curriculum.study.design import Design, PlannedRun
from isomorph.curriculum.study.results import (
    RESULTS,
    TEST,
    append_lines,
    newest_identities,
    newest_warm_starts,
    read_lines,
    rows_of_evaluation,
    text_key,
)
from isomorph.engine.config import UserError
from isomorph.engine.record.checkpoint import checkpoint_path
from isomorph.engine.record.runlog import Row
from isomorph.engine.types import Sampling

PLAN, TAKEN = "PLAN.md", "test.json"
Say = Callable[[str], None]


def check_test(design: Design, runs: list[PlannedRun], *, again: bool) -> dict[str, Any]:
    """Whether the test exam may be taken now; what is recorded of it. Raises UserError where it may not."""
    if design.spec.test is None:
        design.test_recipe(design.spec.study.baseline, design.spec.study.seeds[0])  # says what is missing
    taken = read_taken(design.out)
    if taken and taken[-1]["is_complete"] and not again:
        raise UserError(
            f"the test exam was taken on {taken[-1]['at']}, and a claim uses it once: --test-again takes it again, "
            "which the page will say"
        )
    kept, present = newest_identities(design.out), design.identities(newest_warm_starts(design.out))
    if missing := [run.name for run in runs if kept.get((run.condition, run.seed)) != present.get(run.name, "none")]:
        raise UserError(
            "the test exam is taken after all runs of the present recipes, files and versions; not done yet: "
            f"{', '.join(missing)}"
        )
    commit = committed(design.file.parent / PLAN)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"at": now, "plan_commit": commit, "is_complete": False}


def read_taken(out: Path) -> list[dict[str, Any]]:
    """When the test exam was taken."""
    file = out / TAKEN
    return list(json.loads(file.read_text())) if file.exists() else []


def committed(plan: Path) -> str | None:
    """The commit of ``plan``; None outside a git repository. Raises UserError where it is missing or not committed."""
    if not plan.is_file():
        raise UserError(
            f"{plan} must be there before the test exam is taken: write down the question, the conditions, the planned "
            "comparisons and what would count as an answer"
        )
    if _git(plan, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    if _git(plan, "status", "--porcelain", "--", plan.name) or not (
        commit := _git(plan, "log", "-1", "--format=%H", "--", plan.name)
    ):
        raise UserError(f"{plan} must be committed in git, without changes, before the test exam is taken")
    return commit


def _git(plan: Path, *arguments: str) -> str:
    """What git prints; "" where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=plan.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def take_test(design: Design, runs: list[PlannedRun], record: dict[str, Any], say: Say) -> None:
    """Evaluates the models of all runs at the budgets of the test exam, and appends the results.

    ``record`` is written first. An exam that is cut off goes on where it was. Raises UserError for a missing model.
    """
    identities = newest_identities(design.out)
    targets = {run.name: _models(design, run) for run in runs}
    taken = read_taken(design.out)
    if not taken or taken[-1]["is_complete"]:
        taken.append(record)
    _write_taken(design.out, taken)
    label = f"test-{len(taken)}"
    rows_of_exam = (row for row in read_lines(design.out / RESULTS) if (row["exam"], row["label"]) == (TEST, label))
    done = {(row["condition"], row["seed"], row["step"], row["identity"]) for row in rows_of_exam}
    for run in runs:
        recipe = located(design.test_recipe(run.condition, run.seed))
        for step, model in targets[run.name].items():
            if (run.condition, run.seed, step, identities[run.condition, run.seed]) in done:
                continue
            scores = _scores(model, recipe, say)
            items = [item for score in scores for item in _items(score)]
            about = {"exam": TEST, "label": label, "step": step, "response_tok": 0}
            rows = rows_of_evaluation(run, identities[run.condition, run.seed], about, items, design.out)
            append_lines(design.out / RESULTS, rows)
            listed = "  ".join(f"{row['representation']} {row['correct'] / row['n']:.1%}" for row in rows)
            say(f"{run.name} after {step} steps: {listed}")
    taken[-1]["is_complete"] = True
    _write_taken(design.out, taken)


def _write_taken(out: Path, taken: list[dict[str, Any]]) -> None:
    (out / TAKEN).write_text(json.dumps(taken, indent=1) + "\n")


def _models(design: Design, run: PlannedRun) -> dict[int, Path]:
    """Step -> checkpoint, or the run's folder for its last step."""
    if read_summary(run.folder) is None:
        raise UserError(f"{run.folder} is missing or holds no finished run: the test exam needs the models of all runs")
    steps = int(json.loads((run.folder / "summary.json").read_text())["steps"])
    found = {}
    for budget in design.spec.test_budgets:
        model = run.folder if budget >= steps else checkpoint_path(run.folder / "checkpoints", budget)
        if not model.is_dir():
            raise UserError(
                f"{model} is missing, which the test exam needs for the budget of {budget} steps: add [test] before "
                "the runs are made, or set study.test_budgets to what is kept"
            )
        found[min(budget, steps)] = model
    return found


def _scores(model: Path, recipe: Recipe, say: Say) -> list[ModelScore]:
    """Greedy responses of one model to all that ``recipe`` evaluates on."""
    policy = find_candidate(str(model)).load()
    most = recipe.eval.max_new_tok
    greedy = Sampling(
        temperature=0.0,
        max_new_tok=most,
        samples_per_prompt=1,
        stop_ids=policy.text.stop_ids,
        stop=recipe.stop_strings,
        seed=recipe.eval.seed,
    )
    with (
        open_exam(policy, recipe, (), prompts=None, max_new_tok=most, say=say) as exam,
        open_sampler(recipe, policy) as sampler,
    ):
        scores: list[ModelScore] = []
        for one in exam.asked:
            num_before = sum(len(score.asked.tasks) for score in scores)
            scores.append(
                evaluate_tasks(policy, sampler, exam.judge, one, [greedy], exam.dialogue, num_before=num_before)
            )
        return scores


def _items(score: ModelScore) -> list[Row]:
    """Of each question the key, or one made of its text, and what else its row says."""
    return [
        {**row, "representation": row["data"], "key": row.get("key") or text_key(str(row["prompt"]))}
        for row in score.rows()
        if row["sample"] is None
    ]
