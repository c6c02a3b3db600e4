"""Each Triton kernel with several small blocks against float64, and mutants of its source that must fail that check.

Other interpreted tests rarely reach a second block: blocks are sized for a GPU, and inputs for the slow interpreter.
Here blocks are small. A mutant is a kernel with one fault: a loop that ends early, a running sum that is not rescaled,
a mask that ends late. The interpreter does not show missing barriers: see ``test_aot.py``.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.advantage import gae_ref, group_advantage_ref
from isomorph.kernels.decode_attention import CachedKV, decode_attention_ref
from isomorph.kernels.packed_attention import packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.sample_token import gumbel_noise
from isomorph.kernels.token_logprob import token_logprob_ref

pytestmark = [
    pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason()),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, which interprets
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = Path(__file__).parents[3] / "kernels" / "gpu"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that leaves rows out must not find them right already, in memory that was freed before.

    Not for the offset kernel: its rescue computes rows that are not finite again, by other code.
    """
    if "[offset exp" in request.node.name:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape))).to(DEVICE)


def _close(ours: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == truth.shape
    error = (ours.double() - truth.detach().double()).abs()
    assert (error <= tolerance * max(1.0, float(truth.detach().abs().max()))).all(), f"off by {float(error.max())}"


# -- the checks: blocks of a kernel are made small, its results compared
def check_rows(rows: Any) -> None:
    """V of five blocks of which the last is partial; rows that are flat, that fall, that rise, that begin with -inf.

    No logit outweighs all others: a fault in what is small would not show.
    """
    rows.BLOCK_V, rows.BLOCK_D = 16, 16
    num_rows, num_vocab = 4, 70
    target = torch.tensor([69, 0, 33, 20], device=DEVICE)
    packed = _random(num_rows, num_vocab)
    packed[1] -= torch.linspace(0, 4, num_vocab, device=DEVICE)
    packed[2] += torch.linspace(0, 4, num_vocab, device=DEVICE)
    packed[3, :18] = -math.inf
    bias, temperature = _random(num_vocab), 0.7
    beyond = torch.full((num_vocab + 26,), 50.0, device=DEVICE)
    beyond[:num_vocab] = bias
    whole = torch.full((num_rows, num_vocab + 26), 90.0, device=DEVICE)
    logits = whole[:, :num_vocab].copy_(packed)
    leaf = packed.double().requires_grad_()
    truth = token_logprob_ref(leaf + bias.double(), target, temperature=temperature)
    stats = rows.row_stats(logits, target, beyond[:num_vocab], 1 / temperature)
    for ours, true in zip(stats, truth, strict=True):
        _close(ours, true)
    grads = tuple((torch.arange(num_rows, device=DEVICE) + i).cos() for i in (1, 2, 3))
    loss = sum((true * grad.double()).sum() for true, grad in zip(truth, grads, strict=True))
    assert isinstance(loss, Tensor)
    (true_grad,) = torch.autograd.grad(loss, leaf)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-3)):
        spent = whole.clone()
        out = spent.view(dtype)[:, :num_vocab]  # in place; a narrower row in the first half of its own
        behind = out.shape[1] * dtype.itemsize
        before = spent.view(torch.uint8)[:, behind:].clone()
        rows.row_gradient(spent[:, :num_vocab], target, stats, grads, bias, 1 / temperature, out)
        _close(out, true_grad, tolerance)
        assert torch.equal(spent.view(torch.uint8)[:, behind:], before)
    into, parts, index = _random(3, 40), _random(7, 40), torch.tensor([2, 0, 2, 2, 0, 2, 0], device=DEVICE)
    expected = into.double().index_add(0, index, parts.double())
    rows.add_rows(into, index, parts)
    _close(into, expected)


def check_sample(sample: Any) -> None:
    """Three steps of 1024 columns, the last partial; large logits wherever a softmax must be rescaled."""
    sample.COUNTERS = 256
    num_vocab = 2500
    whole = torch.full((4, num_vocab + 700), 60.0, device=DEVICE)
    logits = whole[:, :num_vocab].copy_(_random(4, num_vocab))
    logits[1] += torch.linspace(0, 5, num_vocab, device=DEVICE)
    logits[2] -= torch.linspace(0, 5, num_vocab, device=DEVICE)
    logits[3, 2400] = 9.0
    key, position = torch.tensor([3, 4, 5, 6], device=DEVICE), torch.tensor([0, 1, 2**33, 7], device=DEVICE)
    token, logprob = torch.zeros_like(key), torch.zeros(4, device=DEVICE)
    sample.draw_token(logits, key, position, 1 / 0.7, token, logprob)
    z = logits.double() / 0.7
    assert torch.equal(token, (z + gumbel_noise(key, position, num_vocab)).argmax(-1))
    _close(logprob, z.log_softmax(-1).gather(1, token[:, None])[:, 0])


