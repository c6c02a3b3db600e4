"""What an op shares with its GPU implementation: below both, so that neither imports the other for it."""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-4  # added to a group's standard deviation, as GRPO implementations do


class CachedKV(NamedTuple):
    """Keys and values of S slots with room for L entries each, and how much of which slot each of B rows sees."""

    k_SKLD: Tensor
    v_SKLD: Tensor
    slot_B: Tensor  # int64, 0..S-1
    len_B: Tensor  # int64, 0..L


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
