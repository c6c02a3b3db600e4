import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.advantage import EPS, gae, group_advantage, group_advantage_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BODIES = [body for body in ("native", "triton", "reference") if body in backend.bodies("gae", "cpu")]
BODIES += ["triton"] if DEVICE == "cuda" else []
OURS = [body for body in BODIES if body != "reference"]
SMALL = st.floats(-5, 5, width=32)


def _group(body: str, reward: Tensor, offsets: Tensor, **kwargs: Any) -> Tensor:
    device = DEVICE if body == "triton" else "cpu"
    with backend.using(f"group_advantage={body}"):
        return group_advantage(reward.to(device), offsets.to(device), **kwargs).cpu()


def _gae(body: str, reward: Tensor, value: Tensor, offsets: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    device = DEVICE if body == "triton" else "cpu"
    with backend.using(f"gae={body}"):
        advantage, returns = gae(reward.to(device), value.to(device), offsets.to(device), **kwargs)
    return advantage.cpu(), returns.cpu()


def _offsets(lens: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lens)], dtype=torch.int64)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_published_formulas(body: str, dtype: torch.dtype) -> None:
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
        ours = _group(body, reward, offsets, **kwargs)
        assert ours.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            ours.double(), torch.from_numpy(np.concatenate(expected)), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("body", OURS)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(SMALL, min_size=2, max_size=9), max_size=6),
    st.sampled_from(["mean", "leave_one_out", "none"]),
    st.sampled_from(["std", "none", "batch"]),
)
def test_every_body_equals_the_reference(body: str, groups: list[list[float]], baseline: str, scale: str) -> None:
    reward = torch.tensor(sum(groups, []), dtype=torch.float64)
    offsets = _offsets([len(group) for group in groups])
    expected = group_advantage_ref(reward, offsets, baseline=baseline, scale=scale)  # type: ignore[arg-type]
    ours = _group(body, reward, offsets, baseline=baseline, scale=scale)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    # float32: sums are float64, so what is left is the rounding of results, and of what "batch" scales
    narrow = _group(body, reward.float(), offsets.int(), baseline=baseline, scale=scale)
    largest = max(map(abs, expected.tolist()), default=0.0)
    atol = 2**-22 * largest if scale == "batch" else 0.0
    torch.testing.assert_close(narrow.double(), expected, rtol=2**-23, atol=atol + 1e-38)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_variance_is_exactly_zero(
    body: str, baseline: str, scale: str, reward: float, dtype: torch.dtype
) -> None:
    rewards = torch.tensor([reward] * 3 + [reward] * 7 + [0.0, 1.0], dtype=dtype)  # three times 0.1 is not 0.3
    advantage = _group(body, rewards, _offsets([3, 7, 2]), baseline=baseline, scale=scale)
    assert torch.count_nonzero(advantage[:10]) == 0
    assert torch.count_nonzero(advantage[10:]) == 2


@pytest.mark.parametrize("body", BODIES)
def test_a_batch_without_variance_is_exactly_zero(body: str) -> None:
    for baseline in ("mean", "none"):
        advantage = _group(body, torch.full((6,), 0.1), _offsets([3, 3]), baseline=baseline, scale="batch")
        assert torch.count_nonzero(advantage) == 0


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("baseline", "scale"), [("mean", "none"), ("leave_one_out", "batch"), ("none", "std")])
def test_a_group_of_one_is_refused_by_name(body: str, baseline: str, scale: str) -> None:
    with pytest.raises(ValueError, match=r"group 1 has one response.*samples_per_prompt >= 2"):
        _group(body, torch.tensor([1.0, 0.0, 1.0]), _offsets([2, 1]), baseline=baseline, scale=scale)


@pytest.mark.parametrize("body", BODIES)
def test_a_group_of_one_is_fine_where_nothing_compares(body: str) -> None:
    reward, offsets = torch.tensor([1.0, 0.5]), _offsets([1, 0, 1])
    assert torch.equal(_group(body, reward, offsets, baseline="none", scale="none"), reward)
    assert _group(body, reward, offsets, baseline="none", scale="batch").sum().abs() < 1e-6


@pytest.mark.parametrize("body", BODIES)
def test_no_responses_give_no_advantages(body: str) -> None:
    for offsets in (_offsets([]), _offsets([0, 0])):
        assert _group(body, torch.empty(0), offsets, scale="batch").shape == (0,)


@pytest.mark.parametrize("body", BODIES)
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
    body: str, reward: list[float], offsets: list[int], kwargs: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _group(body, torch.tensor(reward), torch.tensor(offsets), **kwargs)


@pytest.mark.parametrize("body", BODIES)
def test_offsets_of_another_device_are_refused(body: str) -> None:
    elsewhere = _offsets([2]).to("meta")
    with backend.using(body), pytest.raises(ValueError, match="group_offsets must be on the device of the rewards"):
        group_advantage(torch.zeros(2), elsewhere)
    with backend.using(body), pytest.raises(ValueError, match="cu_seqlens must be on the device of the rewards"):
        gae(torch.zeros(2), torch.zeros(2), elsewhere, gamma=1.0, lam=1.0)


@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.tuples(SMALL, SMALL), max_size=12), max_size=5),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_equals_its_sum_of_discounted_errors(
    body: str, seqs: list[list[tuple[float, float]]], gamma: float, lam: float
) -> None:
    pairs = torch.tensor(sum(seqs, []), dtype=torch.float64).view(-1, 2)
    reward, value = pairs[:, 0], pairs[:, 1]
    expected = []
    for seq in seqs:
        values = [v for _, v in seq] + [0.0]
        delta = [r + gamma * values[t + 1] - values[t] for t, (r, _) in enumerate(seq)]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(seq))]
    offsets = _offsets([len(seq) for seq in seqs])
    advantage, returns = _gae(body, reward, value, offsets, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantage, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert torch.equal(returns, advantage + value)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("value", "gamma", "lam", "error", "message"),
    [
        ([0.0, 0.0, 0.0], 1.0, 1.0, ValueError, "value must be like reward"),
        ([0.0, math.nan], 1.0, 1.0, ValueError, "value must be finite"),
        ([0.0, 0.0], 1.1, 1.0, ValueError, r"gamma must lie in 0..1"),
        ([0.0, 0.0], 1.0, math.nan, ValueError, r"lam must lie in 0..1"),
    ],
)
def test_bad_gae_arguments_are_refused(
    body: str, value: list[float], gamma: float, lam: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _gae(body, torch.zeros(2), torch.tensor(value), _offsets([2]), gamma=gamma, lam=lam)
