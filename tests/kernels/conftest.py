"""The independent truth of packed attention: what it means, computed without packing."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Unpacked = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], float], Tensor]


@pytest.fixture(scope="session")
def unpacked_attention() -> Unpacked:
    """``unpacked_attention(q, k, v, lens, parents, scale)``: lens and parents as in ``PackedLayout.from_tree``.

    Every segment after its own copies of all that it continues; no sharing, no masks but the triangle. Autograd adds
    up the gradients of the copies.
    """
    return _unpacked_attention


def _unpacked_attention(
    q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int], parents: Sequence[int], scale: float
) -> Tensor:
    out = 0 * (q + k.sum() + v.sum())
    repeats = q.shape[1] // k.shape[1]
    for rows, num_shared in _sequences(lens, parents):
        q_HLD, k_HLD, v_HLD = (x[rows].transpose(0, 1) for x in (q, k, v))
        scores = q_HLD @ k_HLD.repeat_interleave(repeats, 0).mT * scale
        future = torch.ones(len(rows), len(rows), dtype=torch.bool, device=q.device).triu(1)
        weights = torch.exp(scores.masked_fill(future, -math.inf))
        result = (weights / weights.sum(-1, keepdim=True)) @ v_HLD.repeat_interleave(repeats, 0)
        out = out.index_copy(0, rows[num_shared:].to(q.device), result.transpose(0, 1)[num_shared:])
    return out


def _sequences(lens: Sequence[int], parents: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Rows of each unpacked sequence, and how many of its first rows belong to what it continues."""
    out: list[tuple[Tensor, int]] = []
    start = 0
    for length, parent in zip(lens, parents, strict=True):
        above = out[parent][0] if parent >= 0 else torch.zeros(0, dtype=torch.int64)
        out.append((torch.cat([above, torch.arange(start, start + length)]), len(above)))
        start += length
    return out
