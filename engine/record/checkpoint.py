"""Writes and reads checkpoints. A folder gets its final name only when it is complete and synced to the disk.

checkpoints/step-00000050/
    state.json               RunState: counters, totals, the prompt source's state (engine.types)
    weights.safetensors      trained weights: Policy.named_parameters()
    optimizer.safetensors    Learner.state_tensors(): masters, moments, KL reference, the round of an interrupted step
    draws.safetensors        token ids and log-probabilities of an interrupted step's rollouts, and of those drawn ahead
    checksums.json           of every other file the number of its bytes and their CRC-32
checkpoints/stage-NAME/      the same at the end of a stage; never deleted, and not what a run resumes from

With FSDP2 each of N ranks writes its shards: weights-00001-of-0000N.safetensors (the float32 masters) and
optimizer-00001-of-0000N.safetensors, in the layout of torch.distributed.checkpoint (engine.distributed.shards).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.distributed.shards import Part, apart, read_into, saved_in, write_parts
from isomorph.engine.foreign import shortened
from isomorph.engine.serialise import join_scored, split_scored
from isomorph.engine.types import RunFailed, RunState, ScoredRollouts

T = TypeVar("T")
FORMAT, SHARDED = 2, 3  # of one rank; of ranks with shards
WEIGHTS, OPTIMIZER = "weights", "optimizer"
STATE, SUMS = "state.json", "checksums.json"
BLOCK_BYTES = 2**20
Sums = dict[str, list[int]]  # by file: the number of its bytes, their CRC-32


class _Fields(BaseModel):
    """What every version has written of state.json; all other keys are passed on."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    stage: str
    source: dict[str, Any]
    totals: dict[str, float]
    draws: list[dict[str, Any]]


REPLACED = ".replaced-"  # prefix of a checkpoint while a new one of the same step is renamed to its name
# what keeps a checkpoint from being read and says nothing about it: the right to read, handles, memory, the network
NOT_ITS_FAULT = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN),
}


class UnusableCheckpoint(UserError):
    """A checkpoint that is damaged, or of another version, model or recipe, so that an earlier one may do better."""

    def __init__(self, folder: Path, why: str, before: Path | None = None) -> None:
        super().__init__(folder, why, before)
        self.folder, self.why, self.before = folder, why, before

    def __str__(self) -> str:
        return f"{self.folder}: {self.why}{f'; the checkpoint before it is {self.before}' if self.before else ''}"


def save_checkpoint(
    root: Path, state: RunState, weights: Mapping[str, Tensor], learner: Mapping[str, Tensor], *, keep: int
) -> Path:
    """Writes ``root``/step-N atomically, deletes all but ``keep - 1`` of the older ones, and returns its path.

    One rank calls it, with whole tensors. Raises RunFailed if the disk refuses; earlier checkpoints are left as they
    were.
    """
    with _explained(root, state.step):
        partial = _begun(root, state.step)
        sums = {}
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, learner)):
            file = partial / f"{name}.safetensors"
            save_file(apart(tensors), file)
            sums[file.name] = _synced(file)
        final = _finished(root, state, sums, FORMAT)
    _delete_older(root, keep)
    return final


# -- several ranks, each with shards: all begin, each writes its own files, the first finishes
def begin_shards(root: Path, step: int) -> None:
    """Makes the folder that every rank writes into. The first rank calls it. Raises RunFailed."""
    with _explained(root, step):
        _begun(root, step)


def write_shards(
    root: Path, step: int, rank: int, num_ranks: int, weights: Mapping[str, Part], learner: Mapping[str, Part]
) -> Sums:
    """Writes a rank's parts of a checkpoint; returns what ``finish_shards`` has to know of its files. Raises RunFailed.

    A tensor that is not divided is written by the rank that passes it, which must be one.
    """
    sums = {}
    with _explained(root, step, cleans_up=False):
        for name, parts in ((WEIGHTS, weights), (OPTIMIZER, learner)):
            file = _partial(root, step) / f"{name}-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"
            write_parts(file, parts)
            sums[file.name] = _synced(file)
    return sums


def finish_shards(root: Path, state: RunState, sums: Sequence[Sums], *, keep: int) -> Path:
    """Gives the checkpoint its name, when every rank has written; deletes older ones. As ``save_checkpoint`` else."""
    with _explained(root, state.step):
        final = _finished(root, state, {name: told for own in sums for name, told in own.items()}, SHARDED)
    _delete_older(root, keep)
    return final


