"""linear by oneDNN: PyTorch in float64 is the expected value, the error of PyTorch in float32 is the bound."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend, linear_chunks
from isomorph.kernels.linear import (
    linear,
    linear_prepacked,
    linear_ref,
    onednn_has_bfloat16,
    prepack,
    rounded_rows,
    takes_onednn,
)
from isomorph.kernels.linear_logprob import linear_loss

SIZE = st.integers(1, 70)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_too_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isomorph.kernels.linear.MIN_TERMS", 0)
        patch.setattr("isomorph.kernels.linear.MIN_WEIGHT", 0)
        yield


def grown(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, body: str) -> list[Tensor]:
    """Output and all gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    with backend.using(f"linear={body}"):
        y = linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, SIZE, st.booleans(), st.integers(0, 2**31))
def test_output_and_gradients_are_as_near_to_float64_as_pytorchs(
    num_rows: int, num_in: int, num_out: int, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, dy = normal(2, num_rows, num_in), normal(num_out, num_in), normal(2, num_rows, num_out)
    bias = normal(num_out) if has_bias else None
    inputs = [None if t is None else t.float() for t in (x, weight, bias, dy)]
    exact = grown(*(None if t is None else t.double() for t in inputs), "reference")  # type: ignore[arg-type]
    ours, theirs = (grown(*inputs, body) for body in ("torch", "reference"))  # type: ignore[arg-type]
    for truth, mine, its in zip(exact, ours, theirs, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == truth.shape
        rounding = 2**-23 * truth.abs().max()  # where PyTorch happens to be exact
        longest = max(2 * num_rows, num_in, num_out)
        assert (mine - truth).abs().max() <= 2 * (its - truth).abs().max() + longest**0.5 * rounding


def test_strided_views_are_multiplied_as_their_copies() -> None:
    x, weight = torch.randn(30, 20).T, torch.randn(40, 60)[::2, ::2]
    torch.testing.assert_close(linear(x, weight), linear(x.contiguous(), weight.contiguous()), rtol=0, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_still_pass_one_on() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 8))
    assert weight.grad is None


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    assert linear(torch.empty(shape), torch.randn(3, 8)).shape == (*shape[:-1], 3)


def test_only_float32_on_the_cpu_is_taken_from_pytorch() -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert takes_onednn(x, weight, 24)
    assert not takes_onednn(x.double(), weight.double(), 24)
    assert not takes_onednn(x.bfloat16(), weight.bfloat16(), 24)
    with backend.using("reference"):
        assert not takes_onednn(x, weight, 24)
        assert torch.equal(linear(x, weight), linear_ref(x, weight))


def test_infinity_and_nan_stay_in_their_rows() -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    clean = linear(x, weight)
    x[1, 2], x[2, 0] = float("inf"), float("nan")
    found = linear(x, weight)
    assert not found[1:3].isfinite().any()
    torch.testing.assert_close(found[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("num_rows", [1, 5, 32, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_multiplies_as_the_weight_does(num_rows: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not onednn_has_bfloat16():
        pytest.skip("oneDNN multiplies bfloat16 with AVX-512 or AVX-NE-CONVERT only")
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((2, num_rows, 96), (80, 96), (80,)))
    packed = prepack(weight.to(dtype))
    assert packed is not None
    exact = linear_ref(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double())
    ours = linear_prepacked(x.to(dtype), packed, bias.to(dtype))
    theirs = linear_ref(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert ours.dtype == dtype and ours.shape == (2, num_rows, 80)
    rounding = 96**0.5 * 2**-23 * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


def test_few_different_numbers_of_rows_are_multiplied() -> None:
    numbers = range(1, 4097)
    rounded = [rounded_rows(n) for n in numbers]
    assert all(n <= r <= n + max(7, n // 16) for n, r in zip(numbers, rounded, strict=True))
    assert rounded == sorted(rounded) and all(rounded_rows(r) == r for r in rounded)
    assert len({r for r in rounded if r <= 256}) == 39 and len(set(rounded)) == 103


def test_what_onednn_does_not_multiply_is_not_packed() -> None:
    assert prepack(torch.randn(3, 8).double()) is None
    assert prepack(torch.empty(0, 8)) is None
    with backend.using("reference"):
        assert prepack(torch.randn(3, 8)) is None


def test_bfloat16_is_packed_only_where_onednn_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN raises for it on a processor without AVX-512."""
    assert onednn_has_bfloat16() == (prepack(torch.randn(3, 8).bfloat16()) is not None)
    monkeypatch.setattr("isomorph.kernels.linear.onednn_has_bfloat16", lambda: False)
    assert prepack(torch.randn(3, 8).bfloat16()) is None and prepack(torch.randn(3, 8)) is not None


def test_a_small_product_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isomorph.kernels.linear.MIN_TERMS", 4 * 8 * 3)
    monkeypatch.setattr("isomorph.kernels.linear.MIN_WEIGHT", 3 * 8)
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert takes_onednn(x, weight, 24) and not takes_onednn(x[:3], weight, 24) and not takes_onednn(x, weight, 23)
    assert prepack(weight) is not None and prepack(weight[:2]) is None


def test_the_heads_products_are_pytorchs_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "ONEDNN_COLUMNS", 7)
    generator = torch.Generator().manual_seed(0)
    target, found = torch.randint(50, (12,), generator=generator), []
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((12, 16), (50, 16)))
    for body in ("torch", "reference"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with backend.using(f"linear={body}"):
            loss = linear_loss(*leaves, target, lambda stats, rows: -stats.logprob.square().sum(), chunk_rows=5)
            loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found)


def test_autocast_decides_the_dtype_as_for_pytorchs_layer() -> None:
    x, weight = torch.randn(300, 40, requires_grad=True), torch.randn(50, 40, requires_grad=True)
    assert takes_onednn(x, weight, weight.numel())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = linear(x, weight), torch.nn.functional.linear(x, weight)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.ones(50, 41), None),
        (torch.ones(50, 40), torch.ones(49)),
        (torch.ones(50, 40), torch.ones(50, dtype=torch.float64)),
        (torch.ones(50, 40), torch.ones(50, dtype=torch.bfloat16)),
    ],
)
def test_what_does_not_fit_is_refused_in_pytorchs_words(weight: Tensor, bias: Tensor | None) -> None:
    x = torch.ones(300, 40)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.functional.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        linear(x, weight, bias)
    assert str(ours.value) == str(theirs.value)


def test_a_weight_with_one_dimension_is_one_output() -> None:
    x, weight = torch.randn(300, 40), torch.randn(40)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
