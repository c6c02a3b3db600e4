import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isomorph.kernels.packed_attention import PackedLayout, packed_attention, packed_attention_ref

Groups = tuple[list[int], list[list[int]]]

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


def _qkv(num_tok: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    gen = torch.Generator().manual_seed(num_tok)
    shapes = ((num_tok, heads, dim), (num_tok, kv_heads, dim), (num_tok, kv_heads, dim), (num_tok, heads, dim))
    q, k, v, dout = (torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes)
    return [q.mul_(2).requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def _sequences(groups: Groups) -> list[tuple[Tensor, int]]:
    """Rows of each unpacked sequence, and how many of its first rows other sequences have too."""
    out, start = [], 0
    for prompt_len, response_lens in zip(*groups, strict=True):
        prompt = torch.arange(start, start + prompt_len)
        out.append((prompt, 0))
        start += prompt_len
        for length in response_lens:
            out.append((torch.cat([prompt, torch.arange(start, start + length)]), prompt_len))
            start += length
    return out


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float) -> Tensor:
    """Every response after its own copy of the prompt; no packing, no sharing, no masks but the triangle."""
    out = 0 * (q + k.sum() + v.sum())
    repeats = q.shape[1] // k.shape[1]
    for rows, num_shared in _sequences(groups):
        q_HLD, k_HLD, v_HLD = (x[rows].transpose(0, 1) for x in (q, k, v))
        scores = q_HLD @ k_HLD.repeat_interleave(repeats, 0).mT * scale
        future = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        weights = torch.exp(scores.masked_fill(future, -math.inf))
        result = (weights / weights.sum(-1, keepdim=True)) @ v_HLD.repeat_interleave(repeats, 0)
        out = out.index_copy(0, rows[num_shared:], result.transpose(0, 1)[num_shared:])
    return out


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "scale"), [(4, 2, 16, None), (3, 1, 8, 0.2), (2, 2, 5, None)])
def test_equals_reference_and_unpacked_sequences_in_float64(
    groups: Groups, heads: int, kv_heads: int, dim: int, scale: float | None
) -> None:
    # The gradient of a prompt's keys and values in the unpacked truth is the sum over its copies.
    layout = PackedLayout.from_groups(*groups)
    q, k, v, dout = _qkv(layout.num_tok, heads, kv_heads, dim)
    ours = packed_attention(q, k, v, layout, scale=scale)
    grads = torch.autograd.grad(ours, (q, k, v), dout)
    for other in (
        packed_attention_ref(q, k, v, layout, scale=scale),
        _by_sequence(q, k, v, groups, scale or dim**-0.5),
    ):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
        expected = torch.autograd.grad(other, (q, k, v), dout)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(0, 30), max_size=5)),
        min_size=1,
        max_size=6,
    )
)
def test_equals_reference_for_any_lengths(groups: list[tuple[int, list[int]]]) -> None:
    layout = PackedLayout.from_groups([p for p, _ in groups], [r for _, r in groups])
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


class _Attended(TorchDispatchMode):
    """Counts scores and watches the largest tensor."""

    num_scores = 0
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            (batch, _, num_q, _), num_k = args[0].shape, args[1].shape[2]
            self.num_scores += batch * num_q * num_k
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return out


def test_the_prompt_of_a_group_is_computed_once_and_no_square_of_all_tokens_exists() -> None:
    layout = PackedLayout.from_groups([300, 280], [[50] * 4, [40] * 4])
    q, k, v, dout = _qkv(layout.num_tok, 2, 1, 8, torch.float32)
    with _Attended() as attended:
        packed_attention(q, k, v, layout).backward(dout)
    shared = 300**2 + 280**2 + 4 * (50 * 50 + 40 * 40) + 4 * (50 * 300 + 40 * 280)
    assert shared <= attended.num_scores <= 1.1 * shared  # repeated prompts would take 3.2 times as many
    assert attended.largest <= 2 * q.numel()


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_layout_says_where_everything_is(groups: Groups) -> None:
    layout = PackedLayout.from_groups(*groups)
    rows = [x for x, _ in _sequences(groups)]
    segments = [n for p, rs in zip(*groups, strict=True) for n in (p, *rs)]
    assert layout.num_tok == sum(segments)
    assert layout.cu_seqlens.tolist() == list(itertools.accumulate(segments, initial=0))
    assert len(layout.segment_group) == len(layout.segment_is_prompt) == len(layout.vis_end) == len(segments)
    assert [g for g, is_prompt in zip(layout.segment_group, layout.segment_is_prompt, strict=True) if is_prompt] == (
        list(range(len(groups[0])))
    )
    mask = torch.zeros(layout.num_tok, layout.num_tok, dtype=torch.bool)
    for sequence in rows:
        assert layout.positions[sequence].tolist() == list(range(len(sequence)))
        for i, row in enumerate(sequence):
            mask[row, sequence[: i + 1]] = True
    assert torch.equal(layout.dense_mask(), mask)
    for group, (start, end) in enumerate(itertools.pairwise(layout.group_offsets)):
        assert end - start == groups[0][group] + sum(groups[1][group])


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
