"""Gathering rows of a ragged array in a new order, on the CPU.

Cost model: bytes. Every number is read and written once; the roofline is a copy of the array.
"""

import pytest
import torch
from compare import DEVICE, EAGER, Case, check, ours
from torch import Tensor

from isomorph.kernels.packing import take_ragged, take_ragged_ref


def cases(quick: bool) -> list[Case]:
    return [_case(512 if quick else 4096)] if DEVICE.type == "cpu" else []


def _case(rows: int) -> Case:
    torch.manual_seed(0)
    lens = torch.randint(1, 512, (rows,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
    value, order = torch.randn(int(lens.sum())), torch.randperm(rows)

    def eager() -> tuple[Tensor, ...]:
        parts = value.split(lens.tolist())
        return (torch.cat([parts[row] for row in order.tolist()]),)

    providers = {**ours("take_ragged", lambda: take_ragged(value, offsets, order)), EAGER: lambda: eager}
    return Case(
        "take_ragged",
        f"{rows} rows of 1 to 511",
        torch.float32,
        providers,
        lambda: take_ragged_ref(value, offsets, order),
        lambda: value.clone(),
        "copy",
        byte=2 * 4 * len(value),
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.op)
def test_take_ragged(case: Case) -> None:
    check(case)
