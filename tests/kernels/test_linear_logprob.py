import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isomorph.kernels import linear_chunks
from isomorph.kernels.linear_logprob import (
    LossOf,
    TokenStats,
    linear_logprob,
    linear_logprob_ref,
    linear_loss,
    linear_loss_ref,
)


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return out


class _Flops(TorchDispatchMode):
    """FLOP of matrix products. PyTorch's own counter does not count addmm_."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def _problem(
    num_rows: int, dim: int, num_vocab: int, num_targets: int, dtype: torch.dtype = torch.float64, std: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Peaked rows, as after training, and a row index with repetitions, gaps and no order."""
    gen = torch.Generator().manual_seed(num_rows * 7919 + num_vocab)
    hidden = torch.randn(num_rows, dim, generator=gen, dtype=torch.float64)
    weight = torch.randn(num_vocab, dim, generator=gen, dtype=torch.float64) * (std / math.sqrt(dim))
    bias = torch.randn(num_vocab, generator=gen, dtype=torch.float64)
    row_index = torch.randint(0, num_rows, (num_targets,), generator=gen)
    targets = torch.randint(0, num_vocab, (num_targets,), generator=gen)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return *leaves, targets, row_index


def _truth(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, row_index: Tensor, temperature: float
) -> TokenStats:
    """By the definitions, one probability at a time, in float64."""
    logits = (torch.einsum("nd,vd->nv", hidden.double()[row_index], weight.double()) + bias.double()) / temperature
    top = logits.max(1, keepdim=True).values.detach()
    total = (logits - top).exp().sum(1, keepdim=True)
    prob = (logits - top).exp() / total
    one_hot = torch.nn.functional.one_hot(targets, weight.shape[0]).to(logits)
    lse = (top + total.log())[:, 0]
    return TokenStats((logits * one_hot).sum(1) - lse, -torch.xlogy(prob, prob).sum(1), lse)


def _wavy_loss(stats: TokenStats, rows: slice) -> Tensor:
    """Every coefficient differs from row to row, and stats mix."""
    weights = torch.arange(rows.start, rows.stop, dtype=stats.logprob.dtype).cos()
    return (weights * stats.logprob.exp()).sum() + (stats.entropy * weights).square().sum() + stats.lse.sin().sum()


def _logprob_loss(stats: TokenStats, rows: slice) -> Tensor:
    return (stats.logprob * torch.arange(rows.start, rows.stop).cos()).sum()


def _entropy_loss(stats: TokenStats, rows: slice) -> Tensor:
    return stats.entropy.square().sum()


SHAPES = [  # rows, D, V, targets: one of everything, V = 1, V off any block size, many targets a row
    (1, 1, 1, 1),
    (3, 5, 2, 7),
    (7, 16, 37, 5),
    (5, 8, 1003, 130),
]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_logprob_equals_reference_and_truth_in_float64(
    shape: tuple[int, int, int, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_chunks.CHUNK_BYTES, "cpu", 3 * shape[2] * 8)  # three rows a chunk
    hidden, weight, bias, targets, row_index = _problem(*shape)
    kwargs = dict(row_index_N=row_index, bias_V=bias, temperature=temperature)
    ours = linear_logprob(hidden, weight, targets, **kwargs)
    rows = slice(0, len(targets))
    grads = torch.autograd.grad(_wavy_loss(ours, rows), (hidden, weight, bias))
    for other in (
        linear_logprob_ref(hidden, weight, targets, **kwargs),
        _truth(hidden, weight, bias, targets, row_index, temperature),
    ):
        torch.testing.assert_close(tuple(ours), tuple(other), rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad(_wavy_loss(other, rows), (hidden, weight, bias))
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss_of", [_wavy_loss, _logprob_loss, _entropy_loss])
@pytest.mark.parametrize("chunk_rows", [1, 3, 8192])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_loss_equals_reference_and_truth_in_float64(
    shape: tuple[int, int, int, int], chunk_rows: int, loss_of: LossOf
) -> None:
    hidden, weight, bias, targets, row_index = _problem(*shape)
    kwargs = dict(row_index_N=row_index, bias_V=bias, temperature=0.7)
    ours = linear_loss(hidden, weight, targets, loss_of, chunk_rows=chunk_rows, **kwargs)
    grads = torch.autograd.grad(3 * ours, (hidden, weight, bias))
    truth = _truth(hidden, weight, bias, targets, row_index, 0.7)
    for other in (
        linear_loss_ref(hidden, weight, targets, loss_of, chunk_rows=chunk_rows, **kwargs),
        loss_of(truth, slice(0, len(targets))),
    ):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad(3 * other, (hidden, weight, bias))
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


def test_gradients_pass_finite_differences() -> None:
    hidden, weight, bias, targets, row_index = _problem(3, 4, 6, 5)

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_logprob(hidden, weight, targets, row_index_N=row_index, bias_V=bias, temperature=0.5))

    assert torch.autograd.gradcheck(stats, (hidden, weight, bias))


def test_without_row_index_target_i_reads_row_i() -> None:
    hidden, weight, _, targets, _ = _problem(9, 4, 11, 9)
    identity = torch.arange(9)
    plain = linear_loss(hidden, weight, targets, _wavy_loss, chunk_rows=4)
    indexed = linear_loss(hidden, weight, targets, _wavy_loss, chunk_rows=4, row_index_N=identity)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (plain, indexed)]
    torch.testing.assert_close((plain, *grads[0]), (indexed, *grads[1]), rtol=0, atol=0)


