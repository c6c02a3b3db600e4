"""Schema of [eval]: what is evaluated on, how often, and by which set the best model is kept."""

import re
from typing import Literal

from pydantic import Field, model_validator

from isomorph.engine.config import FileName, Section
from isomorph.engine.effect import KeyPath


class EvalSet(Section):
    """One set of questions that is evaluated on; by default it has the name of its data."""

    data: str
    representations: tuple[str, ...] | None = Field(None, min_length=1)  # None: all that the data has
    prompts: int = Field(300, ge=1)  # per representation; of files at most what eval_share keeps
    name: FileName = Field("", pattern=r"^[\w.-]*$")

    def key(self, representation: str, num_sets: int) -> str:
        """What results on ``representation`` are listed under, in a recipe with ``num_sets`` sets.

        The representation, where there is one set; else the set's name, with the representation if it has several.
        """
        if num_sets == 1:
            return representation
        return self.name if self.representations == (representation,) else f"{self.name}:{representation}"


class EvalConfig(Section):
    """What is evaluated on, greedily: before the first RL stage, between stages, at the end, and every ``every`` steps.

    ``data``, ``representations`` and ``prompts`` are short for ``sets`` of one.
    """

    data: str | None = None
    representations: tuple[str, ...] | None = Field(None, min_length=1)
    prompts: int = Field(300, ge=1)
    sets: tuple[EvalSet, ...] = ()
    max_new_tok: int = Field(72, ge=1)
    seed: int = Field(999, ge=0, lt=2**32)  # of generated questions, and of the samples
    # of generated questions: "dev" while a recipe is worked on, "test" for what is claimed; they share no procedure,
    # and half of the test exam's wordings occur nowhere else, where its language has such wordings
    split: Literal["dev", "test"] = "dev"
    every: int = Field(0, ge=0)  # steps of the run, of all stages; 0: at the boundaries only
    samples: int = Field(0, ge=0)  # further responses to each question, for avg@k and pass@k; 0: greedy only
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)  # of these
    keep_best: str | None = None  # name of a set: where its accuracy is the highest so far, best/ keeps the model

    def idle(self) -> dict[KeyPath, str]:
        keys: dict[KeyPath, str] = {("prompts",): "each of eval.sets has its own"} if self.sets else {}
        if not self.samples:
            keys[("temperature",)] = "eval.samples is 0, and greedy responses have none"
        return keys

    @property
    def all_sets(self) -> tuple[EvalSet, ...]:
        """The sets, each with its name."""
        if self.data is not None:
            own = EvalSet(data=self.data, representations=self.representations, prompts=self.prompts, name=self.data)
            return (own,)
        return tuple(one if one.name else one.model_copy(update={"name": one.data}) for one in self.sets)

    @model_validator(mode="after")
    def _sets_are_told_apart(self) -> "EvalConfig":
        if (self.data is None) == (not self.sets):
            raise ValueError("exactly one of eval.data and eval.sets must be given")
        if self.sets and self.representations is not None:
            raise ValueError("representations must stand in the tables of eval.sets, not beside them")
        names = [one.name for one in self.all_sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two of eval.sets are called {', '.join(twice)}: give each a name = ...")
        if self.keep_best is not None and self.keep_best not in names:
            raise ValueError(f"keep_best must name one of the sets, {', '.join(names)}; got {self.keep_best!r}")
        return self


START = "start"  # the label of the evaluation before the first stage; those after a stage have its name


def label_of(step: int) -> str:
    """The label of an evaluation that ``eval.every`` asks for after ``step`` steps of the run."""
    return f"step-{step:08d}"


def place_of(label: str) -> str:
    """The label in words: ``step 20``, or a stage's name."""
    step = step_of(label)
    return label if step is None else f"step {step}"


def step_of(label: str) -> int | None:
    """The step of a label that ``label_of`` made; None for another label."""
    found = re.fullmatch(r"step-(\d{8,})", label)
    return int(found[1]) if found else None
