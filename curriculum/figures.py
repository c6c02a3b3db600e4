"""The pictures of a report. Each function takes records and returns a matplotlib figure; nothing here touches the disk.

A representation has one colour everywhere. Where several runs share a picture the colours stand for runs instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from isomorph.curriculum.run_record import ExamResult, RunRecord, Span, series
from isomorph.curriculum.transfer import Accuracy, TransferMatrix
from isomorph.engine.record.runlog import Row

# Okabe and Ito's palette, which colour-blind readers tell apart; the runs' colours are Paul Tol's muted ones.
COLOUR_OF = {"natural": "#0072B2", "graph": "#D55E00", "code": "#009E73", "table": "#CC79A7"}
SPARE_COLOURS = ("#E69F00", "#56B4E9", "#555555", "#999933")
RUN_COLOURS = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933")
RUN_LINES = ("-", "--", ":", "-.")
PHASES = ("generate", "judge", "pack", "update", "publish", "rest")
PHASE_COLOURS = ("#4477AA", "#EE6677", "#CCBB44", "#228833", "#AA3377", "#BBBBBB")
WIDTH_IN = 9.0
MIN_LABEL_SHARE = 0.09  # of the axis: a narrower stage has its name written slanted


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a representation; the known ones always have their own."""
    others = [name for name in names if name not in COLOUR_OF]
    return {**COLOUR_OF, **{name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(others)}}


