"""Which share of a GPU's multiprocessors idles while packed attention's grids run: a list-scheduling simulation.

Programs start in the order of the grid, each in the slot that is free first; a program costs its iterations of the
inner loop. The tables are those that the kernels read (kernels/gpu/attention_tiles.py), so the simulation sees what is
launched. Costs in iterations leave out what programs do before and after their loops.
"""

import heapq
from collections.abc import Iterable

from torch import Tensor

from isomorph.kernels.gpu.attention_tiles import Config, key_tiles, query_tiles
from isomorph.kernels.packed_layout import PackedLayout

MULTIPROCESSORS = 132  # H100 and H200 SXM


def idle_share(
    name: str,
    config: Config,
    heads: int,
    kv_heads: int,
    *,
    prompt: int,
    response: int,
    group: int,
    slots: int = 1,
    multiprocessors: int = MULTIPROCESSORS,
) -> float:
    """Idle share of the kernel ``name`` (a field of Config) for one group. ``slots``: programs a multiprocessor runs.

    A multiprocessor with several programs is taken to run them at the speed of one each: they share its units, so that
    the idle share is that of its slots.
    """
    layout = PackedLayout.from_groups([prompt], [[response] * group])
    costs = program_costs(name, config, layout, heads, kv_heads)
    return idle(costs, slots * multiprocessors)


def program_costs(name: str, config: Config, layout: PackedLayout, heads: int, kv_heads: int) -> list[int]:
    """Iterations of the inner loop of every program, in the order of the grid; at least 1."""
    tile = getattr(config, name)
    if name == "grad_kv":
        tiles = key_tiles(layout.segments, tile.block_k, config.piece).tiles.tolist()
        per_tile = heads // kv_heads
        costs = [per_tile * -(-(row[3] - row[2]) // tile.block_q) for row in tiles]
        return [max(1, cost) for cost in costs for _ in range(kv_heads)]
    tables = query_tiles(layout.segments, tile.block_q, tile.block_k)
    keys = _whole_blocks(tables.full, tile.block_k)
    costs = []
    for _, _, first, last, first_block, last_block in tables.tiles.tolist():
        costs.append(sum(keys[first:last]) + last_block - first_block)
    return [max(1, cost) for cost in costs for _ in range(heads)]


def _whole_blocks(full: Tensor, block_k: int) -> list[int]:
    return [(end - start) // block_k for start, end in full.tolist()]


def idle(costs: Iterable[int], slots: int) -> float:
    """The idle share of ``slots`` until the last program ends, where each program takes the slot that is free first."""
    free = [0] * slots
    total = 0
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
        total += cost
    return 1 - total / (slots * max(free))
