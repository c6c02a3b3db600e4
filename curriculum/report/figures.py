"""The figures of a report: each function takes run records and returns a matplotlib figure; nothing is written.

A representation has the same colour in all figures. Where a figure compares runs, colours stand for runs.
``narrow``: for a narrow screen: the same in fewer columns, with letters as large.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from isomorph.curriculum.evaluation_spec import START
from isomorph.curriculum.report.drawing import (
    as_label,
    dot,
    dress,
    errorbars,
    is_narrow,
    legend,
    line,
    mark_stages,
    moving_average,
    name_ends,
    new_figure,
    percent,
    smoothing_window,
    thinned,
)
from isomorph.curriculum.report.run_record import EvaluationResult, RunRecord, Span, series
from isomorph.curriculum.report.transfer import TransferMatrix
from isomorph.curriculum.study.statistics import Accuracy
from isomorph.engine.record.runlog import Row

# Okabe and Ito's palette for colour-blind readers; for runs Paul Tol's muted one
COLOUR_OF = {"natural": "#0072B2", "graph": "#D55E00", "code": "#009E73", "table": "#CC79A7"}
SPARE_COLOURS = ("#E69F00", "#56B4E9", "#555555", "#999933")
CELL = "#0072B2"  # of the transfer matrix
RUN_COLOURS = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933")
RUN_LINES = ("-", "--", ":", "-.")
PHASES = ("ask", "publish", "generate", "judge", "exchange", "pack", "handover", "update", "record", "rest")
PHASE_NAMES = {  # as printed, where the key in steps.jsonl is another word
    "ask": "prompts",
    "publish": "weight sync",
    "judge": "rewards",
    "exchange": "exchange of ranks",
    "handover": "sampler memory",
    "record": "logging",
    "rest": "other",
}
PHASE_COLOURS = (
    "#66CCEE",
    "#AA3377",
    "#4477AA",
    "#EE6677",
    "#332288",
    "#CCBB44",
    "#882255",
    "#228833",
    "#DDAA33",
    "#BBBBBB",
)


def colours(names: Sequence[str]) -> dict[str, str]:
    """Representation -> colour; the known ones always have their own."""
    others = [name for name in names if name not in COLOUR_OF]
    return {**COLOUR_OF, **{name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(others)}}


def phase_seconds(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Phase -> [len(rows)] seconds; ``rest`` is the part of a step outside the measured phases."""
    seconds = {phase: np.nan_to_num(series(rows, f"time/{phase}_s")) for phase in PHASES if phase != "rest"}
    seconds["rest"] = np.maximum(series(rows, "time/step_s") - sum(seconds.values()), 0.0)
    return seconds


def phase_name(phase: str) -> str:
    """The words for a phase of ``PHASES`` in tables and figures."""
    return PHASE_NAMES.get(phase, phase)


def learning(record: RunRecord, *, narrow: bool = False) -> Figure:
    """Loss in supervised stages; reward per representation in RL stages."""
    supervised = [span for span in record.spans if span.stage.objective.is_supervised]
    rl = [span for span in record.spans if not span.stage.objective.is_supervised]
    parts: list[tuple[float, Callable[[Axes], None]]] = []
    if supervised:
        parts.append((1.0, lambda ax: _loss(ax, supervised)))
    if rl:
        parts.append((2.0, lambda ax: _rewards(ax, record, rl)))
    if narrow:
        figure = new_figure(2.8 * len(parts), narrow=True)
        axes = list(figure.subplots(len(parts), 1, squeeze=False).flat)
    else:
        figure = new_figure(3.6)
        axes = list(figure.subplots(1, len(parts), squeeze=False, width_ratios=[share for share, _ in parts]).flat)
    for ax, (_, draw) in zip(axes, parts, strict=True):
        draw(ax)
    legend(figure)
    return figure


def _loss(ax: Axes, spans: Sequence[Span]) -> None:
    for span in spans:
        line(ax, series(span.rows, "step"), series(span.rows, "loss"), colour="#555555", lw=1.2, marker=dot(span))
    dress(ax, "loss on demonstrations", "nats per token")
    mark_stages(ax, spans)


def _rewards(ax: Axes, record: RunRecord, spans: Sequence[Span]) -> None:
    colour_of = colours(record.representations)
    labelled: set[str] = set()
    for span in spans:
        steps = series(span.rows, "step")
        for name in dict.fromkeys(part.representation for part in span.stage.mixture):
            reward = series(span.rows, f"reward/{name}")
            line(ax, steps, reward, colour=colour_of[name], alpha=0.3, lw=0.8, marker=dot(span), ms=3)
            ax.plot(
                *_smooth(steps, reward), color=colour_of[name], lw=2, label=None if name in labelled else as_label(name)
            )
            labelled.add(name)
    dress(ax, "reward per step (thick: moving average)", "mean reward")
    _show_rewards(ax)
    mark_stages(ax, spans)