def abandon_shards(root: Path, step: int) -> None:
    """Deletes what the ranks have written of a checkpoint that failed on one of them."""
    shutil.rmtree(_partial(root, step), ignore_errors=True)


@contextlib.contextmanager
def _explained(root: Path, step: int, *, cleans_up: bool = True) -> Iterator[None]:
    """Context: RunFailed in place of the disk's errors, with the checkpoint that is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if cleans_up:
            abandon_shards(root, step)
        earlier = latest_checkpoint(root)
        kept = f"the newest complete checkpoint is {earlier}" if earlier else "there is no earlier checkpoint"
        raise RunFailed(f"checkpoint of step {step} could not be written under {root}: {error}; {kept}") from error


def _partial(root: Path, step: int) -> Path:
    return root / f".partial-{step:08d}"


def _begun(root: Path, step: int) -> Path:
    root.mkdir(exist_ok=True)  # without parents: a run folder that has gone is not made again, without its run.json
    _remove_partial(root)
    partial = _partial(root, step)
    partial.mkdir()
    return partial


def _finished(root: Path, state: RunState, sums: Sums, number: int) -> Path:
    """Writes the rest, and gives the folder its name."""
    final, partial = checkpoint_path(root, state.step), _partial(root, state.step)
    fields_of_draws, tensors = _split_all(state.draws)
    draws = partial / "draws.safetensors"
    save_file(apart(tensors), draws)
    fields = dataclasses.asdict(dataclasses.replace(state, draws=()))
    text = json.dumps({"format": number, **fields, "draws": fields_of_draws})
    sums = {**sums, draws.name: _synced(draws), STATE: [len(text.encode()), zlib.crc32(text.encode())]}
    _write_text(partial / SUMS, json.dumps(sums, indent=2))
    _write_text(partial / STATE, text)
    sync(partial)
    if final.exists():
        replaced = root / f"{REPLACED}{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)  # left by a process that was killed here
        final.rename(replaced)
    partial.rename(final)
    sync(root)
    return final


def _delete_older(root: Path, keep: int) -> None:
    for old in (*complete_checkpoints(root)[:-keep], *root.glob(f"{REPLACED}*")):
        discard(old)


def _synced(file: Path) -> list[int]:
    """Waits until ``file`` is on the disk; returns its size and the CRC-32 of its bytes."""
    sync(file)
    return _sum(file)


def _sum(file: Path) -> list[int]:
    size = checksum = 0
    with file.open("rb", buffering=0) as opened:
        while block := opened.read(BLOCK_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


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
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def load_checkpoint(folder: Path) -> tuple[RunState, dict[str, Tensor], dict[str, Tensor]]:
    """Returns state, weights and learner tensors, none of them sharded, of a checkpoint of any number of ranks.

    Weights that ranks with FSDP wrote are the float32 masters. Raises UnusableCheckpoint if they are not what was
    written, or have another format; UserError if the machine does not let them be read.
    """
    with _readable(folder):
        state = _read_state(folder)
        _check_sums(folder, ALONE)
        weights = _whole(_files(folder, WEIGHTS))
        learner = _whole(_files(folder, OPTIMIZER))
        if state.stage and _is_sharded(folder):
            learner |= {f"master/{name}": weight for name, weight in weights.items()}
        return state, weights, learner


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights alone, as ``load_checkpoint`` returns them. Raises UserError."""
    with _readable(folder):
        _check_sums(folder, ALONE)
        return _whole(_files(folder, WEIGHTS))


def load_shards(folder: Path, weights: Mapping[str, Tensor], ranks: Ranks) -> tuple[RunState, dict[str, Tensor]]:
    """Reads this rank's shards, of a checkpoint of any number of ranks: into ``weights``, and the learner's tensors.

    Of the learner's, those that belong to a weight are DTensors, as ``weights`` are: float32 masters by name. A
    collective: all ranks must call it, and all raise UserError where one cannot read.
    """

    def read() -> tuple[RunState, dict[str, Tensor]]:
        with _readable(folder):
            state = _read_state(folder)
            _check_sums(folder, ranks)
            return state, _read_shards(folder, weights)

    return read_by_all(ranks, read)


