"""The report: one self-contained HTML page and its figures as PNG files, of one run or comparing several."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from isomorph.curriculum.report import document, figures
from isomorph.curriculum.report.answer import answer_of_runs, answer_section
from isomorph.curriculum.report.drawing import MAX_POINTS
from isomorph.curriculum.report.paper import paper_section
from isomorph.curriculum.report.run_record import (
    EvaluationResult,
    RunRecord,
    Span,
    read_completions,
    read_run,
    reward_text,
    series,
    trained_on,
)
from isomorph.curriculum.report.transfer import Measurement, TransferMatrix, transfer_matrix
from isomorph.curriculum.study.statistics import Accuracy
from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import Row

PAGE = "report.html"
MAX_SAMPLE_CHARS = 1_200
MAX_TITLE_NAMES = 3
TOKENS_OF_PHASE = {"generate": "tok/response", "judge": "tok/response", "pack": "tok/trunk", "update": "tok/trunk"}
PHASE_COLUMNS = ("stage", "phase", "seconds", "share", "s/step", "tokens/s")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes ``out``/report.html and its PNGs; returns the page's path. The page loads no other file.

    Raises:
        UserError: no run is given, one is not a run folder or has no step yet, or ``out`` cannot be written.
    """
    if not runs:
        raise UserError("a report needs at least one run folder, got none")
    records = [read_run(run) for run in runs]
    names = _names(records)
    album = document.Album(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        body = _comparison(records, names, album) + "<h2>Each run</h2>" if len(records) > 1 else ""
        album.wide_only = len(records) > 1
        body += "".join(
            _section(record, name, album, number=i if len(records) > 1 else 0)
            for i, (record, name) in enumerate(zip(records, names, strict=True), 1)
        )
        page = out / PAGE
        page.write_text(document.page(_title(names), body), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written there: {error}") from error
    return page


def _title(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MAX_TITLE_NAMES else f"{len(names)} runs, {names[0]} to {names[-1]}"


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The folders' names, or their paths where two names are the same."""
    names = [record.name for record in records]
    return [str(r.folder) if names.count(r.name) > 1 else r.name for r in records]


def _comparison(records: Sequence[RunRecord], names: Sequence[str], album: document.Album) -> str:
    conditions = _conditions(records, names)
    parts = [answer_of_runs(records, names, conditions)]
    unfinished = [name for record, name in zip(records, names, strict=True) if not record.is_done]
    if unfinished:
        parts.append(document.note(f"Unfinished runs, shown by their last evaluation: {', '.join(unfinished)}"))
    parts.append("<h2>Comparison</h2>")
    if any(record.evaluations for record in records):
        caption = "Greedy accuracy at each run's evaluations; one colour per run, its number at the end of its line."
        parts.append(album.add("compare-accuracy", partial(figures.compare_accuracy, records, names), caption))
    if any(not span.stage.objective.is_supervised for record in records for span in record.spans):
        caption = "Mean reward per step, moving average; one colour per run, its number at the end of its line."
        parts.append(album.add("compare-reward", partial(figures.compare_rewards, records, names), caption))
    matrix = _matrix_of_runs(records, conditions)
    if matrix.trained_on:
        parts.append("<h3>Transfer matrix</h3>" + _matrix_table(matrix))
        caption = "Accuracy by what was trained on (rows) and evaluated on (columns), with 95 % intervals."
        parts.append(album.add("transfer", partial(figures.transfer_picture, matrix), caption))
        parts.append(document.note("Runs that differ only in the seed are pooled into one row."))
    parts.append(paper_section(records, names))
    return "\n".join(parts)


def _conditions(records: Sequence[RunRecord], names: Sequence[str]) -> dict[str, list[int]]:
    """Label -> places of the runs of one recipe that differ in the seed only, as far as they were evaluated."""
    labels: dict[str, str] = {}  # recipe without its seed, and the last evaluation -> label
    places: dict[str, list[int]] = {}
    for i, (record, name) in enumerate(zip(records, names, strict=True)):
        if not record.boundaries:
            continue
        last = record.boundaries[-1]
        label = trained_on([span.stage for span in record.spans if span.last <= last.step])
        unique = f"{label} ({name})" if label in labels.values() else label
        label = labels.setdefault(f"{_condition(record)} {last.label}", unique)
        places.setdefault(label, []).append(i)
    return places


def _matrix_of_runs(records: Sequence[RunRecord], conditions: Mapping[str, Sequence[int]]) -> TransferMatrix:
    """A row per condition, with the last evaluation of each run."""
    return transfer_matrix(
        measured
        for label, places in conditions.items()
        for i in places
        for measured in _measurements(label, records[i].boundaries[-1])
    )


def _condition(record: RunRecord) -> str:
    return record.recipe.model_copy(update={"run": record.recipe.run.model_copy(update={"seed": 0})}).model_dump_json()


def _matrix_of_evaluations(record: RunRecord) -> TransferMatrix:
    """A row per evaluation of one run, labelled with what it had been trained on by then."""
    return transfer_matrix(
        measured
        for done in record.boundaries
        for measured in _measurements(trained_on([s.stage for s in record.spans if s.last <= done.step]), done)
    )


def _measurements(label: str, done: EvaluationResult) -> list[Measurement]:
    return [Measurement(trained_on=label, evaluated_on=name, accuracy=a) for name, a in done.accuracy.items()]


def _matrix_table(matrix: TransferMatrix) -> str:
    cells = [
        [row, *(_accuracy(matrix.cell(row, column)) for column in matrix.evaluated_on)] for row in matrix.trained_on
    ]
    return document.table(["trained on \\ evaluated on", *matrix.evaluated_on], cells, css="numbers cards")


def _section(record: RunRecord, name: str, album: document.Album, *, number: int = 0) -> str:
    """A run's part of the page; ``number`` counts the runs of a page with several, where it can be opened."""
    prefix = f"{number}-" if number else ""
    parts = [_status(record), *map(document.note, record.notes), answer_section(record)]
    parts += [_accuracy_pictures(record, album, prefix), "<h3>Accuracy</h3>", _accuracy_table(record)]
    if len(record.boundaries) > 1:
        matrix = _matrix_of_evaluations(record)
        parts.append("<h4>Transfer: accuracy by what the run had been trained on so far</h4>" + _matrix_table(matrix))
        caption = "Accuracy by what this run had been trained on (rows) and evaluated on (columns)."
        parts.append(album.add(f"{prefix}transfer", partial(figures.transfer_picture, matrix), caption))
    parts.append(_shortcut_table(record))
    if not number:  # of several runs the comparison has it
        parts.append(paper_section([record], [name]))
    parts.append("<h3>Learning</h3>")
    caption = "Reward per step and representation; dashed lines are boundaries between stages."
    parts.append(album.add(f"{prefix}reward", partial(figures.learning, record), caption))
    caption = "Further metrics; dashed lines are boundaries between stages, gaps are steps without an update."
    if len(record.rows) > MAX_POINTS:
        caption += f" Lines are means over {MAX_POINTS} equal parts of the steps; bands hold all steps of a part."
    parts.append(album.add(f"{prefix}health", partial(figures.health, record), caption))
    parts.append("<h3>Time per phase</h3>" + _phase_table(record))
    caption = "Seconds per phase of a step; evaluations and checkpoints are not included."
    parts.append(album.add(f"{prefix}phases", partial(figures.phase_times, record), caption))
    parts += ["<h3>Samples</h3>" + _samples(record), "<h3>The run</h3>" + _facts(record)]
    if not number:  # the page's title is enough
        return "\n".join(parts)
    title = document.escaped(f"{number}  {name}")
    return f'<details class="run"><summary>{title}</summary>' + "\n".join(parts) + "</details>\n"


def _accuracy_pictures(record: RunRecord, album: document.Album, prefix: str) -> str:
    if not record.evaluations:
        return ""
    if len(record.evaluations) > len(record.boundaries):
        caption = "Accuracy on held-out questions over the steps; dashed lines are boundaries between stages."
        return album.add(f"{prefix}evaluations", partial(figures.accuracy_over_steps, record), caption)
    caption = "Greedy accuracy on held-out questions at each boundary between stages."
    return album.add(f"{prefix}evaluations", partial(figures.evaluation_accuracy, record), caption)


def _status(record: RunRecord) -> str:
    total = sum(stage.steps for stage in record.recipe.stage)
    last = record.rows[-1]
    if record.is_done:
        return f"<p>Done: {document.escaped(last['step'])} steps.</p>"
    reason = (record.summary or {}).get("reason")
    why = f" ({reason})" if reason else ""
    said = (
        f"This run is {record.status}{why}: step {last['step']} of at most {total}, in stage {last['stage']}. This "
        "page shows its state so far."
    )
    return document.warning(said)


def _facts(record: RunRecord) -> str:
    described = record.described
    model, machine = described["model"], described["machine"]
    device = ", ".join(machine["gpus"]) or f"{machine['cores']} cores, {machine['cpu_capability']}"
    ended = {entry["name"]: entry["ended_by"] for entry in (record.summary or {}).get("stages", [])}
    stages = (f"{s.stage.name}: {len(s.rows)} steps of {s.stage.objective.name}{_end(s, ended)}" for s in record.spans)
    versions = " ".join(f"{name} {version}" for name, version in described["versions"].items())
    rows = [
        ["model", f"{model['type']}, {model['parameters']:,} parameters, {model['dtype']}"],
        ["machine", f"{device}, {machine['memory_gib']} GiB, threads: {machine['threads']}"],
        ["sampler", described["sampler"]],
        ["seed", str(described["seed"])],
        ["stages", "; ".join(stages)],
        ["time", f"{record.rows[-1]['wall_s']:,.0f} s"],
        ["versions", versions],
    ]
    if record.is_done:
        assert record.summary is not None
        rows.append(["weights", f"sha256 {record.summary['weights_sha256'][:16]}..."])
    return document.table(["", ""], rows, css="facts")


def _end(span: Span, ended: dict[str, str]) -> str:
    return " (mastery)" if ended.get(span.stage.name) == "mastery" else ""


def _accuracy_table(record: RunRecord) -> str:
    before, latest = record.before, record.latest
    if before is None and latest is None:
        return document.note("There has been no evaluation yet.")
    names = list(dict.fromkeys(name for done in (before, latest) if done for name in done.accuracy))
    rows = [
        _accuracy_row(name, before, latest, record.baseline.get(name), record.shortcuts.get(name, {})) for name in names
    ]
    after = "after" if record.is_done else "so far"
    columns = [_column("before", before), _column(after, latest)]
    head = [
        "representation",
        *columns,
        "change, points",
        "sequential baseline",
        "best shortcut",
        "no answer",
        "questions",
    ]
    note = (
        "Intervals are 95 % (Wilson). Sequential baseline: accuracy of answering with the sum of all durations. "
        "Best shortcut: accuracy of the best answer that does not plan. "
        "No answer: share of responses of the latest evaluation that state none; they count as wrong."
    )
    return (
        document.table(head, rows, css="numbers cards") + document.note(note) + _best(record) + _sampled_table(record)
    )


def _shortcut_table(record: RunRecord) -> str:
    """What each shortcut reaches on the evaluation's questions; "" where they are not known."""
    known = {name: rates for name, rates in record.shortcuts.items() if rates}
    if not known:
        return ""
    names = list(dict.fromkeys(name for rates in known.values() for name in rates))
    rows = [[name.replace("_", " "), *(_rate(rates.get(name)) for rates in known.values())] for name in names]
    note = "Accuracy of answers without the procedure: a model below the best of them may not use it either."
    return "<h4>Shortcuts</h4>" + document.table(["shortcut", *known], rows) + document.note(note)


def _rate(rate: float | None) -> str:
    """ "-" for a shortcut of another kind of task."""
    return "-" if rate is None else f"{rate:.1%}"


def _best(record: RunRecord) -> str:
    best = (record.summary or {}).get("best")
    if not best:
        return ""
    where = f"step {best['step']}" if best["step"] else "the start"
    return document.note(
        f"The best model by {best['set']} is that of {where}, with {best['score']:.1%}: {best['folder']}."
    )


def _sampled_table(record: RunRecord) -> str:
    """avg@k and pass@k of the latest evaluation; "" without samples."""
    latest = record.evaluations[-1]
    if not latest.sampled:
        return ""
    names = next(iter(latest.sampled.values())).means()
    rows = [[key, *map(str, sampled.means().values())] for key, sampled in latest.sampled.items()]
    note = "Of sampled responses, in the latest evaluation; intervals are 95 %, over questions."
    return document.table(["representation", *names], rows) + document.note(note)


def _column(title: str, done: EvaluationResult | None) -> str:
    return f"{title} ({done.label})" if done else title


def _accuracy_row(
    name: str,
    before: EvaluationResult | None,
    latest: EvaluationResult | None,
    baseline: float | None,
    shortcuts: Mapping[str, float],
) -> list[str]:
    first = before.accuracy.get(name) if before else None
    last = latest.accuracy.get(name) if latest else None
    change = f"{100 * (last.rate - first.rate):+.1f}" if first and last else "-"
    known = last or first
    newest = latest or before
    missing = newest.no_answer if newest else {}
    return [
        name,
        _accuracy(first),
        _accuracy(last),
        change,
        "-" if baseline is None else f"{baseline:.1%}",
        f"{max(shortcuts.values()):.1%}" if shortcuts else "-",
        f"{missing[name]:.1%}" if name in missing else "-",
        "-" if known is None else str(known.n),
    ]


def _accuracy(accuracy: Accuracy | None) -> str:
    return "-" if accuracy is None else str(accuracy)


def phase_rows(record: RunRecord) -> list[list[str]]:
    """Time per phase of each stage as table rows with the columns ``PHASE_COLUMNS``."""
    return [row for span in record.spans for row in _rows_of_stage(span)]


def _phase_table(record: RunRecord) -> str:
    return document.table(PHASE_COLUMNS, phase_rows(record)) + document.note(
        "tokens/s counts response tokens for generate and rewards, and all forward tokens for pack and update. "
        "Supervised stages generate nothing: their responses are demonstrations."
    )


def _rows_of_stage(span: Span) -> list[list[str]]:
    seconds = {phase: float(values.sum()) for phase, values in figures.phase_seconds(span.rows).items()}
    total = float(series(span.rows, "time/step_s").sum())
    rows = [
        [
            *("", figures.phase_name(phase), f"{spent:.2f}", f"{spent / total:.1%}"),
            *(f"{spent / len(span.rows):.3f}", _speed(span, phase, spent)),
        ]
        for phase, spent in seconds.items()
    ]
    rows.append(["", "step", f"{total:.2f}", "100.0%", f"{total / len(span.rows):.3f}", ""])
    rows[0][0] = f"{span.stage.name} ({len(span.rows)} steps)"
    return rows


def _speed(span: Span, phase: str, seconds: float) -> str:
    is_demonstrated = phase == "generate" and span.stage.objective.is_supervised
    if phase not in TOKENS_OF_PHASE or is_demonstrated:
        return "-"
    num_tok = float(np.nansum(series(span.rows, TOKENS_OF_PHASE[phase])))
    return f"{num_tok / seconds:,.0f}" if num_tok > 0 and seconds > 0 else "-"


def _samples(record: RunRecord) -> str:
    """A right and a wrong response per representation, of the last evaluation and of the last step written."""
    files = [record.folder / "completions" / f"exam-{done.label}.jsonl" for done in record.evaluations[-1:]]
    files += sorted((record.folder / "completions").glob("step-*.jsonl"))[-1:]
    parts = [part for file in files for part in _samples_of(file)]
    return "".join(parts) if parts else document.note("There are no files in completions/ yet.")


def _samples_of(file: Path) -> Iterable[str]:
    first: dict[tuple[str, bool], Row] = {}
    for row in read_completions(file) or ():
        first.setdefault((row["representation"], row["correct"]), row)
    if first:
        yield f"<h4>{document.escaped(file.stem)}</h4>"
    for (representation, _), row in sorted(first.items(), key=lambda item: (item[0][0], not item[0][1])):
        none = ", no answer found" if row.get("answered") is False else ""
        summary = f"{document.escaped(representation)}, {document.escaped(reward_text(row))}{none}"
        prompt = f"<pre class='prompt'>{_cut(row['prompt'])}</pre>" if "prompt" in row else ""
        yield f"<details open><summary>{summary}</summary>{prompt}<pre>{_cut(row['text'])}</pre></details>"


def _cut(text: str) -> str:
    left = len(text) - MAX_SAMPLE_CHARS
    return document.escaped(text[:MAX_SAMPLE_CHARS]) + (f" ... ({left} more characters)" if left > 0 else "")
