"""``isomorph train --resume DIR section.key=value``: which keys a resumed run may change."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from isomorph.curriculum.inputs import located
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import STAGE_TABLES, UserError
from isomorph.engine.effect import leaves
from isomorph.engine.recipe_file import check_tables, overridden
from isomorph.engine.record.usable import newest_state

# Keys of length, speed and output, and paths whose file has the same content.
MAY_CHANGE = (
    *("stage.*.steps", "stage.*.mastery*", "stage.*.plateau*", "stage.*.max_response_tok"),
    *("stage.*.optim.*", "stage.*.batch.micro_batch_tok"),
    *("sampler.kv_tok", "sampler.max_seqs", "sampler.memory_frac", "sampler.max_model_len", "sampler.keep_cache"),
    *("run.threads", "run.checkpoint_every", "run.keep_checkpoints", "run.completions_every"),
    "run.checkpoint_in_background",
    *("run.max_mean_drift", "run.profile*", "run.push_to_hub", "log.*"),
    *("eval.every", "eval.samples", "eval.temperature"),
    *("model.gradient_checkpointing_every", "model.compile", "model.path", "data.*.files.*"),
    *("data.*.eval_files.*", "data.*.path", "data.*.eval_path", "data.*.chat_template"),
    "parallel.shards",
)
IN_WORDS = (
    "a stage's steps and other ends, optim and batch.micro_batch_tok; the sampler's kv_tok, max_seqs, memory_frac, "
    "max_model_len and keep_cache; run, but for its seed; log; eval.every, samples and temperature; "
    "model.gradient_checkpointing_every, model.compile; parallel.shards; paths to files of the same content"
)

Changes = dict[str, list[Any]]  # key -> before, after


def resumed_recipe(described: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> tuple[Recipe, Changes]:
    """The recipe of run.json with ``overrides``, and what they change.

    Raises UserError for a key that may not change, or for a stage or step that is done.
    """
    where = f"{folder}/run.json"
    before = check_tables(described["recipe"], Recipe, where=where)
    if not overrides:
        return before, {}
    for text in overrides:
        name, _, rest = text.partition(".")
        if name in STAGE_TABLES:
            raise UserError(
                f"{text}: in run.json each stage has this table: write stage.0.{name}.{rest}, with the stage's number"
            )
    after = located(overridden(described["recipe"], overrides, Recipe, where=where))
    changes = differences(before, after)
    if refused := [key for key in changes if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)]:
        raise UserError(
            f"{', '.join(refused)} cannot be changed by --resume: start a new run, or change only: {IN_WORDS}"
        )
    refuse_what_is_over(changes, after, folder)
    return after, changes


def differences(before: Recipe, after: Recipe) -> Changes:
    """The keys whose values differ."""
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


def _extends_the_end(changes: Changes, after: Recipe, source: Mapping[str, Any]) -> bool:
    """Whether a run that is over goes on with more steps in its last stage. Raises UserError if it cannot."""
    place, stage, done = f"stage.{len(after.stage) - 1}", after.stage[-1], source["finished"][-1]
    if f"{place}.steps" not in changes or stage.steps <= done["steps"]:
        return False
    others = [key for key in changes if key.startswith(f"{place}.") and not key.startswith(f"{place}.optim.")]
    if done["ended_by"] != "steps" or others != [f"{place}.steps"]:
        raise UserError(
            f"{place}.steps: the stage ended after {done['steps']} steps by {done['ended_by']}; it goes on only where "
            f"its steps ended it, and with no other change than of optim ({', '.join(others)})"
        )
    if stage.max_response_tok is not None and not source["response_tok"]:
        raise UserError(
            f"{place}.steps: the run was made by an earlier version, which forgot how many tokens count towards "
            "max_response_tok: start a new run with model.path set to its model"
        )
    return True


def depends_on_steps(recipe: Recipe, changes: Changes) -> list[str]:
    """A sentence for each stage whose learning rate would have been another with its new number of steps before."""
    found = []
    for i, stage in enumerate(recipe.stage):
        keys = [f'optim.schedule = "{stage.optim.schedule}"'] if stage.optim.schedule != "constant" else []
        keys += ["optim.warmup_share"] if stage.optim.warmup_share else []
        if f"stage.{i}.steps" in changes and stage.fade:
            found.append(
                f"stage {stage.name} goes on with the shares of {stage.steps} steps (fade), so it is not the run that "
                "had this number from the start"
            )
        if f"stage.{i}.steps" in changes and keys:
            found.append(
                f"stage {stage.name} goes on with the learning rate of {stage.steps} steps ({', '.join(keys)}), so it "
                "is not the run that had this number from the start"
            )
    return found


def refuse_what_is_over(changes: Changes, after: Recipe, folder: Path) -> None:
    """Refuses changes of a stage that has ended, of steps that are done and of updates that are divided already.

    Of the state of the newest checkpoint; where another one turns out to be used, it is to be called again.
    """
    found = newest_state(folder / "checkpoints")
    if found is None:
        return  # resuming raises
    newest, state = found
    present = state["source"].get("stage_index", 0)
    done = state["source"].get("steps_done", 0)
    is_within = len(state["draws"]) > state.get("num_ahead", 0)
    is_extended = present == len(after.stage) and _extends_the_end(changes, after, state["source"])
    for key in changes:
        parts = key.split(".")
        if parts[0] != "stage":
            continue
        if int(parts[1]) < present and not (is_extended and int(parts[1]) == present - 1):
            raise UserError(
                f"{key}: stage {parts[1]} had ended by step {state['step']}, where the run resumes; only "
                "the last stage of a run can be extended, by more steps than it made: start a new run with "
                f"model.path={folder}/model"
            )
        if int(parts[1]) == present and parts[2] == "steps" and after.stage[present].steps <= done:
            raise UserError(f"{key} must be more than the {done} steps that are done, got {after.stage[present].steps}")
        if int(parts[1]) == present and parts[2] in ("batch", "optim") and is_within:
            raise UserError(
                f"{key} cannot change within a step, where {newest} was written: resume without it for one step, or "
                "delete that checkpoint to resume from the one before"
            )
