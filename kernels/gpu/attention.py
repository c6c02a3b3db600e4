"""packed_attention in Triton: forward, dQ and dK/dV, where key k is visible to queries k <= q < vis_end[segment of k].

    forward   per tile of queries: loop over the visible keys with a running maximum; also writes the natural LSE
    dQ        per tile of queries: the same loop, with attention weights recomputed as exp(score - LSE)
    dK, dV    per tile of keys: loop over the queries k .. vis_end, for all query heads of the key/value head

Inside the kernels scores are in base 2, whose exponential is one instruction; inputs and outputs are natural.

A tile lies within one segment, so only blocks at the end of a segment or on the diagonal need a mask. The queries of a
key tile are split into pieces of fixed length; the float32 partial sums of several pieces are added in ascending order.
The work of a program depends on the lengths of its own group only, so a group's bits do not depend on the batch.
No atomics. The specification is ``packed_attention_ref`` in ``kernels/packed_attention.py``.
"""

import dataclasses
import math
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu import attention_rows
from isomorph.kernels.gpu.attention_rows import (
    add_pieces,
    deltas,
    load_rows,
    row_of_head,
    step,
    store_rows,
    tile_and_head,
    variant,
)
from isomorph.kernels.gpu.attention_tiles import CONFIGS, Tile, block_d, config_of, tables_on
from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.strides import check_contiguous, unit_stride

LOG2_E = math.log2(math.e)


# -- kernels
@triton.jit
def products(
    q, k_ptr, stride_kt, start, end, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Products of the queries with one block of keys [start, end); MASKED if it is not full."""
    k_ptr = step(k_ptr, start, stride_kt)
    k_KD = load_rows(k_ptr, tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), stride_kt, end - start, MASKED, D, BLOCK_D)
    return tl.dot(q, k_KD.T, input_precision="ieee")


@triton.jit
def forward_block(
    out, total, top, product_QK, v_ptr, stride_vt, start, end, row, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys [start, end); MASKED if it is not full or crosses the diagonal."""
    at = tl.arange(0, BLOCK_K)
    score_QK = product_QK * scale
    if MASKED:
        seen_QK = ((start + at)[None, :] <= row[:, None]) & (at[None, :] < end - start)
        score_QK = tl.where(seen_QK, score_QK, float("-inf"))
    new_top = tl.maximum(top, tl.max(score_QK, 1))
    p_QK = tl.exp2(score_QK - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p_QK, 1)
    v_ptr = step(v_ptr, start, stride_vt)
    v_KD = load_rows(v_ptr, at, tl.arange(0, BLOCK_D), stride_vt, end - start, MASKED, D, BLOCK_D)
    out = tl.dot(p_QK.to(v_KD.dtype), v_KD, out * shrink[:, None], input_precision="ieee")
    return out, total, new_top


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,  # [T, H, D] bf16 | f16 | f32, last dimension contiguous, as in k and v
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    out_ptr,  # [T, H, D] contiguous
    lse_ptr,  # [H, T] f32, natural
    tile_ptr,  # [tiles, 6] i32: first row, end of its rows, first and last of its full ranges, of its partial blocks
    full_ptr,  # [ranges, 2] i32: keys visible to all rows, in whole blocks
    block_ptr,  # [blocks, 2] i32: first key of a block, end of its keys
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    T, H,
    repeats,  # H / K
    scale,  # in base 2
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,  # the products of a block are issued before the softmax of the block before it
):  # fmt: skip
    tile_ptr, head = tile_and_head(tile_ptr, H, 6)
    start = tl.load(tile_ptr)
    num_rows = tl.load(tile_ptr + 1) - start
    k_ptr = step(k_ptr, head // repeats, stride_kh)
    v_ptr = step(v_ptr, head // repeats, stride_vh)
    at = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q_ptr = row_of_head(q_ptr, start, head, stride_qt, stride_qh)
    q = load_rows(q_ptr, at, d, stride_qt, num_rows, True, D, BLOCK_D)
    out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row = start + at
    for i in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):
        first = tl.load(full_ptr + 2 * i)
        last = tl.load(full_ptr + 2 * i + 1) - BLOCK_K
        if AHEAD:
            product_QK = products(q, k_ptr, stride_kt, first, 0, False, D, BLOCK_K, BLOCK_D)
            for k0 in range(first, last, BLOCK_K):
                # runs while the exponentials of the block before are computed
                next_QK = products(q, k_ptr, stride_kt, k0 + BLOCK_K, 0, False, D, BLOCK_K, BLOCK_D)
                out, total, top = forward_block(
                    out, total, top, product_QK, v_ptr, stride_vt, k0, 0, row, scale, False, D, BLOCK_K, BLOCK_D
                )
                product_QK = next_QK
            out, total, top = forward_block(
                out, total, top, product_QK, v_ptr, stride_vt, last, 0, row, scale, False, D, BLOCK_K, BLOCK_D
            )
        else:
            for k0 in range(first, last + BLOCK_K, BLOCK_K):
                product_QK = products(q, k_ptr, stride_kt, k0, 0, False, D, BLOCK_K, BLOCK_D)
                out, total, top = forward_block(
                    out, total, top, product_QK, v_ptr, stride_vt, k0, 0, row, scale, False, D, BLOCK_K, BLOCK_D
                )
    for i in tl.range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 5), num_stages=1):  # few iterations: no pipeline
        k0 = tl.load(block_ptr + 2 * i)
        end = tl.load(block_ptr + 2 * i + 1)
        product_QK = products(q, k_ptr, stride_kt, k0, end, True, D, BLOCK_K, BLOCK_D)
        out, total, top = forward_block(
            out, total, top, product_QK, v_ptr, stride_vt, k0, end, row, scale, True, D, BLOCK_K, BLOCK_D
        )
    out_ptr = row_of_head(out_ptr, start, head, H * D, D)
    store_rows(out_ptr, at, d, H * D, num_rows, out / total[:, None], D, BLOCK_D)
    lse_ptr = step(lse_ptr, head, T) + start
    tl.store(lse_ptr + at, (top + tl.log2(total)) * 0.6931471805599453, mask=at < num_rows)


