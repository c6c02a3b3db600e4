"""What ``isomorph eval`` asks: sets of a recipe, files of tasks, or generated tasks.

--data NAME                           a set of the recipe's [eval], or one of its [data.NAME]
       NAME:REPRESENTATION            one representation of it
       FAMILY:REPRESENTATION          what [eval] asks of that family, or generated tasks
       FAMILY:REPRESENTATION=FILE     JSON Lines with the keys question and answer
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isomorph.curriculum.environments.open import Environments
from isomorph.curriculum.evaluation import Asked, evaluation_keys, evaluation_tasks
from isomorph.curriculum.evaluation_spec import EvalSet
from isomorph.curriculum.lengths import LengthLimits
from isomorph.curriculum.recipe import Recipe, evaluated_on
from isomorph.curriculum.rewards.families import ASYNC_PLAN, FAMILIES
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.table_judge import TableJudge, rewarded_sources
from isomorph.curriculum.sources import Source, open_sources
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.curriculum.tasks.kinds import GENERATORS
from isomorph.curriculum.tasks.task import Split
from isomorph.engine.config import UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import Dialogue, Judge

PROMPTS = 100  # per representation, where no recipe says how many
SEED = 999  # of questions and samples, where no recipe has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """What one model is asked, how its responses are rewarded, and who replies to them in several turns."""

    asked: list[Asked]
    judge: Judge
    dialogue: Dialogue | None


@contextlib.contextmanager
def open_exam(
    policy: Policy,
    recipe: Recipe | None,
    wanted: Sequence[str],
    *,
    prompts: int | None,
    max_new_tok: int,
    split: Split = "dev",
    say: Callable[[str], None],
) -> Iterator[Exam]:
    """Tells ``policy`` the chat formats of its questions. Closes reward functions and environments at the end.

    ``prompts``: per representation; None: what the recipe says, or PROMPTS. ``split``: of generated questions that are
    not the recipe's. Rows that are too long for ``policy`` in
    the recipe are left out. Raises UserError and DataError.
    """
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(RewardPool())
        if recipe is None:
            asked = [_of_family(text, None, prompts, split) for text in wanted]
            plans = ASYNC_PLAN.name
            asked = asked or [_drawn(plans, name, prompts, split) for name in GENERATORS[plans].representations]
            yield Exam(asked=asked, judge=pool, dialogue=None)
            return
        environments = stack.enter_context(Environments(recipe, say=say))
        environments.load(policy.text)
        limits = LengthLimits(recipe=recipe, text=policy.text, max_model_len=policy.max_model_len)
        known = _RecipeQuestions(recipe, open_sources(recipe, policy.text, limits), prompts)
        environments.start()
        rewarded = rewarded_sources(recipe.data, {name: source.columns for name, source in known.sources.items()})
        judge = TableJudge(rewarded, pool, say=say, seed=recipe.run.seed, max_new_tok=lambda prompt: max_new_tok)
        stack.enter_context(judge)
        judge.start()
        asked = [_begun(one, environments) for one in _of_recipe(known, wanted, split)]
        yield Exam(asked=asked, judge=judge, dialogue=environments.dialogue())


def _begun(asked: Asked, environments: Environments) -> Asked:
    """The tasks as their environments begin them, without those on which that fails."""
    begun = [environments.begun(task) for task in asked.tasks]
    tasks = tuple(task for task in begun if task is not None)
    if not tasks:
        raise UserError(f"{asked.key}: its environment begins on none of the {len(begun)} rows")
    return dataclasses.replace(asked, tasks=tasks)


def _of_recipe(known: "_RecipeQuestions", wanted: Sequence[str], split: Split) -> list[Asked]:
    if not wanted:
        keys = evaluation_keys(known.recipe, known.sources)
        return [known.asked(key, one, form) for key, (one, form) in keys.items()]
    sets = _sets_of(known.recipe)
    found: list[Asked] = []
    for text in wanted:
        name, _, form = text.partition(":")
        if name in sets:
            found += known.of_set(sets[name], form)
        else:
            found.append(_of_family(text, known, known.prompts, split))
    return found


@dataclass(frozen=True, slots=True)
class _RecipeQuestions:
    """The questions that the recipe's evaluations ask."""

    recipe: Recipe
    sources: dict[str, Source]
    prompts: int | None  # per representation, in place of the sets' own number

    def asked(self, key: str, one: EvalSet, form: str) -> Asked:
        return Asked(key=key, tasks=tuple(evaluation_tasks(self.recipe, self.sources, one, form, self.prompts)))

    def of_set(self, one: EvalSet, form: str) -> list[Asked]:
        """``form``: one of its representations; "": all of them."""
        forms = one.representations or self.sources[one.data].held_out_labels
        if form and form not in forms:
            raise UserError(f"--data {one.name}:{form}: the set has no {form!r}, only {', '.join(forms)}")
        return [self.asked(f"{one.name}:{form}", one, form) for form in ([form] if form else forms)]

    def of_family(self, family: str, form: str) -> Asked | None:
        """What [eval] asks of a family in one representation; None if nothing."""
        for one, label in evaluation_keys(self.recipe, self.sources).values():
            if (self.recipe.data[one.data].family, label) == (family, form):
                return self.asked(f"{family}:{form}", one, form)
        return None


