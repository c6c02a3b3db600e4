"""decode_attention in Triton: split-KV, with shared prompts. The specification is ``kernels/decode_attention.py``.

Keys are split into pieces of a fixed number of entries, to have enough programs for a small batch:

    partial    per slot of a tile of rows, KV head and piece: weighted values, sum of weights, largest score
    merge      per row and head: the pieces of its prompt, then its own, in ascending order

A tile is a fixed number of adjacent rows. In a tile the program of the first row of each slot processes all rows of
that slot, and the programs of the others return at once. So a prompt is read once per tile for any grouping of rows,
and the grid depends on shapes only: the host reads no values, and a CUDA graph can be replayed with other slots and
lengths. Programs for pieces beyond a row's length return at once. No atomics; a row's bits do not depend on the others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu.attention_rows import load_rows, row_of_head
from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.strides import unit_stride
from isomorph.kernels.types import CachedKV

PIECE = 256  # entries; not tuned, because like BLOCK_L it changes the bits of the results
MAX_QUERIES = {2: 64, 4: 16}  # by bytes per element. Per program: rows of a tile times query heads per KV head
BLOCK_L = {2: 64, 4: 16}  # IEEE float32 has no matrix instruction: its operands are in registers
LOG2_E = 1.4426950408889634


@triton.jit
def load_queries(row_ptr, d, inside, DIM: tl.constexpr):
    """Columns ``d`` of the queries, 0 beyond DIM and where not ``inside``."""
    return tl.load(row_ptr[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def scores(
    q, q_upper, k_ptr, at, stride, stop, scale, HALVES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Scaled products of the queries with the keys ``at`` < stop; HALVES: q and q_upper are halves of the columns."""
    if HALVES:
        half = tl.arange(0, BLOCK_D // 2)
        k = load_rows(k_ptr, at, half, stride, stop, True, DIM, BLOCK_D)
        k_upper = load_rows(k_ptr, at, half + BLOCK_D // 2, stride, stop, True, DIM, BLOCK_D)
        # scaled before the addition: the compiler makes one chain of the sum of two bare products
        score = tl.dot(q, k.T, input_precision="ieee") * scale
        score += tl.dot(q_upper, k_upper.T, input_precision="ieee") * scale
    else:
        k = load_rows(k_ptr, at, tl.arange(0, BLOCK_D), stride, stop, True, DIM, BLOCK_D)
        score = tl.dot(q, k.T, input_precision="ieee") * scale
    return score


@triton.jit
def partial_kernel(
    q_ptr,  # [B, H, D] bf16 | f16 | f32, last dimension contiguous, as for the keys and values
    k_ptr,  # [S, K, L, D]
    v_ptr,  # [S, K, L, D]
    slot_ptr,  # [B] i64
    len_ptr,  # [B] i64
    acc_ptr,  # [B, H, pieces, D] f32
    top_ptr,  # [B, H, pieces] f32, in units of log 2
    total_ptr,  # [B, H, pieces] f32
    q_stride_b, q_stride_h,
    k_stride_s, k_stride_k, k_stride_l,
    v_stride_s, v_stride_k, v_stride_l,
    B, H, L,
    first_piece,  # index of this cache's first piece in the partial results
    num_pieces,
    scale,  # times log2 e
    ROWS: tl.constexpr,
    REPEATS: tl.constexpr,  # H / K
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PIECE: tl.constexpr,
    HALVES: tl.constexpr,  # a score is the sum of two products: float32 adds along D one by one
):  # fmt: skip
    b = tl.program_id(0)
    head = tl.program_id(1)
    piece = tl.program_id(2)
    slot = tl.load(slot_ptr + b)
    tile = b // ROWS * ROWS
    row_R = tile + tl.arange(0, ROWS)
    slot_R = tl.load(slot_ptr + row_R, mask=row_R < B, other=-1)
    if tl.min(tl.where(slot_R == slot, row_R, B), 0) != b:
        return  # the program of an earlier row of the tile does the work
    query = tl.arange(0, BLOCK_Q)
    row = tile + query // REPEATS
    inside = (query < ROWS * REPEATS) & (row < B)
    inside = inside & (tl.load(slot_ptr + row, mask=inside, other=-1) == slot)
    length = tl.minimum(tl.load(len_ptr + row, mask=inside, other=0), L)
    longest = tl.max(length, 0)
    start = piece * PIECE
    if start >= longest:
        return
    d = tl.arange(0, BLOCK_D)
    q_head = head * REPEATS + query % REPEATS
    q_row_ptr = row_of_head(q_ptr, row, q_head, q_stride_b, q_stride_h)
    if HALVES:
        q = load_queries(q_row_ptr, tl.arange(0, BLOCK_D // 2), inside, DIM)
        q_upper = load_queries(q_row_ptr, tl.arange(0, BLOCK_D // 2) + BLOCK_D // 2, inside, DIM)
    else:
        q = load_queries(q_row_ptr, d, inside, DIM)
        q_upper = q
    k_ptr = row_of_head(k_ptr, slot, head, k_stride_s, k_stride_k)
    v_ptr = row_of_head(v_ptr, slot, head, v_stride_s, v_stride_k)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    stop = tl.minimum(start + PIECE, longest)
    for first in range(start, stop, BLOCK_L):
        at = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
        score = scores(q, q_upper, k_ptr, at, k_stride_l, stop, scale, HALVES, DIM, BLOCK_D)
        score = tl.where(at[None, :] < length[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(top - shift)
        v = load_rows(v_ptr, at, d, v_stride_l, stop, True, DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    written = inside & (start < length)
    out = (row.to(tl.int64) * H + q_head) * num_pieces + first_piece + piece
    tl.store(top_ptr + out, top, mask=written)
    tl.store(total_ptr + out, total, mask=written)
    tl.store(acc_ptr + out[:, None] * DIM + d[None, :], acc, mask=written[:, None] & (d < DIM)[None, :])


@triton.jit
def merge_kernel(
    acc_ptr,  # [B, H, pieces, D] f32; top and total as in partial_kernel
    top_ptr,
    total_ptr,
    prompt_len_ptr,  # [B] i64
    own_len_ptr,  # [B] i64
    out_ptr,  # [B, H, D], contiguous
    H,
    prompt_L, own_L,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    own_first = tl.cdiv(prompt_L, PIECE)
    num_prompt = tl.cdiv(tl.minimum(tl.load(prompt_len_ptr + b), prompt_L), PIECE)
    num_own = tl.cdiv(tl.minimum(tl.load(own_len_ptr + b), own_L), PIECE)
    at = (b * H + head) * (own_first + tl.cdiv(own_L, PIECE))
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(0, num_prompt + num_own):
        piece = at + tl.where(i < num_prompt, i, own_first + i - num_prompt)
        piece_top = tl.load(top_ptr + piece)
        new_top = tl.maximum(top, piece_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - shift)
        weight = tl.exp2(piece_top - shift)
        total = total * shrink + tl.load(total_ptr + piece) * weight
        acc = acc * shrink + tl.load(acc_ptr + piece * DIM + d, mask=d < DIM, other=0.0) * weight
        top = new_top
    out = tl.where(num_prompt + num_own > 0, acc / total, 0.0)
    tl.store(row_of_head(out_ptr, b, head, H * DIM, DIM) + d, out, mask=d < DIM)


# -- launch
@on_its_device
def decode_attention(q_BHD: Tensor, prompt: CachedKV, own: CachedKV, scale: float) -> Tensor:
    """Returns [B, H, D]; arguments as for the op, which has checked them. bfloat16, float16 or float32."""
    if q_BHD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"decode_attention in Triton supports bfloat16, float16 and float32, got {q_BHD.dtype}; otherwise use "
            'isomorph.kernels.backend.using("decode_attention=torch")'
        )
    num_rows, num_heads, dim = q_BHD.shape
    out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    if not num_rows:
        return out_BHD
    num_pieces = [triton.cdiv(cache.k_SKLD.shape[2], PIECE) for cache in (prompt, own)]
    partial_shape = (num_rows, num_heads, max(1, sum(num_pieces)))
    acc = q_BHD.new_empty((*partial_shape, dim), dtype=torch.float32)
    top, total = (q_BHD.new_empty(partial_shape, dtype=torch.float32) for _ in range(2))
    num_kv_heads = prompt.k_SKLD.shape[1]
    repeats = num_heads // num_kv_heads
    q_BHD = unit_stride(q_BHD)
    block_d = triton.next_power_of_2(max(16, dim))
    for cache, first_piece, num, rows in zip(
        (prompt, own), (0, num_pieces[0]), num_pieces, (prompt_rows(repeats, q_BHD.element_size()), 1), strict=True
    ):
        if not num:
            continue
        k, v = unit_stride(cache.k_SKLD), unit_stride(cache.v_SKLD)
        partial_kernel[(num_rows, num_kv_heads, num)](
            q_BHD, k, v, cache.slot_B.contiguous(), cache.len_B.contiguous(), acc, top, total,
            q_BHD.stride(0), q_BHD.stride(1),
            k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
            num_rows, num_heads, k.shape[2], first_piece, partial_shape[2], scale * LOG2_E,
            ROWS=rows, REPEATS=repeats, DIM=dim, BLOCK_D=block_d, enable_fp_fusion=True,
            **_blocks(rows * repeats, q_BHD.element_size(), block_d),
        )  # fmt: skip
    merge_kernel[(num_rows, num_heads)](
        acc, top, total, prompt.len_B.contiguous(), own.len_B.contiguous(), out_BHD, num_heads,
        prompt.k_SKLD.shape[2], own.k_SKLD.shape[2],
        DIM=dim, BLOCK_D=block_d, PIECE=PIECE, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out_BHD


def prompt_rows(repeats: int, itemsize: int) -> int:
    """Rows of a tile: the largest power of 2 with at most MAX_QUERIES queries."""
    rows = 1
    while 2 * rows * repeats <= MAX_QUERIES[itemsize]:
        rows *= 2
    return rows


def _blocks(num_queries: int, itemsize: int, block_d: int) -> dict[str, Any]:
    """Compile-time constants of a program. Queries are padded to a power of 2, at least 16 for a matrix instruction.

    A product in float32 has no matrix instruction: a lane adds its terms one after the other, whose error grows with
    their number. Two halves are two shorter chains.
    """
    block_q = triton.next_power_of_2(max(16, num_queries))
    num_warps = 8 if block_q >= 64 else 4
    halves = itemsize == 4 and block_d >= 32
    return {
        "BLOCK_Q": block_q, "BLOCK_L": BLOCK_L[itemsize], "PIECE": PIECE, "HALVES": halves,
        "num_warps": num_warps, "num_stages": 2,
    }  # fmt: skip


# -- variants for kernels/aot.py
HEADS = ((64, 3), (128, 7), (64, 4), (64, 7), (128, 2), (128, 4), (128, 6))  # head dimension, query heads per KV head


def variants(arch: int) -> list[Variant]:
    """The dtypes, head dimensions and ratios of heads of the supported model families."""
    found = []
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for dim, repeats in HEADS if dtype == "bf16" else HEADS[:2]:
            for name, rows in (("prompt", prompt_rows(repeats, itemsize)), ("own", 1)):
                found.append(_partial_variant(arch, dtype, itemsize, dim, repeats, name, rows))
    merge = {
        "acc_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32", "prompt_len_ptr": "*i64", "own_len_ptr": "*i64",
        "H": "i32", "prompt_L": "i32", "own_L": "i32",
    }  # fmt: skip
    for dtype in ("bf16", "fp16", "fp32"):
        for dim in (64, 128):
            signature = {**merge, "out_ptr": f"*{dtype}"}
            constants = {"DIM": dim, "BLOCK_D": dim, "PIECE": PIECE}
            label, unaligned = f"{dtype}, D {dim}", ("H", "prompt_L", "own_L")
            found.append(Variant(merge_kernel, label, signature, constants, num_warps=1, unaligned=unaligned))
    return found


def _partial_variant(arch: int, dtype: str, itemsize: int, dim: int, repeats: int, name: str, rows: int) -> Variant:
    signature = {
        **{f"{x}_ptr": f"*{dtype}" for x in "qkv"}, "slot_ptr": "*i64", "len_ptr": "*i64", "acc_ptr": "*fp32",
        "top_ptr": "*fp32", "total_ptr": "*fp32", "q_stride_b": "i32", "q_stride_h": "i32",
        **{f"{x}_stride_{axis}": "i32" for x in "kv" for axis in "skl"},
        "B": "i32", "H": "i32", "L": "i32", "first_piece": "i32", "num_pieces": "i32", "scale": "fp32",
    }  # fmt: skip
    blocks = _blocks(rows * repeats, itemsize, dim)
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    return Variant(
        partial_kernel,
        f"{name}, {dtype}, D {dim}, {repeats} heads per KV head",
        signature,
        {"ROWS": rows, "REPEATS": repeats, "DIM": dim, "BLOCK_D": dim, **blocks},
        uses_dot=dtype != "fp32",
        dot_rows=blocks["BLOCK_Q"],
        stack_allowed={120: 32}.get(arch, 8),  # a convergence barrier of the loop; on sm_120 4 stores and 4 loads
        unaligned=("B", "H", "L", "first_piece", "num_pieces"),
        **options,
    )
