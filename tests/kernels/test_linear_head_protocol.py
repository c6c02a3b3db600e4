"""Every implementation of linear_logprob and linear_loss: float64 accuracy at block edges, extreme values, same bits.

Inputs are float32, which every implementation supports (the interpreter cannot multiply bfloat16), unless noted.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.engine.update.logits_chunk import logits_chunk_rows
from isomorph.kernels import backend, linear_chunks
from isomorph.kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_ref, linear_loss, linear_loss_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BODIES = [body for body in backend.bodies("linear_loss", DEVICE) if body != "reference"]
EXACT_ROWS = [body for body in BODIES if body != "offset"]  # bodies of linear_logprob too
COMPILED = [
    body for body in BODIES if DEVICE == "cuda" or body not in backend.OUR_TRITON
]  # the rest is interpreted: slow
VOCABULARIES = [7, 32_001, 128_256, 151_665, 151_936, 152_064]


def _head(num_rows: int, dim: int, num_vocab: int, std: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num_rows * 7919 + num_vocab + dim)
    hidden = torch.randn(num_rows, dim, generator=gen)
    weight = torch.randn(num_vocab, dim, generator=gen) * (std / math.sqrt(dim))
    targets = torch.randint(0, num_vocab, (num_rows,), generator=gen)
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def _loss(stats: TokenStats, rows: slice) -> Tensor:
    weights = torch.arange(rows.start, rows.stop, device=stats.logprob.device).cos()
    return (weights * stats.logprob).sum()


def _loss_of_all(stats: TokenStats, rows: slice) -> Tensor:
    return _loss(stats, rows) + (stats.entropy * 0.3).sum() + (stats.lse * 0.1).sum()


def _run(body: str, hidden: Tensor, weight: Tensor, targets: Tensor, loss_of=_loss_of_all, **kwargs):  # type: ignore[no-untyped-def]
    """Stats as the loss sees them, and the gradients."""
    seen: list[TokenStats] = []

    def watching(stats: TokenStats, rows: slice) -> Tensor:
        seen.append(TokenStats(*(stat.detach().clone() for stat in stats)))
        return loss_of(stats, rows)

    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with backend.using(f"linear_loss={body}"):
        loss = linear_loss(*leaves, targets, watching, **kwargs)
    grads = torch.autograd.grad(loss, leaves)
    return TokenStats(*(torch.cat(stat) for stat in zip(*seen, strict=True))) if seen else None, *grads


def _truth(hidden: Tensor, weight: Tensor, targets: Tensor, loss_of=_loss_of_all, **kwargs):  # type: ignore[no-untyped-def]
    """The reference in float64, which test_linear_logprob.py holds against the definitions."""
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    stat_kwargs = {name: value for name, value in kwargs.items() if name != "chunk_rows"}
    stats = linear_logprob_ref(*wide, targets, **stat_kwargs)
    grads = torch.autograd.grad(linear_loss_ref(*wide, targets, loss_of, **kwargs), wide)
    return TokenStats(*(stat.detach() for stat in stats)), *grads


def _assert_within_budget(ours, truth, hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> None:  # type: ignore[no-untyped-def]
    if truth[0].logprob.numel():
        largest = max(1.0, float((hidden.double() @ weight.double().T).abs().max()) / temperature)
        for name, bound in (("logprob", 5e-6), ("entropy", 1e-5), ("lse", 5e-6)):
            error = (getattr(ours[0], name).double() - getattr(truth[0], name)).abs().max()
            assert error <= bound * largest, (name, float(error), largest)
    noise = 1e-6 * (hidden.double().norm() + weight.double().norm()) / temperature
    for our, true in zip(ours[1:], truth[1:], strict=True):
        assert (our.double() - true).norm() <= 1e-5 * true.norm() + noise


@pytest.mark.parametrize("body", COMPILED)  # edges of the others: test_token_logprob.py, gpu/test_offset.py
@settings(max_examples=25, deadline=None)
@given(
    num_targets=st.sampled_from([0, 1, 2, 31, 32, 33, 127, 128, 129]),
    num_vocab=st.sampled_from([1, 63, 64, 65, 127, 129, 1003, 1016]),
    dim=st.sampled_from([8, 64, 96]),
    temperature=st.sampled_from([0.1, 1.0, 10.0]),
    target=st.sampled_from(["any", "first", "last"]),
    shares=st.booleans(),
    apart=st.booleans(),
    chunk_rows=st.sampled_from([32, 8192]),
)
def test_stats_and_gradients_at_every_edge(
    body: str, num_targets: int, num_vocab: int, dim: int, temperature: float, target: str, shares: bool, apart: bool,
    chunk_rows: int,
) -> None:  # fmt: skip
    hidden, weight, targets = _head(num_targets, dim, num_vocab)
    if target != "any":
        targets.fill_(0 if target == "first" else num_vocab - 1)
    if apart:  # every second column of something wider
        hidden = torch.stack([hidden, torch.full_like(hidden, math.nan)], 2).flatten(1)[:, ::2]
    kwargs = dict(temperature=temperature, chunk_rows=chunk_rows)
    if shares:  # many targets on one row, others on none
        kwargs["row_index_N"] = torch.arange(num_targets, device=DEVICE) // 5 * 3 % max(num_targets, 1)
    ours = _run(body, hidden, weight, targets, **kwargs)
    truth = _truth(hidden, weight, targets, **kwargs)
    assert num_targets or all(torch.count_nonzero(grad) == 0 for grad in ours[1:])
    _assert_within_budget(ours, truth, hidden, weight, temperature)


@pytest.mark.parametrize("num_vocab", VOCABULARIES)
@pytest.mark.parametrize("body", COMPILED)
def test_vocabularies_of_real_models_with_targets_at_both_ends(body: str, num_vocab: int) -> None:
    hidden, weight, targets = _head(4, 16, num_vocab)
    targets[0], targets[1] = 0, num_vocab - 1
    ours, truth = (run(hidden, weight, targets) for run in (lambda *x: _run(body, *x), _truth))
    _assert_within_budget(ours, truth, hidden, weight)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("body", BODIES)
def test_hostile_logits_are_within_the_budget(body: str, scale: float) -> None:
    # with an identity unembedding the hidden rows are the logits
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)) * scale
    logits[1] = -100 - logits[1].abs()
    logits[2], logits[2, 5] = 0.0, 60.0 * max(scale, 1.0)  # one-hot to rounding
    logits[3], logits[3, 5] = 0.0, 200.0  # its target is 200 nats away
    logits[4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40]).repeat(16)
    targets = torch.tensor([3, 63, 5, 6, 0, 0])
    operands = logits.to(DEVICE), torch.eye(64, device=DEVICE), targets.to(DEVICE)
    ours, truth = _run(body, *operands), _truth(*operands)
    _assert_within_budget(ours, truth, *operands[:2])
    assert ours[0].logprob.max() <= 1e-6
    assert abs(ours[0].logprob[3].item() + 200) < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("body", BODIES)
def test_a_row_that_is_not_finite_poisons_its_own_gradient_and_the_weights_it_must(body: str, bad: float) -> None:
    hidden, weight, targets = _head(6, 16, 70)
    clean = _run(body, hidden, weight, targets)
    spoiled = hidden.clone()
    spoiled[2, 1] = bad
    stats, dhidden, dweight = _run(body, spoiled, weight, targets)
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    assert stats.logprob[2].isnan() and dhidden[2].isnan().all() and dweight.isnan().all()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(stats, clean[0], strict=True))
    torch.testing.assert_close(dhidden[others], clean[1][others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_repeats_are_one_bit_pattern(body: str) -> None:
    hidden, weight, targets = _head(20, 16, 150)
    index = torch.arange(20, device=DEVICE) // 3
    repeats = 20 if body in COMPILED else 3
    runs = [_run(body, hidden, weight, targets, row_index_N=index, chunk_rows=8) for _ in range(repeats)]
    for stats, *grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*stats, *grads), (*runs[0][0], *runs[0][1:]), strict=True))


def _dtypes(body: str) -> Iterator[torch.dtype]:
    yield torch.float32
    if body == "native" and backend.native().has_bfloat16_gemm():
        yield torch.bfloat16


@pytest.mark.parametrize("body", EXACT_ROWS)
def test_the_cut_into_chunks_moves_no_gradient_beyond_its_budget(body: str) -> None:
    for dtype in _dtypes(body):
        hidden, weight, targets = (x.to(dtype) if x.is_floating_point() else x for x in _head(50, 64, 301))
        whole, cut = (_run(body, hidden, weight, targets, chunk_rows=rows) for rows in (50, 7))
        unit = torch.finfo(dtype).eps
        for a, b in zip(whole[1:], cut[1:], strict=True):
            assert (a.double() - b.double()).norm() <= 2 * max(unit, 1e-6) * a.double().norm()


@pytest.mark.skipif(
    not backend.native_available() or not backend.native().has_bfloat16_gemm(),
    reason="needs the C++ module and a processor with AVX-512 and bfloat16 dot products",
)
def test_a_bfloat16_row_has_the_same_bits_alone_in_any_batch_and_in_any_chunk() -> None:
    hidden, weight, targets = _head(23, 64, 1003)
    operands = hidden.bfloat16(), weight.bfloat16()
    together = _run("native", *operands, targets)[0]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    permuted = _run("native", operands[0][order], operands[1], targets[order])[0]
    cut = _run("native", *operands, targets, chunk_rows=5)[0]
    for whole, other, part in zip(together, permuted, cut, strict=True):
        assert torch.equal(whole[order], other) and torch.equal(whole, part)
    with torch.no_grad(), backend.using("linear_logprob=native"):
        for i in range(23):
            alone = linear_logprob(operands[0][i : i + 1], operands[1], targets[i : i + 1])
            assert all(torch.equal(whole[i : i + 1], one) for whole, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("body", [body for body in BODIES if body in ("native", "torch")])
@pytest.mark.parametrize("num_vocab", [1003, 32_001])
def test_bfloat16_gradients_are_within_the_budget_and_have_no_bias(body: str, num_vocab: int) -> None:
    hidden, weight, targets = (x.bfloat16() if x.is_floating_point() else x for x in _head(128, 96, num_vocab))
    for chunk_rows in (128, 48):
        ours = _run(body, hidden, weight, targets, chunk_rows=chunk_rows)
        truth = _truth(hidden, weight, targets)
        for our, true, budget in zip(ours[1:], truth[1:], (2.5e-3, 3e-3), strict=True):
            assert (our.double() - true).norm() <= budget * true.norm()
            assert abs(float((our.double() * true).sum() / true.square().sum()) - 1) < 5e-4
        largest = max(1.0, float((hidden.double() @ weight.double().T).abs().max()))
        assert (ours[0].logprob - truth[0].logprob).abs().max() <= 5e-6 * largest


@pytest.mark.parametrize("body", EXACT_ROWS)
def test_poison_in_fresh_memory_reaches_no_result(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = _head(10, 16, 150)
    expected = _run(body, hidden, weight, targets, chunk_rows=4)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # with it torch.empty is NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = _run(body, hidden, weight, targets, chunk_rows=4)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip((*expected[0], *expected[1:]), (*poisoned[0], *poisoned[1:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("body", EXACT_ROWS)
def test_rows_of_logits_on_boundaries_change_no_bit(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a buffer's rows are padded: V of no multiple, several blocks of columns, several chunks."""
    if body == "triton":
        from isomorph.kernels.gpu import rows

        monkeypatch.setattr(rows, "BLOCK_V", 128)
    problem = _head(5, 16, 257)
    stats, *grads = _run(body, *problem, chunk_rows=2)
    monkeypatch.setitem(linear_chunks.STRIDE_MULTIPLE, DEVICE, 64 if DEVICE == "cpu" else 1)
    padded, *padded_grads = _run(body, *problem, chunk_rows=2)
    for ours, usual in zip((*padded, *padded_grads), (*stats, *grads), strict=True):
        assert torch.equal(ours, usual)
    true_stats, *true_grads = _truth(*problem, chunk_rows=2)
    for ours, true in zip((*padded, *padded_grads), (*true_stats, *true_grads), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5)


def test_chunks_on_a_gpu_have_rows_and_strides_that_its_gemms_take() -> None:
    """Tiles of 128 rows; rows of float32 logits that begin at 256 bytes, also where V is GPT-2's or Llama 2's."""
    assert [linear_chunks.whole_rows(n, "cuda") for n in (5, 127, 128, 3533)] == [5, 127, 128, 3456]
    for num_vocab in (49_152, 50_257, 128_257, 151_936):
        stride = linear_chunks.logits_stride(num_vocab, "cuda")
        assert num_vocab <= stride < num_vocab + 64 and stride * 4 % 256 == 0
        assert linear_chunks.logits_stride(num_vocab, "cpu") == num_vocab
    assert logits_chunk_rows(151_936, is_gpu=True) % linear_chunks.CHUNK_ROWS["cuda"] == 0
