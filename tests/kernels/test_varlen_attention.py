"""packed_attention=varlen without a GPU: the rows of the two calls, the merge, and the algebra of the backward.

FlashAttention runs on CUDA only; here a float64 implementation of its contract replaces it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.flash import Flash
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
varlen = pytest.importorskip("isomorph.kernels.varlen_attention", reason="needs Triton: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _pairs(at: Any) -> Iterator[tuple[slice, slice]]:
    for i in range(len(at.cu_q) - 1):
        yield slice(*at.cu_q[i : i + 2].tolist()), slice(*at.cu_k[i : i + 2].tolist())


def _weights(q: Tensor, k: Tensor, at: Any, scale: float) -> tuple[Tensor, Tensor]:
    """Scores of one entry, [H, q, k], hidden ones -inf, and the keys of every query head."""
    k_HKD = k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
    scores = q.transpose(0, 1) @ k_HKD.mT * scale
    if at.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores, k_HKD


def _forward(q: Tensor, k: Tensor, v: Tensor, at: Any, scale: float) -> tuple[Tensor, Tensor]:
    """The contract: out, and the natural LSE [H, T], both of this call's keys alone."""
    out, lse = torch.full_like(q, math.nan), q.new_full(q.shape[1::-1], math.nan)
    for rows, keys in _pairs(at):
        scores, _ = _weights(q[rows], k[keys], at, scale)
        v_HKD = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
        out[rows] = (scores.softmax(-1) @ v_HKD).transpose(0, 1)
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    at: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract: weights are exp(score - lse), delta the dot of dout and out, of the lse and out that are given."""
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for rows, keys in _pairs(at):
        scores, k_HKD = _weights(q[rows], k[keys], at, scale)
        p = torch.exp(scores - lse[:, rows, None])
        dout_HQD = dout[rows].transpose(0, 1)
        v_HKD = v[keys].repeat_interleave(repeats, 1).transpose(0, 1)
        delta = (dout[rows] * out[rows]).sum(-1).T
        ds = p * (dout_HQD @ v_HKD.mT - delta[..., None]) * scale
        dq[rows] = (ds @ k_HKD).transpose(0, 1)
        for into, grad in ((dk, ds.mT @ q[rows].transpose(0, 1)), (dv, p.mT @ dout_HQD)):
            into[keys] = grad.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return dq, dk, dv


BY_CONTRACT = Flash("its contract", _forward, _backward)

GROUPS: dict[str, tuple[list[int], list[list[int]]]] = {
    "nothing": ([], []),
    "nothing but empty segments": ([0], [[0, 0]]),
    "one plain sequence": ([13], [[]]),
    "one group": ([7], [[5, 3]]),
    "zero-length and one-token segments": ([21, 1, 40, 3, 0], [[9, 1, 17, 0, 30], [5, 3], [1, 1], [0, 0], [4, 2]]),
    "with and without responses": ([5, 9, 2], [[], [3, 3], []]),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 8)])
def test_two_merged_calls_are_packed_attention(
    groups: tuple[list[int], list[list[int]]], heads: int, kv_heads: int, dim: int
) -> None:
    layout = PackedLayout.from_groups(*groups)
    gen = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, dim))
    q, k, v, dout = (torch.randn(layout.num_tok, *shape, generator=gen, dtype=torch.float64) for shape in shapes)
    q, k, v, dout = (x.to(DEVICE) for x in (2 * q, k, v, dout))
    out, lse = varlen.attend(q, k, v, layout, 0.3, BY_CONTRACT)
    grads = varlen.attend_backward(dout, q, k, v, out, lse, layout, 0.3, BY_CONTRACT)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    truth = packed_attention_ref(*leaves, layout, scale=0.3)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, torch.autograd.grad(truth, leaves, dout), rtol=1e-9, atol=1e-11)


def test_how_the_operands_lie_in_memory_does_not_matter(lay: Callable[[Tensor], Tensor]) -> None:
    """``full_like`` above lays an output out as its input, as flash attention does: see the next test."""
    layout = PackedLayout.from_groups([7, 2], [[5, 3], []])
    gen = torch.Generator().manual_seed(0)
    operands = (torch.randn(layout.num_tok, h, 8, generator=gen, dtype=torch.float64) for h in (4, 2, 2, 4))
    q, k, v, dout = (lay(x.to(DEVICE)) for x in operands)
    out, lse = varlen.attend(q, k, v, layout, 0.3, BY_CONTRACT)
    grads = varlen.attend_backward(dout, q, k, v, out, lse, layout, 0.3, BY_CONTRACT)
    leaves = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
    truth = packed_attention_ref(*leaves, layout, scale=0.3)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, torch.autograd.grad(truth, leaves, dout), rtol=1e-9, atol=1e-11)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 6), max_size=4)), max_size=6))
def test_the_calls_name_every_visible_pair_once_and_no_entry_is_empty(groups: list[tuple[int, list[int]]]) -> None:
    layout = PackedLayout.from_groups([p for p, _ in groups], [r for _, r in groups])
    own, cross = varlen.calls_of(layout.segments)
    seen = torch.zeros(layout.num_tok, layout.num_tok, dtype=torch.int64)
    for rows, keys in _pairs(own):
        assert rows == keys
        seen[rows, keys] += torch.ones(rows.stop - rows.start, rows.stop - rows.start, dtype=torch.int64).tril()
    if cross is not None:
        for rows, keys in _pairs(cross.batch):
            seen[cross.queries[rows, None], cross.keys[keys]] += 1
        assert cross.batch.cu_q[-1] == len(cross.queries) and cross.batch.cu_k[-1] == len(cross.keys)
        assert len(set(cross.queries.tolist())) == len(cross.queries)
    assert torch.equal(seen, layout.dense_mask().long())
    for at in (own, cross.batch) if cross is not None else (own,):
        for cu, longest in ((at.cu_q, at.max_q), (at.cu_k, at.max_k)):
            assert cu.dtype == torch.int32 and all(length > 0 for length in cu.diff().tolist())
            assert longest == max(cu.diff().tolist(), default=0)


def test_the_merge_of_float16_rows_rounds_once() -> None:
    from isomorph.kernels.gpu.attention_rows import merge

    gen = torch.Generator().manual_seed(1)
    out, part = (torch.randn(n, 3, 40, generator=gen).half() for n in (50, 37))
    lse, part_lse = (5 * torch.randn(3, n, generator=gen) for n in (50, 37))
    part_lse[0, 3] += 200  # one part takes everything
    rows = torch.randperm(50, generator=gen)[:37]
    total = torch.logaddexp(lse[:, rows].double(), part_lse.double())
    own_weight, part_weight = (torch.exp(x.double() - total).T[..., None] for x in (lse[:, rows], part_lse))
    expected = out.double().index_copy(0, rows, own_weight * out[rows] + part_weight * part)
    expected_lse = lse.double().index_copy(1, rows, total)
    out, lse, part, part_lse, rows = (x.to(DEVICE) for x in (out, lse, part, part_lse, rows))
    merge(out, lse, part, part_lse, rows)
    torch.testing.assert_close(out.cpu(), expected.half(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=1e-6)


# -- on a GPU
@pytest.mark.gpu
@pytest.mark.skipif(bool(backend.flash_reason()), reason=backend.flash_reason())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 2, 128), (9, 3, 64), (4, 4, 96)])
@pytest.mark.parametrize(
    "groups",
    [
        ([700, 33, 1, 0, 300], [[300, 5, 513], [1, 0, 128], [1, 1], [7, 9], []]),
        ([1, 1], [[1, 1], [1]]),  # entries of one token: flash attention swaps their heads and rows
    ],
)
def test_both_gpu_bodies_err_at_most_twice_as_much_as_repeated_prompts_do(
    groups: tuple[list[int], list[list[int]]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    layout = PackedLayout.from_groups(*groups)
    gen = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, dim))
    q, k, v, dout = (torch.randn(layout.num_tok, *shape, generator=gen).to("cuda", dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mask = layout.dense_mask().to("cuda")
    results = {}
    for body in ("varlen", "triton"):
        with backend.using(f"packed_attention={body}"):
            results[body] = packed_attention(*leaves, layout)
    results["theirs"] = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in leaves), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    truth = packed_attention_ref(*exact, layout)
    all_true = (truth, *torch.autograd.grad(truth, exact, dout.double()))
    theirs = (results["theirs"], *torch.autograd.grad(results["theirs"], leaves, dout))
    for body in ("varlen", "triton"):
        ours = (results[body], *torch.autograd.grad(results[body], leaves, dout))
        for our, their, true in zip(ours, theirs, all_true, strict=True):
            ulp = torch.finfo(dtype).eps * true.norm()
            assert (our.double() - true).norm() <= 2 * (their.double() - true).norm() + ulp, body
