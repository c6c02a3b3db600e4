"""The first screen of a report: did it learn, and what carried over to forms that it was not trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isomorph.curriculum.report import document
from isomorph.curriculum.report.run_record import EvaluationResult, RunRecord
from isomorph.curriculum.study.statistics import Accuracy, paired_difference

MAX_NAMES = 8  # representations that a sentence names


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Accuracy on one representation before and after the stages in question."""

    name: str
    is_trained: bool  # on it, by a stage between the two evaluations
    before: Accuracy
    after: Accuracy
    difference: tuple[float, float, float] | None  # mean, low, high over the same questions; None: other questions
    shortcut: float | None  # accuracy of the best shortcut

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "not compared"
        _, low, high = self.difference
        return "rose" if low > 0 else "fell" if high < 0 else "no change shown"

    def __str__(self) -> str:
        return f"{self.name} {_points(self.difference) if self.difference else '(other questions)'}, {self.verdict}"


def changes(record: RunRecord) -> list[Change]:
    """A change for each representation that was evaluated both before the RL stages and last; [] without the two."""
    before, after = record.before, record.latest
    if before is None or after is None:
        return []
    between = [span for span in record.spans if before.step < span.first <= after.step]
    trained = {part.representation for span in between for part in span.stage.mixture}
    return [
        Change(
            name=name,
            is_trained=name in trained,
            before=before.accuracy[name],
            after=after.accuracy[name],
            difference=_difference(name, before, after),
            shortcut=max(record.shortcuts.get(name, {}).values(), default=None),
        )
        for name in after.accuracy
        if name in before.accuracy
    ]


def _difference(name: str, before: EvaluationResult, after: EvaluationResult) -> tuple[float, float, float] | None:
    first, second = before.answers[name], after.answers[name]
    if first.keys() != second.keys() or len(first) != before.accuracy[name].n:
        return None
    return paired_difference([float(first[key]) for key in first], [float(second[key]) for key in first])


def answer_section(record: RunRecord) -> str:
    """HTML: sentences, and the accuracies before and after."""
    found = changes(record)
    heading = "<h2>Did it learn, and what carried over?</h2>"
    if not found:
        return heading + document.note(_nothing(record))
    assert record.before is not None and record.latest is not None
    rows = [
        [
            f"{one.name}, trained on" if one.is_trained else one.name,
            str(one.before),
            str(one.after),
            _points(one.difference) if one.difference else "-",
        ]
        for one in found
    ]
    head = ["accuracy", _when("before", record.before), _when("after", record.latest), "change, points"]
    note = (
        "Greedy accuracy on held-out questions, with 95 % intervals: of an accuracy Wilson's, of a change by bootstrap "
        "over the same questions. One run says nothing about other seeds."
    )
    return (
        heading
        + document.bullets(sentences(found))
        + document.table(head, rows, css="numbers brief")
        + document.note(note)
    )


def sentences(found: Sequence[Change]) -> list[str]:
    """What was learned, what carried over, and how that stands to the best shortcut."""
    trained, others = ([one for one in found if one.is_trained is side] for side in (True, False))
    said = [f"Trained on: {_listed(trained)}."] if trained else []
    if others:
        said.append(f"Not trained on in these stages, so carried over if it rose: {_listed(others)}.")
    known = [one for one in found if one.shortcut is not None]
    if known:
        above = [one.name for one in known if one.shortcut is not None and one.after.low > one.shortcut]
        most = max(one.shortcut for one in known if one.shortcut is not None)
        said.append(
            f"Above the best shortcut, which does not plan: {_short(above)}."
            if above
            else f"Nowhere above the best shortcut, which does not plan and answers up to {most:.1%}: these accuracies "
            "do not show that the procedure is used."
        )
    return said


def _listed(found: Sequence[Change]) -> str:
    return _short([str(one) for one in found], between="; ")


def _short(names: Sequence[str], *, between: str = ", ") -> str:
    left = len(names) - MAX_NAMES
    return between.join(names[:MAX_NAMES]) + (f" and {left} more" if left > 0 else "")


def _points(difference: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _when(title: str, done: EvaluationResult) -> str:
    return f"{title} ({done.label})"


def _nothing(record: RunRecord) -> str:
    if not record.evaluations:
        return "There has been no evaluation yet, so this cannot be said."
    if record.latest is None:
        return "There has been one evaluation only, so this cannot be said yet: its accuracies are below."
    return (
        "There was no evaluation before the stages of this run, so a change cannot be said: the last accuracies are "
        "below. With a supervised warm-up, or with [eval] every, there is one."
    )


def answer_of_runs(records: Sequence[RunRecord], names: Sequence[str], conditions: Mapping[str, Sequence[int]]) -> str:
    """HTML: for each condition (label -> places of its runs) the mean change, and a row for each run."""
    of_run = [changes(record) for record in records]
    forms = list(dict.fromkeys(one.name for found in of_run for one in found))
    letter: dict[int, str] = {}  # place of a run -> its recipe's letter
    said = []
    for i, (label, places) in enumerate(conditions.items()):
        letter |= dict.fromkeys(places, _letters(i))
        parts = [part for form in forms if (part := _over_runs(form, [of_run[at] for at in places]))]
        runs = f"{len(places)} runs" if len(places) > 1 else "1 run"
        if parts:
            said.append(f"{_letters(i)}, {label}, {runs}: {'; '.join(parts)}.".replace("->", "→"))
    rows = [
        [f"{i + 1}  {name}{_state(record)}", letter.get(i, "-"), str(record.recipe.run.seed)]
        + [_after(form, of_run[i]) for form in forms]
        for i, (record, name) in enumerate(zip(records, names, strict=True))
    ]
    note = (
        "Accuracy at the last evaluation, and in brackets its change in points since the evaluation before the RL "
        "stages; above, the mean change and its range over the runs of a recipe that differ in the seed only. isomorph "
        "study gives intervals over seeds."
    )
    return (
        "<h2>Did they learn, and what carried over?</h2>"
        + document.bullets(said)
        + document.table(["run", "recipe", "seed", *forms], rows)
        + document.note(note)
    )


def _letters(i: int) -> str:
    """A, B, ..., Z, A2, B2, ..."""
    return chr(ord("A") + i % 26) + (str(i // 26 + 1) if i >= 26 else "")


def _over_runs(form: str, of_run: Sequence[Sequence[Change]]) -> str:
    own = [one for found in of_run for one in found if one.name == form]
    if not own:
        return ""
    points = [100 * (one.after.rate - one.before.rate) for one in own]
    spread = f" ({min(points):+.1f} to {max(points):+.1f})" if len(points) > 1 else ""
    trained = "" if own[0].is_trained else ", not trained on"
    return f"{form} {sum(points) / len(points):+.1f} points{spread}{trained}"


def _after(form: str, found: Sequence[Change]) -> str:
    for one in found:
        if one.name == form:
            return f"{one.after.rate:.1%} ({100 * (one.after.rate - one.before.rate):+.1f})"
    return "-"


def _state(record: RunRecord) -> str:
    return "" if record.is_done else f", {record.status} at step {record.rows[-1]['step']}"
