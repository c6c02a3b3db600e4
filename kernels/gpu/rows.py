"""Row kernels of the LM head in Triton: statistics and gradients of rows of logits, and a deterministic index_add.

One program processes one row in blocks of a fixed width, so the order of additions is fixed: a row's bits do not depend
on the batch. No atomics. The specification is ``kernels/token_logprob.py``.

    stats      reads a row once                  4 (float32) or 2 (bfloat16) bytes per logit
    gradient   reads and writes a row once       in place; a float32 row may become a bfloat16 row in its first half
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

BLOCK_V = 4096  # 16 values (of 4 bytes) per thread; not tuned, because it changes the bits of the results
STRIPES = 4  # of a block of ``stats_kernel``
NUM_WARPS = 8
BLOCK_D = 1024


@triton.jit
def stats_block(
    row_ptr, bias_ptr, at, V, top, total, weighted, base_2,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds the logits ``at`` [STRIPES, columns] to each column's running softmax; MASKED if some are beyond V.

    ``base_2`` is log2(e) / temperature. The largest logit, the shift to it and the sums' correction cost once per
    column and block: one exponential for each logit, and one for STRIPES of them.
    """
    if MASKED:
        z = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(WIDE)
        if HAS_BIAS:
            z += tl.load(bias_ptr + at, mask=at < V, other=0.0)
    else:
        z = tl.load(row_ptr + at).to(WIDE)
        if HAS_BIAS:
            z += tl.load(bias_ptr + at)
    found = tl.max(z, 0)
    new_top = tl.where(found > top, found, top)  # max without NaN: a NaN stays in z
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    step = top - shift
    shrink = tl.exp2(step * base_2)
    diff = z - shift[None, :]
    e = tl.exp2(diff * base_2)
    # where diff is -inf, e is 0 and so is their product; where it is NaN, e makes it NaN
    surprise = tl.sum(e * tl.maximum(diff, -1e38), 0)
    weighted = shrink * (weighted + tl.where(total > 0, total * step, 0.0)) + surprise
    return new_top, shrink * total + tl.sum(e, 0), weighted


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
    inv_temperature,  # rounded to float32
    inv_temperature_rest,  # the rounding error, needed for float64
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # the dtype of the arithmetic
    BLOCK_V: tl.constexpr,
    STRIPES: tl.constexpr,  # a block is [STRIPES, BLOCK_V / STRIPES]; a column of it lies in one thread
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2**31
    row_ptr = logits_ptr + row * stride_n
    scale = tl.full((), inv_temperature, WIDE) + inv_temperature_rest
    base_2 = scale * 1.4426950408889634  # an exponential in base 2 is one instruction
    # Each column keeps a running softmax of its own, so columns are reduced once per row, not once per block. Maxima
    # and differences are of logits plus bias, the temperature comes after them.
    COLUMNS: tl.constexpr = BLOCK_V // STRIPES
    column = tl.arange(0, STRIPES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    top = tl.full((COLUMNS,), float("-inf"), WIDE)
    total = tl.zeros((COLUMNS,), WIDE)
    weighted = tl.zeros((COLUMNS,), WIDE)  # sum of exp((z - top) / temperature) (z - top)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        top, total, weighted = stats_block(
            row_ptr, bias_ptr, start + column, V, top, total, weighted, base_2, False, HAS_BIAS, WIDE
        )
    if whole < V:
        top, total, weighted = stats_block(
            row_ptr, bias_ptr, whole + column, V, top, total, weighted, base_2, True, HAS_BIAS, WIDE
        )
    row_top = tl.max(top, 0)
    step = tl.where(top == row_top, 0.0, top - row_top)
    shrink = tl.exp(step * scale)
    weighted = tl.sum(tl.where(total == 0, 0.0, shrink * (weighted + tl.where(shrink == 0, 0.0, total * step))), 0)
    total = tl.sum(shrink * total, 0)
    log_total = tl.log(total)
    target = tl.load(target_ptr + row)
    z_y = tl.load(row_ptr + target).to(WIDE)
    if HAS_BIAS:
        z_y += tl.load(bias_ptr + target)
    tl.store(logprob_ptr + row, (z_y - row_top) * scale - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total * scale)
    lse = row_top * scale
    tl.store(lse_ptr + row, tl.where(row_top == float("inf"), row_top, lse + log_total))  # as torch.logsumexp


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
    inv_temperature,  # rounded to float32
    inv_temperature_rest,  # the rounding error, needed for float64
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
    z_y = tl.load(row_ptr + target).to(WIDE)  # read before it is overwritten
    if HAS_BIAS:
        z_y += tl.load(bias_ptr + target)
    z_y = tl.where(z_y == float("-inf"), 0.0, z_y * scale)  # where it is, logprob is -lse
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
    tl.debug_barrier()  # every warp has read z_y
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
        # A narrower out overwrites columns of the same row that other warps may not have read yet. Block b of out ends
        # before column BLOCK_V (b + 1) / 2 of the logits, which every warp has read at the barrier of iteration b.
        tl.debug_barrier()
        tl.store(out_row_ptr + at, d, mask=at < V)


