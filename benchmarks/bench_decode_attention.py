"""One new token per response over the shared prompt's and its own cache, beside the prompt's cache repeated.

Cost model: bytes. 2 K D (P L + P G L_own) numbers are read; the roofline is a copy of both caches.
"""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, EAGER, Case, check, ours
from head_inputs import dtypes
from torch import Tensor

from isomorph.kernels.decode_attention import CachedKV, decode_attention, decode_attention_ref

CPU_SIZES = ((4, 8, 9, 3, 64, 128, 64), (4, 8, 9, 3, 64, 512, 256))  # prompts, G, heads, KV heads, D, L, own L
GPU_SIZES = ((8, 8, 12, 2, 128, 2048, 1024),)


def cases(quick: bool) -> list[Case]:
    shapes = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
    return [_case(*shape, dtype) for shape in (shapes[:1] if quick else shapes) for dtype in dtypes()]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_case(1, 2, 2, 1, 16, 8, 4, torch.float32)]


def _case(prompts: int, rows: int, heads: int, kv: int, dim: int, long: int, own: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    num_rows = prompts * rows
    shapes = ((num_rows, heads, dim), (prompts, kv, long, dim), (num_rows, kv, own, dim))
    q, k_prompt, v_prompt, k_own, v_own = (torch.randn(shapes[i], device=DEVICE).to(dtype) for i in (0, 1, 1, 2, 2))
    row_B = torch.arange(num_rows, device=DEVICE)
    slots_and_lens = ((row_B // rows, torch.full_like(row_B, long)), (row_B, torch.full_like(row_B, own)))

    def run(wide: bool = False) -> tuple[Tensor, ...]:
        q_, *kv_ = (x.double() if wide else x for x in (q, k_prompt, v_prompt, k_own, v_own))
        caches_ = (CachedKV(*kv_[2 * i : 2 * i + 2], *slots_and_lens[i]) for i in (0, 1))
        return ((decode_attention_ref if wide else decode_attention)(q_, *caches_),)

    def repeated() -> tuple[Tensor, ...]:
        k, v = (
            torch.cat([shared.repeat_interleave(rows, 0), mine], 2)
            for shared, mine in ((k_prompt, k_own), (v_prompt, v_own))
        )
        return (F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0],)

    providers = {**ours("decode_attention", run), EAGER: lambda: repeated}
    caches = (k_prompt, v_prompt, k_own, v_own)
    size = f"P={prompts} G={rows} H={heads}/{kv} D={dim} L={long}+{own}"
    return Case(
        "decode_attention", size, dtype, providers, lambda: run(wide=True), lambda: [x.clone() for x in caches], "copy"
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_decode_attention(case: Case) -> None:
    with torch.no_grad():
        check(case)
