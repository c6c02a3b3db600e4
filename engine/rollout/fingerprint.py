"""Fingerprints of weights: of every bit, or of the addresses where both sides share storage."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from isomorph.kernels.bit_hash import bit_hash

_64_BITS = (1 << 64) - 1


def fingerprint(named: Mapping[str, Tensor]) -> str:
    """32 hex digits of the names, shapes, dtypes and bits of all tensors; one pass over memory, whatever the device."""
    return combine_hashes(tensor_hashes(named))


def storage_fingerprint(named: Mapping[str, Tensor]) -> str:
    """32 hex digits of the names, shapes, dtypes and places of all tensors: equal where they are one memory."""
    places = {
        name: f"{tuple(t.shape)} {tuple(t.stride())} {t.dtype} {t.device} {t.data_ptr():x}" for name, t in named.items()
    }
    return combine_hashes(places)


def tensor_hash(tensor: Tensor) -> str:
    """Of one tensor's shape, dtype and bits; swapped rows are seen, and every single bit."""
    return tensor_hashes({"": tensor})[""]


def tensor_hashes(named: Mapping[str, Tensor]) -> dict[str, str]:
    """``tensor_hash`` of each. The device is waited for once, not once a tensor."""
    found = [(f"{tuple(tensor.shape)} {tensor.dtype}", bit_hash(tensor)) for tensor in named.values()]
    totals = torch.stack([bits for _, bits in found]).tolist() if found else []
    return {
        name: f"{kind} {total & _64_BITS:016x}" for name, (kind, _), total in zip(named, found, totals, strict=True)
    }


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """The fingerprint of tensors whose ``tensor_hash`` is known."""
    text = "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
