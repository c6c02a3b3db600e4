"""``[data.NAME]`` of kind "rows": anyone's rows, as prompts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.paths import resolve
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.engine.effect import KeyPath

HUB = "hub:"  # before the name of a dataset on the Hugging Face hub
ROWS = "rows"  # the family of tasks whose rewards their [data.NAME] names
SHARE = 0.1  # kept for evaluation where the recipe does not say what is


def located_rewards(rewards: Iterable[RewardEntry], folder: Path) -> list[dict[str, Any]]:
    """The entries with an absolute path where their function stands in a file; ``folder``: of the recipe."""
    found = []
    for entry in rewards:
        where, _, name = entry.function.rpartition(":")
        function = f"{resolve(where, folder)}:{name}" if entry.is_file else entry.function
        found.append({**entry.model_dump(), "function": function})
    return found


class RowsData(RewardTable, EnvironmentTable):
    """Rows of a file, a folder or a dataset of the hub.

    A column is named by its name, what lies inside one by a dotted name (``reward_model.ground_truth``). A text with
    ``{column}`` in it is a template; ``{{`` and ``}}`` are braces.
    """

    kind: Literal["rows"]
    # .jsonl, .json, .parquet, .csv, .tsv, .arrow, a folder of one of these, "hub:NAME" or "hub:NAME@REVISION"; None:
    # the rows of the environment, which is one of verifiers
    path: str | None = None
    split: str | None = None  # of a hub dataset or a folder, such as "train"; of an environment "train" or "eval"
    subset: str | None = None  # of a hub dataset: its configuration
    eval_path: str | None = None  # rows for evaluation, where they lie apart
    eval_split: str | None = None  # their split, of eval_path or of path
    eval_share: float | None = Field(None, gt=0, lt=1)  # share of the prompts kept for evaluation; None: SHARE
    split_seed: int = 0  # chooses them, and the examples
    prompt: str = "prompt"  # a column of text or of chat messages, or a template
    system: str | None = None  # the system prompt
    examples: int = Field(0, ge=0)  # few-shot: training rows, shown before every question with their answers
    chat_template: str | None = None  # a Jinja file in place of the tokenizer's chat template
    chat_arguments: dict[str, Any] = {}  # what the chat template is rendered with, such as enable_thinking
    answer: str | None = None  # a column or a template: what the reward is handed as the accepted answer
    representation: str = "natural"  # the label of all rows
    representation_column: str | None = None  # a column with the label of each
    demonstration: str | None = None  # a column, of text or of messages, or a template: the response of sft stages
    # of a row with a list of demonstrations: in each pass one at random, or all of them
    demonstration_choice: Literal["one", "all"] = "one"
    demonstrations_accepted: bool = False  # only demonstrations that the first reward finds right; others are counted
    max_prompt_tok: int = Field(2048, ge=1)  # longer rows are left out, and counted

    @property
    def family(self) -> str:
        return ROWS

    @property
    def representations(self) -> tuple[str, ...] | None:
        """The labels of its rows; None where only the rows tell."""
        return None if self.representation_column else (self.representation,)

    @property
    def origin(self) -> str:
        """Where its rows come from, for messages."""
        return self.path or str(self.environment)

    @property
    def share(self) -> float | None:
        """Share of the prompts that is kept for evaluation; None where the rows for it lie apart."""
        return None if self.has_eval_rows else (self.eval_share or SHARE)

    @property
    def has_eval_rows(self) -> bool:
        return self.eval_path is not None or self.eval_split is not None

    def idle(self) -> dict[KeyPath, str]:
        keys = super().idle()
        if self.representation_column:
            keys[("representation",)] = "representation_column gives the labels"
        if self.demonstration is None:
            why = "demonstration names no column"
            keys |= {(key,): why for key in ("demonstration_choice", "demonstrations_accepted")}
        if self.has_eval_rows and not self.examples:
            keys[("split_seed",)] = "the rows for evaluation lie apart, and there are no examples"
        return keys

    def located(self, folder: Path) -> dict[str, Any]:
        """The keys that name files, as absolute paths; ``folder``: of the recipe."""
        found = {key: getattr(self, key) for key in ("path", "eval_path", "chat_template")}
        paths = {k: v if v is None or v.startswith(HUB) else resolve(v, folder) for k, v in found.items()}
        return {**paths, "rewards": located_rewards(self.rewards, folder), **self.located_code(folder)}

    @model_validator(mode="after")
    def _accepted_by_rewards(self) -> "RowsData":
        if self.demonstrations_accepted and not self.rewards:
            raise ValueError("demonstrations_accepted needs rewards, which say whether a demonstration is right")
        return self

    @model_validator(mode="after")
    def _one_source_of_evaluation(self) -> "RowsData":
        if self.has_eval_rows and self.eval_share is not None:
            raise ValueError("eval_share splits path: it cannot be given with eval_path or eval_split")
        if self.examples and self.answer is None and self.demonstration is None:
            raise ValueError("examples show their answers: give answer or demonstration")
        if self.subset is not None and not (self.path or "").startswith(HUB):
            raise ValueError('subset is of a hub dataset: path must begin with "hub:"')
        if self.path is None and not self.is_of_verifiers:
            raise ValueError('path must be given: only an environment "verifiers:NAME" has rows of its own')
        return self
