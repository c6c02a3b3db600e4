"""What ``isomorph eval`` can evaluate: a run, a checkpoint of one, its best model, or any model."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from isomorph.curriculum.assemble import open_policy
from isomorph.curriculum.inputs import changed_files
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json, read_summary
from isomorph.curriculum.restored import check_base
from isomorph.curriculum.rewards.answer import ANSWER_TAGS
from isomorph.engine.config import ModelConfig, UserError
from isomorph.engine.model.load import load_policy, silence_loaders
from isomorph.engine.model.policy import Policy
from isomorph.engine.recipe_file import check_tables
from isomorph.engine.record.best import BEST, FILE, read_best
from isomorph.engine.record.checkpoint import latest_checkpoint, load_weights, read_state

NEEDED = (
    "a run folder (with run.json), a checkpoint of a run (with state.json), RUN/best, or a model folder (with "
    "config.json, weights and a tokenizer)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model that can be evaluated, not loaded yet, and the recipe that it was trained with, if it is of a run."""

    target: str  # as the user named it
    source: str  # where the weights come from
    recipe: Recipe | None
    load: Callable[[], Policy]  # raises UserError where it cannot be loaded
    changed: tuple[str, ...] = ()  # a sentence for each input file that has changed since the run began


def find_candidate(target: str) -> Candidate:
    """The candidate that ``target`` names: a run folder, a checkpoint, RUN/best, a model folder, .gguf file, hub name.

    Raises UserError where there is none, with what is needed.
    """
    silence_loaders()
    folder = Path(os.path.expanduser(target))
    if (folder / "run.json").is_file():
        return _of_run(target, folder)
    if folder.name == BEST and (folder.parent / "run.json").is_file():
        return _best_of_run(target, folder.parent)
    if (folder / "state.json").is_file():
        return _checkpoint(target, folder, _run_of(folder))
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{target} must be {NEEDED}; it holds {found}")
    if not folder.exists() and str(folder.parent) != "." and folder.parent.is_dir():
        # a hub name has no such parent
        raise UserError(f"{target}: there is no such folder or file in {folder.parent}; it must be {NEEDED}")
    config = ModelConfig(path=target, dtype="bfloat16" if device().type == "cuda" else "float32")
    return Candidate(target=target, source=target, recipe=None, load=lambda: _loaded(config))


def device() -> torch.device:
    """This machine's GPU, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loaded(config: ModelConfig) -> Policy:
    return load_policy(config, vocabulary=[], seed=0, device=device(), tags=ANSWER_TAGS)


def _run_of(checkpoint: Path) -> Path:
    """The run folder of RUN/checkpoints/NAME or RUN/best/checkpoint."""
    run = checkpoint.resolve().parent.parent
    if not (run / "run.json").is_file():
        raise UserError(
            f"{checkpoint} is a checkpoint, whose model is described in the run.json of its run: it must lie in its "
            f"run folder, as RUN/checkpoints/step-N does; there is no {run / 'run.json'}"
        )
    return run


def _of_run(target: str, folder: Path) -> Candidate:
    """The finished model, or the newest checkpoint of a run that is not done."""
    summary = read_summary(folder)
    if summary is not None and summary["status"] == "done":
        return _model_of_run(target, folder, folder / "model")
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise UserError(
            f"{folder} holds neither a finished model nor a checkpoint: wait for its first checkpoint (every "
            "run.checkpoint_every steps), or name another run"
        )
    return _checkpoint(target, newest, folder)


def _best_of_run(target: str, run: Path) -> Candidate:
    if read_best(run) is None:
        raise UserError(
            f"{run} keeps no best model: its recipe needs eval.keep_best = NAME of a set, and the run an evaluation; "
            f"{run / BEST / FILE} is missing"
        )
    return _model_of_run(target, run, run / BEST / "model")


def _model_of_run(target: str, run: Path, model: Path) -> Candidate:
    recipe, changed = _recipe_of(run)
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is missing or incomplete, though the run has written it: name a checkpoint of {run}")
    config = recipe.model.model_copy(update={"path": str(model), "tiny": None})
    return Candidate(target=target, source=str(model), recipe=recipe, changed=changed, load=lambda: _loaded(config))


def _recipe_of(run: Path) -> tuple[Recipe, tuple[str, ...]]:
    described = read_run_json(run)
    recipe = check_tables(described["recipe"], Recipe, where=f"{run}/run.json")
    return recipe, tuple(changed_files(described.get("files", {}), recipe))


def _checkpoint(target: str, checkpoint: Path, run: Path) -> Candidate:
    recipe, changed = _recipe_of(run)

    def load() -> Policy:
        state = read_state(checkpoint)
        policy = open_policy(recipe)
        try:
            check_base(policy, state.get("base", ""), checkpoint)
            weights = load_weights(checkpoint)
            policy.overwrite([weights[name] for name in policy.named_parameters()])
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{checkpoint}: the weights do not fit the recipe's model: {error}") from error
        return policy

    return Candidate(target=target, source=str(checkpoint), recipe=recipe, changed=changed, load=load)
