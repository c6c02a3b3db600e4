"""linear_loss=offset: the softmax in the matrix product's epilogue. Interpreted if there is no GPU."""

import math

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.linear_logprob import TokenStats, linear_loss, linear_loss_ref

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _problem(num_rows: int, dim: int, num_vocab: int, std: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num_rows * 7919 + num_vocab)
    hidden = torch.randn(num_rows, dim, generator=gen)
    weight = torch.randn(num_vocab, dim, generator=gen) * (std / math.sqrt(dim))
    targets = torch.randint(0, num_vocab, (num_rows,), generator=gen)
    targets[0], targets[-1] = num_vocab - 1, 0  # the tail's last column, and the first
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE)


def _logprob_loss(stats: TokenStats, rows: slice) -> Tensor:
    return (stats.logprob * torch.arange(rows.start, rows.stop, device=stats.logprob.device).cos()).sum()


def _every_stat_loss(stats: TokenStats, rows: slice) -> Tensor:
    return (2 * stats.logprob.exp() + stats.entropy.square()).sum() + stats.lse.sin().sum()


def _stats(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    from isomorph.kernels.gpu import offset

    hidden, weight = hidden.detach(), weight.detach()
    facts = offset.exp_chunk(hidden, weight, targets, temperature, offset.new_buffer(weight, len(hidden)))
    return TokenStats(facts.logprob, facts.entropy, facts.lse)


def _truth(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    z = hidden.detach().double() @ weight.detach().double().T / temperature
    logp = z.log_softmax(-1)
    return TokenStats(logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1))


@pytest.mark.parametrize("loss_of", [_logprob_loss, _every_stat_loss])
@pytest.mark.parametrize("num_vocab", [1, 63, 64, 128, 200, 1003])
def test_loss_and_gradients_equal_the_reference_in_float64(num_vocab: int, loss_of: object) -> None:
    hidden, weight, targets = _problem(37, 40, num_vocab)
    row_index = torch.arange(37, device=DEVICE) * 5 % 37 // 2  # some rows are read twice, some never
    kwargs = dict(row_index_N=row_index, temperature=0.7, chunk_rows=20)
    with backend.using("linear_loss=offset"):
        ours = linear_loss(hidden, weight, targets, loss_of, **kwargs)  # type: ignore[arg-type]
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = linear_loss_ref(*wide, targets, loss_of, **kwargs)  # type: ignore[arg-type]
    assert abs(ours.item() - truth.item()) <= 1e-5 * max(1, abs(truth.item()))
    grads = torch.autograd.grad(ours, (hidden, weight))
    # E[y] is made by a product whose order of addition is not the offset's: it is 1 to about 5e-7, and with it p[y]
    noise = 5e-7 * (hidden.norm() + weight.norm())
    for our, true in zip(grads, torch.autograd.grad(truth, wide), strict=True):
        assert (our.double() - true).norm() <= 1e-5 * true.norm() + noise


@pytest.mark.parametrize("std", [1e-3, 4.0, 60.0, 400.0])
def test_a_target_of_any_probability_is_exact(std: float) -> None:
    """At 60 and 400 most targets are hundreds of nats away: E overflows, and the row is made again."""
    hidden, weight, targets = _problem(9, 24, 150, std)
    ours, truth = _stats(hidden, weight, targets), _truth(hidden, weight, targets)
    largest = max(1.0, float(truth.lse.abs().max()), float(truth.logprob.abs().max()))
    assert (ours.logprob - truth.logprob).abs().max() <= 5e-6 * largest
    assert (ours.lse - truth.lse).abs().max() <= 5e-6 * largest
    assert (ours.entropy - truth.entropy).abs().max() <= 1e-5 * largest
    assert ours.logprob.max() <= 1e-6


def test_rescued_rows_have_exact_gradients() -> None:
    from isomorph.kernels.gpu import offset

    hidden, weight, targets = _problem(9, 24, 150, 100.0)
    facts = offset.exp_chunk(
        hidden.detach(), weight.detach(), targets, 1.0, offset.new_buffer(weight.detach(), len(hidden))
    )
    assert (facts.at_target != 1).any(), "no row was rescued: the test tests nothing"
    for loss_of in (_logprob_loss, _every_stat_loss):
        with backend.using("linear_loss=offset"):
            grads = torch.autograd.grad(linear_loss(hidden, weight, targets, loss_of), (hidden, weight))
        wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        for our, true in zip(grads, torch.autograd.grad(linear_loss_ref(*wide, targets, loss_of), wide), strict=True):
            assert (our.double() - true).norm() <= 5e-5 * true.norm()  # logits of 300: 300 ulp of one


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE == "cpu", reason="the interpreter multiplies tiles with NumPy, whose bits depend on the tile"
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    hidden, weight, targets = _problem(35, 24, 150)
    together = _stats(hidden, weight, targets)
    order = torch.arange(34, -1, -1, device=DEVICE)
    for stat, permuted in zip(together, _stats(hidden[order], weight, targets[order]), strict=True):
        assert torch.equal(stat[order], permuted)
    for i in (0, 17, 34):
        alone = _stats(hidden[i : i + 1], weight, targets[i : i + 1])
        assert all(torch.equal(stat[i : i + 1], one) for stat, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_poisons_itself_alone(bad: float) -> None:
    hidden, weight, targets = _problem(6, 24, 150)
    clean = _stats(hidden, weight, targets)
    spoiled = hidden.detach().clone()
    spoiled[2, 3] = bad
    stats = _stats(spoiled, weight, targets)
    assert stats.logprob[2].isnan()
    others = [0, 1, 3, 4, 5]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(stats, clean, strict=True))


def test_no_rows_give_a_loss_of_zero() -> None:
    _, weight, _ = _problem(2, 24, 150)
    hidden = torch.zeros(0, 24, device=DEVICE, requires_grad=True)
    with backend.using("linear_loss=offset"):
        loss = linear_loss(hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE), _logprob_loss)
    assert loss.item() == 0
    assert torch.count_nonzero(torch.autograd.grad(loss, weight)[0]) == 0


@pytest.mark.parametrize(
    ("dim", "dtype", "has_bias", "reason"),
    [
        (24, torch.float32, True, "it has no bias"),
        (20, torch.float32, False, "D must be a multiple of 8, got 20"),
        (24, torch.float64, False, "bfloat16 or float32, got torch.float64"),
    ],
)
def test_what_it_cannot_do_is_refused(dim: int, dtype: torch.dtype, has_bias: bool, reason: str) -> None:
    hidden, weight, targets = _problem(3, dim, 50)
    bias = torch.zeros(50, dtype=dtype, device=DEVICE) if has_bias else None
    with backend.using("linear_loss=offset"), pytest.raises(ValueError, match=reason):
        linear_loss(hidden.to(dtype), weight.to(dtype), targets, _logprob_loss, bias_V=bias)
