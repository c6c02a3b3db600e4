"""Estimates of a recipe before it runs."""

from pathlib import Path
from typing import Any

import pytest

from isomorph.curriculum.estimate import plan_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import check_tables

SEVEN_B = Path(__file__).parents[2] / "curriculum" / "recipes" / "shapes" / "qwen2.5-7b"


def recipe(model: dict[str, Any], form: str = "graph", **data: Any) -> Recipe:
    tables = {
        "model": model,
        "data": {"plans": {"kind": "async_plan", **data}},
        "stage": [{"name": "rl", "steps": 1, "mixture": [{"data": "plans", "representation": form}]}],
        "eval": {"data": "plans", "representations": [form]},
    }
    return check_tables(tables, Recipe, where="test")


def test_a_loaded_model_is_estimated_on_tasks_without_a_closed_vocabulary() -> None:
    planned = plan_recipe(recipe({"path": str(SEVEN_B)}), "h200", None, 1)
    assert planned["stages"][0]["tok"]["prompt"] > 50 and planned["model"]["num_parameters"] > 7e9


def test_a_tiny_model_is_not_estimated_on_data_that_it_cannot_read() -> None:
    tables = recipe({"tiny": {}}, difficulty={"form": "terse", "demonstration": "compact"})
    planned = plan_recipe(tables, "h200", None, 1)
    assert planned["model"]["num_parameters"] < 1e8
    pytest.importorskip("reasoning_gym")
    rows = {"kind": "reasoning_gym", "tasks": {"chain_sum": {}}}
    with pytest.raises(UserError, match="words of data.plans are not known before they are generated: set model.tiny"):
        plan_recipe(recipe({"tiny": {}}, "chain_sum", **rows), "h200", None, 1)
