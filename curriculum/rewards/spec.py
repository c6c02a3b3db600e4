"""The keys of a ``[data.NAME]`` table that say how its responses are rewarded.

    rewards = [{ function = "rewards.py:right" }, { function = "formatted", weight = 0.2, arguments = {...} }]
    combine = "sum"            sum over k of weight[k] * reward[k]
              "product"        product over k of weight[k] * reward[k]
              "normalized"     each reward normalised within its group, then the weighted sum is the advantage (GDPO)

A function is one of ours by its bare name, ``file.py:name``, or ``package.module:name``. A reward that does not apply
to a response (it returned None) is left out of its sum or product. What ``overlong`` and an environment give is added.
"""

import difflib
import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from isomorph.curriculum.rewards.builtin import BUILTINS
from isomorph.curriculum.rewards.signature import OURS
from isomorph.engine.config import Section, Stage
from isomorph.engine.effect import KeyPath

Combine = Literal["sum", "product", "normalized"]
RESERVED = ("overlong", "environment")  # names that rewards of a table cannot have, because these are logged under them


class RewardEntry(Section):
    """One reward function with its weight."""

    function: str = Field(min_length=1)  # "exact", "file.py:name" or "package.module:name"
    weight: float = Field(1.0, allow_inf_nan=False)
    name: str | None = Field(None, pattern=r"^[\w.-]+$")  # it is logged under; None: the function's name
    arguments: dict[str, Any] = {}  # given to the function as keywords

    @property
    def label(self) -> str:
        """The name that the reward is logged under."""
        return self.name or self.function.rpartition(":")[2]

    @property
    def is_in_worker(self) -> bool:
        """Whether it runs in a process that is killed at a deadline."""
        return ":" in self.function or BUILTINS[self.function].in_worker

    @property
    def is_file(self) -> bool:
        """Whether ``function`` is ``file.py:name``."""
        return self.function.rpartition(":")[0].endswith(".py")

    @property
    def place(self) -> str:
        """``file.py:name`` or ``package.module:name``, also of one of our functions."""
        return self.function if ":" in self.function else f"{OURS}:{BUILTINS[self.function].function}"

    @property
    def normal_place(self) -> str:
        """``place`` with the shortest path of its file, for comparing."""
        where, _, name = self.place.rpartition(":")
        return f"{os.path.normpath(where)}:{name}" if self.is_file else self.place

    @field_validator("function")
    @classmethod
    def _is_ours_or_a_place(cls, function: str) -> str:
        where, colon, name = function.rpartition(":")
        if colon and where and name:
            return function
        if function in ("overlong", "mask_truncated"):
            raise ValueError(f"{function} is a key beside rewards, not a function: see docs/own-reward.md")
        if function not in BUILTINS:
            near = difflib.get_close_matches(function, BUILTINS, n=1)
            raise ValueError(
                f"function must be one of {', '.join(BUILTINS)}, or file.py:name, or package.module:name"
                f"{f' (did you mean {near[0]}?)' if near else ''}"
            )
        return function


class Overlong(Section):
    """Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), with L = ``sampling.max_new_tok``.

    A response of up to L - ``soft`` tokens has 0, one of L tokens or more -``penalty``, linear between them.
    """

    soft: int = Field(ge=1)  # tokens before the limit in which the punishment grows
    penalty: float = Field(1.0, gt=0, allow_inf_nan=False)


class RewardTable(Section):
    """What a ``[data.NAME]`` table says of rewards; of a response that a function fails on, that reward is worth 0."""

    rewards: tuple[RewardEntry, ...] = ()
    combine: Combine = "sum"
    on_error: Literal["zero", "stop"] = "zero"  # stop: the run ends with a checkpoint where a reward fails
    deadline_s: float = Field(5.0, gt=0, allow_inf_nan=False)  # of a call: for a group (TRL), or for a response
    overlong: Overlong | None = None
    mask_truncated: bool = False  # responses that were cut off at their length limit do not enter the loss

    @field_validator("rewards", mode="before")
    @classmethod
    def _are_tables(cls, rewards: Any) -> Any:
        entries = rewards if isinstance(rewards, list | tuple) else [rewards]
        if texts := [entry for entry in entries if isinstance(entry, str)]:
            raise ValueError(f'rewards must be a list of tables: rewards = [{{ function = "{texts[0]}" }}]')
        return rewards

    def idle(self) -> dict[KeyPath, str]:
        keys = super().idle()
        if not self.rewards:
            keys |= {(key,): "rewards is empty" for key in ("on_error", "deadline_s")}
        elif not any(entry.is_in_worker for entry in self.rewards):
            keys[("deadline_s",)] = "the time of these built-in rewards is bounded"
        extra = (self.overlong is not None) + (getattr(self, "environment", None) is not None)
        if len(self.rewards) + (extra if self.combine == "normalized" else 0) < 2:
            keys[("combine",)] = "there are not two rewards to combine"
        return keys

    @model_validator(mode="after")
    def _names_differ(self) -> "RewardTable":
        names = [entry.label for entry in self.rewards]
        for i, name in enumerate(names):
            if name in names[:i] or name in RESERVED:
                raise ValueError(
                    f'two rewards would be logged as {name!r}: give one of them another name = "..." in rewards[{i}]'
                )
        return self

    def refuse_unrewarded(self, name: str, where: str) -> None:
        """Raises ValueError where responses to this table, [data.``name``], would have no reward at all."""
        if not self.rewards and getattr(self, "environment", None) is None:
            raise ValueError(
                f'{where} needs rewards for data {name!r}: rewards = [{{ function = "rewards.py:right" }}] in '
                f"[data.{name}], or one of {', '.join(BUILTINS)}"
            )

    def refuse_evaluation(self, max_new_tok: int, where: str) -> None:
        """Raises ValueError where ``overlong`` would punish every response of an evaluation; ``where``: its limit."""
        if self.overlong is not None and self.overlong.soft > max_new_tok:
            raise ValueError(f"{where} must be at least overlong.soft, got {max_new_tok} and {self.overlong.soft}")

    def refuse_stage(self, stage: Stage) -> None:
        """Raises ValueError where the rewards do not go with the objective or the length limit of ``stage``."""
        most, objective = stage.sampling.max_new_tok, stage.objective
        if self.overlong is not None and self.overlong.soft > most:
            raise ValueError(
                f"stage {stage.name!r}: overlong.soft must be at most sampling.max_new_tok, got {self.overlong.soft} "
                f"and {most}"
            )
        if self.combine != "normalized":
            return
        if objective.name == "rft" or objective.reward_kl_coef:
            other = 'objective.name = "rft"' if objective.name == "rft" else "objective.reward_kl_coef"
            raise ValueError(
                f'stage {stage.name!r}: combine = "normalized" is not supported with {other}, which needs one reward '
                'for each response: set combine = "sum"'
            )
        if stage.sampling.samples_per_prompt < 2:
            raise ValueError(
                f'stage {stage.name!r}: samples_per_prompt must be >= 2 with combine = "normalized", which compares '
                f"the responses of a group, got {stage.sampling.samples_per_prompt}"
            )