@triton.jit
def grad_q_block(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, start, end, row, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys, as ``forward_block``; scale and LSE in base 2."""
    at = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    k_ptr = step(k_ptr, start, stride_kt)
    v_ptr = step(v_ptr, start, stride_vt)
    k_KD = load_rows(k_ptr, at, d, stride_kt, end - start, MASKED, D, BLOCK_D)
    v_KD = load_rows(v_ptr, at, d, stride_vt, end - start, MASKED, D, BLOCK_D)
    p_QK = tl.exp2(tl.dot(q, k_KD.T, input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        seen_QK = ((start + at)[None, :] <= row[:, None]) & (at[None, :] < end - start)
        p_QK = tl.where(seen_QK, p_QK, 0.0)
    ds_QK = p_QK * (tl.dot(dout, v_KD.T, input_precision="ieee") - delta[:, None])
    return tl.dot(ds_QK.to(k_KD.dtype), k_KD, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["T"])
def grad_q_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    dout_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] f32, natural
    delta_ptr,  # [H, T] f32
    dq_ptr,  # [T, H, D] contiguous
    tile_ptr,  # as in forward_kernel
    full_ptr,
    block_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    T, H, repeats,
    scale,
    scale_base_2,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_ptr, head = tile_and_head(tile_ptr, H, 6)
    start = tl.load(tile_ptr)
    num_rows = tl.load(tile_ptr + 1) - start
    k_ptr = step(k_ptr, head // repeats, stride_kh)
    v_ptr = step(v_ptr, head // repeats, stride_vh)
    at = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q_ptr = row_of_head(q_ptr, start, head, stride_qt, stride_qh)
    dout_ptr = row_of_head(dout_ptr, start, head, stride_dt, stride_dh)
    q = load_rows(q_ptr, at, d, stride_qt, num_rows, True, D, BLOCK_D)
    dout = load_rows(dout_ptr, at, d, stride_dt, num_rows, True, D, BLOCK_D)
    lse_ptr = step(lse_ptr, head, T) + start
    delta_ptr = step(delta_ptr, head, T) + start
    lse = tl.load(lse_ptr + at, mask=at < num_rows, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_ptr + at, mask=at < num_rows, other=0.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for i in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):
        for k0 in range(tl.load(full_ptr + 2 * i), tl.load(full_ptr + 2 * i + 1), BLOCK_K):
            dq = grad_q_block(
                dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, k0, k0 + BLOCK_K, start + at, scale_base_2,
                False, D, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    for i in tl.range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 5), num_stages=1):  # few iterations: no pipeline
        k0 = tl.load(block_ptr + 2 * i)
        dq = grad_q_block(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, k0, tl.load(block_ptr + 2 * i + 1), start + at,
            scale_base_2, True, D, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    dq_ptr = row_of_head(dq_ptr, start, head, H * D, D)
    store_rows(dq_ptr, at, d, H * D, num_rows, dq * scale, D, BLOCK_D)


@triton.jit
def grad_kv_block(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_dt, start, end, key, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds one block of queries [start, end); MASKED if it is not full or crosses the diagonal."""
    at = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q_ptr = step(q_ptr, start, stride_qt)
    dout_ptr = step(dout_ptr, start, stride_dt)
    q = load_rows(q_ptr, at, d, stride_qt, end - start, MASKED, D, BLOCK_D)
    dout = load_rows(dout_ptr, at, d, stride_dt, end - start, MASKED, D, BLOCK_D)
    if MASKED:  # exp2(score - inf) = 0
        lse = tl.load(lse_ptr + start + at, mask=at < end - start, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + start + at, mask=at < end - start, other=0.0)
    else:
        lse = tl.load(lse_ptr + start + at) * 1.4426950408889634
        delta = tl.load(delta_ptr + start + at)
    p_KQ = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
    if MASKED:
        p_KQ = tl.where(key[:, None] <= (start + at)[None, :], p_KQ, 0.0)
    dv = tl.dot(p_KQ.to(dout.dtype), dout, dv, input_precision="ieee")
    ds_KQ = p_KQ * (tl.dot(v, dout.T, input_precision="ieee") - delta[None, :])
    dk = tl.dot(ds_KQ.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "num_slots"])
