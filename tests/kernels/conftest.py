"""Shared by the tests of kernels: trees, attention without packing as expected value, tensors with unusual strides."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend

Lay = Callable[[Tensor], Tensor]
Sequences = Callable[[Sequence[int], Sequence[int]], list[tuple[Tensor, int]]]
TreeOf = Callable[[list[tuple[int, int]]], tuple[list[int], list[int]]]
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


@pytest.fixture(scope="session")
def sequences() -> Sequences:
    """``sequences(lens, parents)``: per segment the packed rows of its ancestors and its own, and the number of the
    ancestors' rows."""
    return _sequences


def _sequences(lens: Sequence[int], parents: Sequence[int]) -> list[tuple[Tensor, int]]:
    out: list[tuple[Tensor, int]] = []
    start = 0
    for length, parent in zip(lens, parents, strict=True):
        above = out[parent][0] if parent >= 0 else torch.zeros(0, dtype=torch.int64)
        out.append((torch.cat([above, torch.arange(start, start + length)]), len(above)))
        start += length
    return out


@pytest.fixture(scope="session")
def tree_of() -> TreeOf:
    """``tree_of(nodes)``: lens and parents from lengths and depths in depth-first order.

    A depth without a parent is reduced to one that has a parent.
    """
    return _tree_of


def _tree_of(nodes: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    path: list[int] = []
    parents = []
    for i, (_, depth) in enumerate(nodes):
        del path[depth:]
        parents.append(path[-1] if path else -1)
        path.append(i)
    return [length for length, _ in nodes], parents


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)


# -- tensors with unusual strides
def _reversed(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def _first_two_swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else _every_second(x)


def _every_second(x: Tensor) -> Tensor:
    whole = _poison(x, (*x.shape[:-1], 2 * x.shape[-1] + 3))
    return whole[..., 1 : 1 + 2 * x.shape[-1] : 2].copy_(x)


def _amid_poison(x: Tensor) -> Tensor:
    """Unit stride in the last dimension only."""
    whole = _poison(x, tuple(size + 3 for size in x.shape))
    return whole[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


def _off_by_one(x: Tensor) -> Tensor:
    """Contiguous, but not aligned to 16 bytes."""
    return _poison(x, (x.numel() + 1,))[1:].view(x.shape).copy_(x)


def _first_expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _last_expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def _poison(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, math.nan if x.is_floating_point() else 2**40, dtype=x.dtype, device=x.device)


LAYS: tuple[Lay, ...] = (
    _reversed,
    _first_two_swapped,
    _every_second,
    _amid_poison,
    _off_by_one,
    _first_expanded,
    _last_expanded,
)


@pytest.fixture(params=LAYS, ids=lambda lay: lay.__name__.strip("_"))
def lay(request: pytest.FixtureRequest) -> Lay:
    """``lay(x)``: a tensor with the values of x (those of its first row or column if expanded) and other strides."""
    return request.param
