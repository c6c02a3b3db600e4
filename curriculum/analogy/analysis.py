"""Generative analogy: does success on an item go with its likeness to training instances? And do traces predict gain?

analogy      strength of the nearest training instance
frequency    mean strength of all training instances; ``related`` counts those of at least ``RELATED``
alignment    agreement of the finish times in the responses to two isomorphic questions, before a stage
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.curriculum.analogy.correlation import difference, pearson, slope
from isomorph.curriculum.analogy.items import Item, items_of_evaluation
from isomorph.curriculum.analogy.strength import strengths
from isomorph.curriculum.analogy.structure import Structure
from isomorph.curriculum.analogy.trace import alignment, read_trace
from isomorph.curriculum.report.run_record import RunRecord
from isomorph.engine.config import UserError

RELATED = 0.8  # least strength of a training instance that counts as related; the paper's bound is not known


def analogy_rows(
    items: Sequence[Item], evaluated: dict[str, Structure], training: Sequence[Structure]
) -> list[dict[str, Any]]:
    """A JSON-able row for each representation. Raises UserError where no item's procedure is known."""
    known = [item for item in items if item.key in evaluated]
    if not known:
        raise UserError(
            "no item's key is that of a question whose procedure is known: the items must be of this recipe's [eval], "
            "or --test must name the file of their questions"
        )
    keys = list(dict.fromkeys(item.key for item in known))
    found = strengths([evaluated[key] for key in keys], training)
    nearest = dict(zip(keys, found.max(axis=1), strict=True))
    mean = dict(zip(keys, found.mean(axis=1), strict=True))
    related = dict(zip(keys, (found >= RELATED).sum(axis=1), strict=True))
    rows = []
    for form in dict.fromkeys(item.representation for item in known):
        of_form = [item for item in known if item.representation == form]
        success = [float(item.is_correct) for item in of_form]
        by_analogy, by_mean, by_count = ([float(m[i.key]) for i in of_form] for m in (nearest, mean, related))
        rows.append(
            {
                "representation": form,
                "items": len(of_form),
                "unknown": sum(item.representation == form for item in items) - len(of_form),
                "success": float(np.mean(success)),
                "nearest_mean": float(np.mean(by_analogy)),
                "analogy": pearson(by_analogy, success).to_dict(),
                "frequency": pearson(by_mean, success).to_dict(),
                "related": pearson(by_count, success).to_dict(),
                "analogy_minus_frequency": difference(by_analogy, by_mean, success).to_dict(),
            }
        )
    return rows


def alignment_rows(record: RunRecord, folder: Path) -> list[dict[str, Any]]:
    """A JSON-able row for each change of stage and pair (form trained on before it, new form trained on after it).

    Gain of an item: right after the stage minus right before it. The slope is at equal success before the stage, which
    bounds the gain.
    """
    done = {one.label: items_of_evaluation(folder, one.label, record.recipe) for one in record.boundaries}
    rows = []
    for stage, later in pairwise(record.recipe.stage):
        if stage.name not in done or later.name not in done:
            continue
        before, after = ({part.representation for part in s.mixture} for s in (stage, later))
        for form in sorted(after - before):
            for base in sorted(before):
                rows.append(
                    alignment_row(done[stage.name], done[later.name], base, form, f"{stage.name} -> {later.name}")
                )
    return rows


def alignment_row(before: list[Item], after: list[Item], base: str, form: str, change: str) -> dict[str, Any]:
    """Responses to ``base`` and ``form`` in the evaluation before a change, against the gain on ``form`` after it."""
    traces = {
        name: {i.key: read_trace(i.text) for i in before if i.representation == name and i.text is not None}
        for name in (base, form)
    }
    scores = {
        key: score
        for key, trace in traces[form].items()
        if (score := alignment(traces[base].get(key, {}), trace)) is not None
    }
    right = [{i.key: float(i.is_correct) for i in some if i.representation == form} for some in (before, after)]
    keys = [key for key in scores if key in right[0] and key in right[1]]
    x, start, gain = [scores[k] for k in keys], [right[0][k] for k in keys], [right[1][k] - right[0][k] for k in keys]
    return {
        "change": change,
        "from": base,
        "to": form,
        "items": len(traces[form]),
        "readable": len(keys),
        "alignment": float(np.mean(x)) if x else None,
        "gain": float(np.mean(gain)) if x else None,
        "with_success_before": pearson(x, start).to_dict(),
        "with_gain": pearson(x, gain).to_dict(),
        "slope": slope(x, gain, start).to_dict(),
    }