def check_offset(offset: Any, offset_rows: Any = None) -> None:
    """3 x 4 tiles and a tail, two groups of row tiles of which one is short, three blocks along D; rows to rescue."""
    offset_rows = offset_rows or offset.offset_rows
    tile = offset.Tile(16, 16, 16, 4, 2)
    offset.MAIN_FLOAT32, offset.TAIL_BLOCK_N, offset.GROUP_M = tile, 16, 2
    num_rows, dim, num_vocab = 40, 40, 70
    hidden, weight = _random(num_rows, dim), _random(num_vocab, dim) * (4 / dim**0.5)
    target = torch.arange(num_rows, device=DEVICE) * 7 % num_vocab
    for row in (7, 8):  # to be rescued, with more than one likely token
        weight[target[row]] = hidden[row] * (-120 / hidden[row].square().sum())
    exp = offset.new_buffer(weight, num_rows)
    facts = offset.exp_chunk(hidden, weight, target, 0.7, exp)
    assert (facts.at_target != 1).any(), "no row was rescued"
    logits = (hidden.double() @ weight.double().T).requires_grad_()
    truth = token_logprob_ref(logits, target, temperature=0.7)
    for ours, true in zip((facts.logprob, facts.entropy, facts.lse), truth, strict=True):
        _close(ours, true)
    grads = tuple((torch.arange(num_rows, device=DEVICE) + i).cos() for i in (1, 2, 3))
    loss = sum((true * grad.double()).sum() for true, grad in zip(truth, grads, strict=True))
    assert isinstance(loss, Tensor)
    (true_grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    whole = exp.clone()
    offset_rows.whole_gradient_(whole, facts, grads, target, 0.7)
    _close(whole, true_grad)
    scales = offset_rows.row_scales(facts, grads[0], target, 0.7, exp)
    (true_grad,) = torch.autograd.grad((truth[0] * grads[0].double()).sum(), logits)
    _close(exp * scales[:, None], true_grad)


def check_offset_rows(offset_rows: Any) -> None:
    from isomorph.kernels.gpu import offset

    offset_rows.BLOCK_D = offset_rows.BLOCK_V = offset_rows.RESCUE_V = offset_rows.RESCUE_D = 16
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAIN_FLOAT32", "TAIL_BLOCK_N", "GROUP_M"):
            patch.setattr(offset, name, getattr(offset, name))  # check_offset sets them
        for name in ("target_logits", "rescue_"):
            patch.setattr(offset, name, getattr(offset_rows, name))
        check_offset(offset, offset_rows)


def check_attention(attention: Any) -> None:
    """Several whole and several partial blocks of keys a tile, two ranges of keys, several pieces of queries a key."""
    from isomorph.kernels.gpu import attention_tiles

    tile = attention_tiles.Tile(16, 16, 4, 1)
    attention.config_of = lambda x: attention_tiles.Config(tile, tile, tile, piece=48)
    layout = PackedLayout.from_tree([37, 20, 5], [-1, 0, 0])
    shapes = (2, 1, 1, 2)
    q, k, v, dout = (_random(layout.num_tok, heads, 8, seed=i) for i, heads in enumerate(shapes))
    leaves = [x.double().requires_grad_() for x in (3 * q, k, v)]
    truth = packed_attention_ref(*leaves, layout, scale=0.5)
    true_grads = torch.autograd.grad(truth, leaves, dout.double())
    out, lse = attention.attend(3 * q, k, v, layout, 0.5)
    _close(out, truth)
    for ours, true in zip(attention.attend_backward(dout, 3 * q, k, v, out, lse, layout, 0.5), true_grads, strict=True):
        _close(ours, true)


def check_attention_rows(attention_rows: Any) -> None:
    from isomorph.kernels.gpu import attention

    attention_rows.DELTA_ROWS = attention_rows.MERGE_ROWS = 16
    before = attention.deltas, attention.add_pieces
    attention.deltas, attention.add_pieces = attention_rows.deltas, attention_rows.add_pieces
    config_of = attention.config_of
    try:
        check_attention(attention)
    finally:
        attention.deltas, attention.add_pieces = before
        attention.config_of = config_of
    out, part = _random(50, 3, 8), _random(37, 3, 8)
    lse, part_lse = 3 * _random(3, 50), 3 * _random(3, 37)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:37].to(DEVICE)
    total = torch.logaddexp(lse[:, rows].double(), part_lse.double())
    own_weight, part_weight = (torch.exp(x.double() - total).T[..., None] for x in (lse[:, rows], part_lse))
    expected = out.double().index_copy(0, rows, own_weight * out[rows] + part_weight * part)
    expected_lse = lse.double().index_copy(1, rows, total)
    attention_rows.merge(out, lse, part, part_lse, rows)
    _close(out, expected)
    _close(lse, expected_lse)


