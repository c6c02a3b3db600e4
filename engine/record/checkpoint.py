"""Writes and reads checkpoints. A folder gets its final name only when it is complete and synced to the disk.

checkpoints/step-00000050/
    state.json               RunState: counters, totals, the prompt source's state (engine.types)
    weights.safetensors      trained weights: Policy.named_parameters()
    optimizer.safetensors    Learner.state_tensors(): masters, moments, KL reference, the round of an interrupted step
    draws.safetensors        token ids and log-probabilities of an interrupted step's rollouts; else empty
checkpoints/stage-NAME/      the same at the end of a stage; never deleted, and not what a run resumes from
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isomorph.engine.config import UserError
from isomorph.engine.serialise import join_scored, split_scored
from isomorph.engine.types import RunFailed, RunState, ScoredRollouts

FORMAT = 2
REPLACED = ".replaced-"  # prefix of a checkpoint while a new one of the same step is renamed to its name


def save_checkpoint(
    root: Path, state: RunState, weights: dict[str, Tensor], learner: dict[str, Tensor], *, keep: int
) -> Path:
    """Writes ``root``/step-N atomically, deletes all but ``keep - 1`` of the older ones, and returns its path.

    Raises RunFailed if the disk refuses; earlier checkpoints are left as they were.
    """
    final = checkpoint_path(root, state.step)
    partial = root / f".partial-{state.step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_partial(root)
        partial.mkdir()
        _write_tensors(partial / "weights.safetensors", weights)
        _write_tensors(partial / "optimizer.safetensors", learner)
        fields_of_draws, tensors = _split_all(state.draws)
        _write_tensors(partial / "draws.safetensors", tensors)
        fields = dataclasses.asdict(dataclasses.replace(state, draws=()))
        _write_text(partial / "state.json", json.dumps({"format": FORMAT, **fields, "draws": fields_of_draws}))
        sync(partial)
        if final.exists():
            replaced = root / f"{REPLACED}{final.name}"
            shutil.rmtree(replaced, ignore_errors=True)  # left by a process that was killed here
            final.rename(replaced)
        partial.rename(final)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = latest_checkpoint(root)
        kept = f"the newest complete checkpoint is {earlier}" if earlier else "there is no earlier checkpoint"
        raise RunFailed(
            f"checkpoint of step {state.step} could not be written under {root}: {error}; {kept}"
        ) from error
    for old in (*_complete(root)[:-keep], *root.glob(f"{REPLACED}*")):
        discard(old)
    return final


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step``."""
    return root / f"step-{step:08d}"


def keep_copy(checkpoint: Path, target: Path) -> None:
    """Keeps a complete checkpoint as ``target``, too, whatever becomes of it. Raises RunFailed if the disk refuses.

    By hard links, which take no space, where the file system has them: files of a checkpoint are never written again.
    """
    partial = target.with_name(f".partial-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial, copy_function=_link)
        sync(partial)
        replace_folder(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{checkpoint} could not be kept as {target}: {error}") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def replace_folder(new: Path, final: Path) -> None:
    """Renames ``new`` to ``final``. A process that is killed here leaves one of the two: see ``restore_replaced``."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    new.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(final: Path) -> None:
    """Undoes a ``replace_folder`` that was killed between its two renames."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if replaced.is_dir() and not final.exists():
        replaced.rename(final)


def latest_checkpoint(root: Path) -> Path | None:
    """Returns the newest complete checkpoint; None if there is none."""
    complete = _complete(root)
    return complete[-1] if complete else None


def load_checkpoint(folder: Path) -> tuple[RunState, dict[str, Tensor], dict[str, Tensor]]:
    """Returns state, weights and learner tensors. Raises UserError if they cannot be read or have another format."""
    try:
        fields = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = fields.pop("format")
        if found == FORMAT:
            draws = _join_all(fields.pop("draws"), load_file(folder / "draws.safetensors"))
            weights = load_file(folder / "weights.safetensors")
            return RunState(**fields, draws=draws), weights, load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: not a readable checkpoint ({error}): delete it to resume from an earlier one"
        ) from error
    raise UserError(
        f"{folder}: the checkpoint format must be {FORMAT}, got {found}: resume with the version of isomorph that "
        "wrote it (versions in run.json), or start a new run"
    )


def _split_all(draws: Sequence[ScoredRollouts]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Returns the fields of each item for state.json, and its tensors, named by its index, for draws.safetensors."""
    parts = [split_scored(scored) for scored in draws]
    tensors = {f"{i}/{name}": tensor for i, (_, own) in enumerate(parts) for name, tensor in own.items()}
    return [fields for fields, _ in parts], tensors


def _join_all(fields_of_draws: Sequence[dict[str, Any]], tensors: Mapping[str, Tensor]) -> tuple[ScoredRollouts, ...]:
    named: list[dict[str, Tensor]] = [{} for _ in fields_of_draws]
    for key, tensor in tensors.items():
        i, _, name = key.partition("/")
        named[int(i)][name] = tensor
    return tuple(join_scored(fields, own) for fields, own in zip(fields_of_draws, named, strict=True))


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One that is being replaced counts until its successor has its name."""
    folders = (*root.glob(f"{REPLACED}step-*"), *root.glob("step-*"))
    by_name = {path.name.removeprefix(REPLACED): path for path in folders if (path / "state.json").is_file()}
    return [by_name[name] for name in sorted(by_name)]


def discard(folder: Path) -> None:
    """Deletes a checkpoint, after renaming it, so that it never looks complete while partly deleted."""
    gone = folder.with_name(f".partial-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _remove_partial(root: Path) -> None:
    for path in root.glob(".partial-*"):
        shutil.rmtree(path)


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes contiguous copies, because safetensors refuses tensors that share storage."""
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, file)
    sync(file)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text)
    sync(file)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Returns a hash of names and bytes, in the order of names: equal for bit-equal weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        own = weights[name].detach().to("cpu", copy=True)  # a NumPy view of FSDP's storage would keep it alive
        digest.update(own.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
