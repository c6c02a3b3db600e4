"""Truncated sampling: kept sets against transformers, how they are stored, and the linear head over them alone."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from isomorph.kernels import backend, kept_tokens
from isomorph.kernels.kept_tokens import (
    COPIES,
    KeptTokens,
    keep_tokens,
    keep_tokens_ref,
    packed_bits,
    unpacked_bits,
)
from isomorph.kernels.linear_logprob import (
    TokenStats,
    linear_logprob,
    linear_logprob_ref,
    linear_loss,
    linear_loss_ref,
)
from isomorph.kernels.sample_token import sample_token

ISAS = backend.native().isas() if backend.native_available() else []
BODIES = ["torch", *[f"native-{isa}" for isa in ISAS], "triton"]
PAIRS = [(body, num_vocab) for body in BODIES[:-1] for num_vocab in (5, 1003)]
CHOICES = [
    (0, 0.9, 0.0),
    (3, 1.0, 0.0),
    (0, 1.0, 0.05),
    (4, 0.8, 0.1),
    (50, 0.95, 0.01),
    (0, 0.3, 0.0),
    (0, 0.999, 0.0),
]


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    yield
    if ISAS:
        backend.native().use_isa("")


def using(body: str) -> backend.using:
    name, _, isa = body.partition("-")
    if name == "triton" and backend.triton_reason():
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1 before Python starts")
    if isa:
        backend.native().use_isa(isa)
    return backend.using(name)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- which tokens
def of_transformers(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """[B, V] bool by the processors that transformers' ``generate`` would run, in its order."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores > -math.inf


@pytest.mark.parametrize("keep", [keep_tokens, keep_tokens_ref])
@pytest.mark.parametrize("num_vocab", [1, 5, 33, 1003])
@pytest.mark.parametrize("std", [0.5, 3.0])
def test_the_kept_tokens_are_those_of_transformers(keep: Callable[..., Tensor], num_vocab: int, std: float) -> None:
    for dtype in (torch.float32, torch.float64):
        logits = std * randn(16, num_vocab, dtype=dtype)
        for temperature in (1.0, 0.7):
            for top_k, top_p, min_p in CHOICES:
                found = keep(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
                assert torch.equal(found, of_transformers(logits, temperature, top_k, top_p, min_p)), (top_k, top_p)


@pytest.mark.parametrize("keep", [keep_tokens, keep_tokens_ref])
def test_of_equal_probabilities_those_with_the_larger_logits_are_kept(keep: Callable[..., Tensor]) -> None:
    """Neighbouring float32 logits often have one probability. The larger of each pair has the lower id."""
    higher = randn(1, 100).float()
    logits = torch.cat([higher, torch.nextafter(higher, torch.tensor(-math.inf))], 1)
    ours = logits.softmax(-1)
    assert (ours[:, :100] == ours[:, 100:]).sum() > 10
    for top_p in torch.linspace(0.01, 0.99, 99).tolist():
        assert torch.equal(keep(logits, top_p=top_p), of_transformers(logits, 1.0, 0, top_p, 0.0)), top_p


@pytest.mark.parametrize("keep", [keep_tokens, keep_tokens_ref])
def test_ties_are_those_of_transformers(keep: Callable[..., Tensor]) -> None:
    """Which of several equal tokens at the edge of top-p stay is an accident of transformers' sort; how many is not."""
    logits = randn(64, 40).round()
    for top_k, top_p, min_p in CHOICES:
        found = keep(logits, top_k=top_k, top_p=top_p, min_p=min_p)
        truth = of_transformers(logits, 1.0, top_k, top_p, min_p)
        if top_p == 1:
            assert torch.equal(found, truth) and (top_k == 0 or (found.sum(1) > top_k).any())
        kept, true_kept = (logits.masked_fill(~mask, -math.inf).sort().values for mask in (found, truth))
        assert torch.equal(kept, true_kept)
    four = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])  # probabilities 0.084 and 0.229: three reach 0.5, two do not
    assert keep(four, top_p=0.5).tolist() == [[False, False, True, True, True]]


