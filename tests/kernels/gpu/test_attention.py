"""packed_attention in Triton. Interpreted if there is no GPU, in tiles of 32 x 16 and 16 x 32 and pieces of 64 queries.

bfloat16 is not tested interpreted: the interpreter computes its products wrongly.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tree = tuple[list[int], list[int]]  # lengths and parents

TREES: dict[str, Tree] = {
    "nothing": ([], []),
    "one token": ([1], [-1]),
    "one response": ([7, 5], [-1, 0]),
    "zero-length and one-token segments": (
        [21, 9, 1, 17, 0, 30, 1, 5, 3, 40, 1, 1, 3, 0, 0],
        [-1, 0, 0, 0, 0, 0, -1, 6, 6, -1, 9, 9, -1, 12, 12],
    ),
    "prompts of zero length": ([0, 4, 2, 6, 3, 0], [-1, 0, 0, -1, 3, -1]),
    "whole tiles": ([64, 32, 64], [-1, 0, 0]),
    "longer than tiles and pieces, and no multiple of them": ([71, 41, 33, 83], [-1, 0, 0, 0]),
    "a tree of depth 3": ([35, 20, 4, 34, 6, 2, 7, 8], [-1, 0, 1, 2, 1, 0, -1, 6]),
    "a chain, and empty branches": ([6, 0, 5, 1, 0, 3, 12], [-1, 0, 1, 2, 3, 2, 0]),
}

# for heads that fill a tile in part: masks along D are the same for every tree
NARROW = ("nothing", "one response", "prompts of zero length", "longer than tiles and pieces, and no multiple of them")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever is allocated without a value holds NaN: an output that is not written, or read before, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # only for that: cuBLAS, in the references, would refuse
    assert torch.empty(3, device=DEVICE).isnan().all()
    with backend.using("packed_attention=triton"):
        yield
    torch.use_deterministic_algorithms(False)


def _qkv(num_tok: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(num_tok)
    shapes = ((num_tok, heads, dim), (num_tok, kv_heads, dim), (num_tok, kv_heads, dim), (num_tok, heads, dim))
    q, k, v, dout = (torch.randn(shape, generator=gen).to(DEVICE, dtype) for shape in shapes)
    return [q.mul_(2).requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def _run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: PackedLayout) -> tuple[Tensor, ...]:
    out = packed_attention(q, k, v, layout)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def _assert_close(inputs: list[Tensor], layout: PackedLayout, truth: Any, ulps: float = 1.0) -> None:
    """Within twice the error that PyTorch makes in the same dtype, and an ulp; the truth is float64.

    An ulp of dq and dk also is one of their terms, p (dout v - dout out), whose difference cancels where p is 1.
    """
    q, k, v, dout = inputs
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true_out = truth(*exact)
    theirs = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=layout.dense_mask().to(DEVICE), enable_gqa=True
    )[0].transpose(0, 1)
    triples = zip(
        _run(*inputs, layout),
        (theirs, *torch.autograd.grad(theirs, (q, k, v), dout)),
        (true_out, *torch.autograd.grad(true_out, exact, dout.double())),
        strict=True,
    )
    q_max, k_max, v_max = (max(x.detach().norm(dim=-1).flatten().tolist(), default=0.0) for x in (q, k, v))
    term = float(dout.norm()) * v_max * q.shape[2] ** -0.5
    for (our, their, true), largest in zip(triples, (0, term * k_max, term * q_max, 0), strict=True):
        assert our.shape == true.shape and our.dtype == dout.dtype and our.is_contiguous()
        slack = ulps * torch.finfo(dout.dtype).eps * (true.norm() + largest)
        assert (our.double() - true).norm() <= 2 * (their.double() - true).norm() + slack


# every way to fill a tile with a head: 64 and 128 whole, 5, 40 and 96 masked
@pytest.mark.parametrize(
    ("tree", "heads", "kv_heads", "dim"),
    [
        *(pytest.param(tree, 2, 1, 64, id=f"D 64, {name}") for name, tree in TREES.items()),
        *(pytest.param(TREES[name], 2, 2, 5, id=f"D 5, {name}") for name in NARROW),
    ],
)
def test_equals_unpacked_sequences(unpacked_attention: Any, tree: Tree, heads: int, kv_heads: int, dim: int) -> None:
    # The gradient of a prompt's keys and values in the unpacked truth is the sum over its copies.
    layout = PackedLayout.from_tree(*tree)
    inputs = _qkv(layout.num_tok, heads, kv_heads, dim)
    _assert_close(inputs, layout, lambda q, k, v: unpacked_attention(q, k, v, *tree, dim**-0.5))


@pytest.mark.parametrize(
    ("dim", "dtype"), [(40, torch.float32), (96, torch.float32), (128, torch.float32), (96, torch.float16)]
)
def test_equals_reference_for_other_widths_and_dtypes(dtype: torch.dtype, dim: int) -> None:
    layout = PackedLayout.from_tree([37, 20, 4, 33], [-1, 0, 1, 0])
    inputs = _qkv(layout.num_tok, 4, 2, dim, dtype)
    _assert_close(inputs, layout, lambda q, k, v: packed_attention_ref(q, k, v, layout))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter gets products of bfloat16 wrong")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 2, 128), (9, 3, 64)])
def test_equals_reference_in_bfloat16(heads: int, kv_heads: int, dim: int) -> None:
    layout = PackedLayout.from_tree([700, 300, 5, 513, 1, 900], [-1, 0, 1, 1, 0, 0])
    inputs = _qkv(layout.num_tok, heads, kv_heads, dim, torch.bfloat16)
    _assert_close(inputs, layout, lambda q, k, v: packed_attention_ref(q, k, v, layout))


@settings(max_examples=12, deadline=None)
@given(nodes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=6))
def test_equals_reference_for_any_lengths(tree_of: Any, nodes: list[tuple[int, int]]) -> None:
    layout = PackedLayout.from_tree(*tree_of(nodes))
    _assert_close(_qkv(layout.num_tok, 2, 1, 8), layout, lambda q, k, v: packed_attention_ref(q, k, v, layout))


def test_the_shared_gradient_is_the_sum_over_repeated_prompts() -> None:
    prompt, responses = 37, [9, 20, 1]
    layout = PackedLayout.from_groups([prompt], [responses])
    q, k, v, dout = _qkv(layout.num_tok, 4, 2, 16)
    dout[:prompt] = 0  # the copies of the prompt as queries would count as often as there are copies
    rows = [
        torch.cat([torch.arange(prompt), torch.arange(start, end)])
        for start, end in itertools.pairwise(itertools.accumulate(responses, initial=prompt))
    ]
    at = torch.cat(rows).to(DEVICE)
    repeated = PackedLayout.from_groups([len(row) for row in rows], [[]] * len(rows))
    parts = _run(*(x.detach()[at].requires_grad_() for x in (q, k, v)), dout[at], repeated)
    packed = _run(q, k, v, dout, layout)
    torch.testing.assert_close(packed[0][at], parts[0], rtol=1e-5, atol=1e-6)
    for shared, part in zip(packed[1:], parts[1:], strict=True):
        torch.testing.assert_close(shared, torch.zeros_like(shared).index_add(0, at, part), rtol=1e-5, atol=1e-5)


def test_a_group_has_the_same_bits_alone_and_in_any_batch() -> None:
    groups = [(37, [41]), (5, [1, 0, 20]), (70, []), (33, [9, 2])]
    layout = PackedLayout.from_groups([p for p, _ in groups], [r for _, r in groups])
    inputs = _qkv(layout.num_tok, 2, 1, 16)
    together = _run(*inputs, layout)
    for (prompt, responses), (start, end) in zip(groups, itertools.pairwise(layout.group_offsets), strict=True):
        alone = PackedLayout.from_groups([prompt], [responses])
        rows = [x.detach()[start:end].clone().requires_grad_() for x in inputs[:3]]
        for whole, part in zip(together, _run(*rows, inputs[3][start:end], alone), strict=True):
            assert torch.equal(whole[start:end], part)


def test_the_same_call_gives_the_same_bits() -> None:
    layout = PackedLayout.from_groups([40], [[33, 5]])
    inputs = _qkv(layout.num_tok, 2, 1, 16)
    first = _run(*inputs, layout)
    for _ in range(2 if DEVICE == "cpu" else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, _run(*inputs, layout), strict=True))


def test_strided_views_amid_poison_give_what_contiguous_tensors_give() -> None:
    """Rows before and after, heads beside, and values beyond the width are NaN; dout comes transposed."""
    layout = PackedLayout.from_groups([37], [[9, 20]])
    inputs = _qkv(layout.num_tok, 4, 2, 24)
    clean = _run(*inputs, layout)
    views = []
    for x in inputs:
        wide = torch.full((layout.num_tok + 70, x.shape[1] + 2, 40), math.nan, device=DEVICE)
        view = wide[35:-35, 1:-1, 8:32]
        view.copy_(x.detach())
        views.append(view)
    dout = views[3].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    leaves = [view.detach().requires_grad_() for view in views[:3]]
    assert all(torch.equal(a, b) for a, b in zip(clean, _run(*leaves, dout, layout), strict=True))


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets
def test_a_broken_group_poisons_no_other(group: int) -> None:
    layout = PackedLayout.from_groups([30, 20, 33], [[5, 10], [35], [3, 1]])
    q, k, v, dout = _qkv(layout.num_tok, 2, 1, 8)
    clean = _run(q, k, v, dout, layout)
    start, end = layout.group_offsets[group : group + 2]
    others = torch.cat([torch.arange(start), torch.arange(end, layout.num_tok)])
    with torch.no_grad():
        for x in (q, k, v):
            x[start:end] = math.nan
    broken = _run(q, k, v, dout, layout)
    assert broken[0][start:end].isnan().all()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(broken, clean, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e-4, 30.0, 300.0])
def test_scores_of_any_size_are_exact(size: float) -> None:
    """From all alike to one key that takes everything."""
    layout = PackedLayout.from_groups([40], [[9, 20]])
    inputs = _qkv(layout.num_tok, 2, 1, 16)
    with torch.no_grad():
        inputs[0].mul_(size)
    # dK and dV make a score again from the transposed product: an ulp of the score is that share of its weight
    largest = (torch.einsum("qhd,khd->hqk", inputs[0], inputs[1].repeat(1, 2, 1)).abs().max() / 4).item()
    _assert_close(inputs, layout, lambda q, k, v: packed_attention_ref(q, k, v, layout), max(1.0, largest))


# -- the tables
@settings(max_examples=150, deadline=None)
@given(
    nodes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=12),
    block_q=st.sampled_from([4, 16]),
    block_k=st.sampled_from([4, 8, 32]),
    pieces=st.sampled_from([1, 2, 100]),
)
def test_tables_name_every_visible_pair_once(
    tree_of: Any, nodes: list[tuple[int, int]], block_q: int, block_k: int, pieces: int
) -> None:
    from isomorph.kernels.gpu.attention_tiles import key_tiles, query_tiles

    layout = PackedLayout.from_tree(*tree_of(nodes))
    token = torch.arange(layout.num_tok)
    causal = token <= token[:, None]
    seen = torch.zeros(layout.num_tok, layout.num_tok, dtype=torch.int64)
    tables = query_tiles(layout.segments, block_q, block_k)
    for start, end, first_full, last_full, first_block, last_block in tables.tiles.tolist():
        assert 0 < end - start <= block_q
        for a, b in tables.full[first_full:last_full].tolist():
            assert (b - a) % block_k == 0 and causal[start:end, a:b].all(), "these blocks are not masked"
            seen[start:end, a:b] += 1
        for a, b in tables.blocks[first_block:last_block].tolist():
            assert 0 < b - a <= block_k
            seen[start:end, a:b] += causal[start:end, a:b]
    assert torch.equal(seen, layout.dense_mask().long())

    seen.zero_()
    keys = key_tiles(layout.segments, block_k, block_k * pieces)
    slots = []
    for key, end_key, start, end, slot in keys.tiles.tolist():
        assert 0 < end_key - key <= block_k and 0 < end - start <= block_k * pieces
        seen[start:end, key:end_key] += causal[start:end, key:end_key]
        slots += [slot] if slot >= 0 else []
    assert torch.equal(seen, layout.dense_mask().long())
    assert sorted(slots) == list(range(keys.num_slots))
    assert [slot for *_, first, last in keys.split.tolist() for slot in range(first, last)] == list(
        range(keys.num_slots)
    )


def test_longest_tiles_come_first_and_long_ones_are_cut() -> None:
    from isomorph.kernels.gpu.attention_tiles import key_tiles, query_tiles

    layout = PackedLayout.from_groups([300], [[100] * 8])
    keys = key_tiles(layout.segments, 64, 256)
    lengths = [end - start for _, _, start, end, _ in keys.tiles.tolist()]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) == 256
    assert keys.num_slots >= 4 * (300 // 64)
    assert query_tiles(layout.segments, 64, 64).tiles[0, 0] >= 300  # a response sees more than its prompt does


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the compiler may order the sums of the two differently")
def test_products_that_are_issued_ahead_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of no, one and several whole blocks of 16 keys; a tree, so that a tile has two ranges."""
    from isomorph.kernels.gpu import attention, attention_tiles

    layout = PackedLayout.from_tree([71, 41, 16, 3], [-1, 0, 1, 0])
    q, k, v, _ = _qkv(layout.num_tok, 2, 1, 64)
    config = attention_tiles.INTERPRETED
    found = []
    for is_ahead in (False, True):
        tile = config.forward._replace(ahead=is_ahead)
        monkeypatch.setattr(attention, "config_of", lambda x, tile=tile: config._replace(forward=tile))
        found.append(attention.attend(q.detach(), k.detach(), v.detach(), layout, 0.125))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_every_gpu_has_a_row_whose_tiles_fit_it() -> None:
    from isomorph.kernels.gpu.attention_rows import ADD_ROWS
    from isomorph.kernels.gpu.attention_tiles import CONFIGS, INTERPRETED, table_arch

    arch_of = {(8, 0): 80, (8, 6): 120, (8, 7): 80, (8, 9): 120, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 0): 120}
    assert {capability: table_arch(*capability) for capability in arch_of} == arch_of
    assert set(CONFIGS) == set(itertools.product((80, 90, 100, 120), (64, 128), (2, 4)))
    for config in (*CONFIGS.values(), INTERPRETED):
        assert config.grad_kv.block_k % ADD_ROWS == 0
