"""Hashes of weights: of all their bits, or of their addresses where trainer and sampler share storage."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from isomorph.kernels.bit_hash import bit_hash

_64_BITS = (1 << 64) - 1


def fingerprint(named: Mapping[str, Tensor]) -> str:
    """32 hex digits: hash of names, shapes, dtypes and bits of all tensors, on whatever device. Reads memory once."""
    return combine_hashes(tensor_hashes(named))


def storage_fingerprint(named: Mapping[str, Tensor]) -> str:
    """32 hex digits: hash of names, shapes, strides, dtypes, devices and addresses. Equal only for one storage."""
    places = {
        name: f"{tuple(t.shape)} {tuple(t.stride())} {t.dtype} {t.device} {t.data_ptr():x}" for name, t in named.items()
    }
    return combine_hashes(places)


def tensor_hash(tensor: Tensor) -> str:
    """Shape, dtype and 16 hex digits of one tensor's bits; sensitive to every single bit (see ``bit_hash``)."""
    return tensor_hashes({"": tensor})[""]


def tensor_hashes(named: Mapping[str, Tensor]) -> dict[str, str]:
    """``tensor_hash`` of each; waits for the device once for all."""
    found = [(f"{tuple(tensor.shape)} {tensor.dtype}", bit_hash(tensor)) for tensor in named.values()]
    totals = torch.stack([bits for _, bits in found]).tolist() if found else []
    return {
        name: f"{kind} {total & _64_BITS:016x}" for name, (kind, _), total in zip(named, found, totals, strict=True)
    }


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """The ``fingerprint`` of tensors of which ``tensor_hash`` is given by name."""
    text = "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
