"""Shards of tensors in safetensors files, in the Hugging Face layout of torch.distributed.checkpoint.

Each rank writes the rows that it holds into a file of its own; the file's metadata say where they begin in the full
tensor. torch.distributed.checkpoint reads such files, and the files of any model, into tensors that are sharded in
another way, or not at all: every rank reads the rows that it needs. Nothing is pickled.
"""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

# torch.distributed.checkpoint's names in the metadata of a file
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class Part(NamedTuple):
    """A rank's rows of a tensor."""

    rows: Tensor
    first: int  # the index of the first of them in the full tensor


class Saved(NamedTuple):
    """Dtype and shape of a tensor in files, all its shards together."""

    dtype: torch.dtype
    shape: torch.Size


def own_part(tensor: Tensor) -> Part:
    """What this rank holds of ``tensor``: all of a plain one, the rows of its shard of a DTensor.

    Raises ValueError for a DTensor that is not divided by rows over the last dimension of ranks, as FSDP2 does.
    """
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), 0)
    mesh = tensor.device_mesh
    if tuple(tensor.placements) not in ((Shard(0),), (Replicate(), Shard(0))):
        raise ValueError(f"a shard must be rows, over the last dimension of ranks, got {tensor.placements} on {mesh}")
    most = -(-tensor.shape[0] // mesh.size(-1))
    return Part(tensor.to_local().detach(), min(mesh.get_local_rank(mesh.ndim - 1) * most, tensor.shape[0]))


def is_written_here(tensor: DTensor, number: int) -> bool:
    """Whether this rank's copy writes the ``number``-th tensor of a checkpoint: each copy writes every n-th."""
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or number % mesh.size(0) == mesh.get_local_rank(0)


def host_part(part: Part) -> Part:
    """A copy in host memory."""
    return Part(part.rows.to("cpu", copy=True), part.first)


def write_parts(file: Path, parts: Mapping[str, Part]) -> None:
    """Writes them; those without rows are left out. The tensors of one call may share storage."""
    kept = {name: part for name, part in parts.items() if part.rows.numel() or part.first == 0}
    told = {name: {OFFSETS: [part.first, *[0] * (part.rows.ndim - 1)][: part.rows.ndim]} for name, part in kept.items()}
    save_file(apart({name: part.rows for name, part in kept.items()}), file, metadata={SHARDING: json.dumps(told)})


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory, contiguous, each in a storage of its own, as safetensors demands.

    Copies only those that are not so already.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if own.numel() and (storage.nbytes() != own.nbytes or storage.data_ptr() in taken):
            own = own.clone()
            storage = own.untyped_storage()
        taken.add(storage.data_ptr())
        found[name] = own
    return found


def saved_in(files: Sequence[Path]) -> dict[str, Saved]:
    """The tensors in ``files`` by name. Raises SafetensorError or OSError for files that cannot be read."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # importing it takes 0.3 s
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _folder_of(files) as folder:
        found = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    return {
        name: Saved(tensor.properties.dtype, tensor.size)
        for name, tensor in found.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def read_into(files: Sequence[Path], targets: Mapping[str, Tensor]) -> None:
    """Fills plain tensors, and this rank's shards of DTensors, from ``files``; dtypes may differ. No communication.

    Raises ValueError where a tensor is missing, has another shape, or lacks rows; SafetensorError, OSError for files.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    saved = saved_in(files)
    for name, target in targets.items():
        if name not in saved:
            raise ValueError(f"{name} is missing")
        if saved[name].shape != target.shape:
            raise ValueError(f"{name} must have the shape {list(target.shape)}, got {list(saved[name].shape)}")
    with _folder_of(files) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading needs no communication
        try:
            dcp.load(dict(targets), storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=True)
        except CheckpointException as error:  # no Exception, but a BaseException
            first = next(iter(error.failures.values()))[0]
            raise ValueError(str(first).splitlines()[0] if str(first) else type(first).__name__) from error


def _folder_of(files: Sequence[Path]) -> tempfile.TemporaryDirectory[str]:
    """A folder with links to ``files`` alone: the reader takes every file of a folder."""
    folder = tempfile.TemporaryDirectory(prefix="isomorph-")
    for i, file in enumerate(files):
        (Path(folder.name) / f"{i}.safetensors").symlink_to(file.resolve())
    return folder
