"""A study's runs: the recipe of each condition and seed, checked before the first run starts, and their identities.

An identity is a hash of all that determines a run's result. A run whose identity has changed is not reused.
"""

import hashlib
import importlib.metadata
import json
import math
import os
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from isomorph.curriculum.inputs import describe_files, located
from isomorph.curriculum.recipe import Recipe, refuse_shared_instances
from isomorph.curriculum.study.spec import WARM_START, StudySpec, Tables, read_study
from isomorph.curriculum.version import installed_version
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import load_recipe, load_variant

# of [run]: what changes neither a run's weights nor its evaluations, up to rounding
NO_EFFECT = (
    *("threads", "checkpoint_every", "keep_checkpoints", "checkpoint_in_background"),
    *("completions_every", "profile", "push_to_hub"),
)
WARM_SEED = 1_000_000  # is added to a seed for its warm start, so that RL does not begin with the warm start's tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of a study: a condition with a seed, or the warm start of a seed."""

    condition: str  # WARM_START for a warm start
    seed: int
    recipe: Recipe
    folder: Path
    warm: Path | None  # folder of the warm start whose model it begins with

    @property
    def name(self) -> str:
        return f"{self.condition}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return num_steps(self.recipe)


def num_steps(recipe: Recipe) -> int:
    """The most steps that its stages make."""
    return sum(stage.steps for stage in recipe.stage)


