"""The pictures of a study: each function returns a matplotlib figure; nothing is written.

``narrow``: for a narrow screen: the same in fewer columns, with letters as large.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from isomorph.curriculum.report.drawing import (
    as_label,
    dress,
    is_narrow,
    legend,
    name_ends,
    new_figure,
    percent,
)
from isomorph.curriculum.report.figures import RUN_COLOURS, RUN_LINES
from isomorph.curriculum.study.analysis import Analysis, Comparison, Curve, Reached
from isomorph.curriculum.study.results import DIFFICULTY, StudyResults

ROW_IN = 0.27  # height of a row of the picture of differences
GREY = "#888888"


def style_of(study_conditions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Condition -> colour and line, the same in all pictures."""
    return {
        name: {"color": RUN_COLOURS[i % len(RUN_COLOURS)], "ls": RUN_LINES[(i // len(RUN_COLOURS)) % len(RUN_LINES)]}
        for i, name in enumerate(study_conditions)
    }


def answer(
    results: StudyResults, analysis: Analysis, shortcut: tuple[str, float] | None, *, narrow: bool = False
) -> Figure:
    """Learning curves with bands on the first representation, and beside them the planned differences."""
    planned = analysis.planned()
    measure = results.study["measure"][0]
    height = 1.6 + ROW_IN * len(planned)
    if narrow:
        figure = new_figure(3.4 + height, narrow=True)
        left, right = figure.subplots(2, 1, height_ratios=[3.0, height])
    else:
        figure = new_figure(max(4.0, height))
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _curves(left, [c for c in analysis.curves if c.measure == measure], results)
    if shortcut is not None:
        left.axhline(shortcut[1], color="black", ls=":", lw=1.1, label=f"best shortcut: {shortcut[0]}")
    for budget in results.study["budgets"]:
        left.axvline(budget, color="#dddddd", lw=0.8, zorder=0)
    dress(
        left,
        f"accuracy, {as_label(measure)} (bands: 95 % over seeds)",
        "greedy accuracy",
        x="steps after the warm start",
    )
    percent(left)
    _differences(right, planned, results)
    legend(figure, without=_name_curves(left, analysis, measure, results))
    return figure


def _curves(ax: Axes, curves: Sequence[Curve], results: StudyResults, *, by_tokens: bool = False) -> None:
    style = style_of(results.study["conditions"])
    for curve in curves:
        x = np.array(curve.tokens) / 1000 if by_tokens else np.array(curve.steps)
        own = style[curve.condition]
        ax.plot(x, curve.mean, **own, lw=2, marker="o", ms=3.5, label=as_label(curve.condition))
        if not by_tokens and np.isfinite(curve.low).all():
            low, high = np.clip(curve.low, 0, 1), np.clip(curve.high, 0, 1)
            ax.fill_between(x, low, high, color=own["color"], alpha=0.08, lw=0)


def _name_curves(ax: Axes, analysis: Analysis, measure: str, results: StudyResults) -> Collection[str]:
    style = style_of(results.study["conditions"])
    own = [curve for curve in analysis.curves if curve.measure == measure]
    return name_ends(ax, [(as_label(c.condition), float(c.mean[-1]), style[c.condition]["color"]) for c in own])


def _differences(ax: Axes, planned: Sequence[Comparison], results: StudyResults) -> None:
    """A row for each contrast and budget; small dots are seeds."""
    style = style_of(results.study["conditions"])
    for y, one in enumerate(planned):
        effect, colour = one.effect, style[one.first]["color"]
        ax.plot([100 * d for d in effect.by_seed], [y + 0.27] * len(effect.by_seed), "o", ms=2.6, color=GREY, mew=0)
        if math.isfinite(effect.low):
            ax.plot([100 * effect.low, 100 * effect.high], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        ax.plot(100 * effect.mean, y, "D", color=colour, ms=5.5)
    ax.axvline(0, color="black", lw=0.9)
    for y in range(1, len(planned)):
        if planned[y].name != planned[y - 1].name:
            ax.axhline(y - 0.5, color="#eeeeee", lw=0.8)
    figure = ax.get_figure(root=True)
    between = ",\n" if figure is not None and is_narrow(figure) else ", "
    ax.set_yticks(range(len(planned)), [f"{as_label(one.name)}{between}{one.budget} steps" for one in planned])
    ax.set_ylim(len(planned) - 0.4, -0.6)
    exam = "test exam" if planned and planned[0].exam == "test" else "development exam"
    dress(ax, f"differences, {exam}", "", x="points of accuracy (grey dots: seeds)")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+.0f}" if v else "0"))
    ax.grid(axis="y", lw=0)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)


def representations(results: StudyResults, analysis: Analysis, *, narrow: bool = False) -> Figure:
    """A panel for each representation that was evaluated."""
    measures = list(dict.fromkeys(c.measure for c in analysis.curves))
    num_columns = 1 if narrow else min(3, len(measures))
    num_rows = -(-len(measures) // num_columns)
    figure = new_figure(2.7 * num_rows + 0.5, narrow=narrow)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, measure in zip(axes, measures, strict=False):
        _curves(ax, [c for c in analysis.curves if c.measure == measure], results)
        dress(ax, as_label(measure), "accuracy", x="steps after the warm start")
        percent(ax)
    for ax in axes[len(measures) :]:
        ax.set_visible(False)
    legend(figure)
    return figure


def tokens(results: StudyResults, analysis: Analysis, *, narrow: bool = False) -> Figure:
    """The curves over sampled tokens in place of steps."""
    figure = new_figure(3.6, narrow=narrow)
    ax = figure.subplots()
    measure = results.study["measure"][0]
    _curves(ax, [c for c in analysis.curves if c.measure == measure], results, by_tokens=True)
    if analysis.token_budget is not None:
        ax.axvline(analysis.token_budget / 1000, color=GREY, lw=0.9, ls="--", label="compared here")
    dress(
        ax,
        f"accuracy, {as_label(measure)}, by response tokens",
        "accuracy",
        x="thousand response tokens, mean over seeds",
    )
    percent(ax)
    legend(figure)
    return figure


def reached(results: StudyResults, found: Sequence[Reached], *, narrow: bool = False) -> Figure:
    """Steps to reach each accuracy: a mark for each seed; at the right, arrows for runs that never did."""
    style = style_of(results.study["conditions"])
    names = list(results.study["conditions"])
    height = max(2.4, 0.9 + 0.3 * len(names))
    rows, columns = (len(found), 1) if narrow else (1, len(found))
    figure = new_figure(rows * height, narrow=narrow)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for ax, one in zip(axes, found, strict=True):
        for name, reach in one.of_condition.items():
            y = names.index(name)
            steps = [step for step in reach.by_seed if step is not None]
            ax.plot(steps, [y] * len(steps), "o", color=style[name]["color"], ms=5, alpha=0.7)
            if never := len(reach.by_seed) - len(steps):
                ax.text(1.02 * reach.end, y, f"▸ {never} never", va="center", fontsize=8, color=GREY)
            if reach.median is not None:
                ax.plot([reach.median] * 2, [y - 0.3, y + 0.3], color=style[name]["color"], lw=2)
        dress(ax, f"steps to {one.target:.1%} (line: median)", "", x="steps after the warm start")
        ax.set_xlim(left=0, right=1.25 * next(iter(one.of_condition.values())).end)
        ax.set_yticks(range(len(names)), [as_label(name) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
    return figure


def difficulty(results: StudyResults, analysis: Analysis, *, narrow: bool = False) -> Figure:
    """Accuracy of each condition on items by what is known of their difficulty."""
    style = style_of(results.study["conditions"])
    kinds = list(dict.fromkeys(group.by for group in analysis.groups))
    num_columns = 1 if narrow else min(3, len(kinds))
    num_rows = -(-len(kinds) // num_columns)
    figure = new_figure(2.7 * num_rows + 0.5, narrow=narrow)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    for ax, by in zip(axes, kinds, strict=False):
        groups = [group for group in analysis.groups if group.by == by]
        for name in results.study["conditions"]:
            at = [(x, group.rates[name]) for x, group in enumerate(groups) if name in group.rates]
            if at:
                ax.plot(*zip(*at, strict=True), **style[name], marker="o", ms=4, lw=1.5, label=as_label(name))
        ax.set_xticks(range(len(groups)), [f"{as_label(str(group.name))}\n(n={group.num_items})" for group in groups])
        dress(ax, DIFFICULTY[by], "accuracy", x="")
        percent(ax)
    legend(figure)
    return figure
