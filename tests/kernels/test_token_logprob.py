"""token_logprob, row_stats and row_gradient: every implementation against float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.token_logprob import (
    RowGrads,
    TokenStats,
    row_gradient,
    row_stats,
    stats_dtype,
    token_logprob,
    token_logprob_ref,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ISAS = backend.native().isas() if backend.native_available() else []
NATIVE = [f"native-{isa}" for isa in ISAS]
BODIES = ["torch", *NATIVE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EDGES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1003, 1023, 1024, 1025, 2049]
needs_native = pytest.mark.skipif(not ISAS, reason="needs the C++ module; `pip install .` builds it")
needs_triton = pytest.mark.skipif(
    bool(backend.triton_reason()), reason="needs CUDA, or TRITON_INTERPRET=1 before Python starts"
)


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    yield
    if ISAS:
        backend.native().use_isa("")


def _body(name: str) -> str:
    """The body's name, with the instruction set chosen."""
    body, _, isa = name.partition("-")
    if isa:
        backend.native().use_isa(isa)
    return body


def _rows(num_rows: int, num_vocab: int, dtype: torch.dtype, std: float = 3.0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num_rows * 7919 + num_vocab)
    target = torch.randint(0, num_vocab, (num_rows,), generator=gen)
    target[0], target[-1] = 0, num_vocab - 1
    return (torch.randn(num_rows, num_vocab, generator=gen) * std).to(dtype), target


def _stats(
    logits: Tensor, target: Tensor, body: str, bias: Tensor | None = None, temperature: float = 1.0
) -> TokenStats:
    return row_stats(logits, target, bias_V=bias, inv_temperature=1 / temperature, body=_body(body))


def _grads(num_rows: int, dtype: torch.dtype) -> RowGrads:
    t = torch.arange(num_rows, dtype=dtype)
    return (t + 1).cos(), (t + 2).cos(), (t + 3).cos()


