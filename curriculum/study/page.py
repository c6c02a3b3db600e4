"""A study's page: one HTML file that stands alone and its pictures as PNGs, from the rows of the study's folder."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from isomorph.curriculum.report import document
from isomorph.curriculum.study import pictures
from isomorph.curriculum.study.analysis import Analysis, Comparison, Reached, analyse, shortcut_rates
from isomorph.curriculum.study.results import DEVELOPMENT, DIFFICULTY, StudyResults, read_results
from isomorph.curriculum.study.seeds import Effect, sign_test
from isomorph.engine.config import UserError

PAGE, SUMMARY = "study.html", "summary.json"
ALPHA = 0.05


def write_study(folder: Path) -> Path:
    """Writes study.html, its PNGs and summary.json into the study's ``folder``; returns the page's path.

    Raises UserError where there is no result yet, or a file of the study is broken.
    """
    results = read_results(folder)
    if not results.points:
        raise UserError(f"{folder} holds no finished run yet: start the study, or wait for its first run")
    analysis = analyse(results)
    try:
        text = json.dumps({**_about(results), **analysis.to_dict()}, indent=1, ensure_ascii=False)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
        page = folder / PAGE
        body = _body(results, analysis, document.Album(folder))
        page.write_text(document.page(results.study["name"], body), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: the study's page cannot be written there: {error}") from error
    return page


def _about(results: StudyResults) -> dict[str, object]:
    return {"study": results.study, "num_runs": len(results.runs)}


def _body(results: StudyResults, analysis: Analysis, album: document.Album) -> str:
    study = results.study
    rates = shortcut_rates(results)
    shortcut = max(rates.items(), key=lambda item: item[1], default=None)
    parts = [f"<p><b>{document.escaped(study['question'])}</b></p>"]
    if analysis.missing:
        parts.append(
            document.warning(f"Not finished: {', '.join(analysis.missing)}. Seeds without a partner are left out.")
        )
    caption = (
        "Lines: accuracy over the steps, mean over seeds; bands: 95 % intervals of these means at each evaluation "
        "(Student's t), which contain what the conditions of a seed have in common. Bars: planned differences, paired "
        "by seed and item, so that this cancels; 95 % intervals, not adjusted for their number."
    )
    picture = partial(pictures.answer, results, analysis, shortcut)
    parts += [document.bullets(verdicts(analysis)), album.add("answer", picture, caption)]
    parts.append(
        document.note("In brackets 95 % intervals. *: p of the paired t test below 0.05 after Holm's adjustment.")
    )
    parts += [_exam_note(results, analysis), "<h2>Planned comparisons</h2>"]
    parts += [_comparisons(analysis.planned()), document.note(_how(analysis.planned()))]
    parts.append(_other_comparisons(analysis))
    if analysis.reached:
        caption = "Steps to reach an accuracy, interpolated between evaluations; each dot is a seed."
        picture = partial(pictures.reached, results, analysis.reached)
        parts += ["<h2>Steps to reach</h2>", album.add("reach", picture, caption), _reach_table(analysis.reached)]
    parts.append("<h2>At equal tokens</h2>")
    picture = partial(pictures.tokens, results, analysis)
    parts.append(album.add("tokens", picture, "Accuracy over sampled response tokens."))
    parts.append(_comparisons([c for c in analysis.comparisons if c.kind == "tokens"]))
    parts.append(document.note("Between two evaluations each item's answer is interpolated linearly. " + _token_note()))
    if analysis.curves:
        parts.append("<h2>All representations</h2>")
        caption = "The same runs on every representation that was evaluated."
        parts.append(album.add("representations", partial(pictures.representations, results, analysis), caption))
    if analysis.groups:
        caption = "Accuracy at the last budget by the difficulty of the item, mean over seeds."
        picture = partial(pictures.difficulty, results, analysis)
        parts += ["<h2>By difficulty</h2>", album.add("difficulty", picture, caption), _difficulty_table(analysis)]
    parts += [_errors(results), "<h2>Design</h2>", _design(results), _costs(results)]
    return "\n".join(parts)


def _token_note() -> str:
    return "Tokens of demonstrations count like sampled ones; those of the warm start do not count."


def verdicts(analysis: Analysis) -> list[str]:
    """A sentence for each planned contrast, with all its budgets."""
    by_name: dict[str, list[Comparison]] = {}
    for one in analysis.planned():
        by_name.setdefault(one.name, []).append(one)
    return [_verdict(own) for own in by_name.values()]


def _verdict(own: Sequence[Comparison]) -> str:
    first, second = own[0].first, own[0].second
    parts = [
        f"after {one.budget} steps {_called(one)} ({_points(one.effect.mean)} points, {_interval(one.effect)}; ahead "
        f"in {one.effect.num_ahead} of {len(one.seeds)} seeds)"
        for one in own
    ]
    few = " With one seed the intervals are over items and say nothing about other seeds." if _has_one_seed(own) else ""
    return f"{first} against {second}, {own[0].measure}: {', '.join(parts)}.{few}"


def _called(one: Comparison) -> str:
    """In words, by the interval; a star where the paired t test stays below 0.05 after Holm's adjustment."""
    if not one.effect.excludes_zero:
        return "no difference shown"
    star = "*" if one.holm_t_p is not None and one.holm_t_p < ALPHA else ""
    return ("ahead" if one.effect.mean > 0 else "behind") + star


