import math

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.decode_attention import decode_attention, decode_attention_ref
from isomorph.kernels.packed_attention import PackedLayout, packed_attention_ref

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
BODIES = [body for body in ("native", "torch", "reference") if body in backend.bodies("decode_attention", "cpu")]


@pytest.fixture(params=BODIES, autouse=True)
def body(request: pytest.FixtureRequest) -> str:
    with backend.using(f"decode_attention={request.param}"):
        yield request.param


def _operands(
    prompts: int, rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, garbage: float = 0.0
) -> Operands:
    """Caches with more room than is used, sliced to less, with garbage beyond each length."""
    gen = torch.Generator().manual_seed(prompts * 100 + rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    prompt_len = torch.randint(1, 18, (prompts,), generator=gen)
    own_len = torch.randint(0, 12, (prompts, rows), generator=gen)
    prompt_kv = [randn(prompts, kv_heads, 30, dim)[:, :, :17] for _ in "kv"]
    own_kv = [randn(prompts, rows, kv_heads, 20, dim)[:, :, :, :11] for _ in "kv"]
    for cache in prompt_kv:
        cache.masked_fill_((torch.arange(17) >= prompt_len[:, None])[:, None, :, None], garbage)
    for cache in own_kv:
        cache.masked_fill_((torch.arange(11) >= own_len[..., None])[:, :, None, :, None], garbage)
    return randn(prompts, rows, heads, dim) * 2, *prompt_kv, prompt_len, *own_kv, own_len


def _truth(operands: Operands, scale: float) -> Tensor:
    """The last query of each sequence, by packed attention in float64."""
    q, k_prompt, v_prompt, prompt_len, k_own, v_own, own_len = operands
    prompts, rows, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for p in range(prompts):
        for g in range(rows):
            k, v = (
                torch.cat([a[p, :, : prompt_len[p]], b[p, g, :, : own_len[p, g]]], 1).transpose(0, 1).double()
                for a, b in ((k_prompt, k_own), (v_prompt, v_own))
            )
            queries = torch.zeros(len(k), heads, dim, dtype=torch.float64)
            queries[-1] = q[p, g].double()
            layout = PackedLayout.from_groups([len(k)], [[]])
            out[p, g] = packed_attention_ref(queries, k, v, layout, scale=scale)[-1]
    return out


SIZES = [(1, 1, 1, 1, 4), (3, 4, 4, 2, 32), (2, 5, 9, 3, 64), (2, 3, 6, 1, 24), (5, 2, 2, 2, 7)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_packed_attention_in_float64(size: tuple[int, ...], scale: float | None) -> None:
    operands = _operands(*size, torch.float64)
    truth = _truth(operands, scale or size[-1] ** -0.5)
    torch.testing.assert_close(decode_attention(*operands, scale=scale), truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_errs_at_most_twice_as_much_as_the_reference_in_the_same_dtype(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    operands = _operands(*size, dtype)
    truth = _truth(operands, size[-1] ** -0.5)
    ours, theirs = decode_attention(*operands), decode_attention_ref(*operands)
    assert ours.dtype == dtype
    ulp = torch.finfo(dtype).eps * truth.norm()
    assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + ulp


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_beyond_a_length_does_not_matter(garbage: float, dtype: torch.dtype) -> None:
    clean = decode_attention(*_operands(3, 4, 4, 2, 32, dtype))
    dirty = decode_attention(*_operands(3, 4, 4, 2, 32, dtype, garbage=garbage))
    assert torch.equal(clean, dirty)


def test_a_row_without_own_tokens_sees_its_prompt_alone() -> None:
    q, k_prompt, v_prompt, prompt_len, k_own, v_own, own_len = _operands(2, 3, 4, 2, 8, torch.float64)
    none = torch.zeros_like(own_len)
    for room in (11, 0):
        own = k_own[:, :, :, :room], v_own[:, :, :, :room]
        operands = (q, k_prompt, v_prompt, prompt_len, *own, none)
        torch.testing.assert_close(decode_attention(*operands), _truth(operands, 8**-0.5), rtol=1e-11, atol=1e-13)


def test_a_broken_row_poisons_no_other() -> None:
    operands = _operands(3, 4, 4, 2, 8, torch.float32)
    clean = decode_attention(*operands)
    operands[6][1, 2] = 3
    expected = decode_attention(*operands)
    operands[5][1, 2, 0, 1, 0] = math.nan
    broken = decode_attention(*operands)
    assert broken[1, 2].isnan().any()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    assert torch.equal(broken[mask], expected[mask])
    assert torch.equal(broken[mask], clean[mask])


def test_large_scores_do_not_overflow() -> None:
    operands = _operands(2, 3, 4, 2, 8, torch.float32)
    operands[0].mul_(1e4)
    truth = _truth(operands, 8**-0.5)
    torch.testing.assert_close(decode_attention(*operands).double(), truth, rtol=1e-4, atol=1e-4)


def test_the_same_call_gives_the_same_bits() -> None:
    operands = _operands(3, 4, 4, 2, 32, torch.float32)
    first = decode_attention(*operands)
    assert all(torch.equal(first, decode_attention(*operands)) for _ in range(5))


def _with(index: int, value: Tensor) -> Operands:
    operands = list(_operands(2, 3, 4, 2, 8, torch.float32))
    operands[index] = value
    return tuple(operands)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        (_with(0, torch.zeros(2, 3, 32)), ValueError, r"q must be \[P, G, H, D\]"),
        (_with(0, torch.zeros(2, 3, 5, 8)), ValueError, "multiple of KV heads"),
        (_with(1, torch.zeros(2, 2, 17, 4)), ValueError, "k_prompt must be"),
        (_with(2, torch.zeros(2, 2, 16, 8)), ValueError, "v_prompt must be"),
        (_with(3, torch.ones(3, dtype=torch.int64)), ValueError, "prompt_len must be"),
        (_with(4, torch.zeros(2, 4, 2, 11, 8)), ValueError, "k_own must be"),
        (_with(5, torch.zeros(2, 3, 2, 12, 8)), ValueError, "v_own must be"),
        (_with(6, torch.ones(2, dtype=torch.int64)), ValueError, "own_len must be"),
        (_with(4, torch.zeros(2, 3, 2, 11, 8, dtype=torch.float64)), TypeError, "the dtype of q"),
        (_with(3, torch.ones(2, dtype=torch.int32)), TypeError, "prompt_len must be int64"),
        (_with(3, torch.tensor([0, 1])), ValueError, "prompt_len must lie in 1..17"),
        (_with(3, torch.tensor([1, 18])), ValueError, "prompt_len must lie in 1..17"),
        (_with(6, torch.full((2, 3), 12)), ValueError, "own_len must lie in 0..11"),
        (_with(6, torch.full((2, 3), -1)), ValueError, "own_len must lie in 0..11"),
    ],
)
def test_bad_arguments_are_refused(operands: Operands, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_attention(*operands)
