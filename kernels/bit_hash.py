"""A hash of a tensor's bits: one pass over memory, the same value on every device.

    words     the tensor's bytes in row-major order, padded with zeros to whole blocks of 16 words of 8 bytes
    hash      sum over blocks b of (2 b + 1) * (sum of the words of block b)          modulo 2**64

A change of a single word changes the hash, because its weight is odd. Two changes may cancel: exchanged words within a
block do not change it, nor do the highest bits of two words. Exchanged blocks do unless their sums differ by nothing or
by a high power of 2. The hash is for detecting outdated weights; it is not cryptographic.
"""

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.strides import dense

BLOCK_BYTES = 128


# -- reference: the specification
def bit_hash_ref(tensor: Tensor) -> Tensor:
    """The specification of ``bit_hash``."""
    flat = dense(tensor.detach())
    per_block = BLOCK_BYTES // flat.element_size()
    whole = flat.numel() // per_block * per_block
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    if whole:
        total = _weighted_sum(flat[:whole].view(-1, per_block), 1)
    if whole < flat.numel():
        rest = torch.zeros(per_block, dtype=flat.dtype, device=flat.device)
        rest[: flat.numel() - whole] = flat[whole:]
        total += _weighted_sum(rest[None], 2 * (whole // per_block) + 1)
    return total


def _weighted_sum(blocks_BW: Tensor, first_weight: int) -> Tensor:
    is_aligned = blocks_BW.storage_offset() * blocks_BW.element_size() % 8 == 0
    words_BW = (blocks_BW if is_aligned else blocks_BW.clone()).view(torch.int64)
    sums_B = words_BW.sum(1)
    weights_B = torch.arange(first_weight, first_weight + 2 * sums_B.numel(), 2, device=sums_B.device)
    return (sums_B * weights_B).sum()


# -- public
def bit_hash(tensor: Tensor) -> Tensor:
    """Returns [] int64 on the tensor's device, without synchronising. Any dtype, shape and strides; no gradient."""
    if backend.choose("bit_hash", tensor.device) == "reference" or not backend.has_memory(tensor):
        return bit_hash_ref(tensor)
    out = torch.empty(1, dtype=torch.int64)
    backend.native().bit_hash(dense(tensor.detach()).view(torch.uint8), out)
    return out[0]
