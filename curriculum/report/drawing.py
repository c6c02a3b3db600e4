"""Helpers of all figures: size, titles, axes, lines, error bars, stage bands, names at lines, legend."""

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from isomorph.curriculum.report.run_record import Span
from isomorph.curriculum.study.statistics import Accuracy
from isomorph.engine.foreign import shortened

WIDTH_IN, NARROW_IN = 9.0, 3.8  # of a figure on a wide and on a narrow screen; the letters have one size
POINTS_A_LETTER = 5.3  # of a title
MAX_POINTS = 250  # of a line; of more steps it shows means over equal parts, and a band from least to greatest
MAX_END_LETTERS, MAX_END_LETTERS_NARROW = 24, 10  # of a name at the end of its line; longer ones go into the legend
END_GAP_IN = 0.13  # between two such names
MAX_NAME_CHARS = 60
MIN_LABEL_SHARE = 0.09  # of the axis: a narrower stage has its name written slanted
SLANTED_PAD = 40  # points that such names need below the title
MIN_TICK_SHARE = 0.2  # a wider stage has a tick in its middle


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values that are not NaN; NaN where there is none."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    num = counts[end] - counts[start]
    return np.where(num > 0, (sums[end] - sums[start]) / np.maximum(num, 1), np.nan)


def errorbars(ax: Axes, at: Sequence[tuple[float, Accuracy]], **style: Any) -> None:
    """Draws (x, accuracy) pairs as a line with error bars."""
    rates = np.array([accuracy.rate for _, accuracy in at])
    spread = [rates - [a.low for _, a in at], [a.high for _, a in at] - rates]
    # rounding may leave an end a hair inside the rate
    ax.errorbar([x for x, _ in at], rates, yerr=np.maximum(spread, 0), marker="o", ms=5, capsize=3, **style)


def as_label(name: str) -> str:
    """``name`` as a figure shows it: on one line, shortened, and without matplotlib's mathematics between dollars."""
    return shortened(name, MAX_NAME_CHARS).replace("$", r"\$")


def new_figure(height_in: float, *, narrow: bool = False) -> Figure:
    """An empty figure of the page's width, or that of a narrow screen."""
    return Figure(figsize=(NARROW_IN if narrow else WIDTH_IN, height_in), dpi=110, layout="constrained")


def is_narrow(figure: Figure) -> bool:
    return figure.get_figwidth() < WIDTH_IN


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``steps`` and ``values`` in at most ``MAX_POINTS`` equal parts: [n] middle steps, means, least, greatest values.

    NaN where a part has no value. Up to ``MAX_POINTS`` values each is a part of its own.
    """
    if len(steps) <= MAX_POINTS:
        return steps, values, values, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS)
    known = [values[part][np.isfinite(values[part])] for part in parts]
    middle = np.array([steps[part].mean() for part in parts])
    mean, low, high = (
        np.array([reduce(part) if len(part) else np.nan for part in known]) for reduce in (np.mean, np.min, np.max)
    )
    return middle, mean, low, high


def line(ax: Axes, steps: np.ndarray, values: np.ndarray, *, colour: str, **style: Any) -> None:
    """Draws a line; of many steps the means of equal parts, in a band of what they hold."""
    middle, mean, low, high = thinned(steps, values)
    ax.plot(middle, mean, color=colour, **style)
    if len(middle) < len(steps):
        ax.fill_between(middle, low, high, color=colour, alpha=0.2, lw=0)


def name_ends(ax: Axes, ends: Sequence[tuple[str, float, str]]) -> Collection[str]:
    """Writes each line's name beside its end, in its colour: (label, y of the end, colour), after the axis is scaled.

    Returns the labels that are written, for ``legend``: none where one is too long for that.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    limit = MAX_END_LETTERS_NARROW if is_narrow(figure) else MAX_END_LETTERS
    if not ends or any(len(label) > limit for label, _, _ in ends):
        return ()
    rows = ax.get_gridspec().nrows if ax.get_gridspec() is not None else 1  # type: ignore[union-attr]
    gap = END_GAP_IN / max(0.5, figure.get_figheight() / rows - 1.0)
    at = ax.transAxes.inverted().transform(ax.transData.transform([(ax.get_xlim()[1], y) for _, y, _ in ends]))[:, 1]
    for (label, _, colour), y in zip(ends, _apart(at, gap), strict=True):
        ax.text(1.01, y, label, color=colour, transform=ax.transAxes, va="center", fontsize=8)
    return {label for label, _, _ in ends}


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """``places`` in the same order, each at least ``gap`` from the next, as near to where they were as is simple."""
    order = np.argsort(places, kind="stable")
    moved = places[order].copy()
    for _ in range(50):  # neighbours that are too close push each other apart
        for i in range(1, len(moved)):
            lack = gap - (moved[i] - moved[i - 1])
            if lack > 1e-9:
                moved[i] += lack / 2
                moved[i - 1] -= lack / 2
    result = np.empty_like(moved)
    result[order] = moved + max(0.0, -moved[0])
    return result


