"""One new token per response over the shared prompt's and its own cache, beside the prompt's cache repeated.

Model: bytes. 2 K D (P L + P G L_own) numbers are read; the ceiling is a copy of both caches.
"""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, EAGER, Case, check, ours
from head_inputs import dtypes
from torch import Tensor

from isomorph.kernels.decode_attention import decode_attention, decode_attention_ref

CPU_SIZES = ((4, 8, 9, 3, 64, 128, 64), (4, 8, 9, 3, 64, 512, 256))  # prompts, G, heads, KV heads, D, L, own L
GPU_SIZES = ((8, 8, 12, 2, 128, 2048, 1024),)


def cases(quick: bool) -> list[Case]:
    shapes = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
    return [_case(*shape, dtype) for shape in (shapes[:1] if quick else shapes) for dtype in dtypes()]


def _case(prompts: int, rows: int, heads: int, kv: int, dim: int, long: int, own: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    shapes = ((prompts, rows, heads, dim), (prompts, kv, long, dim), (prompts, rows, kv, own, dim))
    q, k_prompt, v_prompt, k_own, v_own = (torch.randn(shapes[i], device=DEVICE).to(dtype) for i in (0, 1, 1, 2, 2))
    prompt_len = torch.full((prompts,), long, device=DEVICE)
    own_len = torch.full((prompts, rows), own, device=DEVICE)

    def run(wide: bool = False) -> tuple[Tensor, ...]:
        q_, kp, vp, ko, vo = (x.double() if wide else x for x in (q, k_prompt, v_prompt, k_own, v_own))
        attend = decode_attention_ref if wide else decode_attention
        return (attend(q_, kp, vp, prompt_len, ko, vo, own_len),)

    def repeated() -> tuple[Tensor, ...]:
        k, v = (
            torch.cat([shared[:, None].expand(-1, rows, -1, -1, -1), mine], 3).flatten(0, 1)
            for shared, mine in ((k_prompt, k_own), (v_prompt, v_own))
        )
        out = F.scaled_dot_product_attention(q.flatten(0, 1)[:, :, None], k, v, enable_gqa=True)
        return (out[:, :, 0].view_as(q),)

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