def _has_one_seed(own: Sequence[Comparison]) -> bool:
    return any(len(one.seeds) == 1 for one in own)


def _comparisons(rows: Sequence[Comparison]) -> str:
    has_holm = any(one.is_planned for one in rows)
    head = ["comparison", "at", *([] if has_holm else ["on"]), "accuracy", "difference (95 % interval)", "ahead"]
    head += ["sign p", "t p", *(["Holm: sign", "t"] if has_holm else [])]
    cells = []
    for one in rows:
        effect, unit = one.effect, "steps" if one.kind == "steps" else "tokens"
        row = [
            one.name,
            f"{one.budget:,} {unit}",
            *([] if has_holm else [one.measure]),
            f"{one.rates[0]:.1%}, {one.rates[1]:.1%}",
        ]
        row += [f"{_points(effect.mean)} ({_interval(effect)})" + ("†" if one.num_carried else "")]
        row += [f"{effect.num_ahead} of {len(one.seeds)}", _p(effect.sign_p), _p(effect.t_p)]
        row += [_p(one.holm_sign_p), _p(one.holm_t_p)] if has_holm else []
        cells.append(row)
    carried = document.note("† Some runs had ended before: their last evaluation counts.")
    return document.table(head, cells, css="numbers cards") + (carried if any(one.num_carried for one in rows) else "")


def _other_comparisons(analysis: Analysis) -> str:
    others = [c for c in analysis.comparisons if not c.is_planned and c.kind == "steps"]
    if not others:
        return ""
    text = "Not planned as claims: further representations, without adjustment for their number."
    return "<h3>On other representations</h3>" + _comparisons(others) + document.note(text)


def _how(planned: Sequence[Comparison]) -> str:
    """How intervals and p values are made, and the least p that this number of seeds allows."""
    if not planned:
        return "No planned comparison has a seed with both conditions yet."
    num, num_planned = min(len(one.seeds) for one in planned), len(planned)
    least = sign_test(num, 0)
    methods = (
        "hierarchical bootstrap over seeds, then items, its spread scaled to the unbiased variance and its percentiles "
        "taken at Student's t"
        if num >= 5
        else "Student's t over seeds and items (fewer than five seeds)"
        if num > 1
        else "over items only: with one seed nothing is said about other seeds"
    )
    return (
        f"The unit is the seed; differences are paired by seed and item. Intervals: {methods}. Sign p: exact sign test "
        f"over seeds, two-sided; with {num} seeds it cannot be below {least:.3g}, nor "
        f"its smallest Holm value below {min(1.0, num_planned * least):.2g}. t p: paired t test over seeds, which "
        "assumes near-normal differences. Holm: adjusted over all planned comparisons. Intervals are not adjusted."
    )


def _exam_note(results: StudyResults, analysis: Analysis) -> str:
    taken = results.study.get("test_taken", [])
    if analysis.exam == DEVELOPMENT:
        text = "Differences are on the development exam, which designs were tried on. "
        return document.note(text + ("The test exam has not been taken." if not taken else ""))
    times = ", again on ".join(entry["at"] for entry in taken)
    plan = f" PLAN.md was committed before ({taken[0]['plan_commit'][:10]})." if taken[0].get("plan_commit") else ""
    often = "once" if len(taken) == 1 else f"{len(taken)} times"
    return document.note(
        f"Differences are on the test exam, taken {often}: {times}.{plan} Curves are on the development exam."
    )


def _reach_table(found: Sequence[Reached]) -> str:
    rows = []
    for one in found:
        for name, reach in one.of_condition.items():
            saved = one.saved.get(name)
            rows.append(
                [
                    f"{one.target:.1%}",
                    name,
                    f"{reach.num_reached} of {len(reach.by_seed)}",
                    f"more than {reach.end:.0f}" if reach.median is None else f"{reach.median:.0f}",
                    f"{sum(reach.restricted) / len(reach.restricted):.1f}",
                    "-" if saved is None else f"{saved.mean:+.1f}",
                    "-" if saved is None else _interval(saved, scale=1),
                ]
            )
    head = ["accuracy", "condition", "seeds that reach it", "median steps", "mean, cut", "steps saved", "95 % interval"]
    note = (
        "Runs that never reach it are censored at the last budget. Median: of the Kaplan-Meier curve. Mean, cut: of "
        "min(steps, last budget), which is defined for censored runs; steps saved: the baseline's minus the "
        "condition's, paired by seed, so a saving beyond the last budget does not count. Targets that the study's "
        "file does not name come from the baseline's own curve."
    )
    return document.table(head, rows, css="numbers cards") + document.note(note)


