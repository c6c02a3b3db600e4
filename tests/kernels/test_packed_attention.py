"""packed_attention in C++ with every instruction set; Triton is in gpu/test_attention.py."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

ISAS = backend.native().isas() if backend.native_available() else []
Groups = tuple[list[int], list[list[int]]]
Tree = tuple[list[int], list[int]]

GROUPS: dict[str, Groups] = {
    "nothing": ([], []),
    "one token": ([1], [[]]),
    "one plain sequence": ([13], [[]]),
    "one response": ([7], [[5]]),
    "zero-length and one-token segments": ([21, 1, 40, 3], [[9, 1, 17, 0, 30], [5, 3], [1, 1, 1], [0, 0]]),
    "prompts of zero length": ([0, 6, 0], [[4, 2], [3], [0]]),
    "with and without responses": ([5, 9, 2], [[], [3, 3], []]),
    "equal lengths": ([12] * 4, [[9] * 3] * 4),
    "unequal lengths, padded together": ([30, 50, 60], [[5, 20], [70], [33, 1]]),
    "long ones alone": ([200, 150, 3], [[100, 140], [130], [1]]),
}

# lengths and parents
DEEP: dict[str, Tree] = {
    "a tree of depth 3": ([9, 5, 4, 3, 6, 2, 7, 8], [-1, 0, 1, 2, 1, 0, -1, 6]),
    "a chain, and empty branches": ([6, 0, 5, 1, 0, 3, 12], [-1, 0, 1, 2, 3, 2, 0]),
    "a long tree": ([130, 150, 20, 140, 3, 200], [-1, 0, 1, 1, 3, 0]),
}


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    backend.native().use_isa(request.param)
    yield request.param
    backend.native().use_isa("")


def _qkv(num_tok: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    gen = torch.Generator().manual_seed(num_tok)
    shapes = ((num_tok, heads, dim), (num_tok, kv_heads, dim), (num_tok, kv_heads, dim), (num_tok, heads, dim))
    q, k, v, dout = (torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes)
    return [q.mul_(2).requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def _tree(groups: Groups) -> tuple[list[int], list[int]]:
    """Lengths and parents of the segments."""
    lens: list[int] = []
    parents: list[int] = []
    for prompt_len, response_lens in zip(*groups, strict=True):
        parents += [-1] + [len(lens)] * len(response_lens)
        lens += [prompt_len, *response_lens]
    return lens, parents


TREES = {**{name: _tree(groups) for name, groups in GROUPS.items()}, **DEEP}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "scale"), [(4, 2, 16, None), (3, 1, 8, 0.2), (2, 2, 5, None)])
def test_equals_reference_and_unpacked_sequences_in_float64(
    unpacked_attention: Any, tree: Tree, heads: int, kv_heads: int, dim: int, scale: float | None
) -> None:
    # The gradient of a prompt's keys and values in the unpacked truth is the sum over its copies.
    layout = PackedLayout.from_tree(*tree)
    q, k, v, dout = _qkv(layout.num_tok, heads, kv_heads, dim)
    ours = packed_attention(q, k, v, layout, scale=scale)
    grads = torch.autograd.grad(ours, (q, k, v), dout)
    for other in (
        packed_attention_ref(q, k, v, layout, scale=scale),
        unpacked_attention(q, k, v, *tree, scale or dim**-0.5),
    ):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
        expected = torch.autograd.grad(other, (q, k, v), dout)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(nodes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=20))
def test_equals_reference_for_any_lengths(tree_of: Any, nodes: list[tuple[int, int]]) -> None:
    layout = PackedLayout.from_tree(*tree_of(nodes))
    q, k, v, dout = _qkv(layout.num_tok, 2, 1, 4)
    ours, other = packed_attention(q, k, v, layout), packed_attention_ref(q, k, v, layout)
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out, (q, k, v), dout) for out in (ours, other)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [GROUPS["unequal lengths, padded together"], GROUPS["long ones alone"]])
def test_errs_at_most_twice_as_much_as_pytorch_in_the_same_dtype(groups: Groups, dtype: torch.dtype) -> None:
    layout = PackedLayout.from_groups(*groups)
    q, k, v, dout = _qkv(layout.num_tok, 4, 2, 32, dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = packed_attention_ref(*exact, layout)
    ours = packed_attention(q, k, v, layout)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=layout.dense_mask(), enable_gqa=True
    )[0].transpose(0, 1)
    triples = zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), dout)),
        (theirs, *torch.autograd.grad(theirs, (q, k, v), dout)),
        (truth, *torch.autograd.grad(truth, exact, dout.double())),
        strict=True,
    )
    for our, their, true in triples:
        ulp = torch.finfo(dtype).eps * true.norm()
        assert (our.double() - true).norm() <= 2 * (their.double() - true).norm() + ulp


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_layout_says_where_everything_is(sequences: Any, tree: Tree) -> None:
    layout = PackedLayout.from_tree(*tree)
    lens, parents = tree
    assert layout.num_tok == sum(lens)
    assert layout.cu_seqlens.tolist() == list(itertools.accumulate(lens, initial=0))
    assert [segment.parent for segment in layout.segments] == parents
    assert [segment.vis_end for segment in layout.segments] == layout.vis_end.tolist()
    assert layout.segment_is_prompt == tuple(parent < 0 for parent in parents)
    assert [g for g, first in zip(layout.segment_group, layout.segment_is_prompt, strict=True) if first] == (
        list(range(len(layout.prompt_lens)))
    )
    mask = torch.zeros(layout.num_tok, layout.num_tok, dtype=torch.bool)
    for sequence, _ in sequences(*tree):
        assert layout.positions[sequence].tolist() == list(range(len(sequence)))
        for i, row in enumerate(sequence):
            mask[row, sequence[: i + 1]] = True
    assert torch.equal(layout.dense_mask(), mask)
    for group, (start, end) in enumerate(itertools.pairwise(layout.group_offsets)):
        assert end - start == layout.prompt_lens[group] + sum(layout.response_lens[group])


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_trees_of_depth_one(name: str) -> None:
    layout, tree = PackedLayout.from_groups(*GROUPS[name]), PackedLayout.from_tree(*TREES[name])
    assert (layout.segments, layout.prompt_lens, layout.response_lens) == (
        tree.segments,
        tree.prompt_lens,
        tree.response_lens,
    )
    assert not layout.is_tree
    assert all(PackedLayout.from_tree(*deep).is_tree for deep in DEEP.values())


def test_layout_moves_its_tensors() -> None:
    layout = PackedLayout.from_groups([3], [[2]]).to("meta")
    assert {x.device.type for x in (layout.positions, layout.cu_seqlens, layout.vis_end)} == {"meta"}


@pytest.mark.parametrize("groups", [GROUPS["unequal lengths, padded together"], GROUPS["equal lengths"]])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_broken_group_poisons_no_other(groups: Groups, group: int) -> None:
    layout = PackedLayout.from_groups(*groups)
    q, k, v, dout = _qkv(layout.num_tok, 2, 1, 8, torch.float32)
    clean = packed_attention(q, k, v, layout)
    clean_grads = torch.autograd.grad(clean, (q, k, v), dout)
    start, end = layout.group_offsets[group : group + 2]
    others = torch.cat([torch.arange(start), torch.arange(end, layout.num_tok)])
    with torch.no_grad():
        for x in (q, k, v):
            x[start:end] = math.nan
    broken = packed_attention(q, k, v, layout)
    assert torch.equal(broken[others], clean[others])
    assert broken[start:end].isnan().all()
    for grad, clean_grad in zip(torch.autograd.grad(broken, (q, k, v), dout), clean_grads, strict=True):
        assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    layout = PackedLayout.from_groups(*GROUPS["unequal lengths, padded together"])
    q, k, v, dout = _qkv(layout.num_tok, 4, 2, 16, dtype)

    def once() -> tuple[Tensor, ...]:
        out = packed_attention(q, k, v, layout)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_the_group_alone_and_a_responses_output_on_nothing_beside_it(dtype: torch.dtype) -> None:
    prompt, lens = 70, [80, 3, 64]
    layout = PackedLayout.from_groups([9, prompt, 5], [[3], lens, [200]])
    q, k, v, dout = _qkv(layout.num_tok, 4, 2, 20, dtype)
    out = packed_attention(q, k, v, layout)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    own = slice(*layout.group_offsets[1:3])
    alone = PackedLayout.from_groups([prompt], [lens])
    leaves = [x.detach()[own].requires_grad_() for x in (q, k, v)]
    out_alone = packed_attention(*leaves, alone)
    assert torch.equal(out_alone, out[own])
    for grad_alone, grad in zip(torch.autograd.grad(out_alone, leaves, dout[own]), grads, strict=True):
        assert torch.equal(grad_alone, grad[own])
    last = torch.cat([torch.arange(prompt), torch.arange(alone.num_tok - lens[-1], alone.num_tok)])
    one = packed_attention(*(x.detach()[last] for x in leaves), PackedLayout.from_groups([prompt], [lens[-1:]]))
    assert torch.equal(one, out_alone[last])


def test_heads_that_are_not_dense_and_gradients_that_are_one_number_are_taken() -> None:
    layout = PackedLayout.from_groups([9, 4], [[3, 5], [2]])
    q, k, v, _ = _qkv(layout.num_tok, 4, 2, 6)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    assert strided[0].stride(2) != 1
    ours, other = packed_attention(*strided, layout), packed_attention_ref(q, k, v, layout)
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out.sum(), inputs) for out, inputs in ((ours, strided), (other, (q, k, v)))]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_views_into_one_fused_projection_work() -> None:
    layout = PackedLayout.from_groups([9, 4], [[3, 5], [2]])
    fused = torch.randn(layout.num_tok, 4 * 2 * 8, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in fused.split([32, 16, 16], -1))
    grads = [
        torch.autograd.grad(op(q, k, v, layout).square().sum(), fused)
        for op in (packed_attention, packed_attention_ref)
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_changed_inputs_and_second_derivatives_are_refused() -> None:
    layout = PackedLayout.from_groups([4], [[3, 2]])
    q, k, v, _ = _qkv(layout.num_tok, 2, 1, 4)
    (grad,) = torch.autograd.grad(packed_attention(q, k, v, layout).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    out = packed_attention(q, k, v, layout)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


_LAYOUT = PackedLayout.from_groups([2], [[1, 1]])
_Q, _K = torch.randn(4, 4, 8), torch.randn(4, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "error", "message"),
    [
        (_Q[:, 0], _K, _K, None, ValueError, r"q must be \[T, H, D\]"),
        (_Q, _K, _K[:, :1], None, ValueError, r"q must be \[T, H, D\]"),
        (_Q[..., :4], _K, _K, None, ValueError, "with the same D"),
        (_Q[:3], _K[:3], _K[:3], None, ValueError, "the layout's 4 rows"),
        (_Q[:, :3], _K, _K, None, ValueError, "multiple of KV heads"),
        (_Q[:, :0], _K, _K, None, ValueError, "positive multiple of KV heads"),
        (_Q[..., :0], _K[..., :0], _K[..., :0], None, ValueError, "at least one dimension"),
        (_Q, _K[:, :0], _K[:, :0], None, ValueError, "multiple of KV heads"),
        (_Q.double(), _K, _K, None, TypeError, "one floating-point dtype"),
        (_Q.long(), _K.long(), _K.long(), None, TypeError, "one floating-point dtype"),
        (_Q, _K, _K, 0.0, ValueError, "scale must be > 0"),
        (_Q, _K, _K, math.nan, ValueError, "scale must be > 0"),
    ],
)
def test_bad_arguments_are_refused(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, error: type[Exception], message: str
) -> None:
    for op in (packed_attention, packed_attention_ref):
        with pytest.raises(error, match=message):
            op(q, k, v, _LAYOUT, scale=scale)


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry per group, got 2 and 1"):
        PackedLayout.from_groups([1, 2], [[1]])
    with pytest.raises(ValueError, match="lengths must be >= 0, got -1"):
        PackedLayout.from_groups([1], [[-1]])
    with pytest.raises(TypeError, match="lengths must be ints, got float"):
        PackedLayout.from_groups([1], [[2.0]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("lens", "parents", "message"),
    [
        ([1, 2], [-1], "one entry per segment, got 2 and 1"),
        ([1, -2], [-1, 0], "lengths must be >= 0, got -2"),
        ([1, 1], [0, -1], "the parent of segment 0 is 0,"),
        ([1, 1, 1], [-1, -1, 0], "the parent of segment 2 is 0,"),  # 0 is closed: its tokens would not be neighbours
        ([1, 1, 1, 1], [-1, 0, 0, 1], "the parent of segment 3 is 1,"),
        ([1, 1], [-1, 5], "the parent of segment 1 is 5,"),
        ([1, 1], [-1, -2], "the parent of segment 1 is -2,"),
    ],
)
def test_bad_trees_are_refused(lens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_tree(lens, parents)


def test_a_padded_layout_has_the_same_segments_and_one_that_nobody_sees() -> None:
    layout = PackedLayout.from_tree([4, 3, 2, 2, 5], [-1, 0, 1, 1, 0])
    padded = layout.padded(10)
    assert padded.num_tok == 20 and padded.segments[:-1] == layout.segments
    mask, whole = layout.dense_mask(), padded.dense_mask()
    assert torch.equal(whole[:16, :16], mask)
    assert not whole[:16, 16:].any() and not whole[16:, :16].any()
    assert padded.positions.tolist() == [*layout.positions.tolist(), 0, 1, 2, 3]
    assert layout.padded(10) is padded and padded.padded(10) is padded and layout.padded(16) is layout
