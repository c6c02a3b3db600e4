"""add_rows in Triton, on a GPU or interpreted. row_stats and row_gradient are in ``test_token_logprob.py``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.kernels import backend

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_bits_of_a_row_of_logits_depend_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from isomorph.kernels.gpu import rows

    monkeypatch.setattr(rows, "BLOCK_V", 32)
    gen = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 100, generator=gen).to(DEVICE), torch.arange(5, device=DEVICE) * 20
    grad = torch.randn(5, generator=gen).to(DEVICE)

    def both(some: list[int]) -> tuple[torch.Tensor, ...]:
        part, ids, upstream = logits[some], target[some], grad[some]
        stats = rows.row_stats(part, ids, None, 0.7)
        out = torch.empty_like(part)
        rows.row_gradient(part, ids, stats, (upstream, upstream, upstream), None, 0.7, out)
        return (*stats, out)

    whole = both([0, 1, 2, 3, 4])
    for some in ([3], [4, 0], [4, 3, 2, 1, 0]):
        assert all(torch.equal(part, all_rows[some]) for part, all_rows in zip(both(some), whole, strict=True))


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
