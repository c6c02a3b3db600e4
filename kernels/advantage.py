"""Advantages of responses and of tokens.

group_advantage   reward - baseline of its group, then scaled            one number per response
gae               delta[t] = reward[t] + gamma value[t+1] - value[t]     one number per token
                  advantage[t] = delta[t] + gamma lam advantage[t+1]

Shapes, dtypes and names are checked on the host. Values and offsets are checked too: on CUDA by the kernels that read
them, which write flags; the host reads these once per call, the only synchronisation with the GPU.
"""

import itertools
from typing import Literal, get_args

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.types import EPS

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "none", "batch"]


# -- reference: the specification
def group_advantage_ref(
    reward_S: Tensor, group_offsets: Tensor, *, baseline: Baseline = "mean", scale: Scale = "std"
) -> Tensor:
    """The specification of ``group_advantage``, one group at a time."""
    _check_groups(reward_S, group_offsets, baseline, scale)
    offsets = _group_bounds(reward_S, group_offsets, baseline, scale)
    groups = [_one_group(reward_S[a:b], baseline, scale) for a, b in itertools.pairwise(offsets)]
    advantage_S = torch.cat(groups) if groups else torch.zeros_like(reward_S)
    if scale != "batch" or len(reward_S) == 0:
        return advantage_S
    if bool((advantage_S == advantage_S[0]).all()):
        return torch.zeros_like(advantage_S)
    return (advantage_S - advantage_S.mean()) / (advantage_S.std() + EPS)


def _one_group(reward_G: Tensor, baseline: Baseline, scale: Scale) -> Tensor:
    is_flat = bool((reward_G == reward_G[0]).all()) if len(reward_G) else True
    if is_flat and (baseline != "none" or scale == "std"):
        return torch.zeros_like(reward_G)  # reward - rounded mean would not be exactly 0, and 1 / EPS amplifies it
    advantage_G = reward_G
    if baseline == "mean":
        advantage_G = reward_G - reward_G.mean()
    if baseline == "leave_one_out":
        advantage_G = (reward_G - reward_G.mean()) * (len(reward_G) / (len(reward_G) - 1))
    if scale == "std":
        advantage_G = advantage_G / (reward_G.std() + EPS)
    return advantage_G


