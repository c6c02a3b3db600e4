"""The environments and tools of a recipe: loaded and checked before the first step, and asked for prompts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Self

from isomorph.curriculum.environments.calls import CallFormat
from isomorph.curriculum.environments.dialogue import EnvironmentDialogue, Turns, seed_of
from isomorph.curriculum.environments.pool import EnvironmentPool
from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.environments.template import call_format
from isomorph.curriculum.environments.worker import EnvironmentSpec
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.reply import ReplyFormat
from isomorph.engine.model.text import ChatFormat, TextCodec
from isomorph.engine.types import RunFailed

MOST_FAILING = 20  # rows in succession on which an environment does not begin


class Environments:
    """What a recipe's ``[data.NAME]`` tables say of several turns. A context manager: leaving it ends the workers."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        log: Path | None = None,
        say: Callable[[str], None] = lambda sentence: None,
        is_alone: bool = True,
    ) -> None:
        """``log``: the file that what environments print is appended to. ``say``: prints a warning.

        ``is_alone``: there is one rank. Several must leave out the same rows, so that a late reset ends their run.
        """
        self.is_alone = is_alone
        self.seed = recipe.run.seed
        self.pool = EnvironmentPool(log=log, say=say)
        self.tables = {
            name: data for name, data in recipe.data.items() if isinstance(data, EnvironmentTable) and data.has_turns
        }
        self.specs: dict[str, EnvironmentSpec] = {}
        self.turns: dict[str, Turns] = {}
        self.with_tools: set[str] = set()  # names of data with tools
        self.with_step: set[str] = set()  # names of data whose environment has a step
        self.num_skipped = 0  # rows on which an environment did not begin
        self._failing = 0  # of those, in succession
        self.say = say

    def load(self, text: TextCodec) -> None:
        """Loads environments and tools in a worker, and tells ``text`` of the tools. Raises UserError.

        Call it before prompts are measured, which tell the model of its tools.
        """
        self.text = text
        for name, table in self.tables.items():
            spec = EnvironmentSpec(
                environment=table.environment,
                tools=table.tools,
                arguments=table.environment_arguments,
                deadline_s=table.turn_deadline_s,
                calls=CallFormat(),
                max_turns=table.max_turns,
            )
            found = self.pool.describe(spec, f"data.{name}")
            if table.tools or found.has_tools:
                self.with_tools.add(name)
                template, arguments = _chat_format(table)
                spec = dataclasses.replace(spec, calls=call_format(self.text, template, arguments))
                if spec.calls.is_json:
                    found = self.pool.describe(spec, f"data.{name}")
            self.specs[name] = spec
            self.text.tools[name] = found.schemas
            self.with_step |= {name} if found.has_step else set()

    def start(self) -> None:
        """When ``text`` knows the chat formats. Raises UserError where a chat cannot go on after the model's turn."""
        for name, table in self.tables.items():
            template = self.text.formats.get(name, ChatFormat()).template
            format = ReplyFormat(self.text, template=template, arguments=self.text.chat_arguments(name))
            roles = {"user": name in self.with_step, "tool": name in self.with_tools}
            format.check([role for role, is_used in roles.items() if is_used])
            self.turns[name] = Turns(self.specs[name], table.max_turns, format)
        if self.turns:
            self.pool.warm()

    def begun(self, task: Task) -> Task | None:
        """``task`` with the messages that its environment begins with; None where that fails on its row."""
        spec = self.specs.get(task.data)
        if spec is None or spec.environment is None:
            return task
        outcome = self.pool.reset(spec, task.row, seed_of(self.seed, task))
        if outcome.failed:
            self.num_skipped += 1
            self._failing += 1
            row = task.place or "a row"
            sentence = f"data.{task.data}: environment {spec.environment} does not begin on {row}: {outcome.failed}"
            if (outcome.is_late or outcome.is_crash) and not self.is_alone:
                raise RunFailed(f"{sentence}; several ranks cannot leave it out, because others may not have: mend it")
            if self._failing == MOST_FAILING:
                raise UserError(f"{sentence}; nor on the {MOST_FAILING - 1} rows before it")
            if self.num_skipped == 1:
                self.say(f"warning: {sentence}; the row is left out, and further ones are only counted")
            return None
        self._failing = 0
        if outcome.added:
            *before, last = task.messages or ({"role": "user", "content": task.question},)
            last = {**last, "content": f"{last['content']}{outcome.added}"}
            return dataclasses.replace(task, question=last["content"], messages=(*before, last))
        if not outcome.messages:
            return task
        shown = tuple(m for m in task.messages or () if m["role"] == "system")[:1]
        own = outcome.messages if outcome.messages[0]["role"] == "system" else (*shown, *outcome.messages)
        return dataclasses.replace(task, question=outcome.messages[-1]["content"], messages=own)

    def dialogue(self) -> EnvironmentDialogue | None:
        """The engine's Dialogue; None where every rollout has one turn."""
        return EnvironmentDialogue(self.turns, self.pool, self.text.decode, self.seed) if self.turns else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.close()


def _chat_format(table: EnvironmentTable) -> tuple[str | None, dict[str, object]]:
    path = getattr(table, "chat_template", None)
    try:
        template = None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: must be a readable file: {error}") from error
    return template, dict(getattr(table, "chat_arguments", {}))
