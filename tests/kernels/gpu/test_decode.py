"""decode_attention in Triton. Interpreted if there is no GPU, except bfloat16, which the interpreter gets wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.decode_attention import CachedKV, decode_attention, decode_attention_ref

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def _cache(slots: int, kv: int, room: int, dim: int, dtype: torch.dtype, slot: list[int], lens: list[int]) -> CachedKV:
    gen = torch.Generator().manual_seed(room)
    k, v = (torch.randn(slots, kv, room, dim, generator=gen).to(DEVICE, dtype) for _ in "kv")
    slot_B, len_B = torch.tensor(slot, device=DEVICE), torch.tensor(lens, device=DEVICE)
    for s in range(slots):
        length = max((n for i, n in zip(slot, lens, strict=True) if i == s), default=0)
        for x in (k, v):
            x[s, :, length:] = math.nan
    return CachedKV(k, v, slot_B, len_B)


def _query(rows: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return 2 * torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)


def _ours(q: Tensor, prompt: CachedKV, own: CachedKV) -> Tensor:
    with backend.using("decode_attention=triton"):
        return decode_attention(q, prompt, own)


def _close(q: Tensor, prompt: CachedKV, own: CachedKV) -> None:
    wide = (c._replace(k_SKLD=c.k_SKLD.double(), v_SKLD=c.v_SKLD.double()) for c in (prompt, own))
    truth = decode_attention_ref(q.double(), *wide)
    theirs = decode_attention_ref(q, prompt, own)
    ours = _ours(q, prompt, own)
    assert ours.dtype == q.dtype
    ulp, error, usual = (float(x) for x in (
        torch.finfo(q.dtype).eps * truth.norm(), (ours.double() - truth).norm(), (theirs.double() - truth).norm()
    ))  # fmt: skip
    assert error <= 2 * usual + ulp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (2, 2, 24), (7, 1, 16)])
def test_errs_at_most_twice_as_much_as_the_reference_in_the_same_dtype(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Prompts of one piece, of a whole number of pieces, and of several; rows without own entries, and with a piece."""
    prompt = _cache(4, kv_heads, 600, dim, dtype, [2, 2, 2, 0, 0, 3], [512, 512, 512, 1, 1, 300])
    own = _cache(7, kv_heads, 270, dim, dtype, [6, 1, 2, 3, 4, 5], [0, 1, 63, 64, 257, 20])
    _close(_query(6, heads, dim, dtype), prompt, own)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_slots_and_lengths(data: st.DataObject) -> None:
    rows, repeats = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 3, 5]))
    draw = lambda most: data.draw(st.lists(st.integers(0, most), min_size=rows, max_size=rows))  # noqa: E731
    prompt_len = data.draw(st.lists(st.integers(1, 40), min_size=4, max_size=4))
    slots = draw(3)
    prompt = _cache(4, 2, 40, 16, torch.float32, slots, [prompt_len[s] for s in slots])
    own = _cache(rows, 2, 30, 16, torch.float32, list(range(rows)), draw(30))
    _close(_query(rows, 2 * repeats, 16, torch.float32), prompt, own)


def test_a_rows_bits_do_not_depend_on_the_other_rows_or_on_their_order() -> None:
    slots = [0, 0, 1, 0, 1, 2, 0, 0, 2, 1]
    prompt = _cache(3, 2, 300, 16, torch.float32, slots, [[300, 5, 70][s] for s in slots])
    own = _cache(10, 2, 20, 16, torch.float32, list(range(10)), list(range(10)))
    q = _query(10, 6, 16, torch.float32)
    whole = _ours(q, prompt, own)
    for rows in ([7], [9, 0, 5], list(range(9, -1, -1))):
        index = torch.tensor(rows, device=DEVICE)
        caches = (CachedKV(c.k_SKLD, c.v_SKLD, c.slot_B[index], c.len_B[index]) for c in (prompt, own))
        ours = _ours(q[index], *caches)
        # the interpreter multiplies with NumPy, whose last bits depend on a row's place in the tile
        assert torch.equal(ours, whole[index]) if ON_GPU else torch.allclose(ours, whole[index], atol=1e-6)


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    prompt = _cache(2, 1, 16, 16, torch.float32, [0, 1, 0], [16, 0, 16])
    own = _cache(3, 1, 16, 16, torch.float32, [0, 1, 2], [3, 0, 5])
    out = _ours(_query(3, 2, 16, torch.float32), prompt, own)
    assert (out[1] == 0).all() and out.isfinite().all()


def test_float64_is_refused_with_the_way_out() -> None:
    prompt = _cache(1, 1, 16, 16, torch.float64, [0], [4])
    with pytest.raises(TypeError, match="decode_attention=torch"):
        _ours(_query(1, 2, 16, torch.float64), prompt, prompt)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="a CUDA graph needs a GPU")
def test_a_recorded_graph_follows_slots_and_lengths() -> None:
    prompt = _cache(3, 2, 300, 64, torch.bfloat16, [0, 0, 1], [300, 300, 7])
    own = _cache(3, 2, 20, 64, torch.bfloat16, [0, 1, 2], [20, 20, 20])
    q = _query(3, 6, 64, torch.bfloat16)
    _ours(q, prompt, own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _ours(q, prompt, own)
    own.len_B.copy_(torch.tensor([3, 0, 19]))
    prompt.slot_B.copy_(torch.tensor([1, 0, 0]))
    prompt.len_B.copy_(torch.tensor([7, 300, 300]))
    graph.replay()
    assert torch.equal(out, _ours(q, prompt, own))
