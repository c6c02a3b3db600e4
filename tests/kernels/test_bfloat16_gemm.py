"""The LM head's matrix products on a CPU with bfloat16 instructions: bfloat16 in, float32 out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend

pytestmark = pytest.mark.skipif(
    not backend.native_available() or not backend.native().has_bfloat16_gemm(),
    reason="needs the C++ module and a processor with AVX-512 and bfloat16 dot products",
)


def _operands(num_rows: int, num_columns: int, dim: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num_rows * 31 + num_columns * 7 + dim)
    return tuple(torch.randn(n, dim, generator=gen).bfloat16() for n in (num_rows, num_columns))  # type: ignore[return-value]


def _gemm(x: Tensor, w: Tensor) -> Tensor:
    """Into the middle of a poisoned tensor, so that nothing else may be written."""
    whole = torch.full((len(x) + 2, len(w) + 5), math.nan)
    backend.native().bfloat16_gemm(x, w, whole[1:-1, 2:-3])
    written = ~whole.isnan()
    assert written[1:-1, 2:-3].all() and written.sum() == len(x) * len(w)
    return whole[1:-1, 2:-3].clone()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    num_columns=st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 100]),
    dim=st.sampled_from([2, 4, 30, 32, 34, 64, 96, 576]),
)
def test_products_are_float32_accurate_at_every_edge(num_rows: int, num_columns: int, dim: int) -> None:
    x, w = _operands(num_rows, num_columns, dim)
    truth = x.double() @ w.double().T
    # float32 sums of D products, each of which is exact: gamma_D sum |x w|
    bound = dim * 2.0**-24 * (x.double().abs() @ w.double().abs().T)
    assert ((_gemm(x, w).double() - truth).abs() <= bound).all()


def test_rows_that_are_not_neighbours_are_read_where_they_lie() -> None:
    x, w = _operands(30, 70, 64)
    wide_x, wide_w = torch.full((30, 80), math.nan).bfloat16(), torch.full((70, 128), math.nan).bfloat16()
    wide_x[:, 8:72], wide_w[:, 32:96] = x, w
    assert torch.equal(_gemm(wide_x[:, 8:72], wide_w[:, 32:96]), _gemm(x, w))


def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    x, w = _operands(29, 200, 96)
    together = _gemm(x, w)
    assert torch.equal(torch.cat([_gemm(row[None], w) for row in x]), together)
    assert torch.equal(_gemm(x.flip(0), w).flip(0), together)


def test_a_value_that_is_not_finite_stays_in_its_row_and_column() -> None:
    x, w = _operands(14, 40, 32)
    x[3, 5], w[33, 7] = math.inf, math.nan
    out = torch.zeros(14, 40)
    backend.native().bfloat16_gemm(x, w, out)
    bad = ~out.isfinite()
    assert bad[3].all() and bad[:, 33].all()
    bad[3], bad[:, 33] = False, False
    assert not bad.any()


@settings(max_examples=60, deadline=None)
@given(
    num_k=st.sampled_from([1, 2, 3, 31, 64, 127]),
    num_rows=st.sampled_from([1, 11, 12, 13, 95, 96, 97, 200]),
    num_columns=st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 96]),
)
def test_outer_products_are_added_with_float32_accuracy_at_every_edge(
    num_k: int, num_rows: int, num_columns: int
) -> None:
    a, b = (x.T for x in _operands(num_rows, num_columns, num_k))
    apart = torch.full((num_k, num_rows + 9), math.nan).bfloat16()[:, 4 : 4 + num_rows].copy_(a)
    whole = torch.full((num_rows + 2, num_columns + 5), math.nan)
    out = whole[1:-1, 2:-3].fill_(3.0)
    backend.native().bfloat16_outer(apart, b.contiguous(), out)
    assert (~whole.isnan()).sum() == num_rows * num_columns
    truth = 3 + a.double().T @ b.double()
    bound = (num_k + 2) * 2.0**-24 * (3 + a.double().abs().T @ b.double().abs())
    assert ((out.double() - truth).abs() <= bound).all()