def grad_kv_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    dout_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] f32, natural
    delta_ptr,  # [H, T] f32
    dk_ptr,  # [T, K, D] contiguous
    dv_ptr,  # [T, K, D] contiguous
    partial_ptr,  # [2, slots, K, BLOCK_K, D] f32: dk and dv of tiles with several pieces
    tile_ptr,  # [tiles, 5] i32: first key, end of its keys, first query, end of its queries, slot or -1
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    T, H, K, repeats, num_slots,
    scale,
    scale_base_2,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_ptr, kv_head = tile_and_head(tile_ptr, K, 5)
    key = tl.load(tile_ptr)
    num_keys = tl.load(tile_ptr + 1) - key
    start = tl.load(tile_ptr + 2)
    end = tl.load(tile_ptr + 3)
    slot = tl.load(tile_ptr + 4)
    at = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    k_ptr = row_of_head(k_ptr, key, kv_head, stride_kt, stride_kh)
    v_ptr = row_of_head(v_ptr, key, kv_head, stride_vt, stride_vh)
    k = load_rows(k_ptr, at, d, stride_kt, num_keys, True, D, BLOCK_D)
    v = load_rows(v_ptr, at, d, stride_vt, num_keys, True, D, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # the first queries are the tile's own rows, on the diagonal
    full = tl.minimum(tl.maximum(start, key + BLOCK_K), end)
    tail = full + (end - full) // BLOCK_Q * BLOCK_Q
    num_diagonal = tl.cdiv(full - start, BLOCK_Q)
    num_masked = num_diagonal + tl.cdiv(end - tail, BLOCK_Q)
    for i in range(repeats):
        head = kv_head * repeats + i
        q_head_ptr = step(q_ptr, head, stride_qh)
        dout_head_ptr = step(dout_ptr, head, stride_dh)
        lse_head_ptr = step(lse_ptr, head, T)
        delta_head_ptr = step(delta_ptr, head, T)
        for j in tl.range(num_masked, num_stages=1):  # few iterations: no pipeline
            q0 = tl.where(j < num_diagonal, start + j * BLOCK_Q, tail)
            dk, dv = grad_kv_block(
                dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, stride_qt, stride_dt, q0, end,
                key + at, scale_base_2, True, D, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
        for q0 in range(full, tail, BLOCK_Q):
            dk, dv = grad_kv_block(
                dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, stride_qt, stride_dt, q0, end,
                key + at, scale_base_2, False, D, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
    dk = dk * scale
    if slot < 0:
        store_rows(row_of_head(dk_ptr, key, kv_head, K * D, D), at, d, K * D, num_keys, dk, D, BLOCK_D)
        store_rows(row_of_head(dv_ptr, key, kv_head, K * D, D), at, d, K * D, num_keys, dv, D, BLOCK_D)
    else:
        dk_part_ptr = row_of_head(partial_ptr, slot, kv_head, K * BLOCK_K * D, BLOCK_K * D)
        dv_part_ptr = row_of_head(partial_ptr, slot + num_slots, kv_head, K * BLOCK_K * D, BLOCK_K * D)
        store_rows(dk_part_ptr, at, d, D, num_keys, dk, D, BLOCK_D)
        store_rows(dv_part_ptr, at, d, D, num_keys, dv, D, BLOCK_D)


# -- launches
@on_its_device
def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], contiguous, and the natural LSE [H, T] float32. q [T, H, D]; k, v [T, K, D]; D up to 128."""
    q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (q_THD, k_TKD, v_TKD))
    num_tok, num_heads, dim = q_THD.shape
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse_HT = q_THD.new_empty(num_heads, num_tok, dtype=torch.float32)
    if not q_THD.numel():
        return out_THD, lse_HT
    config = config_of(q_THD)
    tables = tables_on(layout, q_THD.device, config)[0]
    forward_kernel[(len(tables.tiles) * num_heads,)](
        q_THD, k_TKD, v_TKD, out_THD, lse_HT, *tables,
        *q_THD.stride()[:2], *k_TKD.stride()[:2], *v_TKD.stride()[:2],
        num_tok, num_heads, num_heads // k_TKD.shape[1], scale * LOG2_E,
        AHEAD=config.forward.ahead, **_launch(config.forward, dim),
    )  # fmt: skip
    return out_THD, lse_HT


@on_its_device
def attend_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    layout: PackedLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, H, D], dk and dv [T, K, D], contiguous, from dout [T, H, D] and what ``attend`` returned."""
    check_contiguous(out=out_THD, lse=lse_HT)
    dout_THD, q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (dout_THD, q_THD, k_TKD, v_TKD))
    dq_THD, dk_TKD, dv_TKD = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_TKD, v_TKD))
    if not q_THD.numel():
        return dq_THD, dk_TKD, dv_TKD
    num_tok, num_heads, dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    repeats = num_heads // num_kv_heads
    config = config_of(q_THD)
    _, query_tables, key_tables = tables_on(layout, q_THD.device, config)
    strides = [*q_THD.stride()[:2], *k_TKD.stride()[:2], *v_TKD.stride()[:2], *dout_THD.stride()[:2]]
    delta_HT = deltas(out_THD, dout_THD, lse_HT)
    grad_q_kernel[(len(query_tables.tiles) * num_heads,)](
        q_THD, k_TKD, v_TKD, dout_THD, lse_HT, delta_HT, dq_THD, *query_tables, *strides,
        num_tok, num_heads, repeats, scale, scale * LOG2_E, **_launch(config.grad_q, dim),
    )  # fmt: skip
    num_slots = key_tables.num_slots
    partial = q_THD.new_empty(2, num_slots, num_kv_heads, config.grad_kv.block_k, dim, dtype=torch.float32)
    grad_kv_kernel[(len(key_tables.tiles) * num_kv_heads,)](
        q_THD, k_TKD, v_TKD, dout_THD, lse_HT, delta_HT, dk_TKD, dv_TKD, partial, key_tables.tiles, *strides,
        num_tok, num_heads, num_kv_heads, repeats, num_slots, scale, scale * LOG2_E, **_launch(config.grad_kv, dim),
    )  # fmt: skip
    if num_slots:
        add_pieces(partial, dk_TKD, dv_TKD, key_tables.split)
    return dq_THD, dk_TKD, dv_TKD


