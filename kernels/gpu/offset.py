"""linear_loss with the softmax in the epilogue of the unembedding's matrix product, without a running maximum.

The logit of the target is computed before the product, as the dot product of two rows. With k = z[y] as a row's offset

    E[v]    = exp(z[v] - k)            one product with an epilogue; stored in the dtype of the weights
    S       = sum_v E[v]               logprob = -log S
    W       = sum_v E[v] (z[v] - k)    entropy = log S - W / S
    dz[v]   = (dlogprob / T) ((v == y) - E[v] / S)

so both gradients of the layer are plain products with E: dX = s (E' W) and dW = E'^T (s X), where s = -dlogprob / (T S)
and E' is E with E[y] - S in the target's place. E is unusable only if the target is 69 nats (2^100) less likely than
all other tokens together; ``rescue_kernel`` recomputes such rows, and rows that are not finite, with the LSE as offset.

In bfloat16 log p comes from the rounded E, so that the gradient of an entropy is exact to about 2^-8 of p, not of
itself: where p is near 1 it is small beside p. Losses of log-probabilities alone take no logarithm of E.

Partial sums per tile of columns are added in ascending order, without atomics: a row's bits do not depend on the batch.
The implementation of ``linear_loss`` named "offset"; bfloat16 or float32, D a multiple of 8, no bias.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomorph.kernels.gpu import offset_rows
from isomorph.kernels.gpu.launch import on_its_device
from isomorph.kernels.gpu.offset_rows import Stats, rescue_, target_logits
from isomorph.kernels.gpu.variant import Variant
from isomorph.kernels.strides import check_contiguous, check_unit_stride

LOG2_E = math.log2(math.e)
GROUP_M = 8  # row tiles that read the same panel of the unembedding while it is in the L2 cache


class Tile(NamedTuple):
    """Tile sizes and launch options of ``exp_kernel``; not tuned at run time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By architecture. Chosen to compile without spills; only those of sm_90 were measured.
MAIN = {
    80: Tile(128, 128, 64, 8, 2),
    90: Tile(128, 256, 64, 8, 3),
    100: Tile(128, 256, 64, 8, 3),
    120: Tile(128, 128, 64, 8, 2),
}
MAIN_FLOAT32 = Tile(32, 64, 32, 4, 2)
TAIL_BLOCK_N = 128
USUAL_DIM = 1536  # of the hidden rows, where the bound of the machine code is computed


