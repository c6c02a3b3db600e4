"""A launch configuration of a Triton kernel, which ``kernels/aot.py`` compiles and checks without a GPU."""

from dataclasses import dataclass
from typing import Any, Literal

FLOAT_TYPES = ("bf16", "fp16", "fp32", "fp64")
SHARED_LIMIT = {
    80: 166_912,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}  # bytes per block, by architecture; Triton does not check
ARCHS = tuple(SHARED_LIMIT)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with the types of its arguments, its compile-time constants, and what its machine code must satisfy.

    Example: ``Variant(add_rows_kernel, "fp32", {"into_ptr": "*fp32", "D": "i32"}, {"BLOCK_D": 1024}, num_warps=4)``
    """

    kernel: Any  # a function decorated with @triton.jit
    label: str  # distinguishes the variants of one kernel
    signature: dict[str, str]  # argument -> Triton type, "*bf16" or "i32"; without the constants
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    uses_dot: bool = False  # the code must contain matrix instructions
    dot_rows: int = 64  # rows of the product; with fewer than 64 the instruction is HMMA on every GPU
    barriers: int = 0  # the code must contain as many; the interpreter does not show a missing one
    unaligned: tuple[str, ...] = ()  # pointers and sizes that need not be multiples of 16; all others are
    peak: Literal["matrix", "fp32", "copy"] = "copy"  # what bounds it at best; see kernels/bound.py
    inner_iterations: int = 1  # of the inner loop for each of the loop around it, at a usual size; 1: the inner alone
    stack_allowed: int = 0  # accepted bytes of stack per thread; give the reason beside the number

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__} [{self.label}]"
