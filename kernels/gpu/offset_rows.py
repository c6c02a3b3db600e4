"""Row kernels around the matrix product of ``kernels/gpu/offset.py``, which defines the symbols.

    target     the logit of a row's target, which is its offset, before the product
    rescue     recomputes rows whose E is unusable, with their LSE as offset
    gradient   replaces E by the gradient of the logits

One program processes one row, in blocks of a fixed width. No atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.strides import check_contiguous, check_unit_stride

RESCUE_ABOVE = 2.0**100
BLOCK_D = 512
BLOCK_V = 2048
RESCUE_V, RESCUE_D = 64, 64


class Stats(NamedTuple):
    """Statistics of one chunk of rows, each [M] float32; the first three in nats."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    total: Tensor  # S
    at_target: Tensor  # E[y], not rounded to the dtype of E


@triton.jit
def target_kernel(
    hidden_ptr,  # [N, D] bf16 | f32, contiguous
    weight_ptr,  # [V, D] the same dtype, contiguous
    target_ptr,  # [N] i64
    logit_ptr,  # [N] f32: the raw logit of the target
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + row * D + at, mask=at < D, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + target * D + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(logit_ptr + row, tl.sum(total, 0))


@triton.jit
def rescue_kernel(
    hidden_ptr,  # [M, D]
    weight_ptr,  # [V, D]
    logit_ptr,  # [M] f32
    exp_ptr,  # [M, V] of row stride stride_e
    total_ptr,  # [M] f32
    at_target_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    V,
    D,
    stride_e,
    inv_temperature,
    rescue_above,
    STORE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.load(total_ptr + row)
    if (total <= rescue_above) & (total > 0):  # false for NaN
        return
    z_y = tl.load(logit_ptr + row) * inv_temperature
    column = tl.arange(0, BLOCK_V)
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + column
        z = _row_logits(hidden_ptr + row * D, weight_ptr, v, V, D, BLOCK_V, BLOCK_D) * inv_temperature
        z = tl.where(v < V, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        step = tl.where(total > 0, top - new_top, 0.0)
        shrink = tl.exp(step)
        diff = z - new_top
        e = tl.exp(diff)
        weighted = shrink * (weighted + total * step) + tl.sum(tl.where(e == 0, 0.0, e * diff), 0)
        total = shrink * total + tl.sum(e, 0)
        top = new_top
    log_total = tl.log(total)
    logprob = (z_y - top) - log_total
    tl.store(total_ptr + row, total * 0.0 + 1.0)  # 1, because E is the probability now; NaN stays NaN
    tl.store(at_target_ptr + row, tl.exp(logprob))
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(lse_ptr + row, top + log_total)
    if STORE:
        for start in range(0, V, BLOCK_V):
            v = start + column
            z = _row_logits(hidden_ptr + row * D, weight_ptr, v, V, D, BLOCK_V, BLOCK_D) * inv_temperature
            tl.store(exp_ptr + row * stride_e + v, tl.exp((z - top) - log_total), mask=v < V)


@triton.jit
def _row_logits(row_ptr, weight_ptr, v, V, D, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        inside = (v[:, None] < V) & (d[None, :] < D)
        w = tl.load(weight_ptr + v.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(w * x[None, :], 1)
    return total


@triton.jit
def gradient_kernel(
    exp_ptr,  # [M, V] of row stride stride_e: E, overwritten by dz
    target_ptr,  # [M] i64
    total_ptr,  # [M] f32
    at_target_ptr,  # [M] f32
    entropy_ptr,  # [M] f32
    dlogprob_ptr,  # [M] f32, likewise dentropy and dlse
    dentropy_ptr,
    dlse_ptr,
    V,
    stride_e,
    inv_temperature,
    BLOCK_V: tl.constexpr,
):
    """dz in place, for losses of the entropy or the LSE, whose gradient is not E scaled per row."""
    row = tl.program_id(0).to(tl.int64)
    inv_total = 1.0 / tl.load(total_ptr + row)
    target = tl.load(target_ptr + row)
    at_target = tl.load(at_target_ptr + row)  # E is rounded
    entropy = tl.load(entropy_ptr + row)
    dlogprob = tl.load(dlogprob_ptr + row)
    on_prob = tl.load(dlse_ptr + row) - dlogprob
    on_surprise = -tl.load(dentropy_ptr + row)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        e = tl.load(exp_ptr + row * stride_e + v, mask=v < V, other=0.0).to(tl.float32)
        p = tl.where(v == target, at_target, e) * inv_total
        surprise = tl.where(p == 0, 0.0, tl.log(p) + entropy)
        d = p * (on_prob + on_surprise * surprise) + tl.where(v == target, dlogprob, 0.0)
        tl.store(exp_ptr + row * stride_e + v, d * inv_temperature, mask=v < V)


# -- launches
@on_its_device
def target_logits(hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> Tensor:
    """[M] float32 raw logits of the targets. All contiguous."""
    check_contiguous(hidden=hidden_MD, weight=weight_VD, target=target_M)
    num_rows, dim = hidden_MD.shape
    logit_M = hidden_MD.new_empty(num_rows, dtype=torch.float32)
    target_kernel[(num_rows,)](
        hidden_MD, weight_VD, target_M, logit_M, dim, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True
    )
    return logit_M


@on_its_device
def rescue_(
    hidden_MD: Tensor, weight_VD: Tensor, logit_M: Tensor, exp_MV: Tensor | None, stats: Stats, temperature: float
) -> None:
    """Recomputes, in place, the statistics and E of the rows whose sum is too large, 0 or not finite."""
    check_contiguous(hidden=hidden_MD, weight=weight_VD, logit=logit_M)
    if exp_MV is not None:
        check_unit_stride(exp=exp_MV)
    num_rows, dim = hidden_MD.shape
    rescue_kernel[(num_rows,)](
        hidden_MD, weight_VD, logit_M, exp_MV, stats.total, stats.at_target, stats.logprob, stats.entropy, stats.lse,
        len(weight_VD), dim, 0 if exp_MV is None else exp_MV.stride(0), 1.0 / temperature, RESCUE_ABOVE,
        STORE=exp_MV is not None, BLOCK_V=RESCUE_V, BLOCK_D=RESCUE_D, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def row_scales(stats: Stats, dlogprob_M: Tensor, target_M: Tensor, temperature: float, exp_MV: Tensor) -> Tensor:
    """Returns s = -dlogprob / (T S), [M], and replaces E[y] by E[y] - S in place, so that dz = s E'."""
    exp_MV.scatter_(1, target_M[:, None], (stats.at_target - stats.total)[:, None].to(exp_MV.dtype))
    return dlogprob_M / (-temperature * stats.total)


@on_its_device
def whole_gradient_(
    exp_MV: Tensor,
    stats: Stats,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    target_M: Tensor,
    temperature: float,
) -> None:
    """Replaces E by dz, [M, V], in place."""
    check_unit_stride(exp=exp_MV)
    check_contiguous(target=target_M)
    num_rows, num_vocab = exp_MV.shape
    if not num_rows:
        return
    dlogprob, dentropy, dlse = (torch.zeros_like(stats.total) if g is None else g.contiguous() for g in grads)
    gradient_kernel[(num_rows,)](
        exp_MV, target_M, stats.total, stats.at_target, stats.entropy, dlogprob, dentropy, dlse, num_vocab,
        exp_MV.stride(0), 1.0 / temperature, BLOCK_V=BLOCK_V, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


# -- variants for kernels/aot.py
def variants(arch: int) -> list[Variant]:
    """Every launch configuration of this file, the same for all architectures."""
    found = []
    for dtype in ("bf16", "fp32"):
        rescue: dict[str, str] = {
            "hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "logit_ptr": "*fp32", "exp_ptr": f"*{dtype}",
            **{name: "*fp32" for name in ("total_ptr", "at_target_ptr", "logprob_ptr", "entropy_ptr", "lse_ptr")},
            "V": "i32", "D": "i32", "stride_e": "i32", "inv_temperature": "fp32", "rescue_above": "fp32",
        }  # fmt: skip
        constants: dict[str, Any] = {"STORE": True, "BLOCK_V": RESCUE_V, "BLOCK_D": RESCUE_D}
        found.append(Variant(rescue_kernel, dtype, rescue, constants, num_warps=4))
        gradient = {
            "exp_ptr": f"*{dtype}", "target_ptr": "*i64",
            **{name: "*fp32" for name in ("total_ptr", "at_target_ptr", "entropy_ptr", "dlogprob_ptr", "dentropy_ptr")},
            "dlse_ptr": "*fp32", "V": "i32", "stride_e": "i32", "inv_temperature": "fp32",
        }  # fmt: skip
        found.append(Variant(gradient_kernel, f"offset, {dtype}", gradient, {"BLOCK_V": BLOCK_V}, num_warps=8))
        target = {
            "hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "target_ptr": "*i64", "logit_ptr": "*fp32", "D": "i32"
        }  # fmt: skip
        found.append(Variant(target_kernel, dtype, target, {"BLOCK_D": BLOCK_D}, num_warps=4))
    return found
