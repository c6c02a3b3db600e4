"""benchmarks/grid.py: how busy the grids of packed attention keep the multiprocessors of a GPU."""

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")
FILE = Path(__file__).parents[1] / "benchmarks" / "grid.py"


@pytest.fixture(scope="module")
def grid() -> Any:
    spec = importlib.util.spec_from_file_location("isomorph_test_grid", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_schedule_by_hand(grid: Any) -> None:
    assert grid.idle([4, 3, 2, 1], 2) == 0
    assert grid.idle([1, 2, 3, 4], 2) == pytest.approx(1 - 10 / 12)  # 1 + 3 beside 2 + 4
    assert grid.idle([8, 1], 2) == pytest.approx(1 - 9 / 16)


def test_iterations_are_those_of_the_pairs_that_a_group_has(grid: Any) -> None:
    """Blocks of 1 x 1: an iteration is a pair of a query and a key that it sees, for every query head."""
    from isomorph.kernels.gpu.attention_tiles import Config, Tile
    from isomorph.kernels.packed_layout import PackedLayout

    prompt, response, group, heads = 5, 3, 2, 4
    layout = PackedLayout.from_groups([prompt], [[response] * group])
    pairs = prompt * (prompt + 1) // 2 + group * (prompt * response + response * (response + 1) // 2)
    tile = Tile(1, 1, 4, 1)
    for name in Config._fields[:3]:
        costs = grid.program_costs(name, Config(tile, tile, tile, piece=100), layout, heads, 2)
        assert sum(costs) == heads * pairs, name


@pytest.mark.parametrize(("group", "shape"), list(itertools.product((8, 16), ((12, 2, 128), (9, 3, 64)))), ids=str)
def test_a_group_leaves_at_most_a_tenth_of_the_multiprocessors_idle(
    grid: Any, group: int, shape: tuple[int, int, int]
) -> None:
    """P = 2048, R = 1024 on 132 multiprocessors, in the order of the launched grid, one program on each."""
    from isomorph.kernels.gpu.attention_tiles import CONFIGS

    *heads, dim = shape
    for name in ("forward", "grad_q", "grad_kv"):
        config = CONFIGS[90, dim, 2]
        share = grid.idle_share(name, config, *heads, prompt=2048, response=1024, group=group)
        assert share <= 0.10, (name, share)
