"""``best/`` in the run folder: the checkpoint and the model with the highest score of an evaluation so far.

best/
    best.json      which set, the evaluation's label, its step and the score
    checkpoint/    as under checkpoints/
    model/         Hugging Face format, adapters merged; with LoRA also adapter/, in peft's format

The folder is replaced as a whole. What it holds counts, also for a resumed run: an evaluation made again after a resume
has to be better than it, and of equal ones the first stays.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isomorph.engine.config import UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.checkpoint import keep_copy, replace_folder, restore_replaced, sync
from isomorph.engine.types import RunFailed

BEST = "best"
FILE = "best.json"


def read_best(folder: Path) -> dict[str, Any] | None:
    """best.json of the run in ``folder``; None before there is one. Raises UserError where it cannot be read."""
    restore_replaced(folder / BEST)
    file = folder / BEST / FILE
    if not file.is_file():
        return None
    try:
        best: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {**best, "score": float(best["score"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete {file.parent} to keep the next best model") from error


def is_better(folder: Path, score: float) -> bool:
    """Whether ``score`` is higher than that of the model kept in ``folder``, or none is kept."""
    best = read_best(folder)
    return best is None or score > best["score"]


def write_best(folder: Path, checkpoint: Path, policy: Policy, told: Mapping[str, Any]) -> None:
    """Replaces ``folder``/best by ``checkpoint``, the policy's present model, and ``told``, which holds ``score``.

    Raises RunFailed if the disk refuses; the best model so far then stays.
    """
    partial = folder / f".{BEST}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        keep_copy(checkpoint, partial / "checkpoint")
        save_model(policy, partial)
        (partial / FILE).write_text(json.dumps(dict(told), indent=2) + "\n", encoding="utf-8")
        sync(partial)
        replace_folder(partial, folder / BEST)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{folder / BEST} could not be written: {error}") from error


def save_model(policy: Policy, folder: Path) -> None:
    """Writes ``folder``/model, and with LoRA ``folder``/adapter. The weights must be unsharded."""
    policy.save(folder / "model")
    if policy.adapters is not None:
        policy.adapters.save(folder / "adapter")