def check_decode(decode: Any) -> None:
    """Prompts of up to three pieces, own entries of up to two, pieces of two blocks."""
    decode.PIECE, decode.BLOCK_L = 32, {2: 16, 4: 16}
    slots, lens = [1, 1, 0, 1, 2], [80, 50, 33, 70, 7]
    prompt = CachedKV(_random(3, 2, 80, 8), _random(3, 2, 80, 8, seed=1), torch.tensor(slots), torch.tensor(lens))
    own = CachedKV(
        _random(5, 2, 40, 8), _random(5, 2, 40, 8, seed=1), torch.arange(5), torch.tensor([40, 0, 17, 33, 3])
    )
    for cache in (prompt, own):
        for x in cache[:2]:
            for slot in cache.slot_B.tolist():
                x[slot, :, int(cache.len_B[cache.slot_B == slot].max()) :] = math.nan
    prompt, own = (CachedKV(*(x.to(DEVICE) for x in cache)) for cache in (prompt, own))
    q = 3 * _random(5, 4, 8)
    wide = [c._replace(k_SKLD=c.k_SKLD.double(), v_SKLD=c.v_SKLD.double()) for c in (prompt, own)]
    _close(decode.decode_attention(q, prompt, own, 0.5), decode_attention_ref(q.double(), *wide, scale=0.5))


def check_advantage(advantage: Any) -> None:
    """Groups and sequences of up to four blocks, at and beside a block's edge."""
    advantage.BLOCK_G, advantage.BLOCK_S, advantage.BLOCK_T = 16, 32, 16
    offsets = torch.tensor([0, *itertools.accumulate([2, 16, 0, 17, 55])], device=DEVICE)
    num = int(offsets[-1])
    reward, value = _random(num) + 3, _random(num, seed=1)
    for baseline, scale in (("mean", "std"), ("leave_one_out", "none"), ("none", "batch")):
        ours, faults = advantage.group_advantage(reward, offsets, baseline, scale)
        assert not faults.any()
        _close(ours, group_advantage_ref(reward.double(), offsets, baseline=baseline, scale=scale))  # type: ignore[arg-type]
    *ours, faults = advantage.gae(reward, value, offsets, 0.99, 0.95)
    assert not faults.any()
    for one, true in zip(ours, gae_ref(reward.double(), value.double(), offsets, gamma=0.99, lam=0.95), strict=True):
        _close(one, true)


CHECKS: dict[str, Callable[[Any], None]] = {
    "rows": check_rows, "sample": check_sample, "offset": check_offset, "offset_rows": check_offset_rows,
    "attention": check_attention, "attention_rows": check_attention_rows, "decode": check_decode,
    "advantage": check_advantage,
}  # fmt: skip


# -- the mutants
class Mutant(NamedTuple):
    fault: str
    file: str
    old: str
    new: str
    which: int = 0  # of the places where ``old`` stands, and how many there are
    num: int = 1


