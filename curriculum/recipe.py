"""Schema of the recipe: one TOML file with model, data, stages and evaluation.

[model] [lora] [sampler] [parallel] [run] [log]    the engine's tables
[objective] [optim] [batch] [sampling]             defaults of all stages
[data.NAME]                                        a source of tasks: generated, or files
[[stage]]                                          name, steps, mixture, and what differs from the defaults
[eval]                                             the tasks that are evaluated on between stages
"""

import random
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.evaluation_spec import START, EvalConfig, EvalSet, step_of
from isomorph.curriculum.paths import resolve
from isomorph.curriculum.rewards.families import Reward, check_reward, family_of
from isomorph.curriculum.rewards.spec import RewardTable
from isomorph.curriculum.rows.gym_spec import ReasoningGymData
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.stage_spec import StageRecipe
from isomorph.curriculum.tasks.arithmetic.expression import ArithmeticDifficulty
from isomorph.curriculum.tasks.kinds import GENERATORS, AnyGenerator
from isomorph.curriculum.tasks.procedure import Difficulty
from isomorph.curriculum.tasks.routes.road_map import RouteDifficulty
from isomorph.curriculum.tasks.task import Split, Task
from isomorph.engine.config import NO_KEPT_TOKENS, EngineConfig, Section, refuse_overlap
from isomorph.engine.effect import KeyPath


def _known_family(name: str) -> str:
    return family_of(name).name


Family = Annotated[str, AfterValidator(_known_family)]


class GeneratedData(Section):
    """Tasks that are generated as they are needed; training and evaluation never share an instance."""

    kind: str
    difficulty: Any
    reward: Reward = "strict"

    @property
    def generator(self) -> AnyGenerator:
        return GENERATORS[self.kind]

    @property
    def family(self) -> str:
        return self.generator.name

    @property
    def representations(self) -> tuple[str, ...]:
        return self.generator.representations

    @property
    def longest(self) -> Self:
        """The same with the longest questions that the difficulty allows."""
        return self.model_copy(update={"difficulty": self.generator.longest(self.difficulty)})

    def task(self, rng: random.Random, representation: str, *, split: Split, sequential_rate: float = 0.0) -> Task:
        """A random task of ``split``; its demonstration is sequential with probability ``sequential_rate``."""
        return self.generator.task(rng, self.difficulty, representation, split=split, sequential_rate=sequential_rate)

    def tasks(self, representation: str, num_tasks: int, *, seed: int, split: Split) -> list[Task]:
        """``num_tasks`` tasks; task i is the same instance in every representation."""
        return self.generator.tasks(self.difficulty, representation, num_tasks, seed=seed, split=split)

    def vocabulary(self) -> list[str]:
        """All words of its tasks, for a tiny model. Raises DataError where they are not a closed set."""
        return self.generator.vocabulary(self.difficulty)

    @model_validator(mode="after")
    def _reward_reads_its_answers(self) -> Self:
        if self.reward == "paper":
            raise ValueError(
                'reward = "paper" compares an answer such as "80 min" as text, so that "80 minutes" would be wrong: '
                'generated tasks need reward = "strict"'
            )
        return self


class PlansData(GeneratedData):
    """Async planning: the longest path of a DAG of steps."""

    kind: Literal["async_plan"]
    difficulty: Difficulty = Difficulty()


class RoutesData(GeneratedData):
    """The cheapest route between two places of a map."""

    kind: Literal["routes"]
    difficulty: RouteDifficulty = RouteDifficulty()


class ArithmeticData(GeneratedData):
    """The value of an expression: as a word problem, a graph, a program or a formula."""

    kind: Literal["arithmetic"]
    difficulty: ArithmeticDifficulty = ArithmeticDifficulty()


class JsonlData(Section):
    """JSON Lines with the keys ``question`` and ``answer``; row i of all files is the same procedure."""

    kind: Literal["jsonl"]
    family: Family
    reward: Reward = "strict"  # or "paper": the reward of arXiv 2602.03542, for comparisons with it
    files: dict[str, str] = Field(min_length=1)  # representation -> path, relative to the recipe's folder
    # files that are evaluated on alone, such as an official test split; training then takes all rows of ``files``
    eval_files: dict[str, str] = {}
    eval_share: float = Field(0.1, gt=0, lt=1)  # share of the procedures that is kept for evaluation
    # share of the training procedures that no stage trains on: the loss of their demonstrations is logged
    validation_share: float = Field(0.0, ge=0, lt=1)
    split_seed: int = 0
    max_prompt_tok: int = Field(2048, ge=1)  # longer rows are left out, and counted

    def idle(self) -> dict[KeyPath, str]:
        if not self.eval_files:
            return {}
        why = "eval_files holds what is evaluated on"
        keys = ("eval_share",) if self.validation_share else ("eval_share", "split_seed")
        return {(key,): why for key in keys}

    @property
    def representations(self) -> tuple[str, ...]:
        """Of the rows that are trained on."""
        return tuple(self.files)

    @property
    def eval_representations(self) -> tuple[str, ...]:
        return tuple(self.eval_files or self.files)

    def located(self, folder: Path) -> dict[str, Any]:
        """The keys that name files, as absolute paths; ``folder``: of the recipe."""
        return {
            key: {form: resolve(path, folder) for form, path in files.items()}
            for key, files in (("files", self.files), ("eval_files", self.eval_files))
        }

    @model_validator(mode="after")
    def _family_has_the_reward(self) -> "JsonlData":
        check_reward(self.family, self.reward)
        return self