def _difficulty_table(analysis: Analysis) -> str:
    contrasts = list(dict.fromkeys(name for group in analysis.groups for name in group.effects))
    rows = [
        [DIFFICULTY[group.by], group.name, str(group.num_items)]
        + [_points_with_interval(group.effects.get(name)) for name in contrasts]
        for group in analysis.groups
    ]
    text = "Points with 95 % intervals. Not planned as claims, and not adjusted for their number."
    return document.table(["by", "value", "items", *contrasts], rows, css="numbers cards") + document.note(text)


def _errors(results: StudyResults) -> str:
    """Shares of wrong answers by kind, at each run's last evaluation on the first representation."""
    measure, shares = results.study["measure"][0], {}
    for name in results.study["conditions"]:
        counts: dict[str, int] = {}
        num = 0
        for (condition, seed), row in results.runs.items():
            last = [p for p in results.curve(condition, seed, measure) if p.step == row["steps"]]
            if condition == name and last and "errors" in last[0].row:
                num += len(last[0].right_I)
                for kind, often in last[0].row["errors"].items():
                    counts[kind] = counts.get(kind, 0) + often
        if num:
            shares[name] = {kind: often / num for kind, often in counts.items()}
    kinds = sorted({kind for own in shares.values() for kind in own})
    if not kinds:
        return ""
    rows = [[name, *(f"{own.get(kind, 0.0):.1%}" for kind in kinds)] for name, own in shares.items()]
    text = "Share of all answers of the last development evaluation, pooled over seeds."
    return "<h2>Errors</h2>" + document.table(["condition", *kinds], rows) + document.note(text)


def _design(results: StudyResults) -> str:
    study = results.study
    rows = [
        ["conditions", "; ".join(f"{name}: {says}" for name, says in study["conditions"].items())],
        ["warm start", study["warm_start"] or "none"],
        ["seeds", ", ".join(map(str, study["seeds"]))],
        ["budgets", ", ".join(map(str, study["budgets"])) + " steps"],
        ["planned comparisons", "; ".join(f"{first} - {second}" for first, second in study["contrasts"])],
        ["items", "; ".join(f"{row['representation']} {len(row['keys'])}" for row in results.items.values())],
        ["without the procedure", _shortcuts(results)],
        ["recipe", study["recipe"]],
        ["versions", ", ".join(sorted({_versions(row) for row in results.runs.values()}))],
    ]
    if study["unequal"]:
        rows.append(["steps", "conditions have unequal numbers of steps, as the study's file allows"])
    return document.table(["", ""], rows, css="facts")


def _shortcuts(results: StudyResults) -> str:
    """What shortcuts answer of the development exam, on the first representation."""
    rates = shortcut_rates(results)
    best_first = sorted(rates, key=rates.__getitem__, reverse=True)
    return ", ".join(f"{name} {rates[name]:.1%}" for name in best_first) or "not known"


def _versions(row: dict[str, dict[str, str]]) -> str:
    return " ".join(f"{name} {version}" for name, version in row["versions"].items() if name in ("isomorph", "torch"))


def _costs(results: StudyResults) -> str:
    """What each condition took, and the warm start that all share."""
    groups = {name: [row for (n, _), row in results.runs.items() if n == name] for name in results.study["conditions"]}
    groups["warm start, shared by all conditions of a seed"] = list(results.warm.values())
    rows = []
    for name, own in groups.items():
        if own:
            mean = [sum(values) / len(own) for values in zip(*map(_cost, own), strict=True)]
            rows.append([name, str(len(own)), f"{mean[0]:.0f}", *(f"{value:,.0f}" for value in mean[1:])])
    head = ["mean of a run", "runs", "steps", "response tokens", "forward tokens", "seconds"]
    note = "Seconds depend on what ran beside it, and are no measurement of speed."
    return "<h3>Costs</h3>" + document.table(head, rows, css="numbers cards") + document.note(note)


def _cost(row: dict[str, object]) -> tuple[float, ...]:
    tokens = row["tokens"]
    assert isinstance(tokens, dict)
    return (
        *(float(value) for value in (row["steps"], tokens["response_tok"], tokens["forward_tok"], row["wall_s"])),  # type: ignore[arg-type]
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _points_with_interval(effect: Effect | None) -> str:
    return "-" if effect is None else f"{_points(effect.mean)} ({_interval(effect)})"


def _interval(effect: Effect, scale: float = 100) -> str:
    if not math.isfinite(effect.low):
        return "-"
    return f"{scale * effect.low:+.1f} to {scale * effect.high:+.1f}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
