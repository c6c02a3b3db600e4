"""Rows of heads in the attention kernels: addressing, loads and stores, and the memory-bound kernels.

    delta    the dot product of every output row with its upstream gradient, once for dQ and dK/dV
    add      sums float32 partial dK and dV, in ascending order
    merge    two parts of a softmax by log-sum-exp: l = logaddexp(l1, l2), o = exp(l1 - l) o1 + exp(l2 - l) o2

Sums are float32 (float64 for float64). No atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.attention_tiles import block_d
from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.strides import check_contiguous, check_unit_stride

DELTA_ROWS = 32
ADD_ROWS = 16  # divides every block_k
MERGE_ROWS = 16
NUM_WARPS = 4


# -- addressing
@triton.jit
def step(ptr, count, stride):
    """``ptr + count * stride`` in int64: offsets into packed tokens and KV caches exceed 2**31."""
    return ptr + tl.cast(count, tl.int64) * stride


@triton.jit
def row_of_head(ptr, row, head, row_stride, head_stride):
    """Pointer to row ``row`` of head ``head`` in an array [rows, heads, ...]."""
    return step(step(ptr, row, row_stride), head, head_stride)


@triton.jit
def tile_and_head(tile_ptr, num_heads, WIDTH: tl.constexpr):
    """The table row of this program's tile, and the program's head.

    Programs of one tile are adjacent: a table starts with the longest tiles, whose heads should all start first.
    """
    program = tl.program_id(0)
    return tile_ptr + program // num_heads * WIDTH, program % num_heads


@triton.jit
def load_rows(ptr, at, d, stride, num_rows, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads rows ``at`` [n] as [n, BLOCK_D]: 0 beyond column D and, if MASKED, for rows >= num_rows."""
    place = ptr + at[:, None] * stride + d[None, :]
    if MASKED:
        if D == BLOCK_D:
            x = tl.load(place, mask=at[:, None] < num_rows, other=0.0)
        else:
            x = tl.load(place, mask=(at[:, None] < num_rows) & (d[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            x = tl.load(place)
        else:
            x = tl.load(place, mask=d[None, :] < D, other=0.0)
    return x


@triton.jit
def store_rows(ptr, at, d, stride, num_rows, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores x [n, BLOCK_D] to the rows ``at`` < num_rows, up to column D."""
    place = ptr + at[:, None] * stride + d[None, :]
    x = x.to(ptr.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(place, x, mask=at[:, None] < num_rows)
    else:
        tl.store(place, x, mask=(at[:, None] < num_rows) & (d[None, :] < D))


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    out_ptr,  # [T, H, D] contiguous
    dout_ptr,  # [T, H, D] last dimension contiguous
    delta_ptr,  # [H, T] f32
    stride_dt, stride_dh,
    T, H,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % H).to(tl.int64)
    start = (tl.program_id(0) // H).to(tl.int64) * BLOCK_Q
    at = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    # written out: by row_of_head sm_100 keeps 8 bytes on the stack (float16, D = 128)
    out = load_rows(out_ptr + (start * H + head) * D, at, d, H * D, T - start, True, D, BLOCK_D)
    dout = load_rows(dout_ptr + start * stride_dt + head * stride_dh, at, d, stride_dt, T - start, True, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + start + at, delta, mask=at < T - start)


@triton.jit(do_not_specialize=["num_slots"])
def add_pieces_kernel(
    partial_ptr,  # [2, slots, K, block_k, D] f32
    dk_ptr,  # [T, K, D] contiguous
    dv_ptr,  # [T, K, D] contiguous
    tile_ptr,  # [tiles, 4] i32: first key, end of its keys, first and last slot
    K, num_slots, block_k,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first_row = program % (block_k // BLOCK_ROWS) * BLOCK_ROWS
    program = program // (block_k // BLOCK_ROWS)
    kv_head = program % K
    tile_ptr += program // K * 4
    key = tl.load(tile_ptr)
    num_keys = tl.load(tile_ptr + 1) - key - first_row
    at = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    dk = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    head_stride = block_k * D
    partial_ptr += first_row * D
    for slot in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):  # ascending, so that sums are reproducible
        dk_part_ptr = row_of_head(partial_ptr, slot, kv_head, K * head_stride, head_stride)
        dv_part_ptr = row_of_head(partial_ptr, slot + num_slots, kv_head, K * head_stride, head_stride)
        dk += load_rows(dk_part_ptr, at, d, D, num_keys, True, D, BLOCK_D)
        dv += load_rows(dv_part_ptr, at, d, D, num_keys, True, D, BLOCK_D)
    dk_ptr = row_of_head(dk_ptr, key + first_row, kv_head, K * D, D)
    dv_ptr = row_of_head(dv_ptr, key + first_row, kv_head, K * D, D)
    store_rows(dk_ptr, at, d, K * D, num_keys, dk, D, BLOCK_D)
    store_rows(dv_ptr, at, d, K * D, num_keys, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "N"])
def merge_kernel(
    out_ptr,  # [T, H, D] contiguous; merged in place
    lse_ptr,  # [H, T] f32 (f64 where out is), natural; merged in place
    part_ptr,  # [N, H, D] contiguous
    part_lse_ptr,  # [H, N]
    row_ptr,  # [N] i64: the row of out for each row of the part; distinct
    T, N, H,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % H).to(tl.int64)
    start = (tl.program_id(0) // H).to(tl.int64) * BLOCK_ROWS
    at = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    is_row = at < N - start
    row = tl.load(row_ptr + start + at, mask=is_row, other=0)
    own_lse = tl.load(lse_ptr + head * T + row, mask=is_row, other=0.0)
    part_lse = tl.load(part_lse_ptr + head * N + start + at, mask=is_row, other=0.0)
    top = tl.maximum(own_lse, part_lse)
    own_weight = tl.exp(own_lse - top)
    part_weight = tl.exp(part_lse - top)
    total = own_weight + part_weight
    is_value = is_row[:, None] & (d[None, :] < D)
    place = row_of_head(out_ptr, row[:, None], head, H * D, D) + d[None, :]
    own = tl.load(place, mask=is_value, other=0.0).to(top.dtype)
    part_ptr = row_of_head(part_ptr, start, head, H * D, D)
    part = load_rows(part_ptr, at, d, H * D, N - start, True, D, BLOCK_D).to(top.dtype)
    merged = own * (own_weight / total)[:, None] + part * (part_weight / total)[:, None]
    tl.store(place, merged.to(out_ptr.dtype.element_ty), mask=is_value)
    tl.store(lse_ptr + head * T + row, top + tl.log(total), mask=is_row)


# -- launches
@on_its_device
def deltas(out_THD: Tensor, dout_THD: Tensor, lse_HT: Tensor) -> Tensor:
    """[H, T] dot products of the rows of out, contiguous, and dout, both [T, H, D]; in the dtype of the LSE [H, T]."""
    check_contiguous(out=out_THD, lse=lse_HT)
    check_unit_stride(dout=dout_THD)
    num_tok, num_heads, dim = out_THD.shape
    delta_HT = torch.empty_like(lse_HT)
    delta_kernel[(triton.cdiv(num_tok, DELTA_ROWS) * num_heads,)](
        out_THD, dout_THD, delta_HT, *dout_THD.stride()[:2], num_tok, num_heads,
        D=dim, BLOCK_Q=DELTA_ROWS, BLOCK_D=block_d(dim), num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return delta_HT


@on_its_device
def add_pieces(partial: Tensor, dk_TKD: Tensor, dv_TKD: Tensor, tiles: Tensor) -> None:
    """Writes sums of the partials [2, slots, K, block_k, D] to the rows of dk and dv [T, K, D] listed in ``tiles``."""
    check_contiguous(partial=partial, dk=dk_TKD, dv=dv_TKD, tiles=tiles)
    _, num_slots, num_heads, block_k, dim = partial.shape
    add_pieces_kernel[(len(tiles) * num_heads * (block_k // ADD_ROWS),)](
        partial, dk_TKD, dv_TKD, tiles, num_heads, num_slots, block_k,
        D=dim, BLOCK_ROWS=ADD_ROWS, BLOCK_D=block_d(dim), num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


@on_its_device
def merge(out_THD: Tensor, lse_HT: Tensor, part_NHD: Tensor, part_lse_HN: Tensor, rows_N: Tensor) -> None:
    """Merges part [N, H, D] with its LSE [H, N] into the rows ``rows_N`` of out and LSE, in place. All contiguous."""
    check_contiguous(out=out_THD, lse=lse_HT, part=part_NHD, part_lse=part_lse_HN, rows=rows_N)
    num_tok, num_heads, dim = out_THD.shape
    merge_kernel[(triton.cdiv(len(rows_N), MERGE_ROWS) * num_heads,)](
        out_THD, lse_HT, part_NHD, part_lse_HN, rows_N, num_tok, len(rows_N), num_heads,
        D=dim, BLOCK_ROWS=MERGE_ROWS, BLOCK_D=block_d(dim), num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


# -- variants for kernels/aot.py
def variants(arch: int) -> list[Variant]:
    """For the largest head dimension, which needs the most registers, and for one that is masked."""
    found = []
    for dtype, dim in (("bf16", 40), ("bf16", 128), ("fp16", 128), ("fp32", 128)):
        found.append(variant(delta_kernel, dtype, dim, NUM_WARPS, 3, BLOCK_Q=DELTA_ROWS))
        found.append(variant(add_pieces_kernel, dtype, dim, NUM_WARPS, 3, BLOCK_ROWS=ADD_ROWS))
        found.append(variant(merge_kernel, dtype, dim, NUM_WARPS, 3, BLOCK_ROWS=MERGE_ROWS))
    return found


FLOAT32 = ("lse_ptr", "part_lse_ptr", "delta_ptr", "partial_ptr")
TABLES = ("tile_ptr", "full_ptr", "block_ptr")


def variant(kernel: Any, dtype: str, dim: int, num_warps: int, num_stages: int, **blocks: int) -> Variant:
    """A variant of a packed attention kernel for head dimension ``dim``; argument types follow from argument names."""
    constants = {"D": dim, "BLOCK_D": block_d(dim), **blocks}
    signature = {}
    for name in kernel.arg_names:
        if name in TABLES:
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name == "row_ptr" else "*fp32" if name in FLOAT32 else f"*{dtype}"
        elif name not in constants:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return Variant(
        kernel,
        f"{dtype}, D {dim}",
        signature,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        num_warps=num_warps,
        num_stages=num_stages,
        unaligned=("T", "N", "H", "K", "repeats", "num_slots"),
    )