def dress(ax: Axes, title: str, y: str, *, x: str = "step") -> None:
    """Sets title, labels and a light grid; leaves space under the title for stage names where x is the step."""
    figure = ax.get_figure(root=True)
    columns = ax.get_gridspec().ncols if ax.get_gridspec() is not None else 1  # type: ignore[union-attr]
    share = 0.72 if is_narrow(figure) else 0.93  # type: ignore[arg-type]  # of the width, beside names of ticks
    letters = int(share * 72 * figure.get_figwidth() / columns / POINTS_A_LETTER)  # type: ignore[union-attr]
    ax.set_title(textwrap.fill(title, letters), fontsize=10, loc="left", pad=16 if x == "step" else 6)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(which="both", labelsize=8)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if x == "step":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def percent(ax: Axes) -> None:
    """Formats the y axis in percent, starting at 0."""
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylim(bottom=0)


def mark_stages(ax: Axes, spans: Sequence[Span], *, named: bool = True) -> None:
    """Draws alternating bands for the stages, with names above; a band's width is the square root of its steps.

    So a long warm-up leaves space for the stages after it. Within a stage the axis is linear.
    """
    steps, places = _places(spans)
    ax.set_xscale("function", functions=(lambda s: np.interp(s, steps, places), lambda p: np.interp(p, places, steps)))
    ax.set_xlim(steps[0], steps[-1])
    ax.set_xticks(_ticks(spans, steps, places))
    for i, span in enumerate(spans):
        if i % 2:
            ax.axvspan(span.first - 0.5, span.last + 0.5, color="#f0f0f0", zorder=0)
        if i:
            ax.axvline(span.first - 0.5, color="#999999", lw=0.8, ls="--")
    if named:
        _name_stages(ax, spans, steps, places)


def _places(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the axis: the steps at which stages begin and end, and their positions in 0..1."""
    steps, places = [spans[0].first - 0.5], [0.0]
    for span in spans:
        if span.first - 0.5 > steps[-1]:  # steps of another stage lie between
            steps.append(span.first - 0.5)
            places.append(places[-1] + 0.2)
        steps.append(span.last + 0.5)
        places.append(places[-1] + math.sqrt(span.last - span.first + 1))
    return np.array(steps), np.array(places) / places[-1]


def _ticks(spans: Sequence[Span], steps: np.ndarray, places: np.ndarray) -> list[int]:
    """The first step of each stage, the middle of a wide one, and the last step of all."""
    ticks = {spans[0].first, spans[-1].last}
    for span in spans:
        left, right = np.interp([span.first, span.last], steps, places)
        ticks |= {span.first, (span.first + span.last) // 2} if right - left > MIN_TICK_SHARE else {span.first}
    return sorted(ticks)


def _name_stages(ax: Axes, spans: Sequence[Span], steps: np.ndarray, places: np.ndarray) -> None:
    if any(np.ptp(np.interp([s.first - 0.5, s.last + 0.5], steps, places)) < MIN_LABEL_SHARE for s in spans):
        ax.set_title(ax.get_title(loc="left"), fontsize=10, loc="left", pad=SLANTED_PAD)
    for span in spans:
        left, right = np.interp([span.first - 0.5, span.last + 0.5], steps, places)
        ax.text(
            (span.first + span.last) / 2,
            1.01,
            as_label(span.stage.name),
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color="#555555",
            rotation=35 if right - left < MIN_LABEL_SHARE else 0,
        )


def legend(figure: Figure, *, without: Collection[str] = ()) -> None:
    """One legend below the whole figure, ``without`` what is named elsewhere; the sequential baseline comes last."""
    entries = {
        label: handle
        for ax in figure.axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        if label not in without
    }
    if entries:
        labels = sorted(entries, key=lambda label: label.startswith("sequential baseline"))
        handles = [entries[label] for label in labels]
        width_pt = 72 * figure.get_figwidth()
        shown = [shortened(label, int((width_pt - 45) / 5)) for label in labels]
        columns = max(1, min(5, int(width_pt / (5 * max(map(len, shown)) + 45))))
        figure.legend(handles, shown, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)


def smoothing_window(num_steps: int) -> int:
    """Window of a moving average, in steps: a fifth of them, at most 20, or a fiftieth of many."""
    return max(1, min(20, num_steps // 5), num_steps // 50)


def dot(span: Span) -> str | None:
    """The marker of short stages, where a line alone could be invisible; None for longer ones."""
    return "." if len(span.rows) <= 40 else None
