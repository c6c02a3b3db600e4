"""Kernels that must fail a gate of kernels/aot.py, one per gate. test_aot.py runs this file in its own process."""

import json
import sys

import triton
import triton.language as tl

from isomorph.kernels.aot import compile_variant
from isomorph.kernels.gpu.variant import Variant


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + row[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + column[None, :])
        if DOT:
            total = tl.dot(a, b, total)
        else:
            total += tl.sum(a, 1)[:, None] + tl.sum(b, 0)[None, :]
    tl.store(c_ptr + row[:, None] * N + column[None, :], total)


@triton.jit
def atomic_kernel(x_ptr, total_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + at, mask=at < N, other=0.0), 0))


@triton.jit
def in_place_kernel(x_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """In place, as the gradient of rows."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + at, 2 * x)


def matmul(label: str, *, m: int, n: int, k: int, stages: int, warps: int, dot: bool = True) -> Variant:
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    constants = {"M": m, "N": n, "BLOCK_K": k, "DOT": dot}
    return Variant(matmul_kernel, label, signature, constants, num_warps=warps, num_stages=stages, uses_dot=True)


BAD = {
    "good": matmul("good", m=128, n=128, k=64, stages=3, warps=8),
    "stack": matmul("stack", m=256, n=256, k=64, stages=2, warps=4),
    "shared": matmul("shared", m=128, n=256, k=128, stages=4, warps=8),
    "no HGMMA": matmul("no dot", m=64, n=64, k=64, stages=2, warps=4, dot=False),
    "atomics": Variant(
        atomic_kernel, "atomic", {"x_ptr": "*fp32", "total_ptr": "*fp32", "N": "i32"}, {"BLOCK": 1024}, num_warps=4
    ),
    "barriers": Variant(
        in_place_kernel, "no barrier", {"x_ptr": "*fp32"}, {"BLOCK": 1024, "BARRIER": False}, num_warps=4, barriers=1
    ),
    "good barrier": Variant(
        in_place_kernel, "barrier", {"x_ptr": "*fp32"}, {"BLOCK": 1024, "BARRIER": True}, num_warps=4, barriers=1
    ),
}

if __name__ == "__main__":
    json.dump({name: compile_variant(variant, 90).failures for name, variant in BAD.items()}, sys.stdout)