BLOCKS_V = "for start in range(0, V, BLOCK_V):"
ONE_V = "for start in range(0, BLOCK_V, BLOCK_V):"
BUT_LAST_V = "for start in range(0, V - BLOCK_V, BLOCK_V):"
DONE = "for done in range(0, size, BLOCK):"
ONE_DONE = "for done in range(0, BLOCK, BLOCK):"
FULL = "for k0 in range(tl.load(full_ptr + 2 * i), tl.load(full_ptr + 2 * i + 1), BLOCK_K):"
ONE_FULL = "for k0 in range(tl.load(full_ptr + 2 * i), tl.load(full_ptr + 2 * i) + BLOCK_K, BLOCK_K):"
RANGES = "for i in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):"
ONE_RANGE = "for i in range(tl.load(tile_ptr + 2), tl.minimum(tl.load(tile_ptr + 2) + 1, tl.load(tile_ptr + 3))):"
PARTIAL = "for i in tl.range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 5), num_stages=1):"
ONE_PARTIAL = "for i in tl.range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 4) + 1, num_stages=1):"
SEEN = "((start + at)[None, :] <= row[:, None]) & (at[None, :] < end - start)"
MUTANTS = [
    # rows
    Mutant("stats: one block", "rows", "for start in range(0, whole, BLOCK_V):", ONE_V),
    Mutant("stats: without the last block", "rows", "    if whole < V:", "    if whole > V:"),
    Mutant("stats: one stripe", "rows", "tl.arange(0, STRIPES)[:, None] * COLUMNS",
           "tl.arange(0, STRIPES)[:, None] * 0"),
    Mutant("stats: sums not rescaled", "rows", "shrink = tl.exp2(step * base_2)", "shrink = tl.exp2(step * 0.0)"),
    Mutant("stats: rescaled twice", "rows", "tl.exp2(step * base_2)", "tl.exp2(step * base_2 * 2.0)"),
    Mutant("stats: total not rescaled", "rows", "return new_top, shrink * total +", "return new_top, total +"),
    Mutant("stats: entropy not shifted", "rows", "weighted + tl.where(total > 0, total * step, 0.0)", "weighted"),
    Mutant("stats: columns not rescaled", "rows", "shrink = tl.exp(step * scale)", "shrink = tl.exp(step * 0.0)"),
    Mutant("stats: columns not shifted", "rows", "weighted + tl.where(shrink == 0, 0.0, total * step)", "weighted"),
    Mutant("stats: the mask ends late", "rows", "z = tl.load(row_ptr + at, mask=at < V,",
           "z = tl.load(row_ptr + at, mask=at < V + 9,", 0, 2),
    Mutant("stats: bias of the first block", "rows", "z += tl.load(bias_ptr + at)\n",
           "z += tl.load(bias_ptr + at % 16)\n"),
    Mutant("stats: no bias in the last block", "rows", "z += tl.load(bias_ptr + at, mask=at < V, other=0.0)",
           "z += 0.0", 0, 2),
    Mutant("stats: no bias at the target", "rows", "z_y += tl.load(bias_ptr + target)", "z_y += 0.0", 0, 2),
    Mutant("stats: temperature at the target", "rows", "(z_y - row_top) * scale - log_total",
           "z_y - row_top * scale - log_total"),
    Mutant("stats: entropy without temperature", "rows", "weighted / total * scale", "weighted / total"),
    Mutant("gradient: one block", "rows", BLOCKS_V, ONE_V),
    Mutant("gradient: without the last block", "rows", BLOCKS_V, BUT_LAST_V),
    Mutant("gradient: the store's mask ends late", "rows", "tl.store(out_row_ptr + at, d, mask=at < V)",
           "tl.store(out_row_ptr + at, d, mask=at < V + 9)"),
    Mutant("gradient: target of each block", "rows", "tl.where(at == target, at_target, 0.0)",
           "tl.where(column == target % BLOCK_V, at_target, 0.0)"),
    Mutant("gradient: bias of the first block", "rows", "tl.load(bias_ptr + at, mask=at < V, other=0.0)",
           "tl.load(bias_ptr + column)", 1, 2),
    Mutant("gradient: no bias at the target", "rows", "z_y += tl.load(bias_ptr + target)", "z_y += 0.0", 1, 2),
    Mutant("gradient: blocks in descending order", "rows", "        at = start + column\n",
           "        at = (V - 1) // BLOCK_V * BLOCK_V - start + column\n"),
    Mutant("gradient: the target read too late", "rows", "        z = tl.load(row_ptr + at, mask=at < V,",
           "        z_y = (tl.load(row_ptr + target) + tl.load(bias_ptr + target)).to(WIDE) * scale\n"
           "        z = tl.load(row_ptr + at, mask=at < V,", 1, 2),
    Mutant("add: one block of columns", "rows", "tl.program_id(1) * BLOCK_D + tl.arange", "tl.arange"),
    Mutant("add: one row a place", "rows", "while tl.load(place_ptr + i, mask=i < N, other=-1) == place:",
           "if tl.load(place_ptr + i, mask=i < N, other=-1) == place:"),
    Mutant("add: each row a first", "rows", "mask=i > 0, other=-1) == place:", "mask=i < 0, other=-1) == place:"),
    # sample
    Mutant("one step", "sample", "for start in range(0, V, 4 * COUNTERS):",
           "for start in range(0, 4 * COUNTERS, 4 * COUNTERS):"),
    Mutant("without the last step", "sample", "for start in range(0, V, 4 * COUNTERS):",
           "for start in range(0, V - 4 * COUNTERS, 4 * COUNTERS):"),
    Mutant("noise of the first step", "sample", "tl.philox(rng_key, counter.to(",
           "tl.philox(rng_key, i.to("),
    Mutant("total not rescaled", "sample", "total = total * shrink + ", "total = total + "),
    Mutant("lanes not rescaled", "sample", "total * tl.exp(tl.where(top == row_top, 0.0, top - row_top))", "total"),
    Mutant("the mask ends late", "sample", "mask=column < V, other=float(\"-inf\")",
           "mask=column < V + 400, other=float(\"-inf\")"),
    Mutant("the last word's columns left out", "sample", "_take(row_ptr, column + 768, w3,",
           "_take(row_ptr, column + V, w3,"),
    Mutant("the first maximum kept", "sample", "    return new_top, total,", "    return top, total,"),
    # offset
    Mutant("target: one block", "offset_rows", "for start in range(0, D, BLOCK_D):",
           "for start in range(0, BLOCK_D, BLOCK_D):", 0, 2),
    Mutant("exp: one block along D", "offset", "for k in range(tl.cdiv(D, BLOCK_K)):", "for k in range(1):"),
    Mutant("exp: one tile a program", "offset", "tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0))",
           "tl.range(tl.program_id(0), tl.num_programs(0), tl.num_programs(0))"),
    Mutant("exp: a short group taken for whole", "offset", "tl.minimum(num_m - first_m, GROUP_M)", "GROUP_M"),
    Mutant("exp: the tail's mask ends late", "offset", "inside = n * BLOCK_N + tl.arange(0, BLOCK_N) < V",
           "inside = n * BLOCK_N + tl.arange(0, BLOCK_N) < V + BLOCK_N"),
    Mutant("reduce: one tile of columns", "offset", "for tile in range(num_tiles):", "for tile in range(1):"),
    Mutant("rescue: one block", "offset_rows", BLOCKS_V, ONE_V, 0, 3),
    Mutant("rescue: E of one block", "offset_rows", BLOCKS_V, ONE_V, 1, 3),
    Mutant("rescue: total not rescaled", "offset_rows", "total = shrink * total + ", "total = total + "),
    Mutant("rescue: entropy not shifted", "offset_rows", "shrink * (weighted + total * step)", "shrink * weighted"),
    Mutant("rescue: the mask ends late", "offset_rows", "z = tl.where(v < V, z, float(\"-inf\"))",
           "z = tl.where(v < V + 16, z, float(\"-inf\"))"),
    Mutant("rescue: one block along D", "offset_rows", "for start in range(0, D, BLOCK_D):",
           "for start in range(0, BLOCK_D, BLOCK_D):", 1, 2),
    Mutant("gradient: one block", "offset_rows", BLOCKS_V, ONE_V, 2, 3),
    Mutant("gradient: target of the first block", "offset_rows", "tl.where(v == target, dlogprob, 0.0)",
           "tl.where(v - start == target, dlogprob, 0.0)"),
    # attention
    Mutant("forward: one whole block", "attention", "range(first, last + BLOCK_K, BLOCK_K)",
           "range(first, last, BLOCK_K)"),
    Mutant("forward: one range", "attention", RANGES, ONE_RANGE, 0, 2),
    Mutant("forward: one partial block", "attention", PARTIAL, ONE_PARTIAL, 0, 2),
    Mutant("forward: total not rescaled", "attention", "total = total * shrink + ", "total = total + "),
    Mutant("forward: output not rescaled", "attention", "out * shrink[:, None]", "out"),
    Mutant("forward: the future is seen", "attention", SEEN, "at[None, :] < end - start + 0 * row[:, None]", 0, 2),
    Mutant("forward: the mask ends late", "attention", SEEN, "(start + at)[None, :] <= row[:, None]", 0, 2),
    Mutant("forward: LSE in base 2", "attention", " * 0.6931471805599453", ""),
    Mutant("dq: one whole block", "attention", FULL, ONE_FULL),
    Mutant("dq: one range", "attention", RANGES, ONE_RANGE, 1, 2),
    Mutant("dq: one partial block", "attention", PARTIAL, ONE_PARTIAL, 1, 2),
    Mutant("dq: the future is seen", "attention", SEEN, "at[None, :] < end - start + 0 * row[:, None]", 1, 2),
    Mutant("dkv: one query head", "attention", "for i in range(repeats):", "for i in range(1):"),
    Mutant("dkv: one masked block", "attention", "tl.range(num_masked, num_stages=1)", "tl.range(1, num_stages=1)"),
    Mutant("dkv: one whole block", "attention", "for q0 in range(full, tail, BLOCK_Q):",
           "for q0 in range(full, tl.minimum(full + BLOCK_Q, tail), BLOCK_Q):"),
    Mutant("dkv: the past sees", "attention", "p_KQ = tl.where(key[:, None] <= (start + at)[None, :], p_KQ, 0.0)",
           "pass"),
    Mutant("dkv: pieces not summed", "attention", "add_pieces(partial, dk_TKD, dv_TKD, key_tables.split)", "pass"),
    Mutant("add: one piece", "attention_rows", "range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):",
           "range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 2) + 1):"),
    Mutant("delta: the first rows", "attention_rows", "start = (tl.program_id(0) // H).to(tl.int64) * BLOCK_Q",
           "start = (tl.program_id(0) // H).to(tl.int64) * 0"),
    Mutant("merge: weights exchanged", "attention_rows", "own * (own_weight / total)", "own * (part_weight / total)"),
    Mutant("merge: LSE not of both", "attention_rows", "top + tl.log(total), mask=is_row", "top, mask=is_row"),
    # decode
    Mutant("one block of a piece", "decode", "for first in range(start, stop, BLOCK_L):",
           "for first in range(start, start + BLOCK_L, BLOCK_L):"),
    Mutant("output not rescaled", "decode", "acc * shrink[:, None]", "acc"),
    Mutant("total not rescaled", "decode", "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    Mutant("a row sees what the longest sees", "decode", "at[None, :] < length[:, None]",
           "at[None, :] < longest + 0 * length[:, None]"),
    Mutant("merge: one piece", "decode", "for i in range(0, num_prompt + num_own):", "for i in range(0, 1):"),
    Mutant("merge: own pieces left out", "decode", "for i in range(0, num_prompt + num_own):",
           "for i in range(0, num_prompt):"),
    Mutant("merge: total not rescaled", "decode", "total = total * shrink + tl.load", "total = total + tl.load"),
    Mutant("merge: output not rescaled", "decode", "acc = acc * shrink + tl.load", "acc = acc + tl.load"),
    Mutant("merge: pieces not weighed", "decode", "other=0.0) * weight", "other=0.0)"),
    # advantage
    Mutant("group: mean of one block", "advantage", DONE, ONE_DONE, 0, 4),
    Mutant("group: squares of one block", "advantage", DONE, ONE_DONE, 1, 4),
    Mutant("group: results of one block", "advantage", DONE, ONE_DONE, 2, 4),
    Mutant("group: zeros beyond the end are squared", "advantage",
           "squares += tl.where(at < size, (reward - mean) * (reward - mean), 0.0)",
           "squares += (reward - mean) * (reward - mean)"),
    Mutant("gae: one block", "advantage", DONE, ONE_DONE, 3, 4),
    Mutant("gae: nothing carried", "advantage", "carry = tl.sum(tl.where(column == 0, advantage, 0.0), 0)",
           "carry = 0.0 * carry"),
    Mutant("gae: carried undiscounted", "advantage", "advantage = b + a * carry", "advantage = b + carry"),
    Mutant("gae: no value after a block", "advantage", "inside & (at + 1 < size), other=0.0)",
           "inside & (column + 1 < BLOCK), other=0.0)"),
]  # fmt: skip


def _load(file: str, source: str, folder: Path) -> ModuleType:
    path = folder / f"{file}_under_test.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", CHECKS)
def test_kernels_in_many_blocks_are_exact(file: str, tmp_path: Path) -> None:
    CHECKS[file](_load(file, (FOLDER / f"{file}.py").read_text(encoding="utf-8"), tmp_path))


@pytest.mark.skipif(
    DEVICE == "cuda", reason="programs that run at once hide some faults: the interpreter runs them in turn"
)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file} {mutant.fault}")
def test_a_mutant_dies(mutant: Mutant, tmp_path: Path) -> None:
    parts = (FOLDER / f"{mutant.file}.py").read_text(encoding="utf-8").split(mutant.old)
    assert len(parts) == mutant.num + 1, "the kernel has changed: look for the place of this fault again"
    at = mutant.which + 1
    source = mutant.old.join(parts[:at]) + mutant.new + mutant.old.join(parts[at:])
    module = _load(mutant.file, source, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[mutant.file](module)
