"""Types and constants that an op and its GPU implementation both import."""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-4  # group_advantage adds it to a standard deviation, as other GRPO implementations do


class CachedKV(NamedTuple):
    """A KV cache of S slots with L entries each, and the entries that each of B rows attends to.

    Row b attends to the first ``len_B[b]`` entries of slot ``slot_B[b]``. K key/value heads of width D.
    """

    k_SKLD: Tensor  # the dtype of the queries
    v_SKLD: Tensor
    slot_B: Tensor  # int64, 0..S-1
    len_B: Tensor  # int64, 0..L, in tokens


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which log-probabilities and other sums over a row of ``dtype`` are computed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32
