"""The table of curriculum_gpu.py, from its rows alone: accuracy, paired differences, shortcuts, costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from curriculum_design import BASELINE, CLAIM, OTHERS

from isomorph.curriculum.study.spec import WARM_START
from isomorph.curriculum.tasks.battery import best_of

Row = dict[str, Any]
Exams = dict[tuple[str, int, int], Row]  # condition, seed, step -> its row


def exams_of(rows: Sequence[Row]) -> Exams:
    """Of the newest run of each condition and seed; of an exam that it repeated after a kill, the last."""
    exams = [row for row in rows if row["kind"] == "exam"]
    newest = {(row["condition"], row["seed"]): row["identity"] for row in exams}
    return {
        (row["condition"], row["seed"], row["step"]): row
        for row in exams
        if newest[row["condition"], row["seed"]] == row["identity"]
    }


def report(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown. Intervals need scipy (extra ``study``): without it a line says so in their place."""
    exams = exams_of(rows)
    if not exams:
        return ["no exam yet"]
    lines = _head(rows)
    forms = next(iter(exams.values()))["right"]
    # a warm start's last exam is that of the model that all begin with
    warm = {
        (name, seed, 0): row
        for (name, seed, step), row in exams.items()
        if (name, step) == (WARM_START, row["of_steps"])
    }
    exams = {key: row for key, row in exams.items() if key[0] != WARM_START} | warm
    steps = sorted({step for _, _, step in exams})
    for form in forms:
        lines += ["", f"Accuracy on {form}, mean over the seeds that have this exam (their number)"]
        lines += _table(["condition", *(f"after {step}" for step in steps)], _accuracies(exams, form, steps))
    lines += ["", *_shortcuts(rows)]
    try:
        lines += _differences(exams, list(forms), steps)
    except ModuleNotFoundError as missing:
        lines += ["", f"no intervals: {missing.name} is not installed (pip install 'isomorph[study]')"]
    return [*lines, "", *_costs(rows)]


def _head(rows: Sequence[Row]) -> list[str]:
    machines = {
        f"{row['device_name']} ({row['device']}), {row['dtype']}, sampler {row['sampler']}, "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name in ("torch", "vllm"))
        for row in rows
        if row["kind"] == "exam"
    }
    settings = next(row["settings"] for row in rows if row["kind"] == "call")
    what = f"model {settings['model']}" + (", a rehearsal: no figure means anything" if settings["rehearse"] else "")
    return [what, *sorted(machines)]


def _accuracies(exams: Exams, form: str, steps: Sequence[int]) -> list[list[str]]:
    cells = []
    for condition in (WARM_START, *CLAIM, *OTHERS):
        row = []
        for step in steps:
            right = [_right(exam, form) for (name, _, at), exam in exams.items() if (name, at) == (condition, step)]
            row.append(f"{np.mean([one.mean() for one in right]):.1%} ({len(right)})" if right else "")
        if any(row):
            cells.append([condition, *row])
    return cells


def _differences(exams: Exams, forms: Sequence[str], steps: Sequence[int]) -> list[str]:
    """Paired by seed and item. Exams before the first step are of the same model."""
    from isomorph.curriculum.study.seeds import effect

    lines = []
    for form in forms:
        cells = []
        for condition in (*CLAIM[1:], *OTHERS):
            for step in (step for step in steps if step > 0):
                pairs = [
                    (exam, exams[BASELINE, seed, step])
                    for (name, seed, at), exam in sorted(exams.items())
                    if (name, at) == (condition, step) and (BASELINE, seed, step) in exams
                ]
                if not pairs:
                    continue
                if any(first["items"] != second["items"] for first, second in pairs):
                    raise ValueError(f"{condition} and {BASELINE} were asked other items after {step} steps")
                found = effect([_right(a, form) - _right(b, form) for a, b in pairs], shared=True)
                interval = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
                cells.append([condition, f"{step}", interval, f"{found.num_ahead} of {len(pairs)}", found.method])
        if cells:
            lines += ["", f"Minus {BASELINE}, on {form}: points, 95 % interval"]
            lines += _table(["condition", "steps", "difference", "seeds ahead", "interval over"], cells)
    if lines:
        lines += [
            "",
            "An interval over items (one seed) says nothing about other seeds. None is adjusted for their number.",
        ]
    return lines


def _shortcuts(rows: Sequence[Row]) -> list[str]:
    known = [row["rates"] for row in rows if row["kind"] == "shortcuts"]
    if not known:
        return ["shortcuts: not known, no warm start has ended"]
    names = sorted({name for rates in known[-1].values() for name in rates})
    cells = [
        [form, *(f"{rates[name]:.1%}" for name in names), best_of(rates)] for form, rates in known[-1].items() if rates
    ]
    return ["Share of the items that a shortcut answers", *_table(["exam", *names, "best"], cells)]


def _costs(rows: Sequence[Row]) -> list[str]:
    """The newest row of each run."""
    newest = {(row["condition"], row["seed"]): row for row in rows if row["kind"] == "run"}
    cells = []
    for (condition, seed), row in newest.items():
        tokens = "" if row["response_tok"] is None else f"{row['response_tok']:,}"
        seconds = [f"{row[name]:.1f}" if row[name] is not None else "" for name in ("wall_s", "before_first_step_s")]
        cells.append([f"{condition}, seed {seed}", row["status"], f"{row['step']}", *seconds, tokens])
    head = ["run", "ended", "steps", "seconds", "of them before the first step", "response tokens"]
    return _table(head, cells) if cells else []


def _right(exam: Row, form: str) -> np.ndarray:
    return np.array([float(one) for one in exam["right"][form]])


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
