"""docs/migration.md names keys that exist: ours in the schema, TRL's in the GRPOConfig that is installed."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from isomorph.curriculum.environments.spec import EnvironmentTable
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.rewards.spec import RewardTable
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.stage_spec import StageRecipe
from isomorph.engine.config import LoraConfig

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
MAPPED, UNMAPPED = PAGE.split("## What has no counterpart")
ROW = re.compile(r"^\| (?!---|isomorph|theirs)(.*) \|$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
KEY = re.compile(r"^[a-z0-9_]+$")
OF_STAGES = {"objective", "optim", "batch", "sampling"}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split(" | ")] for row in ROW.findall(text)]


def has(section: Any, path: list[str]) -> bool:
    return not path or (path[0] in section.model_fields and (len(path) == 1 or has_in(section, path)))


def has_in(section: Any, path: list[str]) -> bool:
    inner = section.model_fields[path[0]].annotation
    return hasattr(inner, "model_fields") and has(inner, path[1:])


def test_our_keys_are_in_the_schema() -> None:
    names = [name.partition(" = ")[0] for row in cells(MAPPED) for name in CODE.findall(row[0])]
    assert len(names) > 40
    for name in names:
        if name.startswith(("isomorph ", "[")):
            continue
        if any(name in table.model_fields for table in (RowsData, RewardTable, EnvironmentTable)):
            continue
        table, *path = name.split(".")
        if table == "stage" or table in OF_STAGES:
            found = has(StageRecipe, path if table == "stage" else [table, *path])
        else:
            found = has(Recipe, [table, *path]) or has(LoraConfig, [table])
        assert found, name


def test_trls_keys_are_fields_of_its_config_and_all_that_it_adds_are_named() -> None:
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    theirs = {name for row in cells(MAPPED) for name in CODE.findall(row[1]) if KEY.match(name)}
    assert len(theirs) > 30
    assert theirs - fields - OF_THE_TRAINER == set()
    named = {name for name in CODE.findall(PAGE) if KEY.match(name)}
    assert set(GRPOConfig.__annotations__) - named - DEPRECATED == set()


OF_THE_TRAINER = {"train_dataset", "eval_dataset", "reward_funcs", "environment_factory", "tools", "peft_config"}
OF_THE_TRAINER |= {"prompt", "stop"}  # a column; a key of generation_kwargs
DEPRECATED = {"vllm_importance_sampling_cap"}  # an older name of vllm_importance_sampling_clip_max
