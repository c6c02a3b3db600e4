"""The kinds of generated tasks by name."""

from collections.abc import Mapping
from typing import Any

from isomorph.curriculum.tasks.arithmetic.generator import ARITHMETIC
from isomorph.curriculum.tasks.async_plan import PLANS
from isomorph.curriculum.tasks.generator import Generator
from isomorph.curriculum.tasks.routes.generator import ROUTES
from isomorph.curriculum.tasks.task import Task

AnyGenerator = Generator[Any, Any, Any]
GENERATORS: Mapping[str, AnyGenerator] = {generator.name: generator for generator in (PLANS, ROUTES, ARITHMETIC)}


def generator_of(task: Task) -> AnyGenerator | None:
    """The generator that ``task`` comes from; None of a task from a file."""
    generator = GENERATORS.get(task.family)
    return generator if generator is not None and task.difficulty and generator.view(task.row) is not None else None