def _launch(tile: Tile, dim: int) -> dict[str, Any]:
    return dict(
        D=dim,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        BLOCK_D=block_d(dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )


# -- variants for kernels/aot.py
SHAPES = (
    *(("bf16", dim) for dim in (40, 64, 96, 128)),  # 40 and 96: masked to the width of a tile
    *(("fp16", dim) for dim in (64, 128)),
    *(("fp32", dim) for dim in (64, 128)),
)
# Triton before 3.9 spills up to 14 registers of these two; tiles without spills would be half as large.
SPILLING = {(grad_kv_kernel, 90): 48, (forward_kernel, 100): 16}
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def variants(arch: int) -> list[Variant]:
    """Every configuration in ``CONFIGS`` for architecture ``arch``, and the kernels of ``attention_rows``."""
    found = attention_rows.variants(arch)
    for dtype, dim in SHAPES:
        config = CONFIGS[arch, block_d(dim), 4 if dtype == "fp32" else 2]
        for kernel, tile in (
            (forward_kernel, config.forward),
            (grad_q_kernel, config.grad_q),
            (grad_kv_kernel, config.grad_kv),
        ):
            blocks: dict[str, int] = {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
            if kernel is forward_kernel:
                blocks["AHEAD"] = tile.ahead
            made = variant(kernel, dtype, dim, tile.num_warps, tile.num_stages, **blocks)
            is_half = dtype != "fp32"  # IEEE float32 has no matrix instruction
            stack = SPILLING.get((kernel, arch), 0) if IS_OLD and is_half else 0
            peak: Literal["matrix", "fp32"] = "matrix" if is_half else "fp32"
            found.append(dataclasses.replace(made, uses_dot=is_half, peak=peak, stack_allowed=stack))
    return found
