"""Shared-prefix attention of packed groups, forward and backward, beside the prompt repeated for every response.

Model: 4 H D FLOP for each visible pair forward, 2.5 times that backward. A group of P prompt tokens and G responses of
R has P(P+1)/2 + G (P R + R(R+1)/2) pairs packed; repeated, G times (P+R)(P+R+1)/2: the ratio stands in the size.
Everybody's rate counts the packed pairs, so that whoever computes the prompt G times is not paid for it. The ceiling is
as many FLOP in one product of square matrices.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import COMPILED, DEVICE, EAGER, OURS, Case, Run, check
from head_inputs import dtypes
from peers import need_gpu
from torch import Tensor

from isomorph.kernels import attention_route, backend
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

CPU_SIZES = ((128, 64, 4, 6, 2, 64), (256, 64, 8, 9, 3, 64))  # P, R, G, heads, KV heads, D
GPU_SIZES = ((2048, 1024, 8, 12, 2, 128), (2048, 1024, 16, 12, 2, 128), (512, 4096, 8, 28, 4, 128))
SIDE = 8192 if DEVICE.type == "cuda" else 512  # of the square matrix of the ceiling
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(quick: bool) -> list[Case]:
    shapes = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
    return [_case(*shape, dtype) for shape in (shapes[:1] if quick else shapes) for dtype in dtypes()]


def _case(prompt: int, response: int, group: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    layout = PackedLayout.from_groups([prompt], [[response] * group])
    num = layout.num_tok
    inputs = [torch.randn(num, n, dim, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(num, heads, dim, device=DEVICE).to(dtype)

    def gradients(attend: Attend, inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))

    def run(make: Callable[[], Attend]) -> Callable[[], Run]:
        def made() -> Run:
            attend = make()
            return lambda: gradients(attend)

        return made

    def ours(body: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with backend.using(f"packed_attention={body}"):
                return packed_attention(q, k, v, layout)

        return attend

    rows_GL = torch.stack(
        [torch.cat([torch.arange(prompt), prompt + g * response + torch.arange(response)]) for g in range(group)]
    ).to(DEVICE)

    def pack(out_GLHD: Tensor) -> Tensor:
        return torch.cat([out_GLHD[0, :prompt], out_GLHD[:, prompt:].reshape(-1, heads, dim)])

    def repeated(*qkv: Tensor) -> Tensor:
        q, k, v = (x[rows_GL].transpose(1, 2) for x in qkv)
        return pack(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2))

    def repeated_varlen(varlen: Callable[..., Tensor]) -> Attend:
        length = prompt + response
        cu_seqlens = torch.arange(0, (group + 1) * length, length, dtype=torch.int32, device=DEVICE)

        def attend(*qkv: Tensor) -> Tensor:
            q, k, v = (x[rows_GL].flatten(0, 1) for x in qkv)
            return pack(varlen(q, k, v, cu_seqlens, cu_seqlens, length, length).unflatten(0, (group, length)))

        return attend

    def torch_varlen() -> Attend:
        need_gpu("flash attention in PyTorch")
        from torch.nn.attention.varlen import varlen_attn

        return repeated_varlen(lambda *args: varlen_attn(*args, window_size=(-1, 0), enable_gqa=heads != kv_heads))

    def flash_attn() -> Attend:
        need_gpu("flash-attn")
        from flash_attn import flash_attn_varlen_func

        return repeated_varlen(lambda *args: flash_attn_varlen_func(*args, causal=True))

    providers = {OURS: run(lambda: lambda q, k, v: packed_attention(q, k, v, layout))}
    chosen = attention_route.choose(DEVICE, dtype, dim, is_tree=False).body
    for body in backend.bodies("packed_attention", DEVICE.type):
        if body not in (chosen, "reference") and not attention_route.why_not(body, dtype, dim, is_tree=False):
            providers[f"{OURS} ({body})"] = run(lambda body=body: ours(body))  # type: ignore[misc]
    providers |= {
        EAGER: run(lambda: repeated),
        "torch varlen, repeated": run(torch_varlen),
        "flash-attn, repeated": run(flash_attn),
        f"flex attention, {COMPILED}": run(lambda: _flex(layout)),
    }
    pairs = prompt * (prompt + 1) // 2 + group * (prompt * response + response * (response + 1) // 2)
    gain = group * (prompt + response) * (prompt + response + 1) / 2 / pairs
    flop = round(3.5 * 4 * heads * dim * pairs)
    left, right = (torch.randn(n, SIDE, device=DEVICE).to(dtype) for n in (math.ceil(flop / (2 * SIDE**2)), SIDE))

    def exact() -> tuple[Tensor, ...]:
        wide = [x.double() for x in inputs]
        if DEVICE.type == "cuda":  # all T x T scores would not fit
            return by_response(wide)
        return gradients(lambda *x: packed_attention_ref(*x, layout), wide)

    def by_response(wide: list[Tensor]) -> tuple[Tensor, ...]:
        """The same function, one response with its prompt at a time; the prompt's own rows count with the first."""
        sums = [torch.zeros(num, heads, dim, device=DEVICE, dtype=torch.float64), *map(torch.zeros_like, wide)]
        for g, rows in enumerate(rows_GL):
            own = rows if g == 0 else rows[prompt:]
            leaves = [x[rows].requires_grad_() for x in wide]
            q, k, v = (x.transpose(0, 1)[None] for x in leaves)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)[
                -len(own) :
            ]
            grads = torch.autograd.grad(out, leaves, upstream[own].double())
            sums[0][own] = out.detach()
            for total, grad in zip(sums[1:], grads, strict=True):
                total.index_add_(0, rows, grad)
        return tuple(sums)

    size = f"P={prompt} R={response} G={group} H={heads}/{kv_heads} D={dim}, FLOP / {gain:.2f}"
    return Case(
        "packed_attention", size, dtype, providers, exact, lambda: left @ right, "as many FLOP in one GEMM", flop=flop
    )


def _flex(layout: PackedLayout) -> Attend:
    """FlexAttention with our mask: the same pairs, in blocks of 128 x 128."""
    need_gpu("FlexAttention's backward")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lens = layout.cu_seqlens.diff().long()
    vis_end_T = torch.repeat_interleave(layout.vis_end, lens).to(DEVICE)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < vis_end_T[k])

    mask = create_block_mask(visible, None, None, layout.num_tok, layout.num_tok, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_packed_attention(case: Case) -> None:
    check(case)
