"""``[data.NAME]`` of kind "reasoning_gym": tasks that the package of that name generates."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rows.spec import ROWS, located_rewards

SCORER = RewardEntry(function="isomorph.curriculum.rows.gym:Scorer", name="reasoning_gym")
PROMPT = "{question}\nGive the final answer between <answer> and </answer>."


class ReasoningGymData(RewardTable, EnvironmentTable):
    """Tasks of reasoning-gym by name; a name is the representation of its tasks. No question is in both splits."""

    kind: Literal["reasoning_gym"]
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)  # name -> the arguments of its generator
    seed: int = Field(0, ge=0, lt=2**30)
    prompt: str = PROMPT  # a template over the keys of an entry: question, answer, metadata
    system: str | None = None  # the system prompt
    max_prompt_tok: int = Field(2048, ge=1)  # longer questions are left out, and counted
    rewards: tuple[RewardEntry, ...] = (SCORER,)  # default: the task's own scorer, on what the response states

    @property
    def family(self) -> str:
        return ROWS

    @property
    def representations(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    def located(self, folder: Path) -> dict[str, Any]:
        """The keys that name files, as absolute paths; ``folder``: of the recipe."""
        return {"rewards": located_rewards(self.rewards, folder), **self.located_code(folder)}

    @model_validator(mode="after")
    def _rows_are_its_own(self) -> "ReasoningGymData":
        if self.is_of_verifiers:
            raise ValueError('an environment of verifiers has rows of its own: set kind = "rows", without path')
        return self

    @field_validator("tasks")
    @classmethod
    def _seeds_are_ours(cls, tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, arguments in tasks.items():
            if taken := arguments.keys() & {"seed", "size"}:
                raise ValueError(
                    f"tasks.{name}.{min(taken)} cannot be given: seed is a key of the table, size has no end"
                )
        return tasks
