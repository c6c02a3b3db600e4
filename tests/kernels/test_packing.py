from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.packing import (
    assign_groups,
    assign_groups_ref,
    concat_ragged,
    consecutive,
    offsets_of,
    take_ragged,
    take_ragged_ref,
)

needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())
ASSIGN = [assign_groups, assign_groups_ref]
TAKE = [take_ragged, take_ragged_ref]
COSTS = st.lists(st.integers(0, 60), max_size=40)


@settings(max_examples=150, deadline=None)
@given(COSTS, st.integers(60, 200))
def test_every_group_is_in_one_bin_that_holds_it(cost_tok: list[int], max_tok: int) -> None:
    for op in ASSIGN:
        bins = op(cost_tok, max_tok)
        assert sorted(group for members in bins for group in members) == list(range(len(cost_tok)))
        assert all(members == sorted(members) and members for members in bins)
        assert [members[0] for members in bins] == sorted(members[0] for members in bins)
        load = [sum(cost_tok[group] for group in members) for members in bins]
        assert all(tok <= max_tok for tok in load)
        # any two bins overflow together, or one of them would not have been opened
        assert len(bins) <= max(1, 2 * sum(cost_tok) / max_tok + 1)


@needs_native
@settings(max_examples=150, deadline=None)
@given(COSTS, st.integers(60, 200))
def test_native_assignment_equals_reference(cost_tok: list[int], max_tok: int) -> None:
    with backend.using("native"):
        assert assign_groups(cost_tok, max_tok) == assign_groups_ref(cost_tok, max_tok)


@pytest.mark.parametrize("op", ASSIGN)
def test_bins_are_few_and_even(op: object) -> None:
    bins = op([40, 10, 30, 20, 35, 25, 15, 5], 100)  # type: ignore[operator]
    assert [sum([40, 10, 30, 20, 35, 25, 15, 5][group] for group in members) for members in bins] == [90, 90]


@pytest.mark.parametrize("op", ASSIGN)
def test_first_fit_is_taken_where_even_bins_do_not_fit(op: object) -> None:
    # heaviest-first into the lightest bin gives 3+2+2 and 3+2: two bins of at most 6 exist all the same
    assert op([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]  # type: ignore[operator]


@pytest.mark.parametrize("op", ASSIGN)
def test_no_groups_need_no_bins(op: object) -> None:
    assert op([], 10) == []  # type: ignore[operator]


@pytest.mark.parametrize("op", ASSIGN)
def test_impossible_budgets_are_refused(op: object) -> None:
    with pytest.raises(ValueError, match="group 1 has 11 tokens, more than a micro-batch's 10"):
        op([3, 11], 10)  # type: ignore[operator]
    with pytest.raises(ValueError, match="max_tok must be >= 1, got 0"):
        op([], 0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="costs must be >= 0 tokens, got -1 for group 0"):
        op([-1], 10)  # type: ignore[operator]


ROWS = [[3, 1, 4], [], [1], [5, 9, 2, 6]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("row_ids", [[], [0], [3, 1, 0, 0, 2]])
def test_taken_rows_come_in_the_order_asked_for(dtype: torch.dtype, row_ids: list[int]) -> None:
    value, offsets = concat_ragged([torch.tensor(row, dtype=torch.float64).to(dtype) for row in ROWS])
    expected = [torch.tensor(ROWS[i], dtype=torch.float64).to(dtype) for i in row_ids]
    for op in TAKE:
        taken, taken_offsets = op(value, offsets, torch.tensor(row_ids, dtype=torch.int64))
        assert taken.dtype == dtype
        assert torch.equal(taken, torch.cat([value[:0], *expected]))
        assert taken_offsets.tolist() == offsets_of(torch.tensor([len(row) for row in expected]).long()).tolist()


@pytest.mark.parametrize("op", TAKE)
def test_a_single_value_may_be_a_strided_view(op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Contiguous by PyTorch's rule, whatever its stride."""
    value, one = torch.tensor([7, 8])[::2], torch.tensor([0, 1])
    assert value.stride() == (2,) and op(value, one, one[:1])[0].tolist() == [7]


def test_rows_are_joined_with_their_offsets() -> None:
    value, offsets = concat_ragged([torch.tensor(row, dtype=torch.int64) for row in ROWS])
    assert value.tolist() == [3, 1, 4, 1, 5, 9, 2, 6]
    assert offsets.tolist() == [0, 3, 3, 4, 8]
    assert consecutive(torch.tensor([5, 0, 2]), torch.tensor([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]


_VALUE, _OFFSETS = torch.arange(4.0), torch.tensor([0, 1, 4])


@pytest.mark.parametrize("op", TAKE)
@pytest.mark.parametrize(
    ("value", "offsets", "row_ids", "error", "message"),
    [
        (_VALUE[None], _OFFSETS, [0], ValueError, r"value must be \[n\]"),
        (_VALUE.clone().requires_grad_(), _OFFSETS, [0], ValueError, "requires_grad=True"),
        (_VALUE, _OFFSETS.int(), [0], TypeError, "offsets must be int64"),
        (_VALUE, _OFFSETS[:2], [0], ValueError, "offsets must ascend from 0 to 4"),
        (_VALUE, torch.tensor([0, 5, 4]), [0], ValueError, "offsets must ascend from 0 to 4"),
        (_VALUE, _OFFSETS, [2], ValueError, "row_ids must lie in 0..1, got 2..2"),
        (_VALUE, _OFFSETS, [-1], ValueError, "row_ids must lie in 0..1, got -1..-1"),
        (_VALUE, _OFFSETS, [0.5], TypeError, "row_ids must be int64"),
    ],
)
def test_bad_ragged_arguments_are_refused(
    op: object, value: Tensor, offsets: Tensor, row_ids: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(value, offsets, torch.tensor(row_ids))  # type: ignore[operator]


def test_rows_of_different_kinds_are_not_joined() -> None:
    with pytest.raises(TypeError, match="of one dtype"):
        concat_ragged([torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="rows must not be empty"):
        concat_ragged([])