def _gradient(
    logits: Tensor, target: Tensor, stats: TokenStats, grads: RowGrads, body: str, out: Tensor,
    bias: Tensor | None = None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    return row_gradient(
        logits, target, stats, grads, bias_V=bias, inv_temperature=1 / temperature, body=_body(body), out_nV=out
    )


def _truth(logits: Tensor, target: Tensor, bias: Tensor | None, temperature: float) -> tuple[TokenStats, Tensor]:
    """By the definitions, one probability at a time, and the gradient under ``_grads``; float64."""
    leaf = logits.double().requires_grad_()
    z = (leaf if bias is None else leaf + bias.double()) / temperature
    top = z.amax(1, keepdim=True).detach()
    prob = (z - top).exp() / (z - top).exp().sum(1, keepdim=True)
    lse = (top + (z - top).exp().sum(1, keepdim=True).log())[:, 0]
    stats = TokenStats(z.gather(1, target[:, None])[:, 0] - lse, -torch.xlogy(prob, prob).sum(1), lse)
    loss = sum((s * g).sum() for s, g in zip(stats, _grads(len(target), torch.float64), strict=True))
    assert isinstance(loss, Tensor)
    return TokenStats(*(s.detach() for s in stats)), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 5), num_vocab=st.sampled_from(EDGES), dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.7]), biased=st.booleans(), gap=st.sampled_from([0, 5]),
)  # fmt: skip
def test_stats_and_gradient_at_every_edge(
    body: str, num_rows: int, num_vocab: int, dtype: torch.dtype, temperature: float, biased: bool, gap: int
) -> None:
    packed, target = _rows(num_rows, num_vocab, dtype)
    whole = torch.full((num_rows, num_vocab + gap), math.nan, dtype=dtype)
    logits = whole[:, :num_vocab].copy_(packed)
    bias = torch.linspace(-1, 1, num_vocab).to(stats_dtype(dtype)) if biased else None
    stats = _stats(logits, target, body, bias, temperature)
    truth, truth_grad = _truth(packed, target, bias, temperature)
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    bound = 16 * unit * max(1.0, truth.lse.abs().max().item(), packed.double().abs().max().item() / temperature)
    for ours, exact in zip(stats, truth, strict=True):
        assert (ours.double() - exact).abs().max() <= bound
    guarded = torch.full((num_rows + 2, num_vocab + 6), math.nan, dtype=dtype)
    out = guarded[1:-1, 2:-4]
    grads = _grads(num_rows, stats_dtype(dtype))
    _gradient(logits, target, stats, grads, body, out, bias, temperature)
    assert torch.equal((~guarded.isnan()).nonzero(), (torch.zeros_like(guarded).index_put_(
        (torch.arange(1, num_rows + 1)[:, None], torch.arange(2, num_vocab + 2)), torch.ones((), dtype=dtype)) == 1
    ).nonzero())  # fmt: skip
    store = torch.finfo(dtype).eps / 2 * truth_grad.abs() + torch.finfo(dtype).smallest_normal
    assert ((out.double() - truth_grad).abs() <= store + 16 * bound).all()
    assert torch.equal(_gradient(logits, target, stats, grads, body, logits, bias, temperature), out)  # in place


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("num_vocab", [49_152, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_the_vocabularies_of_real_models(body: str, num_vocab: int, dtype: torch.dtype) -> None:
    logits, target = _rows(3, num_vocab, dtype, std=1.0)
    exact = token_logprob_ref(logits.double(), target)
    bound = 5e-6 * max(1.0, logits.abs().max().item())
    for ours, truth in zip(_stats(logits, target, body), exact, strict=True):
        assert (ours.double() - truth).abs().max() <= bound


@pytest.mark.parametrize("body", [*BODIES, pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("num_vocab", [5, 4100])
def test_a_row_without_a_softmax_says_so_in_every_body_as_in_the_specification(body: str, num_vocab: int) -> None:
    logits, target = _rows(8, num_vocab, torch.float32)
    logits[1] = -math.inf
    logits[2, num_vocab - 2] = math.inf
    logits[3, 2] = math.nan
    logits[4, :3] = -math.inf
    target[4] = 4
    logits[5] = math.nan
    logits[6], logits[6, 2] = -math.inf, math.nan
    exact = token_logprob_ref(logits, target)
    stats = _stats(logits.to(DEVICE), target.to(DEVICE), body)
    for ours, truth in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours.cpu(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert [exact.lse[i].item() for i in (1, 2)] == [-math.inf, math.inf] and exact.lse[[3, 5, 6]].isnan().all()
    assert all(stat[[1, 2, 3, 5, 6]].isnan().all() for stat in stats[:2])


@pytest.mark.parametrize("body", BODIES)
def test_adversarial_rows(body: str) -> None:
    logits, target = _rows(8, 2500, torch.float32)
    logits[1] = -1e4
    logits[2] = -100 - logits[2].abs()
    logits[3, 7:2400] = -math.inf
    logits[4] = -math.inf
    logits[5, 1500] = math.nan
    logits[6] += 1e4
    target[3], target[5] = 3, 9
    stats = _stats(logits, target, body)
    fine = [0, 1, 2, 3, 6, 7]
    exact = token_logprob_ref(logits.double(), target)
    for ours, truth in zip(stats, exact, strict=True):
        size = logits[fine].masked_fill(logits[fine].isinf(), 0).abs().amax(1).clamp(min=1)
        assert ((ours[fine].double() - truth[fine]).abs() <= 5e-6 * size).all()
    out = torch.empty_like(logits)
    _gradient(logits, target, stats, _grads(8, torch.float32), body, out)
    assert out[fine].isfinite().all() and (out[3, 7:2400] == 0).all() and out[4].isnan().all()


@pytest.mark.parametrize("body", [*BODIES, pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("lse", [2.4, -300.0])
def test_a_target_of_probability_zero_has_the_gradients_of_the_specification(body: str, lse: float) -> None:
    """As where a caller masks logits, and gives the rows that it ignores some target."""
    logits, target = _rows(3, 1500, torch.float32)
    logits += lse
    logits[:, 1490:] = -math.inf
    target[:] = torch.tensor([1495, 1490, 7])
    grads = _grads(3, torch.float32)
    leaf = logits.double().requires_grad_()
    exact = token_logprob_ref(leaf, target)
    assert exact.logprob[:2].isinf().all() and exact.entropy.isfinite().all()
    upstream = [grad.double() for grad in grads if grad is not None]
    (truth,) = torch.autograd.grad(exact, leaf, upstream)
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    stats = _stats(logits, target, body)
    given: RowGrads = tuple(g.to(DEVICE) for g in grads if g is not None)  # type: ignore[assignment]
    out = _gradient(logits, target, stats, given, body, torch.empty_like(logits))
    torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-4, atol=1e-6)


def test_the_specifications_gradients_are_finite_where_a_logit_is_minus_infinity() -> None:
    logits, target = _rows(2, 9, torch.float64)
    logits[0, 3:] = -math.inf
    target[0] = 1
    leaf = logits.requires_grad_()
    sum(part.sum() for part in token_logprob_ref(leaf, target)).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[0, 3:] == 0).all()


@pytest.mark.parametrize("body", NATIVE)
def test_bits_depend_on_the_row_alone(body: str) -> None:
    logits, target = _rows(6, 5000, torch.float32)
    grads = _grads(6, torch.float32)

    def both(rows: Tensor) -> tuple[Tensor, ...]:
        part = logits[rows].contiguous()
        stats = _stats(part, target[rows], body)
        mine = (grads[0][rows], grads[1][rows], grads[2][rows])  # type: ignore[index]
        return *stats, _gradient(part, target[rows], stats, mine, body, torch.empty_like(part))

    everything = both(torch.arange(6))
    for rows in (torch.arange(6), torch.arange(6).flip(0), *torch.arange(6)[:, None]):
        assert all(torch.equal(a, b[rows]) for a, b in zip(both(rows), everything, strict=True))


@pytest.mark.parametrize("body", BODIES)
def test_gradcheck_and_saved_logits_are_never_written(body: str) -> None:
    logits, target = _rows(3, 19, torch.float64)
    before = logits.clone()
    with backend.using(_body(body)):
        leaf = logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: tuple(token_logprob(x, target, temperature=0.7)), leaf)
        sum(s.sum() for s in token_logprob(leaf, target)).backward()  # type: ignore[union-attr]
    assert torch.equal(leaf.detach(), before)


@needs_native
def test_native_runs_on_the_cpu_and_refuses_what_it_cannot_do() -> None:
    assert backend.choose("token_logprob") == "native"
    with pytest.raises(ValueError, match="does not support"):
        backend.native().use_isa("vax")
    logits, target = _rows(2, 9, torch.float32)
    with pytest.raises(TypeError, match="bias"):
        row_stats(logits, target, bias_V=torch.zeros(9).double(), inv_temperature=1.0, body="native")


@needs_triton
@pytest.mark.parametrize("num_vocab", [1, 17, 1003])
def test_triton_agrees_with_the_truth(num_vocab: int) -> None:
    logits, target = _rows(3, num_vocab, torch.float32)
    truth, truth_grad = _truth(logits, target, None, 0.7)
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    stats = _stats(logits, target, "triton", None, 0.7)
    for ours, exact in zip(stats, truth, strict=True):
        assert (ours.cpu().double() - exact).abs().max() <= 1e-4
    d = _grads(3, torch.float32)
    grads: RowGrads = tuple(g.to(DEVICE) for g in d if g is not None)  # type: ignore[assignment]
    out = _gradient(logits, target, stats, grads, "triton", torch.empty_like(logits), None, 0.7)
    assert (out.cpu().double() - truth_grad).abs().max() <= 1e-4


@pytest.mark.parametrize("body", ["reference", "torch", "native", "triton"])
def test_targets_may_be_a_strided_view(body: str) -> None:
    if body not in backend.bodies("token_logprob", DEVICE):
        pytest.skip(f"{body} does not run on {DEVICE} here")
    logits, target = _rows(8, 17, torch.float32)
    logits = logits[:4].to(DEVICE).requires_grad_()
    strided = target.to(DEVICE)[::2]
    with backend.using(f"token_logprob={body}"):
        got, wanted = token_logprob(logits, strided), token_logprob(logits, strided.contiguous())
        grads = [torch.autograd.grad(stats.logprob.sum(), logits)[0] for stats in (got, wanted)]
    assert torch.equal(got.logprob, wanted.logprob)
    assert torch.equal(*grads)