Data = PlansData | RoutesData | ArithmeticData | JsonlData | RowsData | ReasoningGymData


def evaluated_on(data: Data) -> tuple[str, ...] | None:
    """The representations that ``data`` can be evaluated on; None where only the rows tell."""
    return data.eval_representations if isinstance(data, JsonlData) else data.representations


def refuse_shared_instances(trained: "Recipe", evaluated: "Recipe") -> None:
    """Raises ValueError where ``trained`` may train on generated instances that [eval] of ``evaluated`` asks.

    Each split_by divides the instances of a kind among training and exams in a way of its own.
    """
    parts = dict.fromkeys(part.data for stage in trained.stage for part in stage.mixture)
    for name in parts:
        data = trained.data[name]
        for one in evaluated.eval.all_sets:
            asked = evaluated.data[one.data]
            if not isinstance(data, GeneratedData) or not isinstance(asked, GeneratedData) or data.kind != asked.kind:
                continue
            own, other = data.difficulty.split_by, asked.difficulty.split_by
            if own != other:
                raise ValueError(
                    f"data.{name} has split_by = {own!r} and data.{one.data}, which [eval] asks, {other!r}: what is "
                    "trained on may be asked in the evaluation. Give both the same split_by"
                )


class Recipe(EngineConfig):
    """A whole recipe: the engine's tables, data, stages and evaluation."""

    data: dict[str, Annotated[Data, Field(discriminator="kind")]] = Field(min_length=1)
    stage: tuple[StageRecipe, ...] = Field(min_length=1)
    eval: EvalConfig
    _folder: Path = PrivateAttr(Path())

    def model_post_init(self, context: Any) -> None:
        """Takes the recipe's folder from ``context``, as ``load_recipe`` gives it."""
        self._folder = (context or {}).get("folder", Path())

    @property
    def folder(self) -> Path:
        """The folder of the recipe's file, which paths of data are relative to; without a file the working folder."""
        return self._folder

    def idle(self) -> dict[KeyPath, str]:
        keys = super().idle()
        used = {part.data for stage in self.stage for part in stage.mixture} | {one.data for one in self.eval.all_sets}
        keys |= {("data", name): "no stage and no [eval] uses it" for name in self.data if name not in used}
        for i, stage in enumerate(self.stage):
            for j, part in enumerate(stage.mixture):
                if not isinstance(self.data[part.data], GeneratedData):
                    keys[("stage", i, "mixture", j, "sequential_rate")] = "its demonstrations are not generated"
            tables = [self.data[part.data] for part in stage.mixture]
            if all(isinstance(table, RewardTable) and table.combine == "normalized" for table in tables):
                why = 'combine = "normalized" gives the advantages'
                keys |= {("stage", i, "objective", key): why for key in ("baseline", "scale")}
        if all(stage.objective.is_supervised for stage in self.stage):
            keys[("sampler", "overlap")] = "no stage draws responses step by step"
        is_drawn = any(isinstance(self.data[one.data], GeneratedData) for one in self.eval.all_sets)
        if not is_drawn and not self.eval.samples:
            keys[("eval", "seed")] = (
                "its questions are not generated; data.NAME.split_seed chooses the held-out ones of files"
            )
        if not is_drawn:
            keys[("eval", "split")] = "its questions are not generated"
        if self.model.tiny is not None and all(isinstance(data, GeneratedData) for data in self.data.values()):
            keys[("model", "tiny", "max_words")] = "the words of generated tasks are a closed set"
        supervised = {part.data for stage in self.stage if stage.has_demonstrations for part in stage.mixture}
        for name, data in self.data.items():
            if isinstance(data, PlansData) and name not in supervised and data.difficulty.form != "terse":
                keys[("data", name, "difficulty", "demonstration")] = "no supervised stage uses it"
            if isinstance(data, JsonlData) and name not in supervised and data.validation_share:
                keys[("data", name, "validation_share")] = "no supervised stage uses its demonstrations"
        return {**keys, **self._idle_between_stages()}

    @property
    def evaluation_sets(self) -> tuple[EvalSet, ...]:
        """The sets of [eval], each with its name and all its representations, None where only the rows tell."""
        return tuple(
            one.model_copy(update={"representations": one.representations or evaluated_on(self.data[one.data])})
            for one in self.eval.all_sets
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``sampling.stop`` of the last stage that samples: evaluations end their responses by the same strings."""
        sampled = [stage.sampling.stop for stage in self.stage if not stage.objective.is_supervised]
        return sampled[-1] if sampled else ()

    @property
    def warm_up_label(self) -> str:
        """The label of the last evaluation before the first RL stage: ``START``, or the last supervised stage's name.

        Supervised stages after an RL stage do not count.
        """
        label = START
        for stage in self.stage:
            if not stage.has_demonstrations:
                break
            label = stage.name
        return label

    def _idle_between_stages(self) -> dict[KeyPath, str]:
        why = "the first stage has no optimizer state to carry over"
        keys: dict[KeyPath, str] = {("stage", 0, "optimizer_state"): why}
        needs = [stage.objective.needs_reference for stage in self.stage]
        for i in range(len(self.stage)):
            if not any(needs[:i]) or not any(needs[i:]):
                keys[("stage", i, "reference")] = "no stage before it, or no stage from it on, has a KL term"
        total = sum(stage.steps for stage in self.stage)
        if self.run.profile is not None and self.run.profile[0] > total:
            keys[("run", "profile")] = f"the run has {total} steps"
        return keys

    @model_validator(mode="after")
    def _names_exist(self) -> "Recipe":
        names = [stage.name for stage in self.stage]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have different names, got {', '.join(names)}")
        for name in names:
            if name == START or step_of(name) is not None:
                raise ValueError(f"a stage must not be called {name!r}, as evaluations are: give it another name")
        for stage in self.stage:
            for part in stage.mixture:
                where = f"stage {stage.name!r}"
                data = self._named(part.data, where)
                self._check_form(part.data, part.representation, data.representations, where)
                if isinstance(data, EnvironmentTable) and data.has_turns and stage.star is not None:
                    raise ValueError(f"{where}: star is not supported with an environment or tools")
                if isinstance(data, RewardTable) and not stage.has_demonstrations:
                    data.refuse_unrewarded(part.data, f"stage {stage.name!r}")
                    data.refuse_stage(stage)
                if isinstance(data, GeneratedData) and part.representation in data.generator.held_out:
                    raise ValueError(f"stage {stage.name!r}: {part.representation!r} is for evaluation only")
        for one in self.eval.all_sets:
            data = self._named(one.data, "eval")
            for representation in one.representations or ():
                self._check_form(one.data, representation, evaluated_on(data), "eval")
            if isinstance(data, RewardTable):
                data.refuse_unrewarded(one.data, "[eval]")
                data.refuse_evaluation(self.eval.max_new_tok, f"[eval] of data {one.data!r}: eval.max_new_tok")
        return self

    @model_validator(mode="after")
    def _evaluation_is_kept_apart(self) -> "Recipe":
        refuse_shared_instances(self, self)
        return self

    @model_validator(mode="after")
    def _rewards_are_told_apart(self) -> "Recipe":
        """Rewards of several tables under one name are one column of steps.jsonl: they must be one function."""
        known: dict[str, tuple[str, str]] = {}
        for name, data in self.data.items():
            for entry in data.rewards if isinstance(data, RewardTable) else ():
                before, function = known.setdefault(entry.label, (name, entry.normal_place))
                if function != entry.normal_place:
                    raise ValueError(
                        f"rewards of data.{before} and data.{name} would both be logged as {entry.label!r}, and are "
                        f'different functions, {function} and {entry.normal_place}: give one of them name = "..."'
                    )
        return self

    @model_validator(mode="after")
    def _sampler_says_what_it_keeps(self) -> "Recipe":
        for stage in self.stage:
            if self.sampler.kind == "vllm" and stage.sampling.truncation.is_on:
                raise ValueError(f"stage {stage.name!r}: {NO_KEPT_TOKENS}")
        return self

    @model_validator(mode="after")
    def _overlap_is_possible(self) -> "Recipe":
        for stage in self.stage if self.sampler.overlap else ():
            refuse_overlap(stage)
        return self

    def _named(self, data: str, where: str) -> Data:
        if data not in self.data:
            raise ValueError(f"{where}: no [data.{data}]; there is {', '.join(sorted(self.data))}")
        return self.data[data]

    def _check_form(self, data: str, representation: str, known: tuple[str, ...] | None, where: str) -> None:
        if known is not None and representation not in known:
            raise ValueError(
                f"{where}: data {data!r} has no representation {representation!r}, only {', '.join(known)}"
            )
