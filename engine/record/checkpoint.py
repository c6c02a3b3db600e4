"""Save and resume. A checkpoint is a folder that appears under its final name only when it is complete and on the disk.

checkpoints/step-00000050/  state.json   weights.safetensors   optimizer.safetensors
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isomorph.engine.config import UserError
from isomorph.engine.types import RunFailed, RunState

FORMAT = 1


def save_checkpoint(
    root: Path, state: RunState, weights: dict[str, Tensor], learner: dict[str, Tensor], *, keep: int
) -> Path:
    """``root``/step-N, atomically; of the older ones ``keep - 1`` stay.

    Raises RunFailed where the disk refuses, and leaves what was there.
    """
    final = root / f"step-{state.step:08d}"
    partial = root / f".partial-{state.step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_partial(root)
        partial.mkdir()
        _write_tensors(partial / "weights.safetensors", weights)
        _write_tensors(partial / "optimizer.safetensors", learner)
        _write_text(partial / "state.json", json.dumps({"format": FORMAT, **dataclasses.asdict(state)}))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = latest_checkpoint(root)
        kept = f"the newest complete checkpoint is {earlier}" if earlier else "there is no earlier checkpoint"
        raise RunFailed(
            f"checkpoint of step {state.step} could not be written under {root}: {error}; {kept}"
        ) from error
    for old in _complete(root)[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = _complete(root)
    return complete[-1] if complete else None


def load_checkpoint(folder: Path) -> tuple[RunState, dict[str, Tensor], dict[str, Tensor]]:
    """State, weights and learner tensors. Raises UserError where they cannot be read."""
    try:
        fields: dict[str, Any] = json.loads((folder / "state.json").read_text())
        found = fields.pop("format")
        if found != FORMAT:
            raise UserError(f"{folder}: checkpoint format {found}, this version reads {FORMAT}")
        weights = load_file(folder / "weights.safetensors")
        return RunState(**fields), weights, load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder}: not a readable checkpoint ({error}); delete it to resume from the one before"
        ) from error


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if (path / "state.json").is_file())


def _remove_partial(root: Path) -> None:
    for path in root.glob(".partial-*"):
        shutil.rmtree(path)


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Copies undo shared storage, which the format cannot express."""
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, file)
    _sync(file)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text)
    _sync(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Of names and bytes, in the order of the names: equal for bit-equal policies."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
