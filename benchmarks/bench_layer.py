"""RMS norm after a residual addition, SwiGLU and rotary embedding, forward and backward.

Cost model: bytes. Every operand and every result is read or written once, as a copy of half as many bytes does (the
roofline): norm 3 + 1 forward (x, residual, y; the sum) and 4 backward (sum, dy, dsum, dx), SwiGLU 3 and 5, rotary 2 and
2 of queries and keys. Eager is the arithmetic of transformers' modules.
"""

import peers
import pytest
import torch
from compare import COMPILED, DEVICE, EAGER, Case, Run, check, ours
from torch import Tensor

from isomorph.kernels.rms_norm import add_rms_norm, add_rms_norm_ref
from isomorph.kernels.rotary import rotary, rotary_ref
from isomorph.kernels.swiglu import swiglu, swiglu_ref

EPS = 1e-6


def cases(quick: bool) -> list[Case]:
    if DEVICE.type == "cuda":
        num, dtypes = 8192, (torch.bfloat16,)
        shapes = [(1536, 8960, 12, 2, 128)] if quick else [(1536, 8960, 12, 2, 128), (3584, 18_944, 28, 4, 128)]
    else:
        num, dtypes = 256 if quick else 2048, (torch.float32, torch.bfloat16)
        shapes = [(576, 1536, 9, 3, 64)]
    return [
        case
        for dim, inner, heads, kv_heads, head_dim in shapes
        for dtype in dtypes
        for case in (_norm(num, dim, dtype), _swiglu(num, inner, dtype), _rotary(num, heads, kv_heads, head_dim, dtype))
    ]


def tiny_cases() -> list[Case]:
    """Sizes small enough for Triton's interpreter."""
    return [_norm(5, 24, torch.float32), _swiglu(5, 24, torch.float32), _rotary(5, 4, 2, 8, torch.float32)]


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _run(op, inputs: list[Tensor], grads: list[Tensor], constants: tuple[object, ...]) -> Run:  # type: ignore[no-untyped-def]
    """Outputs and gradients of the inputs."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = op(*leaves, *constants)
        out = out if isinstance(out, tuple) else (out,)
        return (*(y.detach() for y in out), *torch.autograd.grad(out, leaves, grads))

    return run


def _case(name: str, size: str, op, reference, inputs, grads, constants=(), byte=0, liger=None) -> Case:  # type: ignore[no-untyped-def]
    half = torch.empty(max(1, byte // 2), dtype=torch.int8, device=DEVICE)

    def wide(x: object) -> object:
        return x.double() if isinstance(x, Tensor) else x

    providers = {
        **ours(name, _run(op, inputs, grads, constants)),
        EAGER: lambda: _run(reference, inputs, grads, constants),
        COMPILED: lambda: _run(peers.compiled(reference), inputs, grads, constants),
    }
    if liger is not None:
        providers["liger"] = lambda: _run(liger(), inputs, grads, constants)
    exact = _run(reference, [wide(x) for x in inputs], [wide(g) for g in grads], tuple(map(wide, constants)))
    return Case(
        name,
        f"forward and backward, {size}",
        inputs[0].dtype,
        providers,
        exact,
        lambda: half.clone(),
        "copy",
        byte=byte,
    )


def _norm(num: int, dim: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    x, residual, dy, dtotal = (_random(num, dim, dtype=dtype) for _ in range(4))
    weight = 1 + 0.1 * _random(dim, dtype=dtype)

    def liger():  # type: ignore[no-untyped-def]
        peers.require("liger_kernel")
        peers.need_gpu("liger")
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, eps, 0.0, "llama"
        )

    byte = 8 * num * dim * dtype.itemsize
    inputs, grads = [x, residual, weight], [dy, dtotal]
    return _case("rms_norm", f"T={num} D={dim}", add_rms_norm, add_rms_norm_ref, inputs, grads, (EPS,), byte, liger)


def _swiglu(num: int, inner: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    gate, up, dy = (_random(num, inner, dtype=dtype) for _ in range(3))

    def liger():  # type: ignore[no-untyped-def]
        peers.require("liger_kernel")
        peers.need_gpu("liger")
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply

    byte = 8 * num * inner * dtype.itemsize
    return _case("swiglu", f"T={num} I={inner}", swiglu, swiglu_ref, [gate, up], [dy], (), byte, liger)


def _rotary(num: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    q, dq = (_random(num, heads, dim, dtype=dtype) for _ in range(2))
    k, dk = (_random(num, kv_heads, dim, dtype=dtype) for _ in range(2))
    angle = torch.arange(num, device=DEVICE)[:, None] / 10_000 ** (torch.arange(dim // 2, device=DEVICE) * 2 / dim)
    cos, sin = (torch.cat([f(angle), f(angle)], 1).to(dtype) for f in (torch.cos, torch.sin))
    byte = 4 * num * (heads + kv_heads) * dim * dtype.itemsize
    return _case(
        "rotary", f"T={num} H={heads}/{kv_heads} d={dim}", rotary, rotary_ref, [q, k], [dq, dk], (cos, sin), byte
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.op} {case.dtype}")
def test_layer(case: Case) -> None:
    check(case)
