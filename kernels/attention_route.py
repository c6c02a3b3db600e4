"""Selects the implementation of ``packed_attention`` for given inputs, with the reason. On a GPU:

    triton      our Triton kernels; any GPU from sm_80 on, float32, trees; bitwise reproducible and batch-invariant
    varlen      FlashAttention varlen, called twice and merged; preferred on sm_8x and sm_10x, where it has kernels
    reference   all T x T scores; whatever the other two do not support

On an H200 our kernels took 0.61 to 0.74 of the time of PyTorch's FlashAttention 2, forward and backward, in three
layouts (benchmarks/results/gpu/2026-11-27-h200-2.jsonl). Its kernels are made for sm_8x; nothing else was measured.

FlashAttention 3, where the process has activated it, is preferred on sm_90 by an estimate until it is measured there:
its paper has 648 and 561 TFLOP/s forward and backward at head dimension 128 where FlashAttention 2 has 370 and 322,
1.75 times. Of the time of FlashAttention 3 ours would then be 0.61 * 1.75 to 0.74 * 1.75, 1.07 to 1.30.

``route`` depends on its argument alone, so it can be tested without a GPU. ``choose`` collects that argument and
follows ``ISOMORPH_BACKEND`` and ``backend.using``.
"""

from typing import NamedTuple

import torch

from isomorph.kernels import backend, flash

MAX_HEAD_DIM = 128  # of our Triton kernels
FLASH_MAX_HEAD_DIM = 256
FLASH_MAJORS = (8, 9, 10)  # sm_8x, sm_90, sm_10x
FLASH_3_MAJORS = (9,)  # FlashAttention 3 has kernels for sm_90 alone
TRITON_MAJORS = (9,)  # where our Triton kernels were measured to be faster


class Route(NamedTuple):
    """The selected implementation, and why it was selected."""

    body: str
    reason: str


class Facts(NamedTuple):
    """Everything that the selection depends on."""

    capability: tuple[int, int]  # of the GPU: (9, 0) is sm_90
    dtype: torch.dtype
    head_dim: int
    is_tree: bool
    deterministic: bool  # torch.use_deterministic_algorithms(True)
    no_flash: str = ""  # why FlashAttention cannot run on this machine; empty if it can
    no_triton: str = ""  # why Triton kernels cannot
    flash_version: int = 2  # of FlashAttention on sm_90


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, *, is_tree: bool) -> Route:
    """The implementation for such inputs. Raises ValueError if the requested one does not support them."""
    if requested := backend.requested("packed_attention", device):
        reason = why_not(requested, dtype, head_dim, is_tree)
        if reason:
            raise ValueError(f"packed_attention={requested} was requested, but {reason}")
        return Route(requested, "requested")
    if device.type != "cuda":
        body = backend.choose("packed_attention", device)
        reason = why_not(body, dtype, head_dim, is_tree)
        return Route("reference", reason) if reason else Route(body, f"the preferred implementation on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    absent = backend.flash_reason(), backend.triton_reason()
    return route(Facts(capability, dtype, head_dim, is_tree, deterministic, *absent, flash.flash_version()))


def route(facts: Facts) -> Route:
    """The selection on a GPU."""
    name = "sm_{}{}".format(*facts.capability)
    if facts.capability < (8, 0):
        return Route("reference", f"FlashAttention and our Triton kernels need sm_80 or newer, and this GPU is {name}")
    no_flash = why_not("varlen", facts.dtype, facts.head_dim, facts.is_tree) or facts.no_flash
    no_triton = why_not("triton", facts.dtype, facts.head_dim, facts.is_tree) or facts.no_triton
    if no_triton:
        return Route("reference", f"{no_triton}; {no_flash}") if no_flash else Route("varlen", no_triton)
    if no_flash:
        return Route("triton", no_flash)
    if facts.deterministic:
        return Route("triton", "deterministic algorithms are on, and FlashAttention accumulates dQ in no fixed order")
    if facts.capability[0] in FLASH_3_MAJORS and facts.flash_version == 3:
        return Route("varlen", f"FlashAttention 3 is active: estimated, not measured, to be faster than ours on {name}")
    if facts.capability[0] in TRITON_MAJORS:
        return Route("triton", f"measured to be faster than FlashAttention 2 on {name}")
    if facts.capability[0] not in FLASH_MAJORS:
        return Route("triton", f"FlashAttention has no kernels for {name}")
    return Route("varlen", f"FlashAttention has kernels for {name}")


def why_not(body: str, dtype: torch.dtype, head_dim: int, is_tree: bool) -> str:
    """Why an implementation does not support such inputs on any machine; empty if it does."""
    name = str(dtype).removeprefix("torch.")
    if body == "native" and dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"the C++ implementation supports float32, float64 and bfloat16, not {name}"
    if body == "triton" and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"our Triton kernels support float32, bfloat16 and float16, not {name}"
    if body == "triton" and head_dim > MAX_HEAD_DIM:
        return f"our Triton kernels support head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    if body == "varlen" and is_tree:
        return "varlen supports prompts and responses, not trees"
    if body == "varlen" and dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention supports bfloat16 and float16, not {name}"
    if body == "varlen" and (head_dim % 8 or head_dim > FLASH_MAX_HEAD_DIM):
        return f"FlashAttention supports head dimensions in multiples of 8 up to {FLASH_MAX_HEAD_DIM}, not {head_dim}"
    return ""
