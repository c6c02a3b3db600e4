"""decode_attention: every implementation, C++ with every instruction set; Triton is in gpu/test_decode.py."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.decode_attention import CachedKV, decode_attention, decode_attention_ref
from isomorph.kernels.packed_attention import packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

Operands = tuple[Tensor, CachedKV, CachedKV]
HAS_NATIVE = backend.native_available()
ISAS = [f"native-{isa}" for isa in backend.native().isas()] if HAS_NATIVE else []
PROMPT_ROOM, OWN_ROOM = 17, 11


@pytest.fixture(params=[*ISAS, "torch", "reference"], autouse=True)
def body(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, isa = request.param.partition("-")
    if isa:
        backend.native().use_isa(isa)
    with backend.using(f"decode_attention={name}"):
        yield name
    if isa:
        backend.native().use_isa("")


def make_operands(
    rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, garbage: float = 0.0, seed: int = 0
) -> Operands:
    """Rows that share prompts, not all of them neighbours, in caches with more slots and room than are used."""
    gen = torch.Generator().manual_seed(seed + 100 * rows)

    def cache(slot_B: Tensor, len_B: Tensor, room: int) -> CachedKV:
        slots = int(slot_B.max()) + 2
        kv = [torch.randn(slots, kv_heads, room + 3, dim, generator=gen, dtype=torch.float64).to(dtype) for _ in "kv"]
        length_S = torch.zeros(slots, dtype=torch.int64).index_put((slot_B,), len_B)
        hidden_SL = torch.arange(room + 3) >= length_S[:, None]
        k, v = (x.masked_fill_(hidden_SL[:, None, :, None], garbage)[:, :, :room] for x in kv)
        return CachedKV(k, v, slot_B, len_B)

    group_B = torch.arange(rows) // 3
    group_B[-1] = 0
    prompt_len_S = torch.randint(1, PROMPT_ROOM + 1, (rows,), generator=gen)
    own_len_B = torch.randint(0, OWN_ROOM + 1, (rows,), generator=gen)
    prompt_slot_B = torch.randperm(rows, generator=gen)[group_B]
    own_slot_B = torch.randperm(rows + 2, generator=gen)[:rows]
    q = (2 * torch.randn(rows, heads, dim, generator=gen, dtype=torch.float64)).to(dtype)
    prompt = cache(prompt_slot_B, prompt_len_S[group_B], PROMPT_ROOM)
    return q, prompt, cache(own_slot_B, own_len_B, OWN_ROOM)


def truth_of(operands: Operands, scale: float) -> Tensor:
    """The last query of each sequence, by packed attention in float64."""
    q_BHD, *caches = operands
    out_BHD = torch.zeros(q_BHD.shape, dtype=torch.float64)
    for b, q_HD in enumerate(q_BHD):
        seen = [(c, int(c.slot_B[b]), int(c.len_B[b])) for c in caches]
        k = torch.cat([c.k_SKLD[slot, :, :n] for c, slot, n in seen], 1).transpose(0, 1).double()
        v = torch.cat([c.v_SKLD[slot, :, :n] for c, slot, n in seen], 1).transpose(0, 1).double()
        queries = torch.zeros(len(k), *q_HD.shape, dtype=torch.float64)
        queries[-1] = q_HD.double()
        layout = PackedLayout.from_groups([len(k)], [[]])
        out_BHD[b] = packed_attention_ref(queries, k, v, layout, scale=scale)[-1]
    return out_BHD


SIZES = [(1, 1, 1, 4), (12, 4, 2, 32), (10, 9, 3, 64), (6, 6, 1, 24), (11, 2, 2, 7)]  # rows, heads, KV heads, width


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_packed_attention_in_float64(size: tuple[int, ...], scale: float | None) -> None:
    operands = make_operands(*size, torch.float64)
    truth = truth_of(operands, scale or size[-1] ** -0.5)
    torch.testing.assert_close(decode_attention(*operands, scale=scale), truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_errs_at_most_twice_as_much_as_the_reference_in_the_same_dtype(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    operands = make_operands(*size, dtype)
    truth = truth_of(operands, size[-1] ** -0.5)
    ours, theirs = decode_attention(*operands), decode_attention_ref(*operands)
    assert ours.dtype == dtype
    ulp = torch.finfo(dtype).eps * truth.norm()
    assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + ulp


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_slots_and_lengths_in_float64(data: st.DataObject) -> None:
    rows, kv_heads, repeats = (data.draw(st.integers(1, most)) for most in (9, 3, 7))
    dim, slots = data.draw(st.sampled_from([1, 8, 16, 40])), 4
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    caches = []
    for room in (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))):
        k, v = (torch.randn(slots, kv_heads, room, dim, generator=gen, dtype=torch.float64) for _ in "kv")
        slot, length = (torch.randint(0, most, (rows,), generator=gen) for most in (slots, room + 1))
        caches.append(CachedKV(k, v, slot, length.clamp(min=1 - len(caches))))
    q = torch.randn(rows, kv_heads * repeats, dim, generator=gen, dtype=torch.float64)
    truth = truth_of((q, caches[0], caches[1]), dim**-0.5)
    torch.testing.assert_close(decode_attention(q, *caches), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_beyond_a_length_does_not_matter(garbage: float, dtype: torch.dtype) -> None:
    clean = decode_attention(*make_operands(12, 4, 2, 32, dtype))
    dirty = decode_attention(*make_operands(12, 4, 2, 32, dtype, garbage=garbage))
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_other_rows(dtype: torch.dtype, body: str) -> None:
    if body == "torch":
        pytest.skip("the products of PyTorch's body differ in their last bits with the number of rows")
    q, prompt, own = make_operands(12, 9, 3, 64, dtype)
    whole = decode_attention(q, prompt, own)

    def some(rows: Tensor) -> Tensor:
        caches = (CachedKV(c.k_SKLD, c.v_SKLD, c.slot_B[rows], c.len_B[rows]) for c in (prompt, own))
        return decode_attention(q[rows], *caches)

    for rows in (torch.tensor([4]), torch.tensor([11, 0, 5]), torch.arange(11, -1, -1)):
        assert torch.equal(some(rows), whole[rows])


def test_a_row_without_own_entries_sees_its_prompt_alone() -> None:
    q, prompt, own = make_operands(6, 4, 2, 8, torch.float64)
    for room in (OWN_ROOM, 0):
        k, v = own.k_SKLD[:, :, :room], own.v_SKLD[:, :, :room]
        operands = (q, prompt, CachedKV(k, v, own.slot_B, torch.zeros_like(own.len_B)))
        torch.testing.assert_close(decode_attention(*operands), truth_of(operands, 8**-0.5), rtol=1e-11, atol=1e-13)


def test_a_row_that_sees_nothing_gets_zeros_and_changes_no_other() -> None:
    q, prompt, own = make_operands(6, 4, 2, 8, torch.float32)
    whole = decode_attention(q, prompt, own)
    prompt.len_B[4], own.len_B[4] = 0, 0
    out = decode_attention(q, prompt, own)
    assert (out[4] == 0).all()
    others = torch.arange(6) != 4
    assert torch.equal(out[others], whole[others])


def test_no_rows_give_no_rows() -> None:
    q, prompt, own = make_operands(3, 4, 2, 8, torch.float32)
    caches = (CachedKV(c.k_SKLD, c.v_SKLD, c.slot_B[:0], c.len_B[:0]) for c in (prompt, own))
    assert decode_attention(q[:0], *caches).shape == (0, 4, 8)


def test_a_broken_row_poisons_no_other() -> None:
    q, prompt, own = make_operands(12, 4, 2, 8, torch.float32)
    own.len_B[5] = 3
    clean = decode_attention(q, prompt, own)
    own.k_SKLD[own.slot_B[5], 0, 1, 0] = math.nan
    broken = decode_attention(q, prompt, own)
    assert broken[5].isnan().any()
    others = torch.arange(12) != 5
    assert torch.equal(broken[others], clean[others])


def test_large_scores_do_not_overflow() -> None:
    operands = make_operands(6, 4, 2, 8, torch.float32)
    operands[0].mul_(1e4)
    truth = truth_of(operands, 8**-0.5)
    torch.testing.assert_close(decode_attention(*operands).double(), truth, rtol=1e-4, atol=1e-4)


def test_the_same_call_gives_the_same_bits() -> None:
    operands = make_operands(12, 4, 2, 32, torch.float32)
    first = decode_attention(*operands)
    assert all(torch.equal(first, decode_attention(*operands)) for _ in range(5))


def _with(cache: int, field: str, value: Tensor) -> Operands:
    operands = list(make_operands(6, 4, 2, 8, torch.float32))
    operands[cache] = operands[cache]._replace(**{field: value})  # type: ignore[union-attr]
    return tuple(operands)  # type: ignore[return-value]


def _with_query(value: Tensor) -> Operands:
    return (value, *make_operands(6, 4, 2, 8, torch.float32)[1:])


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        (_with_query(torch.zeros(6, 32)), ValueError, r"q must be \[B, H, D\]"),
        (_with_query(torch.zeros(6, 5, 8)), ValueError, "multiple of KV heads"),
        (_with_query(torch.zeros(6, 0, 8)), ValueError, "positive multiple of KV heads"),
        (_with(1, "k_SKLD", torch.zeros(7, 0, 17, 8)), ValueError, "multiple of KV heads"),
        (_with(1, "k_SKLD", torch.zeros(7, 2, 17, 4)), ValueError, r"prompt.k must be \[S, 2, L, 8\]"),
        (_with(1, "v_SKLD", torch.zeros(7, 2, 16, 8)), ValueError, "prompt.v must be"),
        (_with(2, "k_SKLD", torch.zeros(9, 3, 11, 8)), ValueError, r"own.k must be \[S, 2, L, 8\]"),
        (_with(2, "v_SKLD", torch.zeros(9, 2, 12, 8)), ValueError, "own.v must be"),
        (_with(1, "len_B", torch.ones(5, dtype=torch.int64)), ValueError, r"prompt.len must be \[6\]"),
        (_with(2, "slot_B", torch.ones(7, dtype=torch.int64)), ValueError, r"own.slot must be \[6\]"),
        (_with(1, "len_B", torch.ones(6, dtype=torch.int32)), TypeError, "prompt.len must be int64"),
        (_with(1, "len_B", torch.full((6,), 18)), ValueError, "prompt.len must lie in 0..17"),
        (_with(2, "len_B", torch.full((6,), -1)), ValueError, "own.len must lie in 0..11"),
        (_with(2, "slot_B", torch.full((6,), 90)), ValueError, "own.slot must lie in 0.."),
        (_with_query(torch.zeros(6, 4, 8, dtype=torch.float64)), TypeError, "the dtype of q"),
    ],
)
def test_bad_arguments_are_refused(operands: Operands, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_attention(*operands)
