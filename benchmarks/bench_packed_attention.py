"""Shared-prefix attention of packed groups, forward and backward, beside the prompt repeated for every response.

Model: per head 4 D FLOP for each visible pair forward, 2.5 times that backward. A group of P prompt tokens and G
responses of R has P(P+1)/2 + G (P R + R(R+1)/2) pairs packed; repeated, G times (P+R)(P+R+1)/2.
"""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, EAGER, Case, check, ours
from head_inputs import dtypes
from torch import Tensor

from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

CPU_SIZES = ((128, 64, 4, 6, 2, 64), (256, 64, 8, 9, 3, 64))  # P, R, G, heads, KV heads, D
GPU_SIZES = ((2048, 1024, 8, 12, 2, 128), (2048, 1024, 16, 12, 2, 128), (512, 4096, 8, 28, 4, 128))


def cases(quick: bool) -> list[Case]:
    shapes = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
    return [_case(*shape, dtype) for shape in (shapes[:1] if quick else shapes) for dtype in dtypes()]


def _case(prompt: int, response: int, group: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    layout = PackedLayout.from_groups([prompt], [[response] * group])
    num = layout.num_tok
    inputs = [torch.randn(num, n, dim, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(num, heads, dim, device=DEVICE).to(dtype)

    def gradients(attend, inputs: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))

    rows_GL = torch.stack(
        [torch.cat([torch.arange(prompt), prompt + g * response + torch.arange(response)]) for g in range(group)]
    ).to(DEVICE)

    def repeated(*qkv: Tensor) -> Tensor:
        q, k, v = (x[rows_GL].transpose(1, 2) for x in qkv)
        out_GLHD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return torch.cat([out_GLHD[0, :prompt], out_GLHD[:, prompt:].reshape(-1, heads, dim)])

    providers = {
        **ours("packed_attention", lambda: gradients(lambda *x: packed_attention(*x, layout), inputs)),
        EAGER: lambda: lambda: gradients(repeated, inputs),
    }
    size = f"P={prompt} R={response} G={group} H={heads}/{kv_heads} D={dim}"
    exact_inputs = inputs

    def exact() -> tuple[Tensor, ...]:
        wide = [x.double() for x in exact_inputs]
        if DEVICE.type == "cuda":  # all T x T scores would not fit: the repeated prompts are the same function
            return gradients(repeated, wide)
        return gradients(lambda *x: packed_attention_ref(*x, layout), wide)

    return Case("packed_attention", size, dtype, providers, exact)


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_packed_attention(case: Case) -> None:
    check(case)
