"""Which body ``packed_attention`` runs for which inputs, and why. On a GPU:

    varlen      two calls of flash attention, merged: the fastest where flash attention has kernels for the GPU
    triton      our kernels: any GPU from sm_80 on, float32, trees, the same bits every time and in every batch
    reference   all T x T scores: what neither of them takes

``route`` is a function of facts, the same on every machine; ``choose`` collects the facts and obeys what was asked for.
"""

from typing import NamedTuple

import torch

from isomorph.kernels import backend

MAX_HEAD_DIM = 128  # of our kernels
FLASH_MAX_HEAD_DIM = 256
FLASH_MAJORS = (8, 9, 10)  # sm_8x, sm_90, sm_10x


class Route(NamedTuple):
    body: str
    reason: str


class Facts(NamedTuple):
    """All that the choice depends on."""

    capability: tuple[int, int]  # of the GPU: (9, 0) is sm_90
    dtype: torch.dtype
    head_dim: int
    is_tree: bool
    deterministic: bool  # PyTorch was told to use deterministic algorithms
    no_flash: str = ""  # why flash attention cannot be called on this machine; empty where it can
    no_triton: str = ""  # why our kernels cannot


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, *, is_tree: bool) -> Route:
    """The body for such inputs. Raises ValueError for one that was asked for and cannot take them."""
    if asked := backend.asked("packed_attention", device):
        reason = why_not(asked, dtype, head_dim, is_tree)
        if reason:
            raise ValueError(f"packed_attention={asked} was asked for, but {reason}")
        return Route(asked, "asked for")
    if device.type != "cuda":
        body = backend.choose("packed_attention", device)
        reason = why_not(body, dtype, head_dim, is_tree)
        return Route("reference", reason) if reason else Route(body, f"the first that runs on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    absent = backend.flash_reason(), backend.triton_reason()
    return route(Facts(capability, dtype, head_dim, is_tree, deterministic, *absent))


def route(facts: Facts) -> Route:
    """The rule for a GPU."""
    name = "sm_{}{}".format(*facts.capability)
    if facts.capability < (8, 0):
        return Route("reference", f"flash attention and our kernels need sm_80, and this is {name}")
    no_flash = why_not("varlen", facts.dtype, facts.head_dim, facts.is_tree) or facts.no_flash
    no_triton = why_not("triton", facts.dtype, facts.head_dim, facts.is_tree) or facts.no_triton
    if no_triton:
        return Route("reference", f"{no_triton}; {no_flash}") if no_flash else Route("varlen", no_triton)
    if no_flash:
        return Route("triton", no_flash)
    if facts.deterministic:
        return Route("triton", "deterministic algorithms are asked for, and flash attention adds dQ up in any order")
    if facts.capability[0] not in FLASH_MAJORS:
        return Route("triton", f"flash attention has no kernels made for {name}")
    return Route("varlen", f"flash attention has kernels made for {name}")


def why_not(body: str, dtype: torch.dtype, head_dim: int, is_tree: bool) -> str:
    """Why a body cannot take such inputs on any machine; empty where it can."""
    name = str(dtype).removeprefix("torch.")
    if body == "native" and dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"the C++ body takes float32, float64 and bfloat16, not {name}"
    if body == "triton" and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"our kernels take float32, bfloat16 and float16, not {name}"
    if body == "triton" and head_dim > MAX_HEAD_DIM:
        return f"our kernels take heads of up to {MAX_HEAD_DIM} values, not {head_dim}"
    if body == "varlen" and is_tree:
        return "varlen calls take prompts and responses, not trees"
    if body == "varlen" and dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bfloat16 and float16, not {name}"
    if body == "varlen" and (head_dim % 8 or head_dim > FLASH_MAX_HEAD_DIM):
        return f"flash attention takes heads of a multiple of 8 up to {FLASH_MAX_HEAD_DIM} values, not {head_dim}"
    return ""
