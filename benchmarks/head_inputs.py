"""Inputs and peers that the benchmarks of the linear head share."""

import importlib.util
from typing import NamedTuple

import torch
from compare import DEVICE, Absent
from torch import Tensor

# (N, H, V): SmolLM2-135M's and Qwen2.5-1.5B's heads; on a GPU also 7B's
CPU_SIZES = ((64, 576, 49_152), (256, 576, 49_152), (64, 1536, 151_936))
GPU_SIZES = ((4096, 1536, 151_936), (16_384, 1536, 151_936), (16_384, 3584, 152_064))


class Head(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor

    def double(self) -> "Head":
        return Head(self.hidden_ND.double(), self.weight_VD.double(), self.target_N)


def sizes(quick: bool) -> tuple[tuple[int, int, int], ...]:
    if DEVICE.type == "cuda":
        return GPU_SIZES[:1] if quick else GPU_SIZES
    return CPU_SIZES[:1] if quick else CPU_SIZES


def dtypes() -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)


def make_head(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Head:
    torch.manual_seed(0)
    hidden = torch.randn(num, dim, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, dim, device=DEVICE) * dim**-0.5).to(dtype)
    return Head(hidden, weight, torch.randint(vocab, (num,), device=DEVICE))


def require(module: str, why_not: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed{'; ' + why_not if why_not else ''}")


def need_gpu(name: str) -> None:
    if DEVICE.type != "cuda":
        raise Absent(f"{name}'s Triton kernels need a GPU")