def test_a_row_read_by_many_targets_gets_the_sum_of_their_gradients() -> None:
    hidden, weight, _, _, _ = _problem(2, 4, 11, 1)
    targets, row_index = torch.tensor([3, 5, 3, 0, 10]), torch.tensor([1, 1, 0, 1, 1])
    shared = linear_loss(hidden, weight, targets, _logprob_loss, row_index_N=row_index, chunk_rows=2)
    copies = hidden.detach()[row_index].requires_grad_()
    repeated = linear_loss(copies, weight, targets, _logprob_loss, chunk_rows=2)
    (shared_grad,), (copies_grad,) = (torch.autograd.grad(a, b) for a, b in ((shared, hidden), (repeated, copies)))
    expected = torch.stack([copies_grad[row_index == row].sum(0) for row in range(2)])
    torch.testing.assert_close(shared_grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("has_index", [True, False])
def test_no_targets_give_empty_stats_zero_loss_and_zero_gradients(has_index: bool) -> None:
    none = torch.empty(0, dtype=torch.int64)
    hidden = torch.randn(4 if has_index else 0, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    row_index = none if has_index else None
    stats = linear_logprob(hidden, weight, none, row_index_N=row_index)
    assert [stat.shape for stat in stats] == [(0,)] * 3
    for loss in (
        linear_loss(hidden, weight, none, _wavy_loss, row_index_N=row_index),
        stats.logprob.sum(),
        linear_loss_ref(hidden, weight, none, _wavy_loss, row_index_N=row_index),
    ):
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_vocabulary_and_an_empty_width_are_no_special_case(dtype: torch.dtype) -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert linear_logprob(torch.empty(0, 3, dtype=dtype), torch.empty(0, 3, dtype=dtype), none).logprob.shape == (0,)
    stats = linear_logprob(torch.empty(2, 0, dtype=dtype), torch.empty(5, 0, dtype=dtype), torch.tensor([1, 2]))
    torch.testing.assert_close(stats.logprob, torch.full((2,), -math.log(5)))


# Logits are float32 whatever the inputs, so one bound holds for all, against truth from the same rounded inputs.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.1, 4.0, 30.0])
def test_stats_are_float32_accurate_whatever_the_inputs(dtype: torch.dtype, std: float) -> None:
    hidden, weight, bias, targets, row_index = _problem(40, 64, 4099, 100, dtype, std)
    with torch.no_grad():
        ours = linear_logprob(hidden, weight, targets, row_index_N=row_index, bias_V=bias)
        truth = _truth(hidden, weight, bias, targets, row_index, 1.0)
        largest = max(1.0, float(truth.lse.abs().max()))
    assert ours.logprob.dtype == torch.float32
    assert (ours.logprob - truth.logprob).abs().max() <= 5e-6 * largest
    assert (ours.lse - truth.lse).abs().max() <= 5e-6 * largest
    assert (ours.entropy - truth.entropy).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_err_at_most_twice_as_much_as_pytorch_in_the_same_dtype(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets, row_index = _problem(60, 64, 1003, 200, dtype, std=3.0)
    kwargs = dict(row_index_N=row_index, bias_V=bias)
    inputs = (hidden, weight, bias)
    truth = torch.autograd.grad(
        _wavy_loss(_truth(*inputs, targets, row_index, 1.0), slice(0, 200)), inputs
    )  # in float64 all the way; autograd rounds the result to the inputs' dtype
    logits = hidden[row_index] @ weight.T + bias
    torch_stats = TokenStats(
        logits.log_softmax(-1).gather(1, targets[:, None])[:, 0],
        -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1),
        logits.logsumexp(-1),
    )
    theirs = torch.autograd.grad(_wavy_loss(torch_stats, slice(0, 200)), inputs)
    for ours in (
        torch.autograd.grad(linear_loss(hidden, weight, targets, _wavy_loss, **kwargs), inputs),
        torch.autograd.grad(_wavy_loss(linear_logprob(hidden, weight, targets, **kwargs), slice(0, 200)), inputs),
    ):
        for our, their, true in zip(ours, theirs, truth, strict=True):
            ulp = torch.finfo(dtype).eps * true.double().norm()
            our_error = (our.double() - true.double()).norm()
            assert our_error <= 2 * (their.double() - true.double()).norm() + ulp
            bias_of_error = torch.sum(our.double() * true.double()) / true.double().square().sum() - 1
            assert abs(bias_of_error) < 5e-4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_any_magnitude_are_exact(scale: float, sign: int) -> None:
    # with an identity unembedding the hidden rows are the logits, so float32 logits are known exactly
    logits = torch.tensor([[0.0, 1.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 64.0]]) * sign * scale
    hidden = logits.repeat_interleave(4, 0)
    targets = torch.arange(4).repeat(3)
    ours = linear_logprob(hidden, torch.eye(4), targets)
    truth = _truth(hidden, torch.eye(4), torch.zeros(4), targets, torch.arange(12), 1.0)
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=2e-7, atol=2e-7)
    assert (ours.logprob <= 0).all()
    assert (ours.entropy >= 0).all()


def test_a_certain_token_has_logprob_zero_and_entropy_zero() -> None:
    hidden = torch.tensor([[1e4, -1e4, 0.0]])
    stats = linear_logprob(hidden, torch.eye(3), torch.tensor([0]))
    assert (stats.logprob.item(), stats.entropy.item(), stats.lse.item()) == (0.0, 0.0, 1e4)


def test_all_logits_far_below_zero_are_no_special_case() -> None:
    hidden, weight, _, targets, row_index = _problem(6, 8, 50, 20, torch.float32)
    base = linear_logprob(hidden, weight, targets, row_index_N=row_index)
    shifted = linear_logprob(hidden, weight, targets, row_index_N=row_index, bias_V=torch.full((50,), -1000.0))
    torch.testing.assert_close(shifted.logprob, base.logprob, rtol=0, atol=2e-4)  # ulp of 1000 is 6e-5
    torch.testing.assert_close(shifted.lse, base.lse - 1000, rtol=0, atol=2e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_poisons_its_own_stats_and_no_others(bad: float) -> None:
    hidden, weight, _, targets, _ = _problem(5, 4, 30, 5, torch.float32)
    broken = hidden.detach().clone()
    broken[2, 1] = bad
    clean, poisoned = (linear_logprob(x, weight, targets) for x in (hidden, broken))
    others = torch.tensor([0, 1, 3, 4])
    for good, hurt in zip(clean, poisoned, strict=True):
        assert torch.equal(good[others], hurt[others])
        assert not torch.isfinite(hurt[2])


def _gemms(fn: Callable[[], object], num_targets: int, dim: int, num_vocab: int) -> float:
    with _Flops() as counted:
        fn()
    return counted.flops / (2 * num_targets * dim * num_vocab)


def test_linear_loss_takes_three_gemms_and_fewer_where_nothing_needs_them() -> None:
    hidden, weight, bias, targets, row_index = _problem(20, 8, 50, 64)

    def step(hidden: Tensor, weight: Tensor) -> None:
        loss = linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index, chunk_rows=16)
        if loss.requires_grad:
            loss.backward()

    size = (64, 8, 50)
    assert _gemms(lambda: step(hidden, weight), *size) == 3
    assert _gemms(lambda: step(hidden.detach(), weight), *size) == 2
    assert _gemms(lambda: step(hidden, weight.detach()), *size) == 2
    assert _gemms(lambda: step(hidden.detach(), weight.detach()), *size) == 1
    with torch.no_grad():
        assert _gemms(lambda: step(hidden, weight), *size) == 1


def test_linear_logprob_takes_four_gemms_and_one_without_gradients() -> None:
    hidden, weight, _, targets, row_index = _problem(20, 8, 50, 64)
    size = (64, 8, 50)

    def stats() -> Tensor:
        return linear_logprob(hidden, weight, targets, row_index_N=row_index).logprob.sum()

    assert _gemms(lambda: stats().backward(), *size) == 4
    with torch.no_grad():
        assert _gemms(stats, *size) == 1


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets, row_index = _problem(30, 2, 100, 512)
    monkeypatch.setitem(linear_chunks.CHUNK_BYTES, "cpu", 16 * 100 * 8)
    with _LargestTensor() as largest:
        linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index, chunk_rows=16).backward()
        linear_logprob(hidden, weight, targets, row_index_N=row_index, bias_V=bias).entropy.sum().backward()
    assert largest.numel == 16 * 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets, row_index = _problem(30, 32, 301, 200, dtype)

    def once() -> tuple[Tensor, ...]:
        loss = linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index, bias_V=bias, chunk_rows=64)
        return loss, *torch.autograd.grad(loss, (hidden, weight, bias))

    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_loss_of_sees_slices_of_exactly_chunk_rows_with_leaf_stats() -> None:
    hidden, weight, _, targets, row_index = _problem(4, 3, 7, 10)
    seen = []

    def loss_of(stats: TokenStats, rows: slice) -> Tensor:
        assert all(stat.is_leaf and stat.requires_grad and len(stat) == rows.stop - rows.start for stat in stats)
        assert torch.is_grad_enabled()
        seen.append((rows.start, rows.stop))
        return stats.logprob.sum()

    with torch.no_grad():
        linear_loss(hidden, weight, targets, loss_of, row_index_N=row_index, chunk_rows=4)
    assert seen == [(0, 4), (4, 8), (8, 10)]