@triton.jit
def add_rows_kernel(
    into_ptr,  # [T, D] f32, contiguous
    rows_ptr,  # [N, D] f32, contiguous
    place_ptr,  # [N] i64: the row of into, ascending
    order_ptr,  # [N] i64: the row that is added there; ascending within one place
    N,
    D,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0)
    place = tl.load(place_ptr + i)
    if tl.load(place_ptr + i - 1, mask=i > 0, other=-1) == place:  # the first program of a place adds all of its rows
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
    """Log-probability, entropy, LSE, each [N], of logits [N, V] with stride 1 in V; float32 (float64 for float64)."""
    check_unit_stride(logits=logits_NV)
    check_contiguous(target=target_N, bias=bias_V)
    num_rows, num_vocab = logits_NV.shape
    dtype = stats_dtype(logits_NV.dtype)
    logprob, entropy, lse = (logits_NV.new_empty(num_rows, dtype=dtype) for _ in range(3))
    if num_rows:
        stats_kernel[(num_rows,)](
            logits_NV, target_N, bias_V, logprob, entropy, lse,
            logits_NV.stride(0), num_vocab, *split_float32(inv_temperature),
            HAS_BIAS=bias_V is not None, WIDE=arithmetic_type(dtype), BLOCK_V=_stats_block(logits_NV.element_size()),
            STRIPES=STRIPES, num_warps=NUM_WARPS, enable_fp_fusion=True,
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
    """Writes d loss / d logits to ``out`` [N, V]: other memory, the logits, or each row's first half (bfloat16)."""
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
    """into[row_index[i]] += rows[i], additions to a row in order of i; all float32. Does not synchronise."""
    check_contiguous(into=into_TD, rows=rows_ND)
    if not len(row_index_N):
        return
    place_N, order_N = torch.sort(row_index_N, stable=True)
    dim = into_TD.shape[1]
    add_rows_kernel[(len(place_N), triton.cdiv(dim, BLOCK_D))](
        into_TD, rows_ND, place_N, order_N, len(place_N), dim, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True
    )


def _stats_block(itemsize: int) -> int:
    """Logits of a block of ``stats_kernel``: a thread loads 16 bytes of each stripe."""
    return BLOCK_V * 4 // itemsize


def split_float32(x: float) -> tuple[float, float]:
    """``x`` rounded to float32, and the rounding error: Triton passes a Python float as float32."""
    rounded = torch.tensor(x, dtype=torch.float32, device="cpu").item()
    return rounded, x - rounded


def arithmetic_type(dtype: torch.dtype) -> Any:
    """Triton's type for computing with ``dtype``: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# -- variants for kernels/aot.py
# the gradients of a policy loss, of one with an entropy bonus, and of every statistic
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
GRADIENT_TERMS = (("dlogprob",), ("dlogprob", "dentropy"), ("bias", "dlogprob", "dentropy", "dlse"))


def variants(arch: int) -> list[Variant]:
    """Every launch configuration of this file, the same for all architectures."""
    found = []
    for dtype in FLOAT_TYPES:
        wide = "fp64" if dtype == "fp64" else "fp32"
        stats = {
            "logits_ptr": f"*{dtype}", "target_ptr": "*i64", "bias_ptr": f"*{wide}", "logprob_ptr": f"*{wide}",
            "entropy_ptr": f"*{wide}", "lse_ptr": f"*{wide}", "stride_n": "i32", "V": "i32", "inv_temperature": "fp32",
            "inv_temperature_rest": "fp32",
        }  # fmt: skip
        fixed = {"WIDE": tl.float64 if dtype == "fp64" else tl.float32, "BLOCK_V": BLOCK_V}
        block = {**fixed, "BLOCK_V": _stats_block(_ITEMSIZE[dtype]), "STRIPES": STRIPES}
        for has_bias in (False, True):
            label = dtype + (", bias" if has_bias else "")
            found.append(Variant(stats_kernel, label, stats, {"HAS_BIAS": has_bias, **block}, num_warps=NUM_WARPS))
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
