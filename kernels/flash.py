"""Which flash attention this machine has, for sequences of different lengths: PyTorch's, or the package flash-attn's.

It takes plain tensors and offsets; ``kernels/varlen_attention.py`` makes them from a packed layout.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """The batch of one varlen call."""

    cu_q: Tensor  # [entries + 1] int32
    cu_k: Tensor  # [entries + 1] int32
    max_q: int
    max_k: int
    is_causal: bool


class Flash(NamedTuple):
    """Flash attention for entries of different lengths, with its natural LSE [H, T], contiguous.

    The numbers of a row must be neighbours in all that it reads; outputs lie as their inputs do (``torch.empty_like``).
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Entries, float], tuple[Tensor, Tensor]]
    # dout, q, k, v, out, lse -> dq, dk, dv
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Entries, float], tuple[Tensor, Tensor, Tensor]]


@functools.cache
def flash() -> Flash | None:
    """PyTorch's, else the package flash-attn's; None where neither is there."""
    return torch_flash() or package_flash()


def flash_reason() -> str:
    """Why there is none; empty where there is one."""
    if flash() is not None:
        return ""
    return f"torch {torch.__version__} brings no varlen attention with a scale, and flash-attn >= 2.7 is not installed"


def torch_flash() -> Flash | None:
    try:
        importlib.import_module("torch.nn.attention.varlen")  # registers the ops
    except ImportError:
        return None
    ops = torch.ops.torch_attn
    # torch 2.10 has the op without a scale
    if not any(argument.name == "scale" for argument in ops._varlen_attn.default._schema.arguments):
        return None

    # all arguments up to the scale have been the same since; windows, paging and splits come after it
    def forward(q: Tensor, k: Tensor, v: Tensor, at: Entries, scale: float) -> tuple[Tensor, Tensor]:
        out, lse_HT, _ = ops._varlen_attn(q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, at.is_causal, scale)
        return out, lse_HT

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, at: Entries, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return ops._varlen_attn_backward(
            dout, q, k, v, out, lse_HT, at.cu_q, at.cu_k, at.max_q, at.max_k, at.is_causal, no_dropout, scale
        )

    return Flash("torch", forward, backward)


def package_flash() -> Flash | None:
    """Of flash-attn 2.7 or later; its functions with an underscore, because the public ones hide the backward."""
    try:
        package: Any = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None
    if tuple(map(int, importlib.metadata.version("flash_attn").split(".")[:2])) < (2, 7):
        return None

    def forward(q: Tensor, k: Tensor, v: Tensor, at: Entries, scale: float) -> tuple[Tensor, Tensor]:
        out, lse_HT, *_ = package._flash_attn_varlen_forward(
            q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, dropout_p=0.0, softmax_scale=scale, causal=at.is_causal
        )
        return out, lse_HT

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, at: Entries, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        package._flash_attn_varlen_backward(
            dout, q, k, v, out, lse_HT, dq, dk, dv, at.cu_q, at.cu_k, at.max_q, at.max_k,
            dropout_p=0.0, softmax_scale=scale, causal=at.is_causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv

    return Flash("flash-attn", forward, backward)