def test_a_loss_that_reads_no_stats_has_zero_gradients() -> None:
    hidden, weight, _, targets, row_index = _problem(4, 3, 7, 10)
    loss = linear_loss(hidden, weight, targets, lambda *_: torch.tensor(2.0), row_index_N=row_index, chunk_rows=5)
    assert loss.item() == 4
    assert all(torch.count_nonzero(grad) == 0 for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_linear_loss_refuses_a_second_backward() -> None:
    hidden, weight, _, targets, row_index = _problem(4, 3, 7, 10)
    loss = linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_linear_loss_keeps_its_gradients_when_the_weight_changes_before_backward() -> None:
    hidden, weight, _, targets, row_index = _problem(4, 3, 7, 10)
    expected = torch.autograd.grad(
        linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index), (hidden, weight)
    )
    loss = linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index)
    with torch.no_grad():
        weight.mul_(2)
    assert all(map(torch.equal, torch.autograd.grad(loss, (hidden, weight)), expected))


def test_linear_logprob_refuses_backward_after_the_weight_changed() -> None:
    hidden, weight, _, targets, row_index = _problem(4, 3, 7, 10)
    stats = linear_logprob(hidden, weight, targets, row_index_N=row_index)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logprob.sum().backward()


def test_second_derivatives_are_refused() -> None:
    hidden, weight, _, targets, row_index = _problem(4, 3, 7, 10)
    for loss in (
        linear_loss(hidden, weight, targets, _wavy_loss, row_index_N=row_index),
        linear_logprob(hidden, weight, targets, row_index_N=row_index).logprob.sum(),
    ):
        (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_hidden_rows_need_not_be_contiguous() -> None:
    hidden, weight, _, targets, row_index = _problem(6, 8, 13, 9)
    apart = torch.randn(8, 12, dtype=torch.float64)[:, ::2]
    apart.copy_(hidden.detach().T)
    a, b = (linear_logprob(x, weight, targets, row_index_N=row_index).logprob for x in (hidden, apart.T))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


_H, _W, _Y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 6])


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_H[0], _W, _Y), {}, ValueError, "hidden must be"),
        ((_H, _W[:, :2], _Y), {}, ValueError, "same D"),
        ((_H, _W.double(), _Y), {}, TypeError, "one floating-point dtype"),
        ((_H.long(), _W.long(), _Y), {}, TypeError, "floating-point"),
        ((_H, _W, _Y.int()), {}, TypeError, "target_ids must be int64"),
        ((_H, _W, _Y[None]), {}, TypeError, "target_ids must be int64"),
        ((_H, _W, _Y + 1), {}, ValueError, "target_ids must lie in 0..6"),
        ((_H, _W, _Y - 1), {}, ValueError, "target_ids must lie in 0..6"),
        ((_H, _W, _Y[:3]), {}, ValueError, "pass row_index"),
        ((_H, _W, _Y), {"row_index_N": torch.tensor([0, 1, 2, 4])}, ValueError, "row_index must lie in 0..3"),
        ((_H, _W, _Y), {"row_index_N": torch.tensor([0, 1])}, ValueError, "one id for each of the 2 rows"),
        ((_H, _W, _Y), {"bias_V": torch.zeros(6)}, ValueError, "bias must be"),
        ((_H, _W, _Y), {"bias_V": torch.full((7,), -math.inf)}, ValueError, "bias must be finite"),
        ((_H, _W, _Y), {"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ((_H, _W, _Y), {"temperature": math.nan}, ValueError, "temperature must be > 0"),
        ((_H, _W, _Y), {"temperature": math.inf}, ValueError, "temperature must be > 0"),
    ],
)
def test_bad_arguments_are_refused(
    args: tuple[Tensor, ...], kwargs: dict[str, object], error: type[Exception], message: str
) -> None:
    for call in (linear_logprob, linear_logprob_ref):
        with pytest.raises(error, match=message):
            call(*args, **kwargs)
    for call in (linear_loss, linear_loss_ref):
        with pytest.raises(error, match=message):
            call(*args, _wavy_loss, **kwargs)


