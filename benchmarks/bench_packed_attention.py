"""Shared-prefix attention of packed groups, forward and backward, beside the prompt repeated for every response.

Cost model: 4 H D FLOP for each visible pair forward, 2.5 times that backward. A group of P prompt tokens and G
responses of R has P(P+1)/2 + G (P R + R(R+1)/2) pairs packed; repeated, G times (P+R)(P+R+1)/2: the ratio stands in the
size. Every provider's rate counts the packed pairs, so that computing the prompt G times does not raise it. The
roofline is as many FLOP in one product of square matrices.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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

SIDE = 8192 if DEVICE.type == "cuda" else 512  # of the square matrix of the ceiling
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    prompts: int
    prompt: int  # tokens of one
    response: int  # tokens of one
    group: int  # responses a prompt
    heads: int
    kv_heads: int
    dim: int

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, packed."""
        own = self.prompt * (self.prompt + 1) // 2
        return self.prompts * (
            own + self.group * (self.prompt * self.response + self.response * (self.response + 1) // 2)
        )

    @property
    def gain(self) -> float:
        """Pairs with the prompt repeated, over the packed ones."""
        length = self.prompt + self.response
        return self.prompts * self.group * length * (length + 1) / 2 / self.pairs

    def __str__(self) -> str:
        groups = "" if self.prompts == 1 else f"{self.prompts} x "
        sizes = f"P={self.prompt} R={self.response} G={self.group} H={self.heads}/{self.kv_heads} D={self.dim}"
        return f"{groups}{sizes}, FLOP / {self.gain:.2f}"


# a group; on a CPU also many of one response, where nothing is shared
CPU_SIZES = (Shape(1, 128, 64, 4, 6, 2, 64), Shape(1, 256, 64, 8, 9, 3, 64), Shape(64, 53, 52, 1, 9, 3, 64))
GPU_SIZES = (
    Shape(1, 2048, 1024, 8, 12, 2, 128),
    Shape(1, 2048, 1024, 16, 12, 2, 128),
    Shape(1, 512, 4096, 8, 28, 4, 128),
)


def cases(quick: bool) -> list[Case]:
    shapes = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
    return [_case(shape, dtype) for shape in (shapes[:1] if quick else shapes) for dtype in dtypes()]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_case(Shape(1, 4, 3, 2, 2, 1, 16), torch.float32)]


