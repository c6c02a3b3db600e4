"""Helpers of all figures: size, titles, axes, error bars, stage bands, legend."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from isomorph.curriculum.report.run_record import Span
from isomorph.curriculum.study.statistics import Accuracy
from isomorph.engine.foreign import shortened

WIDTH_IN = 9.0
MAX_NAME_CHARS = 60
MIN_LABEL_SHARE = 0.09  # of the axis: a narrower stage has its name written slanted
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


def new_figure(height_in: float) -> Figure:
    """An empty figure of the page's width."""
    return Figure(figsize=(WIDTH_IN, height_in), dpi=110, layout="constrained")


def dress(ax: Axes, title: str, y: str, *, x: str = "step") -> None:
    """Sets title, labels and a light grid; leaves space under the title for stage names where x is the step."""
    ax.set_title(title, fontsize=10, loc="left", pad=16 if x == "step" else 6)
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


def legend(figure: Figure) -> None:
    """One legend below the whole figure; the sequential baseline comes last."""
    entries = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if entries:
        labels = sorted(entries, key=lambda label: label.startswith("sequential baseline"))
        handles = [entries[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower left", ncols=5, fontsize=9, frameon=False)


def smoothing_window(num_steps: int) -> int:
    """Window of a moving average, in steps: a fifth of them, at most 20."""
    return max(1, min(20, num_steps // 5))


def dot(span: Span) -> str | None:
    """The marker of short stages, where a line alone could be invisible; None for longer ones."""
    return "." if len(span.rows) <= 40 else None