def read_by_all(ranks: Ranks, read: Callable[[], T]) -> T:
    """What ``read`` returns to this rank; where it raises UserError on one, all raise that. A collective."""
    refusal: UserError | None = None
    found: list[T] = []
    try:
        found.append(read())
    except UserError as error:
        refusal = error
    refused = [refusal for refusal in ranks.gather(refusal) if refusal is not None]
    if refused:  # of several one after which no other checkpoint is tried
        raise min(refused, key=lambda refusal: isinstance(refusal, UnusableCheckpoint))
    return found[0]


def _read_shards(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    files = [*_files(folder, WEIGHTS), *_files(folder, OPTIMIZER)]
    saved = saved_in(files)
    learner: dict[str, Tensor] = {}
    for name, (dtype, shape) in saved.items():
        kind, _, of = name.partition("/")
        if kind == "master" or name in weights:
            continue
        like = weights.get(of)
        if isinstance(like, DTensor) and shape == like.shape:
            learner[name] = torch.empty_like(like, dtype=dtype)
        else:
            learner[name] = torch.empty(shape, dtype=dtype)
    # a checkpoint of one rank has bfloat16 weights beside their masters
    named = {f"master/{name}" if f"master/{name}" in saved else name: weight for name, weight in weights.items()}
    read_into(files, {**learner, **named})
    return learner


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Context: UserError in place of what reading raises."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = shortened(str(error))
        number = getattr(error, "errno", None)
        if isinstance(error, PermissionError) or number in NOT_ITS_FAULT or "allocate memory" in str(error):
            raise UserError(f"{folder}: the checkpoint cannot be read ({said}): mend that, and try again") from error
        raise UnusableCheckpoint(folder, f"not a readable checkpoint ({said})", _before(folder)) from error


def _before(folder: Path) -> Path | None:
    return max((path for path in complete_checkpoints(folder.parent) if path.name < folder.name), default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with its types checked. Raises as ``load_checkpoint`` does."""
    with _readable(folder):
        return _fields(folder)


def _fields(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    found = fields.pop("format")
    if found not in (FORMAT, SHARDED):
        raise UnusableCheckpoint(
            folder,
            f"the checkpoint format must be {FORMAT} or {SHARDED}, got {found}: use the version of isomorph that wrote "
            "it (versions in run.json)",
            _before(folder),
        )
    _Fields.model_validate(fields, strict=True)
    return fields


def _read_state(folder: Path) -> RunState:
    fields = _fields(folder)
    draws = _join_all(fields.pop("draws"), load_file(folder / "draws.safetensors"))
    return RunState(**fields, draws=draws)


def _check_sums(folder: Path, ranks: Ranks) -> None:
    """Raises ValueError where a file has not the bytes that were written; each rank checks its share of the files."""
    if not (folder / SUMS).is_file():  # versions before 2026-12 wrote none
        return
    told = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    for name in ranks.share(sorted(told)):
        found = _sum(folder / name)
        if found[0] != told[name][0]:
            raise ValueError(f"{name} has {found[0]} bytes, {told[name][0]} were written")
        if found[1] != told[name][1]:
            raise ValueError(f"{name} has other bytes than were written: their CRC-32 differs")


def _is_sharded(folder: Path) -> bool:
    return not (folder / f"{WEIGHTS}.safetensors").exists()


def _files(folder: Path, name: str) -> list[Path]:
    """The files of ``name``, one, or one for each rank that wrote."""
    single = folder / f"{name}.safetensors"
    return sorted(folder.glob(f"{name}-*-of-*.safetensors")) or [single]


def _whole(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors in ``files``, put together where ranks have written their rows."""
    if len(files) == 1:
        return load_file(files[0])
    found = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in saved_in(files).items()}
    read_into(files, found)
    return found


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


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of steps, oldest first. One that is replaced counts until its successor has its name."""
    folders = (*root.glob(f"{REPLACED}step-*"), *root.glob("step-*"))
    by_name = {path.name.removeprefix(REPLACED): path for path in folders if (path / STATE).is_file()}
    return [by_name[name] for name in sorted(by_name)]


def has_checkpoint(root: Path, step: int) -> bool:
    """Whether a complete checkpoint of ``step`` is there."""
    name = checkpoint_path(root, step).name
    return any(path.name.removeprefix(REPLACED) == name for path in complete_checkpoints(root))


def discard(folder: Path) -> None:
    """Deletes a checkpoint, after renaming it, so that it never looks complete while partly deleted."""
    gone = folder.with_name(f".partial-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _remove_partial(root: Path) -> None:
    for path in root.glob(".partial-*"):
        shutil.rmtree(path)


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
