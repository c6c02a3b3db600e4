"""What a decoder layer computes besides products and attention, in Triton: RMS norm, SwiGLU, rotary embedding.

The specifications are ``kernels/rms_norm.py``, ``swiglu.py`` and ``rotary.py``. Every kernel reads its operands once
and writes its results once. No atomics: the gradient of a norm's weight is summed by a fixed number of programs, each
over its rows in ascending order, and then over the programs.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.strides import check_contiguous, check_unit_stride

TILE = 4096  # elements of a program's tile of a norm
PROGRAMS = 256  # of a norm's gradient; a fixed number, because it changes the bits of the weight's gradient
BLOCK = 1024  # elements of a program of SwiGLU


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [N, D], contiguous, as all others
    residual_ptr,  # [N, D], read if HAS_RESIDUAL
    weight_ptr,  # [D]
    y_ptr,  # [N, D]
    total_ptr,  # [N, D], written if HAS_RESIDUAL
    rstd_ptr,  # [N] f32
    N,
    D,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        total = (tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, total, mask=inside)
        x = total
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    normal = (wide * rstd[:, None]).to(x.dtype)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    y = normal.to(tl.float32) * weight.to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(x.dtype), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def rms_norm_gradient_kernel(
    total_ptr,  # [N, D], what was normalised
    weight_ptr,  # [D]
    rstd_ptr,  # [N] f32
    dy_ptr,  # [N, D]
    dtotal_ptr,  # [N, D], the gradient that reaches the sum by its other uses; read if HAS_DTOTAL
    dx_ptr,  # [N, D]
    dweight_ptr,  # [programs, D] f32
    N,
    D,
    HAS_DTOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < N)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        x = tl.load(total_ptr + at, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        normal = x.to(tl.float32) * rstd[:, None]
        dnormal = dy * weight[None, :]
        mean = tl.sum(dnormal * normal, 1) / D
        dx = rstd[:, None] * (dnormal - normal * mean[:, None])
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(x.dtype), mask=inside)
        dweight += tl.sum(dy * normal.to(x.dtype).to(tl.float32), 0)
    tl.store(dweight_ptr + program * D + column, dweight, mask=column < D)


@triton.jit
def swiglu_kernel(
    gate_ptr,  # [size], as all others
    up_ptr,
    y_ptr,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < size, other=0.0)
    up = tl.load(up_ptr + at, mask=at < size, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(y_ptr + at, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=at < size)


@triton.jit
def swiglu_gradient_kernel(
    gate_ptr,  # [size], as all others
    up_ptr,
    dy_ptr,
    dgate_ptr,
    dup_ptr,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < size, other=0.0)
    up = tl.load(up_ptr + at, mask=at < size, other=0.0)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-wide))
    silu = (wide * sigmoid).to(gate.dtype).to(tl.float32)
    slope = sigmoid * (1.0 + wide * (1.0 - sigmoid))
    tl.store(dgate_ptr + at, (dy * up.to(tl.float32) * slope).to(gate.dtype), mask=at < size)
    tl.store(dup_ptr + at, (dy * silu).to(gate.dtype), mask=at < size)


@triton.jit
def rotated_heads(
    x_ptr,  # [N, heads, d], last dimension contiguous
    out_ptr,  # [N, heads, d], contiguous
    token, stride_n, stride_h,
    first_cos, second_cos, first_sin, second_sin,  # [BLOCK_D] f32, of the two halves
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
    at = x_ptr + token * stride_n + head[:, None] * stride_h + column[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = first.dtype
    first = first.to(tl.float32)
    if TRANSPOSED:
        one = first * first_cos[None, :] + second * second_sin[None, :]
        other = second * second_cos[None, :] - first * first_sin[None, :]
    else:
        one = first * first_cos[None, :] - second * first_sin[None, :]
        other = second * second_cos[None, :] + first * second_sin[None, :]
    out = out_ptr + (token * HEADS + head[:, None]) * (2 * HALF) + column[None, :]
    tl.store(out, one.to(dtype), mask=inside)
    tl.store(out + HALF, other.to(dtype), mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr,
    cos_ptr,  # [N, d], contiguous; as sin, of the dtype of q or float32
    sin_ptr,
    q_out_ptr, k_out_ptr,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the transposed rotation: the gradient
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    at = token * (2 * HALF) + column
    first_cos = tl.load(cos_ptr + at, mask=column < HALF, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_ptr + at + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_ptr + at, mask=column < HALF, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_ptr + at + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    rotated_heads(
        q_ptr, q_out_ptr, token, q_stride_n, q_stride_h, first_cos, second_cos, first_sin, second_sin,
        Q_HEADS, HALF, BLOCK_Q, BLOCK_D, TRANSPOSED,
    )  # fmt: skip
    rotated_heads(
        k_ptr, k_out_ptr, token, k_stride_n, k_stride_h, first_cos, second_cos, first_sin, second_sin,
        K_HEADS, HALF, BLOCK_K, BLOCK_D, TRANSPOSED,
    )  # fmt: skip


# -- launches
@on_its_device
def rms_norm(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [N, D]; residual + x [N, D], None without a residual; 1 / root mean square [N] float32."""
    check_contiguous(x=x_ND, residual=residual_ND, weight=weight_D)
    num, dim = x_ND.shape
    y_ND = torch.empty_like(x_ND)
    total_ND = None if residual_ND is None else torch.empty_like(x_ND)
    rstd_N = x_ND.new_empty(num, dtype=torch.float32)
    if num:
        blocks, warps = _norm_blocks(dim)
        rms_norm_kernel[(triton.cdiv(num, blocks["ROWS"]),)](
            x_ND, residual_ND, weight_D, y_ND, total_ND, rstd_N, num, dim, eps,
            HAS_RESIDUAL=residual_ND is not None, **blocks, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y_ND, total_ND, rstd_N


@on_its_device
def rms_norm_gradient(
    total_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, dy_ND: Tensor, dtotal_ND: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised [N, D], ``dtotal`` included, and of the weight [D], in their dtypes."""
    check_contiguous(total=total_ND, weight=weight_D, rstd=rstd_N, dy=dy_ND, dtotal=dtotal_ND)
    num, dim = total_ND.shape
    dx_ND = torch.empty_like(total_ND)
    blocks, warps = _norm_blocks(dim)
    programs = min(PROGRAMS, triton.cdiv(num, blocks["ROWS"]))
    dweight = total_ND.new_empty((programs, dim), dtype=torch.float32)
    if num:
        rms_norm_gradient_kernel[(programs,)](
            total_ND, weight_D, rstd_N, dy_ND, dtotal_ND, dx_ND, dweight, num, dim,
            HAS_DTOTAL=dtotal_ND is not None, **blocks, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx_ND, dweight.sum(0).to(weight_D.dtype)


@on_its_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of contiguous tensors of one shape."""
    check_contiguous(gate=gate, up=up)
    y = torch.empty_like(gate)
    if gate.numel():
        swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, y, gate.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return y


@on_its_device
def swiglu_gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, of contiguous tensors of one shape."""
    check_contiguous(gate=gate, up=up, dy=dy)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        swiglu_gradient_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, dy, dgate, dup, gate.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return dgate, dup


@on_its_device
def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys, contiguous; ``transposed``: rotated back, which is the gradient."""
    check_unit_stride(q=q_NHd, k=k_NKd)
    check_contiguous(cos=cos_Nd, sin=sin_Nd)
    num, q_heads, dim = q_NHd.shape
    k_heads = k_NKd.shape[1]
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NHd, k_NKd))
    if num:
        rotary_kernel[(num,)](
            q_NHd, k_NKd, cos_Nd, sin_Nd, q_out, k_out,
            q_NHd.stride(0), q_NHd.stride(1), k_NKd.stride(0), k_NKd.stride(1),
            TRANSPOSED=transposed, **_rotary_blocks(q_heads, k_heads, dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return q_out, k_out


def _norm_blocks(dim: int) -> tuple[dict[str, int], int]:
    """Compile-time constants of a norm's kernels, and warps."""
    block = triton.next_power_of_2(dim)
    return {"ROWS": max(1, TILE // block), "BLOCK_D": block}, 8 if block <= 2 * TILE else 16


def _rotary_blocks(q_heads: int, k_heads: int, dim: int) -> dict[str, int]:
    power = triton.next_power_of_2
    return {
        "Q_HEADS": q_heads, "K_HEADS": k_heads, "HALF": dim // 2,
        "BLOCK_Q": power(q_heads), "BLOCK_K": power(k_heads), "BLOCK_D": power(dim // 2),
    }  # fmt: skip


# -- variants for kernels/aot.py
DTYPES = ("bf16", "fp16", "fp32")
WIDTHS = (64, 128, 576, 1536, 3584, 8192)  # of heads (Qwen3) and of models; the first and the last for other dtypes
HEADS = ((9, 3, 64), (12, 2, 128), (28, 4, 128), (32, 8, 128))  # queries, keys, head dimension; likewise


def variants(arch: int) -> list[Variant]:
    """The widths and heads of the supported model families, the same for all architectures."""
    return [*_norm_variants(), *_swiglu_variants(), *_rotary_variants()]


def _norm_variants() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        for dim in WIDTHS if dtype == "bf16" else WIDTHS[:: len(WIDTHS) - 1]:
            names = ("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "total_ptr")
            forward = {**{name: f"*{dtype}" for name in names}, "rstd_ptr": "*fp32"}
            names = ("total_ptr", "weight_ptr", "dy_ptr", "dtotal_ptr", "dx_ptr")
            backward = {**{name: f"*{dtype}" for name in names}, "rstd_ptr": "*fp32", "dweight_ptr": "*fp32"}
            sizes: dict[str, str] = {"N": "i32", "D": "i32"}
            blocks, warps = _norm_blocks(dim)
            for has in (False, True):
                label = f"{dtype}, D {dim}{', residual' if has else ''}"
                options: dict[str, Any] = {"num_warps": warps, "unaligned": ("N",)}
                first = {**forward, **sizes, "eps": "fp32"}
                found.append(Variant(rms_norm_kernel, label, first, {"HAS_RESIDUAL": has, **blocks}, **options))
                found.append(
                    Variant(
                        rms_norm_gradient_kernel, label, {**backward, **sizes}, {"HAS_DTOTAL": has, **blocks}, **options
                    )
                )
    return found


def _swiglu_variants() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        for kernel, names in (
            (swiglu_kernel, ("gate_ptr", "up_ptr", "y_ptr")),
            (swiglu_gradient_kernel, ("gate_ptr", "up_ptr", "dy_ptr", "dgate_ptr", "dup_ptr")),
        ):
            signature = {**{name: f"*{dtype}" for name in names}, "size": "i32"}
            found.append(Variant(kernel, dtype, signature, {"BLOCK": BLOCK}, num_warps=4))
    return found


def _rotary_variants() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        for q_heads, k_heads, dim in HEADS if dtype == "bf16" else HEADS[:: len(HEADS) - 1]:
            pointers = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
            strides = ("q_stride_n", "q_stride_h", "k_stride_n", "k_stride_h")
            for transposed, angle in itertools.product((False, True), dict.fromkeys((dtype, "fp32"))):
                signature = {name: f"*{dtype}" for name in pointers} | {name: "i32" for name in strides}
                signature |= {name: f"*{angle}" for name in ("cos_ptr", "sin_ptr")}  # in the order above
                label = f"{dtype}, angles {angle}, {q_heads}/{k_heads} heads of {dim}"
                label += ", transposed" if transposed else ""
                constants = {"TRANSPOSED": transposed, **_rotary_blocks(q_heads, k_heads, dim)}
                found.append(Variant(rotary_kernel, label, signature, constants, num_warps=4))
    return found
