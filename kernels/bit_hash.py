"""A hash of a tensor's bits: one pass over memory, the same number on every device.

    words     the tensor's bytes in row-major order, zeros behind them up to whole blocks of 16 words of 8 bytes
    hash      sum over blocks b of (2 b + 1) * (sum of the words of block b)          modulo 2**64

A change of one word is multiplied by an odd number and cannot vanish; blocks that change places are seen, words that
change places within a block are not. It tells a stale tensor from a fresh one, not an honest one from a forgery.
"""

import torch
from torch import Tensor

from isomorph.kernels import backend

BLOCK_BYTES = 128


# -- reference: the specification
def bit_hash_ref(tensor: Tensor) -> Tensor:
    """What ``bit_hash`` computes."""
    flat = _flat(tensor)
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


def _flat(tensor: Tensor) -> Tensor:
    """[numel], of stride 1 even where a single number had another."""
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))


def _weighted_sum(blocks_BW: Tensor, first_weight: int) -> Tensor:
    is_aligned = blocks_BW.storage_offset() * blocks_BW.element_size() % 8 == 0
    words_BW = (blocks_BW if is_aligned else blocks_BW.clone()).view(torch.int64)
    sums_B = words_BW.sum(1)
    weights_B = torch.arange(first_weight, first_weight + 2 * sums_B.numel(), 2, device=sums_B.device)
    return (sums_B * weights_B).sum()


# -- public
def bit_hash(tensor: Tensor) -> Tensor:
    """[] int64 on the tensor's device, not waited for. Any dtype, shape and stride; no gradient."""
    if backend.choose("bit_hash", tensor.device) == "reference":
        return bit_hash_ref(tensor)
    out = torch.empty(1, dtype=torch.int64)
    backend.native().bit_hash(_flat(tensor).view(torch.uint8), out)
    return out[0]
