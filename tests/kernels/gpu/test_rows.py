"""Sums of rows that share an index, on a GPU or interpreted. The passes over logits: ``test_token_logprob.py``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.kernels import backend

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=20, deadline=None)
@given(index=st.lists(st.integers(0, 4), max_size=12), dim=st.sampled_from([1, 5, 1023, 1025]))
def test_rows_are_added_where_they_go_in_their_order_and_nowhere_else(index: list[int], dim: int) -> None:
    from isomorph.kernels.gpu import rows

    gen = torch.Generator().manual_seed(dim)
    part = torch.randn(len(index), dim, generator=gen) * 10.0 ** torch.arange(len(index))[:, None].remainder(7)
    into = torch.randn(5, dim, generator=gen)
    expected = into.clone()
    for row, place in zip(part, index, strict=True):
        expected[place] += row
    ours = into.to(DEVICE)
    rows.add_rows(ours, torch.tensor(index, dtype=torch.int64, device=DEVICE), part.to(DEVICE))
    assert torch.equal(ours.cpu(), expected)
