"""``isomorph train --resume DIR section.key=value``: what a run that has begun may change, and what it may not."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from isomorph.curriculum.inputs import located
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import STAGE_TABLES, UserError
from isomorph.engine.effect import leaves
from isomorph.engine.recipe_file import check_tables, overridden
from isomorph.engine.record.checkpoint import latest_checkpoint

# What decides how long, how fast and how far a run goes on, and not what it is. A path must lead to the same content.
MAY_CHANGE = (
    *("stage.*.steps", "stage.*.mastery*", "stage.*.plateau*", "stage.*.max_response_tok"),
    *("stage.*.optim.*", "stage.*.batch.micro_batch_tok"),
    *("sampler.kv_tok", "sampler.max_seqs", "sampler.memory_frac", "sampler.max_model_len"),
    *("run.threads", "run.checkpoint_every", "run.keep_checkpoints", "run.completions_every"),
    *("run.max_mean_drift", "run.profile*", "log.*"),
    *("model.gradient_checkpointing_every", "model.compile", "model.path", "data.*.files.*"),
)
IN_WORDS = (
    "a stage's steps and other ends, optim and batch.micro_batch_tok; the sampler's kv_tok, max_seqs, memory_frac and "
    "max_model_len; run, but for its seed; log; model.gradient_checkpointing_every, model.compile; paths to files of "
    "the same content"
)

Changes = dict[str, list[Any]]  # key -> before, after


def resumed_recipe(described: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> tuple[Recipe, Changes]:
    """The recipe of run.json with ``overrides``, and what they change. Raises UserError, by name, for what may not."""
    where = f"{folder}/run.json"
    before = check_tables(described["recipe"], Recipe, where=where)
    if not overrides:
        return before, {}
    for text in overrides:
        name, _, rest = text.partition(".")
        if name in STAGE_TABLES:
            raise UserError(f"{text}: every stage of a run has a table of its own: write stage.0.{name}.{rest}")
    after = located(overridden(described["recipe"], overrides, Recipe, where=where))
    changes = _differences(before, after)
    if refused := [key for key in changes if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)]:
        raise UserError(
            f"{', '.join(refused)} cannot change in a run that has begun: it would be another one, so start that; "
            f"what may change: {IN_WORDS}"
        )
    _refuse_what_is_over(changes, after, folder)
    return after, changes


def _differences(before: Recipe, after: Recipe) -> Changes:
    old, new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, after))
    return {key: [old.get(key), new.get(key)] for key in (*old, *(new.keys() - old)) if old.get(key) != new.get(key)}


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for path in leaves(tables):
        value: Any = tables
        for part in path:
            value = value[part]
        found[".".join(map(str, path))] = value
    return found


def _refuse_what_is_over(changes: Changes, after: Recipe, folder: Path) -> None:
    """By the newest checkpoint: a stage that has ended, steps that are done, and updates that were cut already."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return  # resuming says so
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    present = state["source"].get("stage_index", 0)
    done = state["source"].get("steps_done", 0)
    for key in changes:
        parts = key.split(".")
        if parts[0] != "stage":
            continue
        if int(parts[1]) < present:
            raise UserError(f"{key}: stage {parts[1]} is over at step {state['step']}, which the run goes on from")
        if int(parts[1]) == present and parts[2] == "steps" and after.stage[present].steps <= done:
            raise UserError(f"{key} must be more than the {done} steps that are done, got {after.stage[present].steps}")
        if int(parts[1]) == present and parts[2] in ("batch", "optim") and state["draws"]:
            raise UserError(
                f"{key} cannot change in the midst of a step, where {newest} is: go on without it for a step, or "
                "delete that checkpoint to go on from the one before"
            )
