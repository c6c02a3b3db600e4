"""sample_token in Triton. The specification is ``kernels/sample_token.py``.

One program processes one row and reads it once; the noise is computed in registers. Each lane keeps a running softmax
and maximum over its own columns, and lanes are reduced once, at the end. A row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.rows import arithmetic_type, split_float32
from isomorph.kernels.gpu.variant import FLOAT_TYPES, Variant
from isomorph.kernels.strides import check_contiguous, check_unit_stride

COUNTERS = 1024  # Philox counters per step: 4096 columns
NUM_WARPS = 8


@triton.jit
def draw_kernel(
    logits_ptr,  # [B, V] f32 | bf16 | f16 | f64, last dimension contiguous
    rng_key_ptr,  # [B] i64
    position_ptr,  # [B] i64
    token_ptr,  # [B] i64
    logprob_ptr,  # [B] f32
    stride_b,
    V,
    inv_temperature,  # rounded to float32
    inv_temperature_rest,  # the rounding error, needed for float64
    WIDE: tl.constexpr,  # the dtype of the arithmetic
    COUNTERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_b
    scale = tl.full((), inv_temperature, WIDE) + inv_temperature_rest
    rng_key = tl.load(rng_key_ptr + row)
    position = tl.load(position_ptr + row)
    i = tl.arange(0, COUNTERS)
    top = tl.full((COUNTERS,), float("-inf"), WIDE)
    total = tl.zeros((COUNTERS,), WIDE)
    best = tl.full((COUNTERS,), float("-inf"), WIDE)
    winner = tl.zeros((COUNTERS,), tl.int32)
    c1 = tl.zeros((COUNTERS,), tl.uint32)
    c2 = c1 + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = c1 + (position >> 32 & 0xFFFFFFFF).to(tl.uint32)
    for start in range(0, V, 4 * COUNTERS):
        counter = start // 4 + i
        column = counter // 256 * 1024 + counter % 256
        w0, w1, w2, w3 = tl.philox(rng_key, counter.to(tl.uint32), c1, c2, c3)
        top, total, best, winner = _take(row_ptr, column, w0, top, total, best, winner, V, scale, WIDE)
        top, total, best, winner = _take(row_ptr, column + 256, w1, top, total, best, winner, V, scale, WIDE)
        top, total, best, winner = _take(row_ptr, column + 512, w2, top, total, best, winner, V, scale, WIDE)
        top, total, best, winner = _take(row_ptr, column + 768, w3, top, total, best, winner, V, scale, WIDE)
    row_top = tl.max(top, 0)
    total = tl.sum(total * tl.exp(tl.where(top == row_top, 0.0, top - row_top)), 0)
    token = tl.min(tl.where(best == tl.max(best, 0), winner, V), 0)
    z = tl.load(row_ptr + token).to(WIDE) * scale
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, (z - row_top) - tl.log(total))


@triton.jit
def _take(row_ptr, column, word, top, total, best, winner, V, scale, WIDE: tl.constexpr):
    """Adds one column per lane to its running softmax and its running maximum of z + noise."""
    z = tl.load(row_ptr + column, mask=column < V, other=float("-inf")).to(WIDE) * scale
    new_top = tl.where(z > top, z, top)  # max without NaN: a NaN stays in z
    shrink = tl.exp(tl.where(top == new_top, 0.0, top - new_top))
    total = total * shrink + tl.exp(tl.where(z == float("-inf"), float("-inf"), z - new_top))
    u = (word.to(WIDE) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, 1.0 - 5.9604644775390625e-8)
    rest = 1.0 - u
    rounded = 1.0 - rest  # log(1 - u) to full precision (Kahan's log1p)
    e = tl.where(rounded == 0, u, -tl.log(rest) * u / tl.where(rounded == 0, 1.0, rounded))
    score = z - tl.log(e)
    better = (score > best) | ((score == best) & (column < winner))
    return new_top, total, tl.where(better, score, best), tl.where(better, column, winner)


# -- launch
@on_its_device
def draw_token(
    logits_BV: Tensor, rng_key_B: Tensor, position_B: Tensor, inv_temperature: float, token_B: Tensor, logprob_B: Tensor
) -> None:
    """Writes a token [B] int64 and its log-probability [B] for every row of logits [B, V], with stride 1 along V."""
    check_unit_stride(logits=logits_BV)
    check_contiguous(rng_key=rng_key_B, position=position_B, token=token_B, logprob=logprob_B)
    num_rows, num_vocab = logits_BV.shape
    if num_rows:
        draw_kernel[(num_rows,)](
            logits_BV, rng_key_B, position_B, token_B, logprob_B, logits_BV.stride(0), num_vocab,
            *split_float32(inv_temperature), WIDE=arithmetic_type(logprob_B.dtype), COUNTERS=COUNTERS,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


# -- variants for kernels/aot.py
def variants(arch: int) -> list[Variant]:
    """Every launch configuration of this file, the same for all architectures."""
    found = []
    for dtype in FLOAT_TYPES:
        signature = {
            "logits_ptr": f"*{dtype}", "rng_key_ptr": "*i64", "position_ptr": "*i64", "token_ptr": "*i64",
            "logprob_ptr": "*fp64" if dtype == "fp64" else "*fp32", "stride_b": "i32", "V": "i32",
            "inv_temperature": "fp32", "inv_temperature_rest": "fp32",
        }  # fmt: skip
        constants = {"WIDE": arithmetic_type(torch.float64 if dtype == "fp64" else torch.float32), "COUNTERS": COUNTERS}
        found.append(Variant(draw_kernel, dtype, signature, constants, num_warps=NUM_WARPS))
    return found