class Design:
    """A study's file with the recipes of all its runs. ``out``: the study's folder."""

    def __init__(self, file: Path, out: Path | None = None) -> None:
        """Raises UserError where the file or a condition's recipe is wrong, with the condition's name and the key."""
        self.file = file
        self.spec: StudySpec = read_study(file)
        self.out = out or file.parent / self.spec.study.name
        self.base = file.parent / self.spec.study.recipe
        self._weights: dict[str, str] = {}  # file of a base model -> SHA-256
        self._check()

    @property
    def jobs_threads(self) -> tuple[int | None, int]:
        """Runs at a time, None: not said; and threads of each."""
        table = self.spec.study
        return table.jobs, table.threads or self._any_recipe().run.threads or 1

    def runs(self, conditions: tuple[str, ...], seeds: tuple[int, ...]) -> list[PlannedRun]:
        """Seed by seed: the warm start, then the conditions. So the first results are pairs already."""
        planned = []
        for seed in seeds:
            if self.spec.warm_start is not None:
                planned.append(self.warm_run(seed))
            planned += [self.run(name, seed) for name in conditions]
        return planned

    def check_first_models(self, seeds: tuple[int, ...]) -> None:
        """Raises UserError where the warm start of one of ``seeds`` begins with a model that is not there."""
        for seed in seeds:
            model = self._first_model(seed)
            if model is not None and not (model / "config.json").is_file():
                raise UserError(
                    f"{self.file}: warm_start.model: seed {seed} needs a model folder with config.json, and {model} is "
                    "none: train it first, or choose other seeds with --seeds"
                )

    def warm_folder(self, seed: int) -> Path | None:
        return None if self.spec.warm_start is None else self.out / WARM_START / f"seed{seed}"

    def warm_run(self, seed: int) -> PlannedRun:
        """The warm start of a seed: it is evaluated at its end only."""
        warm, folder = self.spec.warm_start, self.warm_folder(seed)
        assert warm is not None and folder is not None
        run = {"seed": seed + WARM_SEED, "threads": self.jobs_threads[1]}
        where = f"{self.file}: warm_start"
        if warm.stage is None:
            assert warm.recipe is not None
            recipe = load_variant(
                self.file.parent / warm.recipe, {"run": run, "eval": {"every": 0}}, Recipe, where=where
            )
        else:
            own: Tables = {"run": run, "eval": {"every": 0}, "stage": [dict(stage) for stage in warm.stage]}
            own, without = self._beginning_with(self._first_model(seed), own)
            recipe = load_variant(self.base, own, Recipe, without=without, where=where)
        return PlannedRun(condition=WARM_START, seed=seed, recipe=recipe, folder=folder, warm=None)

    def run(self, condition: str, seed: int) -> PlannedRun:
        """One condition with one seed."""
        warm = self.warm_folder(seed)
        recipe = self._condition(condition, {"seed": seed, "threads": self.jobs_threads[1]}, warm)
        return PlannedRun(
            condition=condition,
            seed=seed,
            recipe=recipe,
            folder=self.out / "runs" / f"{condition}-seed{seed}",
            warm=warm,
        )

    def test_recipe(self, condition: str, seed: int) -> Recipe:
        """The condition's recipe with the test exam in place of [eval]. Raises UserError without [test]."""
        if self.spec.test is None:
            raise UserError(
                f"{self.file}: --test needs a table [test]: what the test exam has in place of keys of [eval], for "
                'example split = "test", prompts = 1000'
            )
        return self._condition(condition, {"seed": seed}, self.warm_folder(seed), self.spec.test)

    def identity(self, run: PlannedRun, warm_weights: str | None) -> str:
        """A hash of the recipe, the files and the weights it reads, and the versions.

        ``warm_weights``: hash of the weights of the run's warm start, which has to be finished; None without one.
        """
        recipe = located(run.recipe)
        tables = run.recipe.model_dump(mode="json")
        tables.pop("log")
        tables["run"] = {key: value for key, value in tables["run"].items() if key not in NO_EFFECT}
        files = {place: entry["sha256"] for place, entry in describe_files(recipe).items()}
        weights: Any = warm_weights
        first = self._first_model(run.seed) if run.condition == WARM_START else None
        if first is not None:
            weights = self._weights_of(first)
        if run.warm is not None or first is not None:
            tables["model"].pop("path")  # the weights count, not where they are
            files = {place: value for place, value in files.items() if not place.startswith("model.path/")}
        elif recipe.model.path is not None:
            weights = self._weights_of(Path(os.path.expanduser(recipe.model.path)))
        versions = {"isomorph": installed_version(), "torch": importlib.metadata.version("torch")}
        text = json.dumps([tables, files, weights, versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def identities(self, warm_rows: dict[int, Tables]) -> dict[str, str]:
        """Run -> identity, where the warm start is the design's. ``warm_rows``: seed -> its row of runs.jsonl."""
        found = {}
        for run in self.runs(tuple(self.spec.condition), self.spec.study.seeds):
            row = warm_rows.get(run.seed)
            if run.warm is None:
                found[run.name] = self.identity(run, None)
            elif row is not None and row["identity"] == found[f"{WARM_START}-seed{run.seed}"]:
                found[run.name] = self.identity(run, row["weights_sha256"])
        return found

    def _weights_of(self, path: Path) -> dict[str, str]:
        """Of a folder or a .gguf file; {} for a hub name, whose weights are those of its name."""
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        for file in found:
            if str(file) not in self._weights:
                with file.open("rb") as opened:
                    self._weights[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
        return {file.name: self._weights[str(file)] for file in found}

    def _condition(self, name: str, run: Tables, warm: Path | None, test: Tables | None = None) -> Recipe:
        own: Tables = {**self.spec.condition[name].tables(), "run": dict(run)}
        own, without = self._beginning_with(warm and warm / "model", own)
        if test is not None:
            own["eval"] = dict(test)
            if "sets" in test:
                without += [("eval", key) for key in ("data", "representations", "prompts")]
        where = f"{self.file}: {'test' if test is not None else f'condition.{name}'}"
        recipe = load_variant(self.base, own, Recipe, without=without, where=where)
        return recipe if test is not None else self._keeping_models(recipe)

    @staticmethod
    def _beginning_with(model: Path | None, tables: Tables) -> tuple[Tables, list[tuple[str, ...]]]:
        """``tables`` with the path of ``model``, and the keys of the study's recipe that it replaces."""
        if model is None:
            return tables, []
        return {**tables, "model": {"path": str(model.resolve())}}, [("model", "tiny"), ("model", "path")]

    def _first_model(self, seed: int) -> Path | None:
        """The folder that the warm start of a seed begins with; None: the recipe's model."""
        if self.spec.warm_start is None or self.spec.warm_start.model is None:
            return None
        return self.file.parent / self.spec.warm_start.model.format(seed=seed, warm_seed=seed + WARM_SEED)

    def _keeping_models(self, recipe: Recipe) -> Recipe:
        """With a checkpoint at each budget of the test exam, none of which is deleted."""
        budgets = [step for step in self.spec.test_budgets if step != num_steps(recipe)]
        if not budgets:
            return recipe
        every = math.gcd(recipe.run.checkpoint_every, *budgets)
        run = recipe.run.model_copy(
            update={"checkpoint_every": every, "keep_checkpoints": num_steps(recipe) // every + 1}
        )
        changed = recipe.model_copy(update={"run": run})  # keeps the recipe's folder
        return changed

    def _any_recipe(self) -> Recipe:
        name = self.spec.study.baseline
        return load_variant(self.base, self.spec.condition[name].tables(), Recipe, where=f"{self.file}: {name}")

    def _check(self) -> None:
        """All that can be wrong before the first run. Raises UserError."""
        table = self.spec.study
        seed = table.seeds[0]
        warm = None
        if self.spec.warm_start is not None:
            warm = self.warm_run(seed).recipe
            if self.spec.warm_start.recipe is not None:  # by itself, so that its own keys are checked, too
                load_recipe(self.file.parent / self.spec.warm_start.recipe, [], Recipe)
        recipes = {name: self.run(name, seed).recipe for name in self.spec.condition}
        for name, recipe in recipes.items():
            if warm is not None:
                self._refuse_shared(warm, recipe)
            self._check_budgets(name, recipe)
            known = _result_keys(recipe)
            if known is not None and (missing := [one for one in table.measure if one not in known]):
                raise UserError(
                    f"{self.file}: study.measure: [eval] has no {', '.join(missing)}, only {', '.join(known)}"
                )
            if self.spec.test is not None:
                self.test_recipe(name, seed)
        totals = {name: num_steps(recipe) for name, recipe in recipes.items()}
        if len(set(totals.values())) > 1 and not table.unequal:
            listed = ", ".join(f"{name} {total}" for name, total in totals.items())
            raise UserError(
                f"{self.file}: conditions must have equal numbers of steps, got {listed}: make them equal, or set "
                "study.unequal = true"
            )

    def _refuse_shared(self, warm: Recipe, recipe: Recipe) -> None:
        try:
            refuse_shared_instances(warm, recipe)
        except ValueError as error:
            raise UserError(f"{self.file}: warm_start: {error}") from None

    def _check_budgets(self, name: str, recipe: Recipe) -> None:
        total, every, budgets = num_steps(recipe), recipe.eval.every, self.spec.study.budgets
        if budgets[-1] > total and not self.spec.study.unequal:
            raise UserError(f"{self.file}: study.budgets: condition.{name} has {total} steps, got {budgets[-1]}")
        evaluated = {*accumulate(stage.steps for stage in recipe.stage)}
        missing = [b for b in budgets if b <= total and b not in evaluated and not (every and b % every == 0)]
        if missing:
            raise UserError(
                f"{self.file}: condition.{name} has no evaluation after {', '.join(map(str, missing))} steps: set "
                f"eval.every = {math.gcd(*budgets)} in {self.base}, or choose other budgets"
            )


def _result_keys(recipe: Recipe) -> list[str] | None:
    """What results are listed under; None where only the data's rows tell."""
    sets = recipe.evaluation_sets
    if any(one.representations is None for one in sets):
        return None
    return [one.key(form, len(sets)) for one in sets for form in one.representations or ()]