def _show_rewards(ax: Axes) -> None:
    """The axis of rewards: 0 to 1, and whatever weighted sums and punishments reach beyond."""
    low, high = (float(end) for end in ax.dataLim.intervaly)
    ends = [end for end in (0.0, 1.0, low, high) if np.isfinite(end)]
    margin = 0.02 * (max(ends) - min(ends))
    ax.set_ylim(min(ends) - margin, max(ends) + margin)


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps, moving average of ``values``), in as many points as a line has."""
    middle, mean, _, _ = thinned(steps, moving_average(values, smoothing_window(len(steps))))
    return middle, mean


def evaluation_accuracy(record: RunRecord, *, narrow: bool = False) -> Figure:
    """Greedy accuracy per representation at each evaluation, with intervals and the sequential baseline."""
    figure = new_figure(3.4, narrow=narrow)
    ax = figure.subplots()
    names = list(dict.fromkeys(name for done in record.evaluations for name in done.accuracy))
    colour_of = colours((*record.representations, *names))
    for i, name in enumerate(names):
        shift = 0.06 * (i - (len(names) - 1) / 2)
        at = [(x + shift, done.accuracy[name]) for x, done in enumerate(record.evaluations) if name in done.accuracy]
        errorbars(ax, at, color=colour_of[name], label=as_label(name))
    _baselines(ax, {name: value for name, value in record.baseline.items() if value is not None}, colour_of)
    places = [_evaluation_name(done) for done in record.evaluations]
    crowded = sum(map(len, places)) > (40 if narrow else 110)
    ax.set_xticks(range(len(places)), places, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    ax.set_xlim(-0.4, len(record.evaluations) - 0.6)
    dress(ax, "greedy accuracy at each evaluation, 95 % intervals", "accuracy", x="")
    percent(ax)
    legend(figure, without=name_ends(ax, _last_accuracies(record, names, colour_of)))
    return figure


def _last_accuracies(
    record: RunRecord, names: Sequence[str], colour_of: Mapping[str, str]
) -> list[tuple[str, float, str]]:
    last = {name: done.accuracy[name].rate for done in record.evaluations for name in done.accuracy}
    return [(as_label(name), last[name], colour_of[name]) for name in names]


def accuracy_over_steps(record: RunRecord, *, narrow: bool = False) -> Figure:
    """Accuracy per representation over the steps, greedy with intervals, avg@k and pass@k as lines beside it."""
    figure = new_figure(4.0, narrow=narrow)
    ax = figure.subplots()
    names = list(dict.fromkeys(name for done in record.evaluations for name in done.accuracy))
    colour_of = colours((*record.representations, *names))
    start = record.spans[0].first - 0.5  # where the axis begins, and the evaluation before the first step stands
    for name in names:
        shown = [done for done in record.evaluations if name in done.accuracy]
        greedy = [(max(start, done.step), done.accuracy[name]) for done in shown]
        errorbars(ax, greedy, color=colour_of[name], label=as_label(name), lw=1.5)
        drawn = [(max(start, done.step), done.sampled[name]) for done in shown if name in done.sampled]
        for what, dashes in zip(_first_and_last(drawn[-1][1].means()) if drawn else (), ("--", ":"), strict=False):
            at = [(step, sampled.means()[what].rate) for step, sampled in drawn if what in sampled.means()]
            ax.plot(*zip(*at, strict=True), color=colour_of[name], ls=dashes, lw=1.2, label=f"{as_label(name)}, {what}")
    _baselines(ax, {name: value for name, value in record.baseline.items() if value is not None}, colour_of)
    dress(ax, "accuracy at each evaluation; greedy with 95 % intervals", "accuracy")
    mark_stages(ax, record.spans)
    percent(ax)
    legend(figure, without=name_ends(ax, _last_accuracies(record, names, colour_of)))
    return figure


def _first_and_last(names: Mapping[str, Any]) -> tuple[str, ...]:
    """avg@k, and the pass@k of the largest k."""
    return tuple(dict.fromkeys((list(names)[0], list(names)[-1])))


def _baselines(ax: Axes, baseline: Mapping[str, float], colour_of: Mapping[str, str]) -> None:
    if len(set(baseline.values())) == 1:
        ax.axhline(next(iter(baseline.values())), color="black", ls=":", lw=1.2, label="sequential baseline")
        return
    for name, value in baseline.items():
        ax.axhline(value, color=colour_of[name], ls=":", lw=1.2, label=f"sequential baseline, {as_label(name)}")


HEALTH: tuple[tuple[str, str, str, float, Literal["linear", "log"]], ...] = (
    # column, title, unit, factor, scale
    ("entropy", "entropy", "nats per token", 1.0, "linear"),
    ("drift/max", "largest |trainer - sampler| log-probability", "nats", 1.0, "log"),
    ("clip_frac", "clipped tokens", "%", 100.0, "linear"),
    ("grad_norm", "gradient norm before clipping", "", 1.0, "linear"),
    ("kl", "KL to the reference", "nats per token", 1.0, "linear"),
    ("response/tok_mean", "response length", "tokens", 1.0, "linear"),
    ("judge/no_answer", "responses without an answer", "%", 100.0, "linear"),
    ("response/stopped", "responses with a stop token", "%", 100.0, "linear"),
    ("lr", "learning rate", "", 1.0, "log"),
)


def health(record: RunRecord, *, narrow: bool = False) -> Figure:
    """A panel for each column of ``HEALTH`` that was measured."""
    panels = [panel for panel in HEALTH if np.isfinite(series(record.rows, panel[0])).any()]
    num_columns = 1 if narrow else 2
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(1.9 * num_rows, narrow=narrow)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    steps = series(record.rows, "step")
    marker = "." if len(steps) <= 40 else None
    for ax, (column, title, unit, factor, scale) in zip(axes, panels, strict=False):
        line(ax, steps, factor * series(record.rows, column), colour="#333333", lw=1, marker=marker)
        ax.set_yscale(scale)
        if unit == "%":
            ax.set_ylim(0, 1.05 * max(1.0, ax.get_ylim()[1]))
        dress(ax, title, unit, x="")
        mark_stages(ax, record.spans, named=False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - num_columns) : len(panels)]:
        ax.set_xlabel("step", fontsize=9)
    return figure


def phase_times(record: RunRecord, *, narrow: bool = False) -> Figure:
    """Stacked seconds per phase over the steps."""
    figure = new_figure(3.4, narrow=narrow)
    ax = figure.subplots()
    steps = series(record.rows, "step")
    seconds = phase_seconds(record.rows)
    if len(steps) <= 60:
        _stacked_bars(ax, steps, seconds)
    else:
        names = [phase_name(phase) for phase in PHASES]
        parts = [thinned(steps, seconds[phase])[:2] for phase in PHASES]
        ax.stackplot(parts[0][0], *(mean for _, mean in parts), labels=names, colors=PHASE_COLOURS, lw=0)
    dress(ax, "time per phase of a step", "seconds")
    mark_stages(ax, record.spans)
    legend(figure)
    return figure


def _stacked_bars(ax: Axes, steps: np.ndarray, seconds: Mapping[str, np.ndarray]) -> None:
    below = np.zeros(len(steps))
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        ax.bar(steps, seconds[phase], bottom=below, width=0.9, color=colour, label=phase_name(phase))
        below = below + seconds[phase]


def transfer_picture(matrix: TransferMatrix, *, narrow: bool = False) -> Figure:
    """The transfer matrix: accuracy as colour and as text."""
    num_rows, num_columns = len(matrix.trained_on), len(matrix.evaluated_on)
    figure = new_figure(1.2 + (0.75 if narrow else 0.55) * num_rows, narrow=narrow)
    ax = figure.subplots()
    for y, row in enumerate(matrix.trained_on):
        for x, column in enumerate(matrix.evaluated_on):
            _write_cell(ax, x, y, matrix.cell(row, column))
    ax.set_xlim(-0.5, num_columns - 0.5)
    ax.set_ylim(num_rows - 0.5, -0.5)
    ax.set_xticks(range(num_columns), [as_label(name) for name in matrix.evaluated_on])
    ax.set_yticks(range(num_rows), [_broken(as_label(label), 14 if narrow else 28) for label in matrix.trained_on])
    ax.set_xlabel("evaluated on", fontsize=9)
    ax.set_ylabel("trained on", fontsize=9)
    ax.xaxis.set_label_position("top")
    size = 7 if narrow else 9
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=size)
    ax.spines[:].set_visible(False)
    return figure


def _write_cell(ax: Axes, x: int, y: int, cell: Accuracy | None) -> None:
    if cell is None:
        ax.text(x, y, "-", ha="center", va="center", fontsize=9)
        return
    figure = ax.get_figure(root=True)
    assert figure is not None
    size = 7 if is_narrow(figure) else 9
    # a colour that lets through the page, so that letters can be read on a light and on a dark one
    ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=CELL, alpha=0.04 + 0.5 * cell.rate, lw=0))
    text = f"{cell.rate:.1%}\n{cell.low:.0%} to {cell.high:.0%}"
    ax.text(x, y, text, ha="center", va="center", fontsize=size)


def compare_rewards(records: Sequence[RunRecord], names: Sequence[str], *, narrow: bool = False) -> Figure:
    """Moving average of the mean reward in RL stages, a line per run; at its end the run's number in the page."""
    figure = new_figure(3.6 + (0.1 * len(records) if narrow else 0), narrow=narrow)
    ax = figure.subplots()
    ends: dict[int, tuple[str, float, str]] = {}
    for i, (record, name) in enumerate(zip(records, names, strict=True)):
        label: str | None = _numbered(i, name)
        for span in record.spans:
            if span.stage.objective.is_supervised:
                continue
            steps = _rl_steps_before(record, span.first - 1) + series(span.rows, "stage_step")
            smooth = _smooth(steps, series(span.rows, "reward/mean"))
            ax.plot(*smooth, label=label, marker=dot(span), **_run_style(i))
            label = None
            known = smooth[1][np.isfinite(smooth[1])]
            if len(known):
                ends[i] = (str(i + 1), float(known[-1]), RUN_COLOURS[i % len(RUN_COLOURS)])
    dress(ax, "reward per step, moving average (a gap: the next stage)", "mean reward")
    ax.set_xlabel("RL step", fontsize=9)
    _show_rewards(ax)
    name_ends(ax, list(ends.values()))
    legend(figure)
    return figure