def gae_ref(
    reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The specification of ``gae``, one token at a time."""
    _check_gae(reward_T, value_T, cu_seqlens, gamma, lam)
    offsets = _seq_bounds(reward_T, value_T, cu_seqlens)
    advantage_T = torch.zeros_like(reward_T)
    for start, end in itertools.pairwise(offsets):
        next_advantage = next_value = reward_T.new_zeros(())
        for t in reversed(range(start, end)):
            delta = reward_T[t] + gamma * next_value - value_T[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value_T[t]
            advantage_T[t] = next_advantage
    return advantage_T, advantage_T + value_T


# -- argument checks: shapes, dtypes and names
def _check_array(name: str, value: Tensor) -> None:
    if value.ndim != 1 or value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64 [n], got {value.dtype} {tuple(value.shape)}")


def _check_offsets(name: str, offsets: Tensor, device: torch.device) -> None:
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 [n + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name} must be on the device of the rewards, {device}, got {offsets.device}; move it there")


def _check_groups(reward_S: Tensor, group_offsets: Tensor, baseline: str, scale: str) -> None:
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}, got {baseline!r}")
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    _check_array("reward", reward_S)
    _check_offsets("group_offsets", group_offsets, reward_S.device)


def _check_gae(reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> None:
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {number}")
    _check_array("reward", reward_T)
    _check_array("value", value_T)
    if value_T.shape != reward_T.shape or value_T.dtype != reward_T.dtype or value_T.device != reward_T.device:
        raise ValueError(
            f"value must be like reward, {reward_T.dtype} {tuple(reward_T.shape)} on {reward_T.device}, got "
            f"{value_T.dtype} {tuple(value_T.shape)} on {value_T.device}"
        )
    _check_offsets("cu_seqlens", cu_seqlens, reward_T.device)


# -- argument checks: values
def _finite(name: str, value: Tensor) -> None:
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(f"{name} must be finite, got {float(value[first])} at index {first} ({len(bad)} in all)")


def _ascending(name: str, offsets: Tensor, num: int) -> list[int]:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != num or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name} must ascend from 0 to {num}, the number of rows, got {values}")
    return values


def _group_bounds(reward_S: Tensor, group_offsets: Tensor, baseline: str, scale: str) -> list[int]:
    """The offsets as ints. Raises ValueError for rewards that are not finite and groups that are too small."""
    _finite("reward", reward_S)
    offsets = _ascending("group_offsets", group_offsets, len(reward_S))
    if baseline == "none" and scale != "std":
        return offsets
    for group, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end - start == 1:
            raise ValueError(
                f"group {group} has one response, but baseline {baseline!r} with scale {scale!r} needs two or more: "
                "use samples_per_prompt >= 2, or baseline 'none' without scale 'std'"
            )
    return offsets


def _seq_bounds(reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor) -> list[int]:
    _finite("reward", reward_T)
    _finite("value", value_T)
    return _ascending("cu_seqlens", cu_seqlens, len(reward_T))


def _any(fault: Tensor) -> bool:
    """Whether a kernel found a fault; also True if no kernel was launched, so that the host checks."""
    return len(fault) == 0 or bool(fault.any())


# -- public ops
def group_advantage(
    reward_S: Tensor, group_offsets: Tensor, *, baseline: Baseline = "mean", scale: Scale = "std"
) -> Tensor:
    """Returns [S], the advantage of each response, in the dtype of the rewards.

    reward [S] float32 or float64; group_offsets [P + 1] int32 or int64 on its device, ascending from 0 to S: group g is
    ``group_offsets[g] : group_offsets[g + 1]``. No gradient.
    baseline is subtracted: the "mean" of the group (GRPO), the mean of the others, "leave_one_out" (RLOO), or "none".
    scale: "std" divides by the standard deviation of the group (n - 1) + EPS; "batch" then subtracts the mean of all S
    and divides by their standard deviation + EPS, with equal weight per response (REINFORCE++); "none".
    If all rewards that are compared are equal, the result is exactly 0.
    Raises TypeError or ValueError for shapes, dtypes and offsets that do not fit, a reward that is not finite, and a
    group of one response if baseline or scale compares responses of a group.
    """
    body = backend.choose("group_advantage", reward_S.device)
    if body == "reference" or not backend.has_memory(reward_S, group_offsets):
        return group_advantage_ref(reward_S, group_offsets, baseline=baseline, scale=scale)
    _check_groups(reward_S, group_offsets, baseline, scale)
    if body == "triton":
        from isomorph.kernels.gpu import advantage as gpu

        out_S, fault_P = gpu.group_advantage(_plain(reward_S), _plain(group_offsets.long()), baseline, scale)
        if _any(fault_P):
            _group_bounds(reward_S, group_offsets, baseline, scale)  # raises an error with the details
        return out_S
    _group_bounds(reward_S, group_offsets, baseline, scale)
    out_S = torch.empty(len(reward_S), dtype=reward_S.dtype)
    codes = (get_args(Baseline).index(baseline), get_args(Scale).index(scale))
    backend.native().group_advantage(_plain(reward_S), _plain(group_offsets.long()), *codes, EPS, out_S)
    return out_S


def gae(reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Returns advantages [T] by generalised advantage estimation, and returns [T] = advantage + value.

    reward and value [T] float32 or float64; cu_seqlens [S + 1] int32 or int64, ascending from 0 to T: sequence s is
    ``cu_seqlens[s] : cu_seqlens[s + 1]``; all on one device. The value after the last token of a sequence is 0. No
    gradient. Schulman et al., ICLR 2016.
    Raises TypeError or ValueError for shapes, dtypes and offsets that do not fit, for numbers that are not finite, and
    for gamma or lam outside 0..1.
    """
    body = backend.choose("gae", reward_T.device)
    if body == "reference" or not backend.has_memory(reward_T, value_T, cu_seqlens):
        return gae_ref(reward_T, value_T, cu_seqlens, gamma=gamma, lam=lam)
    _check_gae(reward_T, value_T, cu_seqlens, gamma, lam)
    if body == "triton":
        from isomorph.kernels.gpu import advantage as gpu

        offsets = _plain(cu_seqlens.long())
        advantage_T, returns_T, fault_S = gpu.gae(_plain(reward_T), _plain(value_T), offsets, gamma, lam)
        if _any(fault_S):
            _seq_bounds(reward_T, value_T, cu_seqlens)  # raises an error with the details
        return advantage_T, returns_T
    _seq_bounds(reward_T, value_T, cu_seqlens)
    value_T = _plain(value_T)
    advantage_T = torch.empty_like(value_T)
    backend.native().gae(_plain(reward_T), value_T, _plain(cu_seqlens.long()), gamma, lam, advantage_T)
    return advantage_T, advantage_T + value_T


def _plain(x: Tensor) -> Tensor:
    return x.detach().contiguous()