def _case(shape: Shape, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    operands = Operands(shape, dtype)
    repeated = Repeated(shape)
    flop = round(3.5 * 4 * shape.heads * shape.dim * shape.pairs)
    sides = (math.ceil(flop / (2 * SIDE**2)), SIDE)
    left, right = (torch.randn(n, SIDE, device=DEVICE).to(dtype) for n in sides)
    providers = {
        **{name: operands.run(make) for name, make in _ours(shape, dtype, operands.layout).items()},
        EAGER: operands.run(lambda: repeated.eager),
        "torch varlen, repeated": operands.run(repeated.torch_varlen),
        "flash-attn, repeated": operands.run(repeated.flash_attn),
        f"flex attention, {COMPILED}": operands.run(lambda: _flex(operands.layout)),
    }
    exact = operands.exact if DEVICE.type == "cpu" else lambda: operands.exact_by_response(repeated.rows_BL)
    ceiling = "as many FLOP in one GEMM"
    return Case("packed_attention", str(shape), dtype, providers, exact, lambda: left @ right, ceiling, flop=flop)


def _ours(shape: Shape, dtype: torch.dtype, layout: PackedLayout) -> dict[str, Callable[[], Attend]]:
    """The body that is chosen here, and the others that could be asked for."""

    def asked(body: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with backend.using(f"packed_attention={body}"):
                return packed_attention(q, k, v, layout)

        return attend

    found: dict[str, Callable[[], Attend]] = {OURS: lambda: lambda q, k, v: packed_attention(q, k, v, layout)}
    chosen = attention_route.choose(DEVICE, dtype, shape.dim, is_tree=False).body
    for body in backend.bodies("packed_attention", DEVICE.type):
        if body not in (chosen, "reference") and not attention_route.why_not(body, dtype, shape.dim, is_tree=False):
            found[f"{OURS} ({body})"] = lambda body=body: asked(body)  # type: ignore[misc]
    return found


class Operands:
    """Random q, k, v and gradient, and what is computed of them: the output and three gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.layout = PackedLayout.from_groups(
            [shape.prompt] * shape.prompts, [[shape.response] * shape.group] * shape.prompts
        )
        num, dim = self.layout.num_tok, shape.dim
        num_heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.inputs = [torch.randn(num, n, dim, device=DEVICE).to(dtype) for n in num_heads]
        self.upstream = torch.randn(num, shape.heads, dim, device=DEVICE).to(dtype)

    def run(self, make: Callable[[], Attend]) -> Callable[[], Run]:
        def made() -> Run:
            attend = make()
            return lambda: self.gradients(attend, self.inputs)

        return made

    def gradients(self, attend: Attend, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, self.upstream.to(out.dtype)))

    def exact(self) -> tuple[Tensor, ...]:
        return self.gradients(lambda *x: packed_attention_ref(*x, self.layout), [x.double() for x in self.inputs])

    def exact_by_response(self, rows_BL: Tensor) -> tuple[Tensor, ...]:
        """The same function where all T x T scores would not fit: one response with its prompt at a time; the prompt's
        own rows count with the first."""
        wide = [x.double() for x in self.inputs]
        sums = [torch.zeros_like(self.upstream, dtype=torch.float64), *map(torch.zeros_like, wide)]
        for i, rows in enumerate(rows_BL):
            own = rows[self.shape.prompt :] if i % self.shape.group else rows
            leaves = [x[rows].requires_grad_() for x in wide]
            q, k, v = (x.transpose(0, 1)[None] for x in leaves)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            out = out[-len(own) :]
            grads = torch.autograd.grad(out, leaves, self.upstream[own].double())
            sums[0][own] = out.detach()
            for total, grad in zip(sums[1:], grads, strict=True):
                total.index_add_(0, rows, grad)
        return tuple(sums)


class Repeated:
    """What trainers without shared prompts do: the prompt before each response, B = prompts x group sequences of L."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.length = shape, shape.prompt + shape.response
        size = shape.prompt + shape.group * shape.response
        starts = [
            (p * size, p * size + shape.prompt + g * shape.response)
            for p in range(shape.prompts)
            for g in range(shape.group)
        ]
        rows = [torch.cat([a + torch.arange(shape.prompt), b + torch.arange(shape.response)]) for a, b in starts]
        self.rows_BL = torch.stack(rows).to(DEVICE)

    def eager(self, *qkv: Tensor) -> Tensor:
        q, k, v = (x[self.rows_BL].transpose(1, 2) for x in qkv)
        return self._packed(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2))

    def torch_varlen(self) -> Attend:
        need_gpu("flash attention in PyTorch")
        from torch.nn.attention.varlen import varlen_attn

        return self._varlen(causal_varlen(varlen_attn, self.shape.heads // self.shape.kv_heads))

    def flash_attn(self) -> Attend:
        need_gpu("flash-attn")
        from flash_attn import flash_attn_varlen_func

        return self._varlen(lambda *args: flash_attn_varlen_func(*args, causal=True))

    def _varlen(self, varlen: Callable[..., Tensor]) -> Attend:
        num, length = self.rows_BL.shape
        cu_seqlens = torch.arange(0, (num + 1) * length, length, dtype=torch.int32, device=DEVICE)

        def attend(*qkv: Tensor) -> Tensor:
            q, k, v = (x[self.rows_BL].flatten(0, 1) for x in qkv)
            out = varlen(q, k, v, cu_seqlens, cu_seqlens, length, length)
            return self._packed(out.unflatten(0, (num, length)))

        return attend

    def _packed(self, out_BLHD: Tensor) -> Tensor:
        """[T, H, D]: of each group the prompt of its first sequence, then all responses."""
        out_PGLHD = out_BLHD.unflatten(0, (self.shape.prompts, self.shape.group))
        prompts, responses = out_PGLHD[:, 0, : self.shape.prompt], out_PGLHD[:, :, self.shape.prompt :].flatten(1, 2)
        return torch.cat([prompts, responses], 1).flatten(0, 1)


def causal_varlen(varlen_attn: Callable[..., Tensor], repeats: int) -> Callable[..., Tensor]:
    """Causal, for queries of ``repeats`` heads a KV head, in the words of the PyTorch that is installed.

    torch 2.10 says is_causal, later ones a window; until 2.12 it takes as many KV heads as query heads, so that they
    are copied for it.
    """
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    takes_groups = "enable_gqa" in known
    if takes_groups:
        options["enable_gqa"] = repeats > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, *sizes: Any) -> Tensor:
        if not takes_groups and repeats > 1:
            k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        return varlen_attn(q, k, v, *sizes, **options)

    return attend


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
