"""bit_hash: every implementation returns the value computed with Python's integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.bit_hash import BLOCK_BYTES, bit_hash, bit_hash_ref

needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex128]


def truth(data: bytes) -> int:
    """From the formula, in Python's integers, as a signed word."""
    total = 0
    for block in range(-(-len(data) // BLOCK_BYTES)):
        part = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        total += (2 * block + 1) * sum(int.from_bytes(part[i : i + 8], "little") for i in range(0, BLOCK_BYTES, 8))
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def random_bits(num: int, dtype: torch.dtype, offset: int) -> Tensor:
    """[num] of any bits, NaN among them, that begin ``offset`` numbers into their storage."""
    if dtype == torch.bool:
        return torch.randint(0, 2, (num + offset,)).bool()[offset:]
    num_bytes = (num + offset) * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).view(dtype)[offset:]


@needs_native
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 700), st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 2**31))
def test_both_bodies_give_the_number_of_the_formula(num: int, dtype: torch.dtype, offset: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensor = random_bits(num, dtype, offset)
    wanted = truth(tensor.view(torch.uint8).numpy().tobytes())
    assert bit_hash_ref(tensor).item() == wanted
    with backend.using("bit_hash=native"):
        found = bit_hash(tensor)
    assert (found.item(), found.dtype, found.shape) == (wanted, torch.int64, ())


@pytest.mark.parametrize("body", ["reference", pytest.param("native", marks=needs_native)])
def test_strides_and_gradients_do_not_matter(body: str) -> None:
    tensor = torch.randn(10, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with backend.using(f"bit_hash={body}"):
        assert bit_hash(tensor.T) == bit_hash(tensor.T.contiguous()) != bit_hash(tensor)
        assert bit_hash(tensor[:, 2]) == bit_hash(tensor[:, 2].clone())
        assert bit_hash(tensor[0, 0]) == bit_hash(tensor[:1, 0])
        assert not bit_hash(tensor).requires_grad
        assert bit_hash(torch.empty(0)) == 0
