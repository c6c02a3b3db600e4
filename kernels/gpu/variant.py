"""One launch configuration of one Triton kernel: what ``kernels/aot.py`` compiles and inspects without a GPU."""

from dataclasses import dataclass
from typing import Any

FLOAT_TYPES = ("bf16", "fp16", "fp32", "fp64")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block may use; Triton does not check
ARCHS = tuple(SHARED_LIMIT)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with the types of its arguments and its compile-time constants.

    Example: ``Variant(add_rows_kernel, "fp32", {"into_ptr": "*fp32", "D": "i32"}, {"BLOCK_D": 1024}, num_warps=4)``
    """

    kernel: Any  # what @triton.jit made
    label: str  # tells the variants of one kernel apart
    signature: dict[str, str]  # argument -> Triton type, "*bf16", "i32"; constants are not in it
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    uses_dot: bool = False  # matrix instructions must be in the code
    dot_rows: int = 64  # of the product; below 64 every GPU multiplies with HMMA
    barriers: int = 0  # that must be in the code: no interpreter shows that one is missing
    unaligned: tuple[str, ...] = ()  # pointers and sizes that are no multiple of 16; all others are compiled as such
    stack_allowed: int = 0  # bytes of stack that are accepted, with the reason beside the number

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__} [{self.label}]"