@triton.jit
def exp_kernel(
    hidden_ptr,  # [M, D] bf16 | f32, contiguous
    weight_ptr,  # [V, D] rows of this launch
    logit_ptr,  # [M] f32, raw logit of the target
    exp_ptr,  # [M, V] of row stride stride_e, written if STORE
    sum_ptr,  # [column tiles, M] f32
    weighted_ptr,  # [column tiles, M] f32
    M,
    V,
    D,
    stride_e,
    scale,  # log2(e) / temperature
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_TAIL: tl.constexpr,  # V is not a multiple of BLOCK_N: columns beyond V are masked
    STORE: tl.constexpr,
):
    hidden = tl.make_tensor_descriptor(hidden_ptr, shape=[M, D], strides=[D, 1], block_shape=[BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight_ptr, shape=[V, D], strides=[D, 1], block_shape=[BLOCK_N, BLOCK_K])
    if STORE:
        out = tl.make_tensor_descriptor(exp_ptr, shape=[M, V], strides=[stride_e, 1], block_shape=[BLOCK_M, BLOCK_N])
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(V, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        first_m = tile // (GROUP_M * num_n) * GROUP_M
        group = tl.minimum(num_m - first_m, GROUP_M)
        m = first_m + tile % (GROUP_M * num_n) % group
        n = tile % (GROUP_M * num_n) // group
        logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(D, BLOCK_K)):
            x = hidden.load([m * BLOCK_M, k * BLOCK_K])
            w = weight.load([n * BLOCK_N, k * BLOCK_K])
            logits = tl.dot(x, w.T, logits, input_precision="ieee")
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = tl.load(logit_ptr + row, mask=row < M, other=0.0)
        z = (logits - offset[:, None]) * scale
        e = tl.exp2(z)
        ez = e * z
        if IS_TAIL:
            inside = n * BLOCK_N + tl.arange(0, BLOCK_N) < V
            e = tl.where(inside[None, :], e, 0.0)
            ez = tl.where(inside[None, :], ez, 0.0)
        at = n.to(tl.int64) * M + row
        tl.store(sum_ptr + at, tl.sum(e, 1), mask=row < M)
        tl.store(weighted_ptr + at, tl.sum(ez, 1), mask=row < M)
        if STORE:
            out.store([m * BLOCK_M, n * BLOCK_N], e.to(exp_ptr.dtype.element_ty))


@triton.jit
def reduce_kernel(
    sum_ptr,  # [column tiles, M] f32
    weighted_ptr,  # [column tiles, M] f32
    logit_ptr,  # [M] f32
    total_ptr,  # [M] f32: S
    at_target_ptr,  # [M] f32: E[y], which is 1 here
    logprob_ptr,  # [M] f32, likewise entropy and lse
    entropy_ptr,
    lse_ptr,
    M,
    num_tiles,
    inv_temperature,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(num_tiles):  # ascending, so that sums are reproducible
        at = tl.cast(tile, tl.int64) * M + row
        total += tl.load(sum_ptr + at, mask=inside, other=1.0)
        weighted += tl.load(weighted_ptr + at, mask=inside, other=0.0)
    log_total = tl.log(total)
    tl.store(total_ptr + row, total, mask=inside)
    tl.store(at_target_ptr + row, tl.full((BLOCK_M,), 1.0, tl.float32), mask=inside)
    tl.store(logprob_ptr + row, -log_total, mask=inside)
    tl.store(entropy_ptr + row, log_total - 0.6931471805599453 * (weighted / total), mask=inside)
    z_y = tl.load(logit_ptr + row, mask=inside, other=0.0) * inv_temperature
    tl.store(lse_ptr + row, z_y + log_total, mask=inside)


@on_its_device
def exp_chunk(
    hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float, exp_MV: Tensor | None
) -> Stats:
    """Returns the statistics of the rows; writes E to ``exp_MV`` [M, V] from ``new_buffer`` unless it is None.

    hidden [M, D] and weight [V, D] must be contiguous and start at multiples of 16 bytes (``strides.aligned``);
    target [M] int64. Raises ValueError otherwise.
    """
    check_contiguous(hidden=hidden_MD, weight=weight_VD, target=target_M)
    for name, x in (("hidden", hidden_MD), ("weight", weight_VD)):
        if x.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes, as tensor descriptors require; clone it")
    if exp_MV is not None:
        check_unit_stride(exp=exp_MV)
    num_rows, num_vocab = len(hidden_MD), len(weight_VD)
    new = hidden_MD.new_empty
    stats = Stats(*(new(num_rows, dtype=torch.float32) for _ in Stats._fields))
    if not num_rows:
        return stats
    logit_M = target_logits(hidden_MD, weight_VD, target_M)
    tile = _tile(hidden_MD)
    num_main, num_tail = _column_tiles(num_vocab, tile)
    sums, weighted = (new((num_main + num_tail, num_rows), dtype=torch.float32) for _ in range(2))
    triton.set_allocator(_allocate)  # a context variable: autograd's threads do not inherit it
    main_cols = num_main * tile.block_n
    if num_main:
        _launch_exp(hidden_MD, weight_VD[:main_cols], logit_M, exp_MV, sums, weighted, temperature, tile, False)
    if num_tail:
        tail = tile._replace(block_n=min(tile.block_n, TAIL_BLOCK_N))
        exp_tail = None if exp_MV is None else exp_MV[:, main_cols:]
        parts = sums[num_main:], weighted[num_main:]
        _launch_exp(hidden_MD, weight_VD[main_cols:], logit_M, exp_tail, *parts, temperature, tail, True)
    reduce_kernel[(triton.cdiv(num_rows, 128),)](
        sums, weighted, logit_M, stats.total, stats.at_target, stats.logprob, stats.entropy, stats.lse, num_rows,
        num_main + num_tail, 1.0 / temperature, BLOCK_M=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    rescue_(hidden_MD, weight_VD, logit_M, exp_MV, stats, temperature)
    return stats


def _launch_exp(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    logit_M: Tensor,
    exp_MV: Tensor | None,
    sums: Tensor,
    weighted: Tensor,
    temperature: float,
    tile: Tile,
    is_tail: bool,
) -> None:
    num_rows, dim = hidden_MD.shape
    num_vocab = weight_VD.shape[0]
    tiles = triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_vocab, tile.block_n)
    exp_kernel[(min(tiles, _num_programs(hidden_MD.device)),)](
        hidden_MD, weight_VD, logit_M, exp_MV, sums, weighted, num_rows, num_vocab, dim,
        0 if exp_MV is None else exp_MV.stride(0), LOG2_E / temperature,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, IS_TAIL=is_tail,
        STORE=exp_MV is not None, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def refusal(hidden_TD: Tensor, has_bias: bool) -> str:
    """Why this implementation does not support these operands; empty if it does."""
    if has_bias:
        return "it has no bias"
    if hidden_TD.dtype not in (torch.bfloat16, torch.float32):
        return f"it needs bfloat16 or float32, got {hidden_TD.dtype}"
    return "" if hidden_TD.shape[1] % 8 == 0 else f"D must be a multiple of 8, got {hidden_TD.shape[1]}"


def new_buffer(weight_VD: Tensor, num_rows: int) -> Tensor:
    """[num_rows, V] for E, with rows on 16-byte boundaries as tensor descriptors require."""
    num_vocab = weight_VD.shape[0]
    return weight_VD.new_empty((num_rows, -(-num_vocab // 8) * 8))[:, :num_vocab]


def _column_tiles(num_vocab: int, tile: Tile) -> tuple[int, int]:
    num_main = num_vocab // tile.block_n
    rest = num_vocab - num_main * tile.block_n
    return num_main, triton.cdiv(rest, min(tile.block_n, TAIL_BLOCK_N))


def _tile(hidden_MD: Tensor) -> Tile:
    if hidden_MD.dtype == torch.float32:
        return MAIN_FLOAT32
    major, minor = torch.cuda.get_device_capability(hidden_MD.device)
    known = [arch for arch in MAIN if arch <= 10 * major + minor]
    return MAIN[max(known)] if known else MAIN[min(MAIN)]


def _num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)


# -- variants for kernels/aot.py
def variants(arch: int) -> list[Variant]:
    """Every launch configuration of this file and of ``offset_rows`` for architecture ``arch``."""
    found = offset_rows.variants(arch)
    for dtype, tile in (("bf16", MAIN[arch]), ("fp32", MAIN_FLOAT32)):
        for is_tail in (False, True):
            for store in (False, True):
                found.append(_exp_variant(dtype, tile, is_tail, store))
    reduce = {
        **{name: "*fp32" for name in ("sum_ptr", "weighted_ptr", "logit_ptr", "total_ptr", "at_target_ptr")},
        **{name: "*fp32" for name in ("logprob_ptr", "entropy_ptr", "lse_ptr")},
        "M": "i32", "num_tiles": "i32", "inv_temperature": "fp32",
    }  # fmt: skip
    found.append(Variant(reduce_kernel, "fp32", reduce, {"BLOCK_M": 128}, num_warps=4))
    return found


def _exp_variant(dtype: str, tile: Tile, is_tail: bool, store: bool) -> Variant:
    block_n = min(tile.block_n, TAIL_BLOCK_N) if is_tail else tile.block_n
    signature = {
        "hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "logit_ptr": "*fp32", "exp_ptr": f"*{dtype}",
        "sum_ptr": "*fp32", "weighted_ptr": "*fp32", "M": "i32", "V": "i32", "D": "i32", "stride_e": "i32",
        "scale": "fp32",
    }  # fmt: skip
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": block_n, "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M, "IS_TAIL": is_tail,
        "STORE": store,
    }  # fmt: skip
    return Variant(
        exp_kernel,
        f"{dtype}, {'tail' if is_tail else 'main'}{', E stored' if store else ''}",
        signature,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        uses_dot=dtype == "bf16",  # float32 in IEEE precision has no matrix instruction
        unaligned=("M", "V") if is_tail else ("M",),
        peak="matrix" if dtype == "bf16" else "fp32",
        inner_iterations=USUAL_DIM // tile.block_k,
    )
