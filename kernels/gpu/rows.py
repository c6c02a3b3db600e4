"""Row kernels of the linear head: stats and gradients of rows of logits, and sums of rows that share an index.

One program owns one row and walks it in blocks of a fixed width, so the order of every addition is fixed: the bits of
a row depend neither on its batch nor on the launch. No atomics. The specification is ``kernels/token_logprob.py``.

    stats      reads a row once        4 (float32) or 2 (bfloat16) bytes a logit
    gradient   reads and writes once   in place; a float32 row may become a bfloat16 row in its own first half
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import FLOAT_TYPES, Variant
from isomorph.kernels.strides import check_contiguous, check_unit_stride
from isomorph.kernels.types import stats_dtype

BLOCK_V = 4096  # part of the numerical contract, hence not tuned: 16 values a thread
NUM_WARPS = 8
BLOCK_D = 1024


@triton.jit
def stats_kernel(
    logits_ptr,  # [N, V] f32 | bf16 | f16 | f64, last dimension contiguous
    target_ptr,  # [N] i64
    bias_ptr,  # [V] f32, read if HAS_BIAS
    logprob_ptr,  # [N] f32
    entropy_ptr,  # [N] f32
    lse_ptr,  # [N] f32
    stride_n,
    V,
    inv_temperature,  # as float32, and what that rounding left, for the sake of float64
    inv_temperature_rest,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # the dtype of the arithmetic
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2**31
    row_ptr = logits_ptr + row * stride_n
    scale = tl.full((), inv_temperature, WIDE) + inv_temperature_rest
    # Each lane keeps a softmax of its own columns; lanes meet once, at the end: one reduction a row, not one a block.
    column = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), float("-inf"), WIDE)
    total = tl.zeros((BLOCK_V,), WIDE)
    weighted = tl.zeros((BLOCK_V,), WIDE)  # sum of exp(z - top) (z - top)
    for start in range(0, V, BLOCK_V):
        at = start + column
        z = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(WIDE)
        if HAS_BIAS:
            z += tl.load(bias_ptr + at, mask=at < V, other=0.0)
        z = z * scale
        new_top = tl.where(z > top, z, top)  # a NaN stays in z
        step = tl.where(top == new_top, 0.0, top - new_top)
        shrink = tl.exp(step)
        diff = tl.where(z == float("-inf"), float("-inf"), z - new_top)
        e = tl.exp(diff)
        weighted = shrink * (weighted + tl.where(total > 0, total * step, 0.0)) + tl.where(e == 0, 0.0, e * diff)
        total = shrink * total + e
        top = new_top
    row_top = tl.max(top, 0)
    step = tl.where(top == row_top, 0.0, top - row_top)
    shrink = tl.exp(step)
    weighted = tl.sum(tl.where(total == 0, 0.0, shrink * (weighted + tl.where(shrink == 0, 0.0, total * step))), 0)
    total = tl.sum(shrink * total, 0)
    log_total = tl.log(total)
    target = tl.load(target_ptr + row)
    z_y = tl.load(row_ptr + target).to(WIDE)
    if HAS_BIAS:
        z_y += tl.load(bias_ptr + target)
    z_y = z_y * scale
    tl.store(logprob_ptr + row, (z_y - row_top) - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(lse_ptr + row, tl.where(row_top == float("inf"), row_top, row_top + log_total))  # as torch.logsumexp


@triton.jit
def gradient_kernel(
    logits_ptr,  # [N, V]
    out_ptr,  # [N, V], may be the same storage
    target_ptr,  # [N] i64
    bias_ptr,  # [V] f32, read if HAS_BIAS
    logprob_ptr,  # [N] f32
    entropy_ptr,  # [N] f32
    dlogprob_ptr,  # [N] f32, likewise dentropy and dlse; read if HAS_...
    dentropy_ptr,
    dlse_ptr,
    stride_n,
    out_stride_n,
    V,
    inv_temperature,  # as float32, and what that rounding left, for the sake of float64
    inv_temperature_rest,
    HAS_BIAS: tl.constexpr,
    HAS_DLOGPROB: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    out_row_ptr = out_ptr + row * out_stride_n
    scale = tl.full((), inv_temperature, WIDE) + inv_temperature_rest
    target = tl.load(target_ptr + row)
    z_y = tl.load(row_ptr + target).to(WIDE)  # before its place is written over
    if HAS_BIAS:
        z_y += tl.load(bias_ptr + target)
    z_y = z_y * scale
    logprob = tl.load(logprob_ptr + row)
    on_prob = 0.0
    at_target = 0.0
    if HAS_DLOGPROB:
        at_target = tl.load(dlogprob_ptr + row) * scale
        on_prob -= at_target
    if HAS_DLSE:
        on_prob += tl.load(dlse_ptr + row) * scale
    if HAS_DENTROPY:
        entropy = tl.load(entropy_ptr + row)
        on_surprise = -tl.load(dentropy_ptr + row) * scale
    tl.debug_barrier()  # z_y is in every warp's hands
    column = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        at = start + column
        z = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(WIDE)
        if HAS_BIAS:
            z += tl.load(bias_ptr + at, mask=at < V, other=0.0)
        logp = (z * scale - z_y) + logprob
        p = tl.exp(logp)
        factor = on_prob
        if HAS_DENTROPY:
            factor = on_prob + on_surprise * tl.where(p == 0, 0.0, logp + entropy)
        d = p * factor
        if HAS_DLOGPROB:
            d += tl.where(at == target, at_target, 0.0)
        # A narrower row is written over columns that other warps may still have to read. Its block b ends before column
        # BLOCK_V (b + 1) / 2 of the wide row, and every warp has read that far at the barrier of iteration b.
        tl.debug_barrier()
        tl.store(out_row_ptr + at, d, mask=at < V)


@triton.jit
def add_rows_kernel(
    into_ptr,  # [T, D] f32, contiguous
    rows_ptr,  # [N, D] f32, contiguous
    place_ptr,  # [N] i64: where rows go, ascending
    order_ptr,  # [N] i64: which row goes there; of one place, in ascending order
    N,
    D,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0)
    place = tl.load(place_ptr + i)
    if tl.load(place_ptr + i - 1, mask=i > 0, other=-1) == place:  # the first of a place adds them all
        return
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    at = into_ptr + place * D + column
    total = tl.load(at, mask=inside, other=0.0)
    while tl.load(place_ptr + i, mask=i < N, other=-1) == place:
        total += tl.load(rows_ptr + tl.load(order_ptr + i) * D + column, mask=inside, other=0.0)
        i += 1
    tl.store(at, total, mask=inside)


# -- launches
@on_its_device
def row_stats(
    logits_NV: Tensor, target_N: Tensor, bias_V: Tensor | None, inv_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and LSE of every row, float32 (float64 for float64). Logits: stride 1 along V."""
    check_unit_stride(logits=logits_NV)
    check_contiguous(target=target_N, bias=bias_V)
    num_rows, num_vocab = logits_NV.shape
    dtype = stats_dtype(logits_NV.dtype)
    logprob, entropy, lse = (logits_NV.new_empty(num_rows, dtype=dtype) for _ in range(3))
    if num_rows:
        stats_kernel[(num_rows,)](
            logits_NV, target_N, bias_V, logprob, entropy, lse,
            logits_NV.stride(0), num_vocab, *split_float32(inv_temperature),
            HAS_BIAS=bias_V is not None, WIDE=arithmetic_type(dtype), BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return logprob, entropy, lse


@on_its_device
def row_gradient(
    logits_NV: Tensor,
    target_N: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias_V: Tensor | None,
    inv_temperature: float,
    out_NV: Tensor,
) -> None:
    """Writes d loss / d logits to ``out``, which may be the logits themselves or their first half as bfloat16."""
    check_unit_stride(logits=logits_NV, out=out_NV)
    check_contiguous(target=target_N, bias=bias_V, logprob=stats[0], entropy=stats[1])
    num_rows, num_vocab = logits_NV.shape
    if not num_rows:
        return
    dlogprob, dentropy, dlse = (None if grad is None else grad.contiguous() for grad in grads)
    gradient_kernel[(num_rows,)](
        logits_NV, out_NV, target_N, bias_V, stats[0], stats[1], dlogprob, dentropy, dlse,
        logits_NV.stride(0), out_NV.stride(0), num_vocab, *split_float32(inv_temperature),
        HAS_BIAS=bias_V is not None, HAS_DLOGPROB=dlogprob is not None, HAS_DENTROPY=dentropy is not None,
        HAS_DLSE=dlse is not None, WIDE=arithmetic_type(stats[0].dtype), BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip


@on_its_device
def add_rows(into_TD: Tensor, row_index_N: Tensor, rows_ND: Tensor) -> None:
    """into[row_index[i]] += rows[i]; a row's additions happen in the order of i. The host waits for nothing."""
    check_contiguous(into=into_TD, rows=rows_ND)
    if not len(row_index_N):
        return
    place_N, order_N = torch.sort(row_index_N, stable=True)
    dim = into_TD.shape[1]
    add_rows_kernel[(len(place_N), triton.cdiv(dim, BLOCK_D))](
        into_TD, rows_ND, place_N, order_N, len(place_N), dim, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True
    )


def split_float32(x: float) -> tuple[float, float]:
    """Triton passes a Python float as float32."""
    rounded = torch.tensor(x, dtype=torch.float32, device="cpu").item()
    return rounded, x - rounded


def arithmetic_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


# -- what is compiled and looked at without a GPU
# a policy's loss, one with an entropy bonus, and all that a caller can ask for
GRADIENT_TERMS = (("dlogprob",), ("dlogprob", "dentropy"), ("bias", "dlogprob", "dentropy", "dlse"))


def variants(arch: int) -> list[Variant]:
    """Every launch configuration above; ``arch`` does not matter to them."""
    found = []
    for dtype in FLOAT_TYPES:
        wide = "fp64" if dtype == "fp64" else "fp32"
        stats = {
            "logits_ptr": f"*{dtype}", "target_ptr": "*i64", "bias_ptr": f"*{wide}", "logprob_ptr": f"*{wide}",
            "entropy_ptr": f"*{wide}", "lse_ptr": f"*{wide}", "stride_n": "i32", "V": "i32", "inv_temperature": "fp32",
            "inv_temperature_rest": "fp32",
        }  # fmt: skip
        fixed = {"WIDE": tl.float64 if dtype == "fp64" else tl.float32, "BLOCK_V": BLOCK_V}
        for has_bias in (False, True):
            label = dtype + (", bias" if has_bias else "")
            found.append(Variant(stats_kernel, label, stats, {"HAS_BIAS": has_bias, **fixed}, num_warps=NUM_WARPS))
        for out in {"fp32": ("fp32", "bf16")}.get(dtype, (dtype,)):
            gradient = {
                "logits_ptr": f"*{dtype}", "out_ptr": f"*{out}", "target_ptr": "*i64", "bias_ptr": f"*{wide}",
                "logprob_ptr": f"*{wide}", "entropy_ptr": f"*{wide}", "dlogprob_ptr": f"*{wide}",
                "dentropy_ptr": f"*{wide}", "dlse_ptr": f"*{wide}", "stride_n": "i32", "out_stride_n": "i32",
                "V": "i32", "inv_temperature": "fp32", "inv_temperature_rest": "fp32",
            }  # fmt: skip
            for terms in GRADIENT_TERMS:
                given = {f"HAS_{term.upper()}": term in terms for term in ("bias", "dlogprob", "dentropy", "dlse")}
                label = f"{dtype} -> {out}, {' '.join(terms)}"
                constants = {**given, **fixed}
                found.append(Variant(gradient_kernel, label, gradient, constants, num_warps=NUM_WARPS, barriers=2))
    add = {
        "into_ptr": "*fp32", "rows_ptr": "*fp32", "place_ptr": "*i64", "order_ptr": "*i64", "N": "i32", "D": "i32",
    }  # fmt: skip
    found.append(Variant(add_rows_kernel, "fp32", add, {"BLOCK_D": BLOCK_D}, num_warps=4, unaligned=("N",)))
    return found
