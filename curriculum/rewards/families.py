"""The task families by how their answers are scored: the one place in the program that names them.

To add a family, write its function and add an entry to ``FAMILIES``. Recipes, files of tasks, evaluation, the command
line and ``isomorph doctor`` read this table.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from isomorph.curriculum.rewards.answer import answer_text

Reward = Literal["strict", "paper"]  # which of a family's functions scores a response
REWARDS: tuple[str, ...] = get_args(Reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFamily:
    """A family of tasks whose answers are scored by one function.

    Functions are named ``module:function`` and imported where they are called, so that a family with large dependencies
    costs nothing where it is not used.
    """

    name: str
    function: str  # "strict": (stated answer, accepted answer) -> bool, or a float in 0..1; 1 is a right answer
    in_worker: bool = False  # run in a process that is killed at a deadline: time or memory of a call have no bound
    reads_boxed: bool = False  # without <answer>..</answer> the last \boxed{..} is the stated answer
    check_answer: str = "isomorph.curriculum.rewards.answer:check_not_empty"
    """(accepted answer) -> None; raises ValueError for one that cannot be used. Called in this process."""
    why_unreadable: str = ""
    """(accepted answer) -> the reason why ``function`` cannot read it, or "". Called in a worker, for whole files."""
    readable: re.Pattern[str] | None = None  # accepted answers that are known to be readable without a worker
    paper: str = ""  # the reward of arXiv 2602.03542: (response, accepted answer) -> bool; "": there is none
    why_no_paper: str = ""
    packages: tuple[str, ...] = ()  # what ``function`` imports beyond the base installation
    extra: str = ""  # the optional dependency that installs ``packages``


ASYNC_PLAN = RewardFamily(
    name="async_plan",
    function="isomorph.curriculum.rewards.plan:same_plan",
    check_answer="isomorph.curriculum.rewards.plan:accepted_plan",
    paper="isomorph.curriculum.rewards.plan:same_plan_by_paper",
)
MATH = RewardFamily(
    name="math",
    function="isomorph.curriculum.rewards.mathematics:same_expression",
    in_worker=True,
    reads_boxed=True,
    paper="isomorph.curriculum.rewards.paper:same_mathematics",
    packages=("sympy",),
    extra="math",
)
PHYSICS = RewardFamily(
    name="physics",
    function="isomorph.curriculum.rewards.quantity:same_physics",
    in_worker=True,
    why_unreadable="isomorph.curriculum.rewards.quantity:why_unreadable",
    readable=re.compile(
        r"[-+]?\d{1,20}(?:\.\d{1,20})?(?:[eE][-+]?\d{1,3})?(?: [A-Za-z%][A-Za-z0-9%^*/]{0,40})?", re.ASCII
    ),
    why_no_paper=(
        "the paper's function runs the response as Python code, and its tolerance of 100 % accepts every number of the "
        'right sign; use reward = "strict"'
    ),
    packages=("sympy", "pint"),
    extra="math",
)
ROUTES = RewardFamily(
    name="routes",
    function="isomorph.curriculum.rewards.plan:same_plan",
    check_answer="isomorph.curriculum.rewards.plan:accepted_plan",
    why_no_paper='the paper has no such tasks; use reward = "strict"',
)
ARITHMETIC = RewardFamily(
    name="arithmetic",
    function="isomorph.curriculum.rewards.plan:same_plan",
    check_answer="isomorph.curriculum.rewards.plan:accepted_plan",
    why_no_paper='the paper has no such tasks; use reward = "strict"',
)
FAMILIES: Mapping[str, RewardFamily] = {
    family.name: family for family in (ASYNC_PLAN, MATH, PHYSICS, ROUTES, ARITHMETIC)
}
GENERATED = (ASYNC_PLAN.name, ROUTES.name, ARITHMETIC.name)  # those that tasks can be generated of


def family_of(name: str) -> RewardFamily:
    """The family called ``name``. Raises ValueError where there is none."""
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def check_reward(family: str, reward: str) -> None:
    """Raises ValueError unless ``family`` has a reward of that name."""
    known = family_of(family)
    if reward not in REWARDS:
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {reward!r}")
    if reward == "paper" and not known.paper:
        raise ValueError(f'{family} has no reward "paper": {known.why_no_paper}')


def check_answer(family: str, answer: str | float) -> None:
    """Raises ValueError for an accepted answer that ``family`` cannot use, as far as this is known without a worker."""
    function(family_of(family).check_answer)(answer_text(answer))


@functools.cache
def function(path: str) -> Callable[..., Any]:
    """The function at ``module:function``."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def missing_packages(family: RewardFamily) -> list[str]:
    """Which of the family's packages are not installed."""
    return [name for name in family.packages if importlib.util.find_spec(name) is None]


def require_packages(family: RewardFamily) -> None:
    """Raises ImportError where a package that scores this family is not installed."""
    if missing := missing_packages(family):
        raise ImportError(
            f"scoring {family.name} needs {' and '.join(missing)}: pip install 'isomorph[{family.extra}]'"
        )
