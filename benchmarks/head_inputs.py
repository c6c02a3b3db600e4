"""Inputs that the benchmarks of the linear head share."""

from typing import NamedTuple

import torch
from compare import DEVICE
from torch import Tensor

# (N, H, V): SmolLM2-135M's and Qwen2.5-0.5B's heads; on a GPU Qwen2.5-1.5B's and 7B's
CPU_SIZES = ((256, 576, 49_152), (64, 896, 151_936))
GPU_SIZES = ((16_384, 1536, 151_936), (16_384, 3584, 152_064))


class Head(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor

    def double(self) -> "Head":
        return Head(self.hidden_ND.double(), self.weight_VD.double(), self.target_N)


def sizes(quick: bool) -> tuple[tuple[int, int, int], ...]:
    found = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
    return found[:1] if quick else found


def dtypes() -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)


def make_head(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Head:
    torch.manual_seed(0)
    hidden = torch.randn(num, dim, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, dim, device=DEVICE) * dim**-0.5).to(dtype)
    return Head(hidden, weight, torch.randint(vocab, (num,), device=DEVICE))
