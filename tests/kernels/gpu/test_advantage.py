"""group_advantage and gae in Triton, at the edges of their blocks. Interpreted if there is no GPU."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isomorph.kernels import backend
from isomorph.kernels.advantage import Baseline, Scale, gae, gae_ref, group_advantage, group_advantage_ref

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64]
MODES: list[tuple[Baseline, Scale]] = [
    ("mean", "std"), ("mean", "none"), ("mean", "batch"), ("leave_one_out", "none"), ("leave_one_out", "std"),
    ("leave_one_out", "batch"), ("none", "std"), ("none", "batch"), ("none", "none"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT, "group_advantage=triton,gae=triton")


def _lens(block: int, smallest: int) -> list[int]:
    return [0, smallest, block - 1, block, 0, block + 1, 3 * block + 7, 2]


def _offsets(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(DEVICE)


def _random(num: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def _holds(ours: Tensor, same_dtype: Tensor, truth: Tensor) -> bool:
    """float32: not worse than twice PyTorch's own error, and a rounding. float64: as two orders of a sum may differ."""
    error, own_error = (ours.double() - truth).abs(), (same_dtype.double() - truth).abs().max()
    num_terms = len(ours) if ours.dtype == torch.float64 else 1
    return bool((error <= 2 * own_error + num_terms * torch.finfo(ours.dtype).eps * (1 + truth.abs())).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("baseline", "scale"), MODES)
def test_groups_at_the_edges_of_a_block(baseline: Baseline, scale: Scale, dtype: torch.dtype) -> None:
    from isomorph.kernels.gpu.advantage import BLOCK_G

    lens = _lens(BLOCK_G, 2)
    reward, offsets = _random(sum(lens), dtype) + 3, _offsets(lens)
    ours = group_advantage(reward, offsets, baseline=baseline, scale=scale)
    same_dtype = group_advantage_ref(reward, offsets, baseline=baseline, scale=scale)
    truth = group_advantage_ref(reward.double(), offsets, baseline=baseline, scale=scale)
    assert _holds(ours, same_dtype, truth)
    assert torch.equal(ours, group_advantage(reward, offsets, baseline=baseline, scale=scale))
    if scale == "batch":
        return
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = group_advantage(reward[start:end], _offsets([end - start]), baseline=baseline, scale=scale)
        assert torch.equal(alone, ours[start:end])


@pytest.mark.parametrize("num", [1023, 1024, 1025, 3079])
def test_a_batch_at_the_edges_of_its_block(num: int) -> None:
    reward, offsets = _random(num, torch.float32), _offsets([num - num // 2, num // 2])
    ours = group_advantage(reward, offsets, scale="batch")
    truth = group_advantage_ref(reward.double(), offsets, scale="batch")
    assert _holds(ours, group_advantage_ref(reward, offsets, scale="batch"), truth)
    assert torch.equal(ours, group_advantage(reward, offsets, scale="batch"))


@pytest.mark.parametrize(("gamma", "lam", "dtype"), [(1.0, 1.0, torch.float64), (0.99, 0.95, torch.float32)])
def test_sequences_at_the_edges_of_a_block(gamma: float, lam: float, dtype: torch.dtype) -> None:
    from isomorph.kernels.gpu.advantage import BLOCK_T

    lens = _lens(BLOCK_T, 1)
    reward, value, offsets = _random(sum(lens), dtype), _random(sum(lens), dtype, seed=1), _offsets(lens)
    ours = gae(reward, value, offsets, gamma=gamma, lam=lam)
    same_dtype = gae_ref(reward.cpu(), value.cpu(), offsets.cpu(), gamma=gamma, lam=lam)
    truth = gae_ref(reward.double().cpu(), value.double().cpu(), offsets.cpu(), gamma=gamma, lam=lam)
    for our, same, true in zip(ours, same_dtype, truth, strict=True):
        assert _holds(our.cpu(), same, true)
    assert torch.equal(ours[1], ours[0] + value)
    again = gae(reward, value, offsets, gamma=gamma, lam=lam)
    assert torch.equal(ours[0], again[0])
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone, _ = gae(reward[start:end], value[start:end], _offsets([end - start]), gamma=gamma, lam=lam)
        assert torch.equal(alone, ours[0][start:end])


def test_every_result_is_written_and_nothing_else_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [3, 0, 130, 2]
    num, offsets = sum(lens), _offsets(lens)
    inside, made = slice(5, 5 + num), []
    whole = torch.full((2, num + 12), torch.nan, device=DEVICE)
    whole[0, inside], whole[1, inside] = _random(num, torch.float32), _random(num, torch.float32, seed=1)
    reward, value = whole[0, inside], whole[1, inside]
    expected = group_advantage(reward, offsets, scale="batch"), *gae(reward, value, offsets, gamma=0.9, lam=0.9)

    def poisoned(like: Tensor) -> Tensor:
        made.append(torch.full((num + 12,), torch.nan, dtype=like.dtype, device=like.device))
        return made[-1][inside]

    monkeypatch.setattr(torch, "empty_like", poisoned)
    ours = group_advantage(reward, offsets, scale="batch"), *gae(reward, value, offsets, gamma=0.9, lam=0.9)
    assert len(made) == 4
    for result, before in zip(ours, expected, strict=True):
        assert torch.equal(result, before)
    for array in made:
        assert array[inside].isfinite().all()
        assert array[: inside.start].isnan().all() and array[inside.stop :].isnan().all()


class _HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.num += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_for_all_checks() -> None:
    reward, offsets = _random(6, torch.float32), _offsets([3, 0, 3])
    with _HostReads() as groups:
        group_advantage(reward, offsets, scale="batch")
    with _HostReads() as seqs:
        gae(reward, reward, offsets, gamma=1.0, lam=1.0)
    assert (groups.num, seqs.num) == (1, 1)


@pytest.mark.parametrize("offsets", [[0, 9, 6], [-3, 2, 6], [0, 2, 60], [0, 5 - 2**40, 6], [3, 6, 6], [0, 2, 5]])
def test_wild_offsets_reach_no_memory_outside(offsets: list[int]) -> None:
    inside = slice(64, 70)
    whole = torch.full((134,), torch.nan, device=DEVICE)
    whole[inside] = 1.0
    with pytest.raises(ValueError, match="group_offsets must ascend from 0 to 6"):
        group_advantage(whole[inside], torch.tensor(offsets, device=DEVICE))
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 6"):
        gae(whole[inside], whole[inside], torch.tensor(offsets, device=DEVICE), gamma=1.0, lam=1.0)
