"""FlashAttention for sequences of different lengths (varlen), from PyTorch or else from the package flash-attn.

It takes plain tensors and cumulative lengths; ``kernels/varlen_attention.py`` makes them from a packed layout.
Lengths and offsets are in tokens, the log-sum-exp (LSE) is natural.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class VarlenBatch(NamedTuple):
    """The sequences of one varlen call: queries cu_q[i] : cu_q[i + 1] attend to keys cu_k[i] : cu_k[i + 1].

    The fields are in the order of FlashAttention's arguments.
    """

    cu_q: Tensor  # [sequences + 1] int32, cumulative lengths
    cu_k: Tensor  # [sequences + 1] int32
    max_q: int  # longest sequence of queries
    max_k: int
    is_causal: bool


class Flash(NamedTuple):
    """The two functions of a FlashAttention library.

    q [T, H, D], k and v [T', K, D], bfloat16 or float16, with stride 1 in the last dimension. The output has the
    strides of q (``torch.empty_like``); the LSE is natural, float32 [H, T], contiguous.
    """

    name: str
    # q, k, v, batch, scale -> out, lse
    forward: Callable[[Tensor, Tensor, Tensor, VarlenBatch, float], tuple[Tensor, Tensor]]
    # dout, q, k, v, out, lse, batch, scale -> dq, dk, dv
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, VarlenBatch, float], tuple[Tensor, Tensor, Tensor]
    ]


@functools.cache
def flash() -> Flash | None:
    """FlashAttention of PyTorch, else of the package flash-attn; None if neither is installed."""
    return torch_flash() or package_flash()


def flash_reason() -> str:
    """Why ``flash()`` is None; empty if it is not."""
    if flash() is not None:
        return ""
    return f"torch {torch.__version__} has no varlen attention with a scale, and flash-attn >= 2.7 is not installed"


def flash_version() -> int:
    """Which FlashAttention ``flash()`` runs on sm_90: 3 where the process has activated it in PyTorch, else 2.

    ``torch.nn.attention.activate_flash_attention_impl("FA3")``, with a wheel of flash_attn_3, replaces the kernels of
    PyTorch's ops for the whole process, and so those of ``torch_flash``. We do not activate it: it is the user's.
    """
    found = flash()
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # torch 2.11 and later
    return 3 if found is not None and found.name == "torch" and current is not None and current() == "FA3" else 2


def torch_flash() -> Flash | None:
    """FlashAttention of ``torch.nn.attention.varlen``; None before torch 2.11."""
    try:
        importlib.import_module("torch.nn.attention.varlen")  # registers the ops
    except ImportError:
        return None
    ops = torch.ops.torch_attn
    # torch 2.10 has the op without a scale
    if not any(argument.name == "scale" for argument in ops._varlen_attn.default._schema.arguments):
        return None

    # the arguments up to the scale are the same in all later versions; windows, paging and splits come after it
    def forward(q: Tensor, k: Tensor, v: Tensor, batch: VarlenBatch, scale: float) -> tuple[Tensor, Tensor]:
        out, lse_HT, _ = ops._varlen_attn(q, k, v, *batch, scale)
        return out, lse_HT

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, batch: VarlenBatch, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return ops._varlen_attn_backward(dout, q, k, v, out, lse_HT, *batch, no_dropout, scale)

    return Flash("torch", forward, backward)


def package_flash() -> Flash | None:
    """FlashAttention of flash-attn 2.7 or later; None if that is not installed.

    Calls its functions with an underscore: the public ones do not give access to the backward alone.
    """
    try:
        package: Any = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None
    if tuple(map(int, importlib.metadata.version("flash_attn").split(".")[:2])) < (2, 7):
        return None

    def forward(q: Tensor, k: Tensor, v: Tensor, batch: VarlenBatch, scale: float) -> tuple[Tensor, Tensor]:
        out, lse_HT, *_ = package._flash_attn_varlen_forward(
            q, k, v, *batch[:4], dropout_p=0.0, softmax_scale=scale, causal=batch.is_causal
        )
        return out, lse_HT

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, batch: VarlenBatch, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        package._flash_attn_varlen_backward(
            dout, q, k, v, out, lse_HT, dq, dk, dv, *batch[:4],
            dropout_p=0.0, softmax_scale=scale, causal=batch.is_causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv

    return Flash("flash-attn", forward, backward)