def phase_seconds(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """[len(rows)] seconds of every phase; ``rest`` is what a step took beyond the measured phases."""
    seconds = {phase: np.nan_to_num(series(rows, f"time/{phase}_s")) for phase in PHASES if phase != "rest"}
    seconds["rest"] = np.maximum(series(rows, "time/step_s") - sum(seconds.values()), 0.0)
    return seconds


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values that are not NaN; NaN where there is none."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    num = counts[end] - counts[start]
    return np.where(num > 0, (sums[end] - sums[start]) / np.maximum(num, 1), np.nan)


def learning(record: RunRecord) -> Figure:
    """Loss on demonstrations, and reward per representation in the stages of reinforcement."""
    supervised = [span for span in record.spans if span.stage.objective.is_supervised]
    reinforced = [span for span in record.spans if not span.stage.objective.is_supervised]
    parts: list[tuple[float, Callable[[Axes], None]]] = []
    if supervised:
        parts.append((1.0, lambda ax: _loss(ax, supervised)))
    if reinforced:
        parts.append((2.0, lambda ax: _rewards(ax, record, reinforced)))
    figure = _figure(3.6)
    axes = figure.subplots(1, len(parts), squeeze=False, width_ratios=[share for share, _ in parts])[0]
    for ax, (_, draw) in zip(axes, parts, strict=True):
        draw(ax)
    _legend(figure)
    return figure


def _loss(ax: Axes, spans: Sequence[Span]) -> None:
    for span in spans:
        ax.plot(series(span.rows, "step"), series(span.rows, "loss"), color="#555555", lw=1.2, marker=_dot(span))
    _dress(ax, "loss on demonstrations", "nats per token")
    _mark_stages(ax, spans)


def _rewards(ax: Axes, record: RunRecord, spans: Sequence[Span]) -> None:
    colour_of = colours(record.representations)
    labelled: set[str] = set()
    for span in spans:
        steps = series(span.rows, "step")
        for name in dict.fromkeys(part.representation for part in span.stage.mixture):
            reward = series(span.rows, f"reward/{name}")
            ax.plot(steps, reward, color=colour_of[name], alpha=0.3, lw=0.8, marker=_dot(span), ms=3)
            smooth = moving_average(reward, _window(len(steps)))
            ax.plot(steps, smooth, color=colour_of[name], lw=2, label=None if name in labelled else name)
            labelled.add(name)
    _dress(ax, "reward per step (thick: moving average)", "mean reward, 0 to 1")
    ax.set_ylim(-0.02, 1.02)
    _mark_stages(ax, spans)


def exam_accuracy(record: RunRecord) -> Figure:
    """Greedy accuracy per representation at each boundary, with intervals and the naive floor."""
    figure = _figure(3.8)
    ax = figure.subplots()
    names = list(dict.fromkeys(name for exam in record.exams for name in exam.accuracy))
    colour_of = colours(record.representations)
    for i, name in enumerate(names):
        shift = 0.06 * (i - (len(names) - 1) / 2)
        at = [(x + shift, exam.accuracy[name]) for x, exam in enumerate(record.exams) if name in exam.accuracy]
        _errorbars(ax, at, color=colour_of[name], label=name)
    _floors(ax, {name: value for name, value in record.floor.items() if value is not None}, colour_of)
    ax.set_xticks(range(len(record.exams)), [_exam_name(exam) for exam in record.exams])
    ax.set_xlim(-0.4, len(record.exams) - 0.6)
    _dress(ax, "greedy accuracy at each exam, 95 % intervals", "accuracy", x="")
    _percent(ax)
    _legend(figure)
    return figure


def _errorbars(ax: Axes, at: Sequence[tuple[float, Accuracy]], **style: Any) -> None:
    rates = np.array([accuracy.rate for _, accuracy in at])
    spread = [rates - [a.low for _, a in at], [a.high for _, a in at] - rates]
    # rounding may leave an end a hair inside the rate
    ax.errorbar([x for x, _ in at], rates, yerr=np.maximum(spread, 0), marker="o", ms=5, capsize=3, **style)


def _floors(ax: Axes, floor: Mapping[str, float], colour_of: Mapping[str, str]) -> None:
    if len(set(floor.values())) == 1:
        ax.axhline(next(iter(floor.values())), color="black", ls=":", lw=1.2, label="floor: one step after the other")
        return
    for name, value in floor.items():
        ax.axhline(value, color=colour_of[name], ls=":", lw=1.2, label=f"floor of {name}")


HEALTH: tuple[tuple[str, str, str, float, Literal["linear", "log"]], ...] = (
    # column, title, unit, factor, scale
    ("entropy", "entropy", "nats per token", 1.0, "linear"),
    ("drift/max", "drift: largest |trainer - sampler|", "nats", 1.0, "log"),
    ("clip_frac", "clipped tokens", "%", 100.0, "linear"),
    ("grad_norm", "gradient norm before clipping", "", 1.0, "linear"),
    ("kl", "KL to the reference", "nats per token", 1.0, "linear"),
    ("response/tok_mean", "response length", "tokens", 1.0, "linear"),
    ("response/stopped", "responses that ended by themselves", "%", 100.0, "linear"),
    ("lr", "learning rate", "", 1.0, "log"),
)


def health(record: RunRecord) -> Figure:
    """Small multiples of what tells a sound run from a sick one; a column that was never measured has no panel."""
    panels = [panel for panel in HEALTH if np.isfinite(series(record.rows, panel[0])).any()]
    num_rows = -(-len(panels) // 2)
    figure = _figure(1.9 * num_rows)
    axes = list(figure.subplots(num_rows, 2, squeeze=False).flat)
    steps = series(record.rows, "step")
    for ax, (column, title, unit, factor, scale) in zip(axes, panels, strict=False):
        ax.plot(
            steps, factor * series(record.rows, column), color="#333333", lw=1, marker="." if len(steps) <= 40 else None
        )
        ax.set_yscale(scale)
        if unit == "%":
            ax.set_ylim(0, 1.05 * max(1.0, ax.get_ylim()[1]))
        _dress(ax, title, unit, x="")
        _mark_stages(ax, record.spans, named=False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.set_xlabel("step", fontsize=9)
    return figure


def anatomy(record: RunRecord) -> Figure:
    """Stacked seconds per phase over the steps."""
    figure = _figure(3.4)
    ax = figure.subplots()
    steps = series(record.rows, "step")
    seconds = phase_seconds(record.rows)
    if len(steps) <= 60:
        _stacked_bars(ax, steps, seconds)
    else:
        ax.stackplot(steps, *(seconds[phase] for phase in PHASES), labels=PHASES, colors=PHASE_COLOURS, lw=0)
    _dress(ax, "where the seconds of a step go", "seconds")
    _mark_stages(ax, record.spans)
    _legend(figure)
    return figure


def _stacked_bars(ax: Axes, steps: np.ndarray, seconds: Mapping[str, np.ndarray]) -> None:
    below = np.zeros(len(steps))
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        ax.bar(steps, seconds[phase], bottom=below, width=0.9, color=colour, label=phase)
        below = below + seconds[phase]


def transfer_picture(matrix: TransferMatrix) -> Figure:
    """Trained on x evaluated on: accuracy as colour and in figures."""
    num_rows, num_columns = len(matrix.trained_on), len(matrix.evaluated_on)
    figure = _figure(1.2 + 0.55 * num_rows)
    ax = figure.subplots()
    cells = [[matrix.cell(row, column) for column in matrix.evaluated_on] for row in matrix.trained_on]
    rates = np.array([[np.nan if cell is None else cell.rate for cell in row] for row in cells])
    ax.imshow(rates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            _write_cell(ax, x, y, cell)
    ax.set_xticks(range(num_columns), matrix.evaluated_on)
    ax.set_yticks(range(num_rows), [_broken(label) for label in matrix.trained_on])
    ax.set_xlabel("evaluated on", fontsize=9)
    ax.set_ylabel("trained on", fontsize=9)
    ax.xaxis.set_label_position("top")
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=9)
    ax.spines[:].set_visible(False)
    return figure


def _write_cell(ax: Axes, x: int, y: int, cell: Accuracy | None) -> None:
    if cell is None:
        ax.text(x, y, "-", ha="center", va="center", fontsize=9)
        return
    ink = "white" if cell.rate > 0.55 else "black"
    text = f"{cell.rate:.1%}\n{cell.low:.0%} to {cell.high:.0%}"
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color=ink)


def compare_rewards(records: Sequence[RunRecord], names: Sequence[str]) -> Figure:
    """Moving average of the mean reward in the stages of reinforcement, one line a run."""
    figure = _figure(3.6)
    ax = figure.subplots()
    for i, (record, name) in enumerate(zip(records, names, strict=True)):
        label: str | None = name
        for span in record.spans:
            if span.stage.objective.is_supervised:
                continue
            steps = _reinforced_before(record, span.first - 1) + series(span.rows, "stage_step")
            smooth = moving_average(series(span.rows, "reward/mean"), _window(len(span.rows)))
            ax.plot(steps, smooth, label=label, marker=_dot(span), **_run_style(i))
            label = None
    _dress(ax, "reward per step, moving average (a gap: the next stage)", "mean reward, 0 to 1")
    ax.set_xlabel("step of reinforcement", fontsize=9)
    ax.set_ylim(-0.02, 1.02)
    _legend(figure)
    return figure


def compare_accuracy(records: Sequence[RunRecord], names: Sequence[str]) -> Figure:
    """Greedy accuracy over the steps of reinforcement, a panel for each representation, one line a run."""
    panels = list(dict.fromkeys(r for record in records for exam in record.exams for r in exam.accuracy))
    num_rows = -(-len(panels) // 2)
    figure = _figure(2.6 * num_rows)
    axes = list(figure.subplots(num_rows, 2, squeeze=False, sharey=True).flat)
    for ax, representation in zip(axes, panels, strict=False):
        for i, (record, name) in enumerate(zip(records, names, strict=True)):
            _accuracy_over_steps(ax, record, representation, name, i)
        _dress(ax, representation, "accuracy")
        ax.set_xlabel("steps of reinforcement", fontsize=9)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    _percent(axes[0])  # they share it
    _legend(figure)
    return figure


def _accuracy_over_steps(ax: Axes, record: RunRecord, representation: str, name: str, i: int) -> None:
    exams = [exam for exam in record.exams if representation in exam.accuracy]
    at = [(_reinforced_before(record, exam.step), exam.accuracy[representation]) for exam in exams]
    _errorbars(ax, at, label=name, **_run_style(i))


def _reinforced_before(record: RunRecord, step: int) -> int:
    """Steps of reinforcement up to and with ``step``: so runs with different warm-ups start at one point."""
    return sum(len(s.rows) for s in record.spans if s.last <= step and not s.stage.objective.is_supervised)


def _run_style(i: int) -> dict[str, str]:
    return {"color": RUN_COLOURS[i % len(RUN_COLOURS)], "ls": RUN_LINES[i // len(RUN_COLOURS) % len(RUN_LINES)]}


def _figure(height_in: float) -> Figure:
    return Figure(figsize=(WIDTH_IN, height_in), dpi=110, layout="constrained")


def _dress(ax: Axes, title: str, y: str, *, x: str = "step") -> None:
    ax.set_title(title, fontsize=10, loc="left", pad=16 if x == "step" else 6)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(which="both", labelsize=8)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if x == "step":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _percent(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylim(bottom=0)


def _mark_stages(ax: Axes, spans: Sequence[Span], *, named: bool = True) -> None:
    """Bands in alternating grey, named above the axis; a stage's width grows with the root of its steps.

    So a long warm-up does not press the stages after it into a stripe. Inside a stage the axis is linear.
    """
    steps, places = _places(spans)
    ax.set_xscale("function", functions=(lambda s: np.interp(s, steps, places), lambda p: np.interp(p, places, steps)))
    ax.set_xlim(steps[0], steps[-1])
    ax.set_xticks(_ticks(spans))
    for i, span in enumerate(spans):
        if i % 2:
            ax.axvspan(span.first - 0.5, span.last + 0.5, color="#f0f0f0", zorder=0)
        if i:
            ax.axvline(span.first - 0.5, color="#999999", lw=0.8, ls="--")
    if named:
        _name_stages(ax, spans, steps, places)


def _places(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the axis: steps at which stages begin and end, and where between 0 and 1 they stand."""
    steps, places = [spans[0].first - 0.5], [0.0]
    for span in spans:
        if span.first - 0.5 > steps[-1]:  # steps of another stage lie between
            steps.append(span.first - 0.5)
            places.append(places[-1] + 0.2)
        steps.append(span.last + 0.5)
        places.append(places[-1] + math.sqrt(span.last - span.first + 1))
    return np.array(steps), np.array(places) / places[-1]


def _ticks(spans: Sequence[Span]) -> list[int]:
    """The first step of each stage, the middle of a long one, and the last step of all."""
    middles = [(span.first + span.last) // 2 for span in spans if span.last - span.first > 8]
    return sorted({*(span.first for span in spans), *middles, spans[-1].last})


def _name_stages(ax: Axes, spans: Sequence[Span], steps: np.ndarray, places: np.ndarray) -> None:
    for span in spans:
        left, right = np.interp([span.first - 0.5, span.last + 0.5], steps, places)
        ax.text(
            (span.first + span.last) / 2,
            1.01,
            span.stage.name,
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color="#555555",
            rotation=35 if right - left < MIN_LABEL_SHARE else 0,
        )


def _legend(figure: Figure) -> None:
    """One for the whole figure, under it."""
    entries = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if entries:
        labels = sorted(entries, key=lambda label: label.startswith("floor"))
        handles = [entries[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower left", ncols=5, fontsize=9, frameon=False)


def _window(num_steps: int) -> int:
    return max(1, min(20, num_steps // 5))


def _dot(span: Span) -> str | None:
    """Short stages show their points; a line alone would hide a stage of one step."""
    return "." if len(span.rows) <= 40 else None


def _exam_name(exam: ExamResult) -> str:
    return exam.label if exam.label == "start" else f"after {exam.label}"


def _broken(label: str) -> str:
    """At most 28 characters a line, broken at the arrows and before the name of a run."""
    label, bracket, name = label.partition(" (")
    lines = [""]
    for part in label.split(" -> "):
        grown = f"{lines[-1]} -> {part}" if lines[-1] else part
        if len(grown) > 28 and lines[-1]:
            lines.append(f"-> {part}")
        else:
            lines[-1] = grown
    return "\n".join([*lines, f"({name}"] if bracket else lines)