def test_the_largest_is_kept_and_a_row_without_a_softmax_keeps_all() -> None:
    logits = torch.zeros(5, 6)
    logits[0, 2], logits[1, 3], logits[2, 4] = 80.0, math.nan, math.inf
    logits[3] = -math.inf
    logits[4, :5] = -math.inf
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (0, 1e-6, 0.0), (0, 1.0, 1.0)):
        found = keep_tokens(logits, top_k=top_k, top_p=top_p, min_p=min_p)
        assert found[0].tolist() == [v == 2 for v in range(6)] and found[4].tolist() == [v == 5 for v in range(6)]
        assert found[1:4].all()
    assert keep_tokens(torch.zeros(0, 6), top_p=0.5).shape == (0, 6)
    for bad in ({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError):
            keep_tokens(logits, **bad)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = randn(9, 500, dtype=torch.float32) * torch.linspace(0.1, 4, 9)[:, None]
    together = keep_tokens(logits, top_p=0.9)
    assert all(torch.equal(together[i], keep_tokens(logits[i : i + 1], top_p=0.9)[0]) for i in range(9))


# -- how they are stored
@pytest.mark.parametrize("num_vocab", [1, 31, 32, 33, 1000])
def test_sets_are_stored_in_their_smallest_form(num_vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tokens, "BLOCK_BYTES", 3 * COPIES * num_vocab)  # three rows a block
    share = torch.linspace(0, 1.2, 20)[:, None] ** 4
    mask = torch.rand(20, num_vocab, generator=torch.Generator().manual_seed(0)) < share
    mask[:, -1] = True
    kept = KeptTokens.from_mask(mask)
    assert torch.equal(kept.mask(), mask) and torch.equal(kept.num_kept(), mask.sum(1)) and len(kept) == 20
    num_words = -(-num_vocab // 32)
    smallest = [0 if n == num_vocab else min(n, num_words) for n in mask.sum(1).tolist()]
    assert kept.offsets.diff().tolist() == smallest and kept.words.dtype == torch.int32
    assert torch.equal(unpacked_bits(packed_bits(mask), num_vocab), mask)
    some = torch.arange(20) % 3 == 0
    assert torch.equal(kept.where(some).mask(), mask[some])
    assert torch.equal(kept.rows(slice(4, 11)).where(torch.arange(7) > 2).mask(), mask[7:11])
    both = KeptTokens.cat([kept.rows(slice(5, 9)), KeptTokens.all_of(2, num_vocab), kept.where(some)], num_vocab)
    assert torch.equal(both.mask(), torch.cat([mask[5:9], torch.ones(2, num_vocab, dtype=torch.bool), mask[some]]))
    assert len(kept.rows(slice(20, 25))) == len(KeptTokens.cat([], num_vocab)) == 0
    with pytest.raises(ValueError, match="must all be of"):
        KeptTokens.cat([kept, KeptTokens.all_of(1, num_vocab + 1)], num_vocab)


# -- the linear head over them
def problem(num_vocab: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Leaves hidden, weight, bias; targets, row index, and a mask of 1 to V kept tokens."""
    leaves = [randn(7, 16), randn(num_vocab, 16, seed=1) / 2, randn(num_vocab, seed=2)]
    gen = torch.Generator().manual_seed(3)
    row_index = torch.randint(0, 7, (40,), generator=gen)
    targets = torch.randint(0, num_vocab, (40,), generator=gen)
    mask = torch.rand(40, num_vocab, generator=gen) < torch.linspace(0, 1.05, 40)[:, None] ** 3
    mask[:, 100:110] = False  # never kept, unless drawn
    mask[torch.arange(40), targets] = True
    return [x.to(dtype).requires_grad_() for x in leaves], targets, row_index, mask


def wavy(stats: TokenStats, rows: slice) -> Tensor:
    weights = torch.arange(rows.start, rows.stop, dtype=stats.logprob.dtype).cos()
    return (weights * stats.logprob).sum() + (stats.entropy * weights).square().sum() + stats.lse.sin().sum()


def truth(leaves: list[Tensor], targets: Tensor, row_index: Tensor, mask: Tensor, temperature: float) -> TokenStats:
    """A softmax over the kept columns alone, token by token, in float64, by autograd."""
    hidden, weight, bias = (x.double() for x in leaves)
    rows = []
    for i, target in enumerate(targets.tolist()):
        ids = mask[i].nonzero()[:, 0]
        z = (weight[ids] @ hidden[row_index[i]] + bias[ids]) / temperature
        logp = z.log_softmax(0)
        rows.append((logp[(ids == target).nonzero()[0, 0]], -(logp.exp() * logp).sum(), z.logsumexp(0)))
    return TokenStats(*(torch.stack(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize(("body", "num_vocab"), [*PAIRS, ("reference", 37), ("triton", 137)])
def test_value_and_gradient_are_those_of_a_softmax_over_the_kept_tokens(body: str, num_vocab: int) -> None:
    leaves, targets, row_index, mask = problem(num_vocab)
    kept = KeptTokens.from_mask(mask)
    options = dict(row_index_N=row_index, bias_V=leaves[2], temperature=0.7, kept=kept)
    exact = truth(leaves, targets, row_index, mask, 0.7)
    true_grads = torch.autograd.grad(wavy(exact, slice(0, 40)), leaves, retain_graph=True)
    with using(body):
        stats = linear_logprob(*leaves[:2], targets, **options)
        grads = torch.autograd.grad(wavy(stats, slice(0, 40)), leaves)
        loss = linear_loss(*leaves[:2], targets, wavy, chunk_rows=17, **options)
        loss_grads = torch.autograd.grad(3 * loss, leaves)
    chunks = [slice(i, min(i + 17, 40)) for i in range(0, 40, 17)]
    by_chunk = sum(wavy(TokenStats(*(s[rows] for s in exact)), rows) for rows in chunks)
    torch.testing.assert_close(tuple(stats), tuple(exact), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads, true_grads, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, by_chunk, rtol=1e-11, atol=1e-11)
    truth_3 = torch.autograd.grad(3 * by_chunk, leaves)
    torch.testing.assert_close(loss_grads, truth_3, rtol=1e-9, atol=1e-11)
    never = ~mask.any(0)
    assert never.any() == (num_vocab > 100)
    assert all((g[never] == 0).all() for g in (grads[1], grads[2], loss_grads[1], loss_grads[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", BODIES[:-1])
def test_low_precision_has_no_nan_and_the_same_values(body: str, dtype: torch.dtype) -> None:
    leaves, targets, row_index, mask = problem(1003, dtype)
    mask[0] = False
    mask[0, targets[0]] = True  # a single token: log-probability 0, entropy 0, no gradient
    bias = leaves[2].float().detach()
    options = dict(row_index_N=row_index, bias_V=bias, temperature=0.01, kept=KeptTokens.from_mask(mask))
    exact = truth([leaves[0], leaves[1], bias], targets, row_index, mask, 0.01)
    with using(body):
        stats = linear_logprob(*leaves[:2], targets, **options)
        grads = torch.autograd.grad(wavy(stats, slice(0, 40)), leaves[:2])
        linear_loss(*leaves[:2], targets, wavy, **options).backward()
    for ours, true in zip(stats, exact, strict=True):
        assert (ours.double() - true).abs().max() < 2e-3  # logits reach 1,000: their ulp in float32 is 6e-5
    assert stats.logprob[0] == 0 and abs(stats.entropy[0]) < 1e-6
    assert all(g.isfinite().all() for g in (*grads, leaves[0].grad, leaves[1].grad))


@pytest.mark.parametrize("num_kept", [5, 4000])  # as ids, as bits
def test_unpacking_holds_no_more_than_is_promised(num_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tok, num_vocab = 300, 20_000
    monkeypatch.setattr(kept_tokens, "BLOCK_BYTES", 2**20)
    mask = torch.zeros(num_tok, num_vocab, dtype=torch.bool)
    mask[:, :num_kept] = True
    kept, logits, target = KeptTokens.from_mask(mask), torch.zeros(mask.shape), torch.zeros(num_tok, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept.exclude_(logits, target, slice(0, num_tok))
    assert torch.equal(logits == 0, mask)
    results = profiled.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    most = max(itertools.accumulate(num_bytes for _, num_bytes in changes))
    assert 2**18 < most <= 2**20


def test_no_mask_of_all_tokens_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tokens, "BLOCK_BYTES", 2 * COPIES * 1003)
    made: list[int] = []
    whole = KeptTokens.mask

    def counted(self: KeptTokens, device: torch.device | None = None) -> Tensor:
        made.append(len(self))
        return whole(self, device)

    monkeypatch.setattr(KeptTokens, "mask", counted)
    leaves, targets, row_index, mask = problem(1003)
    kept = KeptTokens.from_mask(mask)
    with backend.using("torch"):
        linear_loss(*leaves[:2], targets, wavy, row_index_N=row_index, chunk_rows=7, kept=kept).backward()
    assert sum(made) == 40 and max(made) == 2


def test_what_does_not_fit_is_refused() -> None:
    leaves, targets, row_index, mask = problem(37)
    kept = KeptTokens.from_mask(mask)
    mask[30, targets[30]] = False
    for bad, message in (
        (KeptTokens.from_mask(mask), "must be among its kept tokens"),
        (kept.rows(slice(0, 39)), "one set for each of the 40 targets"),
        (KeptTokens.all_of(40, 36), "of 37 tokens"),
    ):
        for call in (linear_logprob, linear_logprob_ref):
            with pytest.raises(ValueError, match=message):
                call(*leaves[:2], targets, row_index_N=row_index, kept=bad)
        for call in (linear_loss, linear_loss_ref):
            with pytest.raises(ValueError, match=message):
                call(*leaves[:2], targets, wavy, row_index_N=row_index, kept=bad)
    with pytest.raises(ValueError, match="at least the drawn one"):
        KeptTokens.from_mask(torch.zeros(1, 37, dtype=torch.bool))


def test_the_body_without_logits_is_refused() -> None:
    if backend.triton_reason():
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1 before Python starts")
    leaves, targets, row_index, mask = problem(37, torch.float32)
    with (
        backend.using("linear_loss=offset"),
        pytest.raises(ValueError, match="it has no logits .* use linear_loss=triton"),
    ):
        linear_loss(*leaves[:2], targets, wavy, row_index_N=row_index, kept=KeptTokens.from_mask(mask))


@pytest.mark.parametrize("body", ["reference", *BODIES[1:]])
def test_only_kept_tokens_are_sampled_with_their_renormalised_log_probability(body: str) -> None:
    num_rows = 4 if body == "triton" else 200  # its interpreter is slow
    logits = 3 * randn(num_rows, 300, dtype=torch.float32)
    mask = keep_tokens(logits, top_p=0.6)
    left = logits.masked_fill(~mask, -math.inf)
    with using(body):
        token, logprob = sample_token(left, torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64))
    assert mask.gather(1, token[:, None]).all()
    torch.testing.assert_close(logprob, left.log_softmax(-1).gather(1, token[:, None])[:, 0], rtol=0, atol=1e-5)
