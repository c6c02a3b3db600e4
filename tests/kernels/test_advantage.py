import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.advantage import EPS, gae, gae_ref, group_advantage, group_advantage_ref

OPS = [group_advantage, group_advantage_ref]
needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())
SMALL = st.floats(-5, 5, width=32)


def _offsets(lens: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lens)], dtype=torch.int64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_published_formulas(op: object, dtype: torch.dtype) -> None:
    groups = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.2, -1.5, 3.0], [2.0, 2.5]]
    reward, offsets = torch.tensor(sum(groups, []), dtype=dtype), _offsets([5, 3, 2])
    arrays = [np.array(group, dtype=np.float64) for group in groups]
    grpo = [(x - x.mean()) / (x.std(ddof=1) + EPS) for x in arrays]
    dr_grpo = [x - x.mean() for x in arrays]
    rloo = [np.array([r - (x.sum() - r) / (len(x) - 1) for r in x]) for x in arrays]
    flat = np.concatenate(dr_grpo)
    reinforce_pp = [(flat - flat.mean()) / (flat.std(ddof=1) + EPS)]
    for expected, kwargs in (
        (grpo, {}),
        (dr_grpo, {"scale": "none"}),
        (rloo, {"baseline": "leave_one_out", "scale": "none"}),
        (reinforce_pp, {"scale": "batch"}),
        (arrays, {"baseline": "none", "scale": "none"}),
    ):
        ours = op(reward, offsets, **kwargs)  # type: ignore[operator]
        assert ours.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            ours.double(), torch.from_numpy(np.concatenate(expected)), rtol=tolerance, atol=tolerance
        )


@needs_native
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(SMALL, min_size=2, max_size=9), max_size=6),
    st.sampled_from(["mean", "leave_one_out", "none"]),
    st.sampled_from(["std", "none", "batch"]),
)
def test_native_equals_reference(groups: list[list[float]], baseline: str, scale: str) -> None:
    reward = torch.tensor(sum(groups, []), dtype=torch.float64)
    offsets = _offsets([len(group) for group in groups])
    with backend.using("native"):
        ours = group_advantage(reward, offsets, baseline=baseline, scale=scale)
    expected = group_advantage_ref(reward, offsets, baseline=baseline, scale=scale)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6])
def test_a_group_without_variance_is_exactly_zero(op: object, baseline: str, scale: str, reward: float) -> None:
    rewards = torch.tensor([reward] * 7 + [0.0, 1.0])
    advantage = op(rewards, _offsets([7, 2]), baseline=baseline, scale=scale)  # type: ignore[operator]
    assert torch.count_nonzero(advantage[:7]) == 0
    assert torch.count_nonzero(advantage[7:]) == 2


@pytest.mark.parametrize("op", OPS)
def test_a_batch_without_variance_is_exactly_zero(op: object) -> None:
    for baseline in ("mean", "none"):
        advantage = op(torch.full((6,), 0.1), _offsets([3, 3]), baseline=baseline, scale="batch")  # type: ignore[operator]
        assert torch.count_nonzero(advantage) == 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("baseline", "scale"), [("mean", "none"), ("leave_one_out", "batch"), ("none", "std")])
def test_a_group_of_one_is_refused_by_name(op: object, baseline: str, scale: str) -> None:
    with pytest.raises(ValueError, match=r"group 1 has one response.*samples_per_prompt >= 2"):
        op(torch.tensor([1.0, 0.0, 1.0]), _offsets([2, 1]), baseline=baseline, scale=scale)  # type: ignore[operator]


@pytest.mark.parametrize("op", OPS)
def test_a_group_of_one_is_fine_where_nothing_compares(op: object) -> None:
    reward, offsets = torch.tensor([1.0, 0.5]), _offsets([1, 0, 1])
    assert torch.equal(op(reward, offsets, baseline="none", scale="none"), reward)  # type: ignore[operator]
    assert op(reward, offsets, baseline="none", scale="batch").sum().abs() < 1e-6  # type: ignore[operator]


@pytest.mark.parametrize("op", OPS)
def test_no_responses_give_no_advantages(op: object) -> None:
    for offsets in (_offsets([]), _offsets([0, 0])):
        assert op(torch.empty(0), offsets, scale="batch").shape == (0,)  # type: ignore[operator]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("reward", "offsets", "kwargs", "error", "message"),
    [
        ([1.0, math.nan], [0, 2], {}, ValueError, "reward must be finite, got nan at index 1"),
        ([math.inf, 0.0], [0, 2], {}, ValueError, "reward must be finite, got inf at index 0"),
        ([1, 0], [0, 2], {}, TypeError, "reward must be float32 or float64"),
        ([1.0, 0.0], [0.0, 2.0], {}, TypeError, "group_offsets must be int32 or int64"),
        ([1.0, 0.0], [0, 3], {}, ValueError, "group_offsets must ascend from 0 to 2"),
        ([1.0, 0.0], [1, 2], {}, ValueError, "group_offsets must ascend from 0 to 2"),
        ([1.0, 0.0, 0.5], [0, 2, 1, 3], {}, ValueError, "group_offsets must ascend from 0 to 3"),
        ([1.0, 0.0], [0, 2], {"baseline": "median"}, ValueError, "baseline must be one of mean, leave_one_out, none"),
        ([1.0, 0.0], [0, 2], {"scale": "max"}, ValueError, "scale must be one of std, none, batch"),
    ],
)
def test_bad_arguments_are_refused(
    op: object, reward: list[float], offsets: list[int], kwargs: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(torch.tensor(reward), torch.tensor(offsets), **kwargs)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(SMALL, SMALL), max_size=12), max_size=5),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_equals_its_sum_of_discounted_errors(
    seqs: list[list[tuple[float, float]]], gamma: float, lam: float
) -> None:
    pairs = torch.tensor(sum(seqs, []), dtype=torch.float64).view(-1, 2)
    reward, value = pairs[:, 0], pairs[:, 1]
    expected = []
    for seq in seqs:
        values = [v for _, v in seq] + [0.0]
        delta = [r + gamma * values[t + 1] - values[t] for t, (r, _) in enumerate(seq)]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(seq))]
    for op in (gae, gae_ref):
        advantage, returns = op(reward, value, _offsets([len(seq) for seq in seqs]), gamma=gamma, lam=lam)
        torch.testing.assert_close(advantage, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        assert torch.equal(returns, advantage + value)


@pytest.mark.parametrize("op", [gae, gae_ref])
@pytest.mark.parametrize(
    ("value", "gamma", "lam", "error", "message"),
    [
        ([0.0, 0.0, 0.0], 1.0, 1.0, ValueError, "value must be as reward"),
        ([0.0, math.nan], 1.0, 1.0, ValueError, "value must be finite"),
        ([0.0, 0.0], 1.1, 1.0, ValueError, r"gamma must lie in 0..1"),
        ([0.0, 0.0], 1.0, math.nan, ValueError, r"lam must lie in 0..1"),
    ],
)
def test_bad_gae_arguments_are_refused(
    op: object, value: list[float], gamma: float, lam: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(torch.zeros(2), torch.tensor(value), _offsets([2]), gamma=gamma, lam=lam)  # type: ignore[operator]
