"""Tiles of packed attention: the tables of ints that the kernels read, and the tile sizes for each kind of GPU.

A tile lies within one segment. The entries for a group depend only on the lengths of that group, and sizes are not
tuned at run time, so the bits of a group's results depend neither on the batch nor on the run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isomorph.kernels.gpu.variant import ARCHS
from isomorph.kernels.packed_layout import PackedLayout, Segment


class Tile(NamedTuple):
    """Queries and keys of a block, and launch options."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    ahead: bool = False  # forward alone: products of the next block before the softmax of this one; more registers


class Config(NamedTuple):
    """The tiles of the three kernels for one head dimension on one kind of GPU."""

    forward: Tile
    grad_q: Tile
    grad_kv: Tile
    piece: int = 1024  # queries per program of grad_kv; a multiple of every block_q and block_k


# By (architecture, head dimension, bytes per element). Chosen to compile without spills; those of sm_90 were measured.
CONFIGS = {
    (80, 64, 2): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (90, 64, 2): Config(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
    (100, 64, 2): Config(Tile(128, 64, 8, 3), Tile(128, 64, 4, 2), Tile(32, 128, 8, 3)),
    (120, 64, 2): Config(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(32, 128, 8, 2)),
    (80, 128, 2): Config(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 128, 2): Config(Tile(128, 64, 8, 3, True), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
    (100, 128, 2): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 8, 2)),
    (120, 128, 2): Config(Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    **{(arch, 64, 4): Config(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)) for arch in ARCHS},
    **{(arch, 128, 4): Config(Tile(32, 16, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)) for arch in ARCHS},
}
INTERPRETED = Config(Tile(32, 16, 4, 1, True), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), piece=64)


# -- tables
class QueryTiles(NamedTuple):
    """The keys for every tile of queries, tables of [n, ...] int32; the columns are in ``forward_kernel``."""

    tiles: Tensor
    full: Tensor
    blocks: Tensor


class KeyTiles(NamedTuple):
    """The queries for every tile of keys, [n, ...] int32; columns in ``grad_kv_kernel`` and ``add_pieces_kernel``."""

    tiles: Tensor
    split: Tensor
    num_slots: int


def query_tiles(segments: Sequence[Segment], block_q: int, block_k: int) -> QueryTiles:
    """Tiles of queries with the keys that are visible to them, the largest number of keys first."""
    found: list[tuple[int, tuple[int, int], list[tuple[int, int]], list[tuple[int, int]]]] = []
    for segment in segments:
        above = _ancestors(segments, segment)
        for start in range(segment.start, segment.end, block_q):
            rows = start, min(start + block_q, segment.end)
            diagonal = segment.start + (start - segment.start) // block_k * block_k
            full = [(a, b - (b - a) % block_k) for a, b in (*above, (segment.start, diagonal))]
            full = [(a, b) for a, b in full if a < b]
            part = [(b - (b - a) % block_k, b) for a, b in above if (b - a) % block_k]
            part += [(k0, min(k0 + block_k, rows[1])) for k0 in range(diagonal, rows[1], block_k)]
            found.append((sum(b - a for a, b in full) + block_k * len(part), rows, full, part))
    found.sort(key=lambda tile: -tile[0])  # stable
    tiles: list[int] = []
    ranges: list[tuple[int, int]] = []
    blocks: list[tuple[int, int]] = []
    for _, rows, full, part in found:
        tiles += [*rows, len(ranges), len(ranges) + len(full), len(blocks), len(blocks) + len(part)]
        ranges += full
        blocks += part
    return QueryTiles(_table(tiles, 6), _table(ranges, 2), _table(blocks, 2))


def _ancestors(segments: Sequence[Segment], segment: Segment) -> list[tuple[int, int]]:
    """Packed rows of the ancestors of a segment, first to last; adjacent ranges are joined."""
    ranges: list[tuple[int, int]] = []
    while segment.parent >= 0:
        segment = segments[segment.parent]
        if ranges and ranges[-1][0] == segment.end:
            ranges[-1] = (segment.start, ranges[-1][1])
        elif segment.start < segment.end:
            ranges.append((segment.start, segment.end))
    return ranges[::-1]


def key_tiles(segments: Sequence[Segment], block_k: int, piece: int) -> KeyTiles:
    """Tiles of keys with the queries to which they are visible, in pieces, the largest number of queries first."""
    tiles: list[tuple[int, ...]] = []
    split: list[tuple[int, ...]] = []
    num_slots = 0
    for segment in segments:
        for key in range(segment.start, segment.end, block_k):
            keys = key, min(key + block_k, segment.end)
            pieces = [(a, min(a + piece, segment.vis_end)) for a in range(key, segment.vis_end, piece)]
            if len(pieces) == 1:
                tiles.append((*keys, *pieces[0], -1))
                continue
            tiles += [(*keys, *rows, num_slots + i) for i, rows in enumerate(pieces)]
            split.append((*keys, num_slots, num_slots + len(pieces)))
            num_slots += len(pieces)
    tiles.sort(key=lambda tile: tile[2] - tile[3])  # stable
    return KeyTiles(_table(tiles, 5), _table(split, 4), num_slots)


def _table(rows: Sequence[Any], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, width)


def tables_on(layout: PackedLayout, device: torch.device, config: Config) -> tuple[QueryTiles, QueryTiles, KeyTiles]:
    """The tables for forward, dQ and dK/dV on ``device``; computed and copied once, and reused by all layers."""
    key = ("attention", device, config)
    if key not in layout.on_device:
        forward, grad_q = (
            query_tiles(layout.segments, tile.block_q, tile.block_k) for tile in (config.forward, config.grad_q)
        )
        grad_kv = key_tiles(layout.segments, config.grad_kv.block_k, config.piece)
        layout.on_device[key] = (
            QueryTiles(*(x.to(device) for x in forward)),
            QueryTiles(*(x.to(device) for x in grad_q)),
            KeyTiles(grad_kv.tiles.to(device), grad_kv.split.to(device), grad_kv.num_slots),
        )
    return layout.on_device[key]


# -- sizes
def block_d(dim: int) -> int:
    """The width of a tile for head dimension ``dim``, up to 128; columns beyond ``dim`` are masked."""
    return 64 if dim <= 64 else 128


def config_of(x_THD: Tensor) -> Config:
    """The tiles for x [T, H, D] on its device."""
    if x_THD.device.type != "cuda":
        return INTERPRETED
    arch = table_arch(*torch.cuda.get_device_capability(x_THD.device))
    return CONFIGS[arch, block_d(x_THD.shape[2]), x_THD.element_size()]


def table_arch(major: int, minor: int) -> int:
    """The architecture in ``CONFIGS`` for a GPU: its own, or one with at most as much shared memory."""
    if major in (9, 10):
        return major * 10
    return 80 if (major, minor) in ((8, 0), (8, 7)) else 120
