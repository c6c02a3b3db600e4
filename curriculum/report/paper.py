"""The figures of arXiv 2602.03542 beside those of runs of its recipes.

The paper's figures are second-hand: from a note on it (en.papernotes.org, ICML 2026), which gives natural language and
AAVE for some conditions; each is a multiple of 1/225, the size of the test split. What the note lacks stays empty, and
so does what no run here has measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isomorph.curriculum.analogy.items import read_items
from isomorph.curriculum.recipe import JsonlData, Recipe
from isomorph.curriculum.report import document
from isomorph.curriculum.report.run_record import RunRecord
from isomorph.curriculum.rewards.families import ASYNC_PLAN
from isomorph.curriculum.study.statistics import Accuracy

MODEL, QUESTIONS = "Qwen2.5-1.5B-Instruct", 225
Stages = tuple[tuple[str, frozenset[str], int | None], ...]  # objective, representations, steps (None: by its rounds)


@dataclass(frozen=True, slots=True)
class Published:
    """A condition of the paper, by ``MODEL`` unless ``condition`` names another."""

    condition: str
    stages: Stages  # () where the paper's model is another
    natural: int | None  # right answers of QUESTIONS; None: not known to us
    aave: float | None = None  # accuracy


def _grpo(*stages: tuple[str, int]) -> Stages:
    return tuple(("grpo", frozenset(forms.split("+")), steps) for forms, steps in stages)


PUBLISHED = (
    Published("graph 40 -> natural 40, GRPO", _grpo(("graph", 40), ("natural", 40)), 176, 0.573),
    Published("natural 80, GRPO", _grpo(("natural", 80)), 157),
    Published("natural 40 -> graph 40, GRPO", _grpo(("natural", 40), ("graph", 40)), 97),
    Published("graph + natural mixed 80, GRPO", _grpo(("graph+natural", 80)), 86),
    Published("code 40 -> natural 40, GRPO", _grpo(("code", 40), ("natural", 40)), 86),
    Published("graph + code 40 -> natural 40, GRPO", _grpo(("code+graph", 40), ("natural", 40)), None),
    Published("graph -> natural, SFT", (("sft", frozenset({"graph"}), 309), ("sft", frozenset({"natural"}), 309)), 56),
    Published("graph 40 GRPO -> natural by distillation", (), 104),
    Published("Qwen2.5-3B, natural 40, GRPO", (), 106, 0.400),
    Published("Qwen2.5-7B, natural 40, GRPO", (), 157, 0.573),
    Published("GPT-4o-mini, zero-shot", (), 99, 0.289),
    Published("GPT-4o, zero-shot", (), 176, 0.724),
)
COLUMNS = ("condition", "paper: natural", "paper: AAVE", "ours: natural", "ours: AAVE", "without repeated procedures")


def planning_data(recipe: Recipe) -> str | None:
    """Name of the table with the paper's planning data; None for a recipe that is not one of the paper's."""
    for name, data in recipe.data.items():
        if isinstance(data, JsonlData) and data.family == ASYNC_PLAN.name and data.reward == "paper":
            return name
    return None


def paper_section(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """HTML: the paper's table with the runs' figures, and how each run differs; "" without a run of its recipes."""
    ours = [(record, name) for record, name in zip(records, names, strict=True) if planning_data(record.recipe)]
    if not ours:
        return ""
    rows = []
    for published in PUBLISHED:
        matching = [record for record, _ in ours if published.stages and _stages(record.recipe) == published.stages]
        rows.append(_row(published, matching))
    source = (
        f"The paper's figures are those of {MODEL} on its {QUESTIONS} test questions, one seed as far as is known, "
        "taken from a note on the paper (en.papernotes.org), not from its own tables. Empty: not known, or not "
        "measured here. Repeated procedures stand in the training file up to renumbering."
    )
    differing = [[name, "; ".join(differences(record))] for record, name in ours]
    return (
        "<h3>Beside the paper</h3>"
        + document.table(COLUMNS, rows)
        + document.note(source)
        + document.table(["run", "differs from the paper in"], differing)
    )


def _stages(recipe: Recipe) -> Stages:
    return tuple(
        (
            stage.objective.name,
            frozenset(part.representation for part in stage.mixture),
            None if stage.star else stage.steps,
        )
        for stage in recipe.stage
    )


def _row(published: Published, records: Sequence[RunRecord]) -> list[str]:
    paper = "" if published.natural is None else str(Accuracy.of(published.natural, QUESTIONS))
    last = [record for record in records if record.evaluations]
    return [
        published.condition,
        paper,
        "" if published.aave is None else f"{published.aave:.1%}",
        *(_joined(str(a) for r in last if (a := _accuracy(r, form))) for form in ("natural", "aave")),
        _joined(str(a) for r in last if (a := without_repeated(r, "natural"))),
    ]


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(texts)


def _accuracy(record: RunRecord, form: str) -> Accuracy | None:
    return record.evaluations[-1].accuracy.get(form)


def without_repeated(record: RunRecord, form: str) -> Accuracy | None:
    """Accuracy on the questions whose procedure is not in the training file; None where keys are not recorded."""
    name = planning_data(record.recipe)
    known = record.described.get("rows", {}).get(name, {}).get("repeated")
    file = record.folder / "evaluations" / f"{record.evaluations[-1].label}.jsonl"
    if known is None or not file.is_file():
        return None
    kept = [row["correct"] for row in read_items(file) if row["representation"] == form and row["key"] not in known]
    return Accuracy.of(sum(kept), len(kept)) if kept else None


def differences(record: RunRecord) -> list[str]:
    """In what a run differs from the paper's own, in a few words each."""
    recipe, found = record.recipe, []
    model = recipe.model.path or "a tiny model"
    if MODEL not in model:
        found.append(f"model {model.rpartition('/')[2]}, {record.described['model']['parameters']:,} parameters")
    if _stages(recipe) not in [published.stages for published in PUBLISHED if published.stages]:
        found.append("stages and steps, which are none of these conditions")
    if not record.is_done:
        found.append(f"it is {record.status}")
    name = planning_data(recipe)
    data = recipe.data[name] if name else None
    if isinstance(data, JsonlData) and not data.eval_files:
        found.append("evaluated on rows that are held out of the training file")
    asked = record.evaluations[-1].accuracy.get("natural") if record.evaluations else None
    if asked is not None and asked.n != QUESTIONS:
        found.append(f"{asked.n} questions")
    for stage in recipe.stage:
        num_responses = stage.batch.prompts * stage.sampling.samples_per_prompt
        if not stage.objective.is_supervised and num_responses != 512 * 16:
            found.append(f"{num_responses:,} responses a step in {stage.name}")
        if not stage.objective.is_supervised and stage.sampling.max_new_tok != 6000:
            found.append(f"answers of {stage.sampling.max_new_tok:,} tokens in {stage.name}")
    return found or ["nothing that the recipe says; see docs/paper.md"]
