"""Advantages of groups, and generalised advantage estimates.

Cost model: bytes, 2 (groups) or 4 (GAE) numbers per row; too small for a roofline to be meaningful. Other trainers
compute this inside their trainer classes, padded: "eager" is that arithmetic, for groups and sequences of equal length.
A loop over tokens is not measured with torch.compile, which would unroll it.
"""

import peers
import pytest
import torch
from compare import COMPILED, DEVICE, EAGER, Case, check, ours
from torch import Tensor

from isomorph.kernels.advantage import EPS, gae, gae_ref, group_advantage, group_advantage_ref


def cases(quick: bool) -> list[Case]:
    seqs, length = (256, 1024) if DEVICE.type == "cuda" else (64, 256)
    return [_groups(256, 16), _gae(16, 256)] if quick else [_groups(4096, 16), _gae(seqs, length)]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_groups(4, 3), _gae(3, 5)]


def _groups(groups: int, size: int) -> Case:
    torch.manual_seed(0)
    reward_S = torch.randn(groups * size, device=DEVICE)
    offsets = torch.arange(0, groups * size + 1, size, device=DEVICE)

    def eager() -> tuple[Tensor, ...]:
        reward_PG = reward_S.view(groups, size)
        return (((reward_PG - reward_PG.mean(1, keepdim=True)) / (reward_PG.std(1, keepdim=True) + EPS)).flatten(),)

    providers = {
        **ours("group_advantage", lambda: (group_advantage(reward_S, offsets),)),
        EAGER: lambda: eager,
        COMPILED: lambda: peers.compiled(eager),
    }
    return Case(
        "group_advantage",
        f"{groups} groups of {size}",
        torch.float32,
        providers,
        lambda: (group_advantage_ref(reward_S.double(), offsets),),
        byte=2 * 4 * groups * size,
    )


def _gae(seqs: int, length: int) -> Case:
    torch.manual_seed(0)
    reward_T, value_T = torch.randn(2, seqs * length, device=DEVICE).unbind()
    cu_seqlens = torch.arange(0, seqs * length + 1, length, device=DEVICE)

    def eager(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        reward, value = (x.to(dtype).view(seqs, length) for x in (reward_T, value_T))
        last, after = torch.zeros(2, seqs, dtype=dtype, device=DEVICE).unbind()
        columns = []
        for t in reversed(range(length)):
            last = reward[:, t] + 0.99 * after - value[:, t] + 0.99 * 0.95 * last
            after = value[:, t]
            columns.append(last)
        advantage_T = torch.stack(columns[::-1], 1).flatten()
        return advantage_T, advantage_T + value.flatten()

    def exact() -> tuple[Tensor, ...]:
        if DEVICE.type == "cuda":  # token by token the specification would ask the GPU a million times
            return eager(torch.float64)
        return gae_ref(reward_T.double(), value_T.double(), cu_seqlens, gamma=0.99, lam=0.95)

    providers = {**ours("gae", lambda: gae(reward_T, value_T, cu_seqlens, gamma=0.99, lam=0.95)), EAGER: lambda: eager}
    return Case("gae", f"{seqs} sequences of {length}", torch.float32, providers, exact, byte=4 * 4 * seqs * length)


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.op)
def test_advantage(case: Case) -> None:
    check(case)
