"""group_advantage and gae in Triton. The specification is ``kernels/advantage.py``.

One program processes one group, or one sequence, of any length, in blocks of a fixed width: one launch for all, and the
bits of one do not depend on the others. Sums and the scan are float64 for both dtypes: the arrays are small, and a
launch takes longer than the arithmetic. No atomics.

    group   three passes over a group: sum, squares, result; scale "batch" is a second launch with all of S as one group
    gae     advantage = b + a next_advantage, from the end; (a, b) composes to (a1 a2, a2 b1 + b2), so a block is an
            associative scan, and one number is carried from block to block

The kernels also check their inputs: offsets are clamped to the array before they are used as addresses, and a program
sets its flag for offsets out of order, numbers that are not finite, or a group that is too small. The caller reads all
flags at once, so checking needs no extra pass over the data and no extra synchronisation.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.strides import check_contiguous
from isomorph.kernels.types import EPS

BLOCK_G, GROUP_WARPS = 128, 1  # most groups fit one block
BLOCK_S, BATCH_WARPS = 1024, 8  # for all responses of a step, in one program
BLOCK_T, GAE_WARPS = 512, 8


@triton.jit(do_not_specialize=["S"])  # it changes with every call
def group_kernel(
    reward_ptr,  # [S] f32 | f64
    offset_ptr,  # [P + 1] i64
    out_ptr,  # [S] as reward
    fault_ptr,  # [P] i8, written if CHECKS
    S,
    HAS_BASELINE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    HAS_STD: tl.constexpr,
    CHECKS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    first = tl.load(offset_ptr + group)
    last = tl.load(offset_ptr + group + 1)
    start = tl.maximum(first, 0)
    size = tl.maximum(tl.minimum(last, S) - start, 0).to(tl.int32)
    reward_ptr += start
    out_ptr += start
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    bad = tl.zeros((BLOCK,), tl.int32)
    for done in range(0, size, BLOCK):
        at = done + column
        reward = tl.load(reward_ptr + at, mask=at < size, other=0.0).to(tl.float64)
        total += reward
        low = tl.minimum(low, tl.where(at < size, reward, float("inf")))
        high = tl.maximum(high, tl.where(at < size, reward, float("-inf")))
        bad += tl.where(tl.abs(reward) < float("inf"), 0, 1)  # false for NaN
    mean = tl.sum(total, 0) / size
    is_flat = tl.min(low, 0) == tl.max(high, 0)
    if CHECKS:
        fault = (tl.sum(bad, 0) > 0) | (first > last)
        fault |= (group == 0) & (first != 0)
        fault |= (group == tl.num_programs(0) - 1) & (last != S)
        if HAS_BASELINE or HAS_STD:
            fault |= size == 1
        tl.store(fault_ptr + group, fault.to(tl.int8))
    factor = tl.full((), 1.0, tl.float64)
    if LEAVE_ONE_OUT:
        factor = factor * size / (size - 1)
    if HAS_STD:
        squares = tl.zeros((BLOCK,), tl.float64)
        for done in range(0, size, BLOCK):
            at = done + column
            reward = tl.load(reward_ptr + at, mask=at < size, other=0.0).to(tl.float64)
            squares += tl.where(at < size, (reward - mean) * (reward - mean), 0.0)
        factor = factor / (tl.sqrt(tl.sum(squares, 0) / (size - 1)) + EPS)
    for done in range(0, size, BLOCK):
        at = done + column
        reward = tl.load(reward_ptr + at, mask=at < size, other=0.0).to(tl.float64)
        advantage = reward
        if HAS_BASELINE:
            advantage = reward - mean
        advantage = advantage * factor
        if HAS_BASELINE or HAS_STD:
            advantage = tl.where(is_flat, 0.0, advantage)  # reward - rounded mean would not be exactly 0
        tl.store(out_ptr + at, advantage, mask=at < size)


@triton.jit
def _compose(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit(do_not_specialize=["T"])
def gae_kernel(
    reward_ptr,  # [T] f32 | f64
    value_ptr,  # [T] as reward
    offset_ptr,  # [S + 1] i64
    advantage_ptr,  # [T] as reward
    returns_ptr,  # [T] as reward
    fault_ptr,  # [S] i8
    T,
    gamma: tl.float64,
    decay: tl.float64,  # gamma lam
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    first = tl.load(offset_ptr + seq)
    last = tl.load(offset_ptr + seq + 1)
    start = tl.maximum(first, 0)
    size = tl.maximum(tl.minimum(last, T) - start, 0).to(tl.int32)
    reward_ptr += start
    value_ptr += start
    advantage_ptr += start
    returns_ptr += start
    column = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, tl.float64)  # the advantage after this block
    bad = tl.zeros((BLOCK,), tl.int32)
    for done in range(0, size, BLOCK):
        at = size - done - BLOCK + column  # blocks are aligned to the end; the first may start before the sequence
        inside = at >= 0
        reward = tl.load(reward_ptr + at, mask=inside, other=0.0)
        value = tl.load(value_ptr + at, mask=inside, other=0.0)
        next_value = tl.load(value_ptr + at + 1, mask=inside & (at + 1 < size), other=0.0)
        bad += tl.where((tl.abs(reward) < float("inf")) & (tl.abs(value) < float("inf")), 0, 1)
        delta = reward.to(tl.float64) + gamma * next_value.to(tl.float64) - value.to(tl.float64)
        a = tl.full((BLOCK,), 1.0, tl.float64) * decay
        a, b = tl.associative_scan((a, delta), 0, _compose, reverse=True)
        advantage = b + a * carry
        carry = tl.sum(tl.where(column == 0, advantage, 0.0), 0)
        rounded = advantage.to(reward.dtype)
        tl.store(advantage_ptr + at, rounded, mask=inside)
        tl.store(returns_ptr + at, rounded + value, mask=inside)
    fault = (tl.sum(bad, 0) > 0) | (first > last)
    fault |= (seq == 0) & (first != 0)
    fault |= (seq == tl.num_programs(0) - 1) & (last != T)
    tl.store(fault_ptr + seq, fault.to(tl.int8))


# -- launches
@on_its_device
def group_advantage(reward_S: Tensor, offsets: Tensor, baseline: str, scale: str) -> tuple[Tensor, Tensor]:
    """Advantages [S], and flags [P] int8: if any is not 0, the arguments are invalid, and so are the advantages."""
    check_contiguous(reward=reward_S, offsets=offsets)
    num_groups = len(offsets) - 1
    out_S = torch.empty_like(reward_S)
    fault_P = torch.empty(num_groups, dtype=torch.int8, device=reward_S.device)
    if num_groups:
        group_kernel[(num_groups,)](
            reward_S, offsets, out_S, fault_P, len(reward_S),
            HAS_BASELINE=baseline != "none", LEAVE_ONE_OUT=baseline == "leave_one_out", HAS_STD=scale == "std",
            CHECKS=True, EPS=EPS, BLOCK=BLOCK_G, num_warps=GROUP_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    if num_groups and scale == "batch":
        whole = offsets[::num_groups].contiguous()  # [0, S], already on the device
        raw_S, out_S = out_S, torch.empty_like(reward_S)
        group_kernel[(1,)](
            raw_S, whole, out_S, None, len(reward_S),
            HAS_BASELINE=True, LEAVE_ONE_OUT=False, HAS_STD=True,
            CHECKS=False, EPS=EPS, BLOCK=BLOCK_S, num_warps=BATCH_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out_S, fault_P


@on_its_device
def gae(reward_T: Tensor, value_T: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [T], returns [T], and flags [S] int8 as for ``group_advantage``."""
    check_contiguous(reward=reward_T, value=value_T, offsets=offsets)
    num_seqs = len(offsets) - 1
    advantage_T, returns_T = torch.empty_like(reward_T), torch.empty_like(reward_T)
    fault_S = torch.empty(num_seqs, dtype=torch.int8, device=reward_T.device)
    if num_seqs:
        gae_kernel[(num_seqs,)](
            reward_T, value_T, offsets, advantage_T, returns_T, fault_S, len(reward_T), float(gamma),
            float(gamma * lam), BLOCK=BLOCK_T, num_warps=GAE_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return advantage_T, returns_T, fault_S


# -- variants for kernels/aot.py
def variants(arch: int) -> list[Variant]:
    """Every launch configuration of this file, the same for all architectures."""
    return [variant for dtype in ("fp32", "fp64") for variant in (*_group_variants(dtype), _gae_variant(dtype))]


def _group_variants(dtype: str) -> Iterator[Variant]:
    modes = {  # HAS_BASELINE, LEAVE_ONE_OUT, HAS_STD
        "mean": (True, False, False), "mean, std": (True, False, True),
        "leave_one_out": (True, True, False), "leave_one_out, std": (True, True, True),
        "none": (False, False, False), "none, std": (False, False, True), "batch": (True, False, True),
    }  # fmt: skip
    for label, (has_baseline, leave_one_out, has_std) in modes.items():
        is_batch = label == "batch"
        signature = {"reward_ptr": f"*{dtype}", "offset_ptr": "*i64", "out_ptr": f"*{dtype}", "S": "i32"}
        constants: dict[str, Any] = {
            "HAS_BASELINE": has_baseline, "LEAVE_ONE_OUT": leave_one_out, "HAS_STD": has_std, "EPS": EPS,
            "CHECKS": not is_batch, "BLOCK": BLOCK_S if is_batch else BLOCK_G,
        }  # fmt: skip
        if is_batch:
            constants["fault_ptr"] = None
        else:
            signature["fault_ptr"] = "*i8"
        warps = BATCH_WARPS if is_batch else GROUP_WARPS
        yield Variant(group_kernel, f"{dtype}, {label}", signature, constants, warps, unaligned=("S",))


def _gae_variant(dtype: str) -> Variant:
    signature = {
        "reward_ptr": f"*{dtype}", "value_ptr": f"*{dtype}", "offset_ptr": "*i64", "advantage_ptr": f"*{dtype}",
        "returns_ptr": f"*{dtype}", "fault_ptr": "*i8", "T": "i32", "gamma": "fp64", "decay": "fp64",
    }  # fmt: skip
    return Variant(gae_kernel, dtype, signature, {"BLOCK": BLOCK_T}, GAE_WARPS, unaligned=("T",))
