"""Schema of a study's TOML file: conditions, seeds, budgets, a shared warm start, planned contrasts, the test exam."""

from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import Field, model_validator

from isomorph.engine.config import FileName, Section
from isomorph.engine.recipe_file import check_tables, read_tables

NAME = r"^\w[\w.-]*$"
WARM_START = "warm"  # the folder of warm starts; no condition has that name
STAGE_DEFAULTS = ("objective", "optim", "batch", "sampling")

Tables = dict[str, Any]


class StudyTable(Section):
    """[study]: the question, what all conditions share, and where they are compared."""

    name: FileName = Field(pattern=NAME)
    question: str = Field(min_length=1)  # shown at the top of the page
    recipe: str  # relative to the study's file: model, data, [eval] and defaults of all conditions
    seeds: tuple[int, ...] = Field(min_length=1)
    budgets: tuple[int, ...] = Field(min_length=1)  # steps of a condition's own stages, ascending
    max_response_tok: int | None = Field(None, ge=1)  # a second budget; None: what the cheapest run has sampled
    baseline: str  # the condition that others are compared with
    measure: tuple[str, ...] = Field(("natural",), min_length=1)  # representations; claims are about the first
    reach: tuple[float, ...] = ()  # accuracies for "steps to reach"; (): from the baseline's curve
    jobs: int | None = Field(None, ge=1)  # runs at a time; None: cores / threads, 1 with a GPU
    threads: int | None = Field(None, ge=1)  # of a run; None: run.threads of the recipe, or 1
    unequal: bool = False  # conditions may have different numbers of steps
    # budgets at which the test exam is taken, and models kept for it (needs [test]); None: all
    test_budgets: tuple[int, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> "StudyTable":
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different and not negative, got {list(self.seeds)}")
        if list(self.budgets) != sorted({*self.budgets}) or self.budgets[0] < 1:
            raise ValueError(f"budgets must be positive and ascending, got {list(self.budgets)}")
        if any(not 0 < x <= 1 for x in self.reach):
            raise ValueError(f"reach must hold accuracies in 0..1, got {list(self.reach)}")
        if other := sorted({*(self.test_budgets or ())} - {*self.budgets}):
            raise ValueError(f"test_budgets must be among budgets, got {other}")
        return self


class WarmStart(Section):
    """[warm_start]: trained once per seed; all conditions of the seed begin from its model."""

    stage: tuple[Tables, ...] | None = Field(None, min_length=1)  # over the study's recipe
    recipe: str | None = None  # a whole recipe instead, relative to the study's file
    # model folder that the stages begin with, relative to the study's file; {seed} and {warm_seed} are replaced
    model: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "WarmStart":
        if (self.stage is None) == (self.recipe is None):
            raise ValueError("exactly one of stage and recipe must be given")
        if self.model is not None and self.stage is None:
            raise ValueError("model needs stages; with recipe, the recipe's model.path says which model is trained")
        for _, name, *_ in Formatter().parse(self.model or ""):
            if name not in (None, "seed", "warm_seed"):
                raise ValueError(f"model: only {{seed}} and {{warm_seed}} are replaced, got {{{name}}}")
        return self


class Condition(Section):
    """[condition.NAME]: stages as in a recipe, and what else differs from the study's recipe."""

    stage: tuple[Tables, ...] = Field(min_length=1)
    says: str = ""  # a line for the page; "": made from the stages
    objective: Tables = {}  # this and the next three: defaults of the condition's stages
    optim: Tables = {}
    batch: Tables = {}
    sampling: Tables = {}

    def tables(self) -> Tables:
        """What lies over the study's recipe."""
        defaults = {name: getattr(self, name) for name in STAGE_DEFAULTS if getattr(self, name)}
        return {**defaults, "stage": [dict(stage) for stage in self.stage]}


class Compare(Section):
    """[[compare]]: a planned contrast, accuracy of ``first`` minus that of ``second``."""

    first: str
    second: str

    @property
    def name(self) -> str:
        return f"{self.first} - {self.second}"


class StudySpec(Section):
    """The whole file."""

    study: StudyTable
    warm_start: WarmStart | None = None
    condition: dict[FileName, Condition] = Field(min_length=1)
    compare: tuple[Compare, ...] = ()
    test: Tables | None = None  # what the test exam has in place of keys of the recipe's [eval]

    @property
    def contrasts(self) -> tuple[Compare, ...]:
        """The planned ones; by default each condition against the baseline."""
        base = self.study.baseline
        return self.compare or tuple(Compare(first=name, second=base) for name in self.condition if name != base)

    @property
    def test_budgets(self) -> tuple[int, ...]:
        """Where the test exam is taken; () without [test]."""
        return () if self.test is None else (self.study.test_budgets or self.study.budgets)

    @model_validator(mode="after")
    def _names_exist(self) -> "StudySpec":
        for name in self.condition:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name == WARM_START:
                raise ValueError(f"condition {name!r}: a name has letters, digits, _ - . and is not {WARM_START!r}")
        known = ", ".join(self.condition)
        if self.study.baseline not in self.condition:
            raise ValueError(f"study.baseline must be one of the conditions, {known}; got {self.study.baseline!r}")
        for one in self.compare:
            if {one.first, one.second} - self.condition.keys() or one.first == one.second:
                raise ValueError(f"compare: {one.name} must be two of the conditions, {known}")
        if len({one.name for one in self.compare}) < len(self.compare):
            raise ValueError("compare: the same contrast stands there twice")
        return self


def read_study(path: Path) -> StudySpec:
    """The study's file, checked by itself. Raises UserError with all defects."""
    return check_tables(read_tables(path), StudySpec, where=str(path))