def _sets_of(recipe: Recipe | None) -> dict[str, EvalSet]:
    """The recipe's sets by name, and its other data, of which a set could be made."""
    if recipe is None:
        return {}
    others = {
        name: EvalSet(data=name, name=name, representations=evaluated_on(data), prompts=PROMPTS)
        for name, data in recipe.data.items()
    }
    return others | {one.name: one for one in recipe.evaluation_sets}


def check_wanted(text: str, recipe: Recipe | None) -> None:
    """Raises UserError for a --data that can be nothing, before a model is loaded."""
    sets = _sets_of(recipe)
    if text.partition(":")[0] not in sets:
        _parse_family(text, tuple(sets))


def _parse_family(text: str, sets: Sequence[str]) -> tuple[str, str, Path | None]:
    name, equals, file = text.partition("=")
    family, _, representation = name.partition(":")
    if family not in FAMILIES or not representation or bool(equals) != bool(file):
        of_recipe = f"name a set or data of the recipe ({', '.join(sets)}), or " if sets else ""
        raise UserError(
            f"--data must {of_recipe}read FAMILY:REPRESENTATION or FAMILY:REPRESENTATION=FILE with a family of "
            f"{', '.join(FAMILIES)}; got {text!r}"
        )
    return family, representation, Path(os.path.expanduser(file)) if file else None


def _of_family(text: str, known: _RecipeQuestions | None, prompts: int | None, split: Split) -> Asked:
    family, representation, file = _parse_family(text, ())
    if file is not None:
        tasks = read_rows(file, family, representation, is_test=True)[: prompts or PROMPTS]
        return Asked(key=f"{family}:{representation}", tasks=tuple(tasks), noun="row")
    of_recipe = known.of_family(family, representation) if known else None
    if of_recipe is not None:
        return of_recipe
    if family not in GENERATORS:
        raise UserError(f"--data {text}: only {', '.join(GENERATORS)} tasks can be generated; name a file: {text}=FILE")
    known_forms = GENERATORS[family].representations
    if representation not in known_forms:
        raise UserError(f"--data {text}: the representation must be one of {', '.join(known_forms)}")
    return _drawn(family, representation, prompts, split)


def _drawn(family: str, representation: str, prompts: int | None, split: Split) -> Asked:
    generator = GENERATORS[family]
    tasks = generator.tasks(generator.difficulty(), representation, prompts or PROMPTS, seed=SEED, split=split)
    return Asked(key=f"{family}:{representation}", tasks=tuple(tasks))