def compare_accuracy(records: Sequence[RunRecord], names: Sequence[str], *, narrow: bool = False) -> Figure:
    """Greedy accuracy over the RL steps, a panel per representation, a line per run with its number at its end."""
    panels = list(dict.fromkeys(r for record in records for done in record.evaluations for r in done.accuracy))
    num_columns = 1 if narrow else 2
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(2.6 * num_rows + 0.1 * len(records), narrow=narrow)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for ax, representation in zip(axes, panels, strict=False):
        for i, (record, name) in enumerate(zip(records, names, strict=True)):
            _accuracy_over_steps(ax, record, representation, _numbered(i, name), i)
        dress(ax, as_label(representation), "accuracy")
        ax.set_xlabel("RL steps", fontsize=9)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    percent(axes[0])  # they share it
    for ax, representation in zip(axes, panels, strict=False):
        last = [
            [d.accuracy[representation].rate for d in r.evaluations if representation in d.accuracy] for r in records
        ]
        colour = [RUN_COLOURS[i % len(RUN_COLOURS)] for i in range(len(records))]
        name_ends(ax, [(str(i + 1), rates[-1], colour[i]) for i, rates in enumerate(last) if rates])
    legend(figure)
    return figure


def _accuracy_over_steps(ax: Axes, record: RunRecord, representation: str, name: str, i: int) -> None:
    shown = [done for done in record.evaluations if representation in done.accuracy]
    at = [(_rl_steps_before(record, done.step), done.accuracy[representation]) for done in shown]
    errorbars(ax, at, label=name, **_run_style(i))


def _rl_steps_before(record: RunRecord, step: int) -> int:
    """Number of RL steps up to and including ``step``, so that runs with different warm-ups start at 0."""
    rows = (row for span in record.spans if not span.stage.objective.is_supervised for row in span.rows)
    return sum(row["step"] <= step for row in rows)


def _numbered(i: int, name: str) -> str:
    return f"{i + 1}  {as_label(name)}"


def _run_style(i: int) -> dict[str, Any]:
    return {"color": RUN_COLOURS[i % len(RUN_COLOURS)], "ls": RUN_LINES[i // len(RUN_COLOURS) % len(RUN_LINES)]}


def _evaluation_name(done: EvaluationResult) -> str:
    return done.label if done.label == START else f"after {as_label(done.label)}"


def _broken(label: str, limit: int) -> str:
    """The label in lines of at most ``limit`` letters, broken at the arrows and before the name of a run."""
    label, bracket, name = label.partition(" (")
    lines = [""]
    for part in label.split(" -> "):
        grown = f"{lines[-1]} -> {part}" if lines[-1] else part
        if len(grown) > limit and lines[-1]:
            lines.append(f"-> {part}")
        else:
            lines[-1] = grown
    return "\n".join([*lines, f"({name}"] if bracket else lines)