def test_bad_losses_and_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_rows must be >= 1"):
        linear_loss(_H, _W, _Y, _wavy_loss, chunk_rows=0)
    with pytest.raises(ValueError, match="loss_of must return a scalar"):
        linear_loss(_H, _W, _Y, lambda stats, rows: stats.logprob)
    with pytest.raises(ValueError, match="got float"):
        linear_loss(_H, _W, _Y, lambda stats, rows: 1.0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("has_index", [False, True])
def test_the_scale_of_a_loss_keeps_float16_gradients_above_zero(has_index: bool) -> None:
    """As a gradient scaler multiplies: the gradients of the loss itself are below the smallest float16."""
    hidden, weight, target = _half_operands(torch.float16)
    kwargs = dict(row_index_N=torch.arange(64) // 2 if has_index else None, chunk_rows=16)

    def grads(op: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = op(*leaves, target, lambda stats, rows: -1e-9 * stats.logprob.sum(), **kwargs)
        return torch.autograd.grad(65536 * loss, leaves)

    for ours, truth in zip(grads(linear_loss, torch.float16), grads(linear_loss_ref, torch.float64), strict=True):
        assert truth.abs().max() > 1e-5
        assert ((ours.double() - truth).abs() <= 2**-11 * truth.abs() + 2**-25).all()


def test_a_scaled_loss_has_gradients_that_are_rounded_once() -> None:
    hidden, weight, target = _half_operands(torch.bfloat16)

    def grad(dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        loss = linear_loss(hidden.to(dtype), leaf, target, lambda stats, rows: -stats.logprob.sum(), chunk_rows=16)
        return torch.autograd.grad(0.3 * loss, leaf)[0]

    # a few are near the middle of two numbers of bfloat16, where float32 decides
    assert (grad(torch.bfloat16) != grad(torch.float64).bfloat16()).float().mean() < 0.005


def _half_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(dtype) for n in (64, 500))
    return hidden, weight, torch.randint(500, (64,), generator=generator)
