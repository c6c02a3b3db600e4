"""Parts of the GPU suite that check draws against their distribution, and that the same call gives the same bits."""

from collections.abc import Callable, Iterator

import torch
from compare import DEVICE, free_memory
from gpu_correct import (
    TEMPERATURE,
    HeadProblem,
    Rows,
    bodies_here,
    check,
    dtype_here,
    layouts_here,
    make_head_problem,
    parts_of,
)
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.linear_logprob import linear_loss
from isomorph.kernels.packed_attention import packed_attention
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.sample_token import sample_token, sample_token_ref
from isomorph.kernels.token_logprob import token_logprob


# -- draws
def draws(rehearse: bool) -> Rows:
    """sample_token: its distribution by chi-square, its tokens and log-probabilities beside the specification's."""
    for vocab, rows in ((8, 150), (300, 100)) if rehearse else ((8, 400_000), (151_936, 20_000)):
        gen = torch.Generator(DEVICE).manual_seed(vocab)
        logits_V = 3 * torch.randn(vocab, device=DEVICE, generator=gen)
        prob_V = torch.softmax(logits_V.double() / TEMPERATURE, -1)
        for body in bodies_here("sample_token"):
            with backend.using(f"sample_token={body}"):
                token_B = _many_draws(logits_V, rows)
            yield check(f"sample_token={body} V={vocab}: -log10 of the chi-square test's p of {rows} draws",
                         _surprise(token_B, prob_V), 6.0)  # fmt: skip
    yield from _check_draws(16 if rehearse else 256, 301 if rehearse else 151_936)


def _many_draws(logits_V: Tensor, num: int) -> Tensor:
    """Of one row, under keys of their own; so many at a time that a part's logits stay below 128 MiB."""
    size = max(1, 2**25 // len(logits_V))
    parts = []
    for rows in parts_of(num, size):
        key_B = torch.arange(rows.start, rows.stop, device=DEVICE)
        row_BV = logits_V.expand(len(key_B), -1).contiguous()
        parts.append(sample_token(row_BV, key_B, torch.full_like(key_B, 7), temperature=TEMPERATURE)[0])
    return torch.cat(parts)


def _surprise(token_B: Tensor, prob_V: Tensor) -> float:
    """-log10 p of Pearson's test; columns in order of probability are joined until a cell expects ten draws."""
    order = prob_V.argsort(descending=True)
    expected = prob_V[order] * len(token_B)
    cell_V = (expected.cumsum(0) / 10).floor().long()  # ten draws a cell, or one likely column
    cell_V = torch.unique_consecutive(cell_V, return_inverse=True)[1]
    num = int(cell_V[-1]) + 1
    seen = torch.bincount(token_B, minlength=len(prob_V)).double()[order]
    observed, wanted = (
        torch.zeros(num, dtype=torch.float64, device=DEVICE).index_add(0, cell_V, x) for x in (seen, expected)
    )
    keep = wanted >= 5
    statistic = ((observed - wanted).square() / wanted)[keep].sum()
    freedom = (keep.sum() - 1).double()
    p = torch.special.gammaincc(freedom / 2, statistic / 2).clamp(min=1e-300)
    return float(-p.log10())


def _check_draws(rows: int, vocab: int) -> Rows:
    gen = torch.Generator(DEVICE).manual_seed(2)
    logits_BV = 3 * torch.randn(rows, vocab, device=DEVICE, generator=gen)
    key_B = torch.randint(2**62, (rows,), device=DEVICE, generator=gen)
    position_B = torch.arange(rows, device=DEVICE)
    true_B, _ = sample_token_ref(logits_BV.double(), key_B, position_B, temperature=TEMPERATURE)
    logprob_BV = torch.log_softmax(logits_BV.double() / TEMPERATURE, -1)
    largest = float(logprob_BV.abs().max())
    for body in bodies_here("sample_token"):
        with backend.using(f"sample_token={body}"):
            token_B, got_B = sample_token(logits_BV, key_B, position_B, temperature=TEMPERATURE)
        error = (got_B.double() - logprob_BV.gather(1, token_B[:, None])[:, 0]).abs().max()
        yield check(f"sample_token={body} V={vocab}: log-probability", float(error) / largest, 5e-6)
        other = int((token_B != true_B).sum())  # two columns that tie to rounding
        yield check(f"sample_token={body} V={vocab}: tokens unlike float64's, of {rows}", other, rows / 100)


# -- the same bits again
def repeats(rehearse: bool) -> Rows:
    """A row of logits alone and in its batch, by the implementations that promise its bits (PyTorch's reductions do
    not); many launches at real sizes in bfloat16, where a missing barrier shows: all must give the same bits."""
    yield from _check_rows_alone(*((4, 300) if rehearse else (256, 151_936)), dtype_here(rehearse))
    launches = 2 if rehearse else 200
    for name, call in _repeated(rehearse):
        first = call()
        differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(launches):
            differing += torch.stack([(a != b).any() for a, b in zip(first, call(), strict=True)]).any()
        yield check(f"{name}: launches of {launches} that give other bits", int(differing), 0)
        del first, call
        free_memory()


def _check_rows_alone(num: int, vocab: int, dtype: torch.dtype) -> Rows:
    gen = torch.Generator(DEVICE).manual_seed(3)
    logits = (3 * torch.randn(num, vocab, device=DEVICE, generator=gen)).to(dtype)
    target = torch.randint(vocab, (num,), device=DEVICE, generator=gen)
    for body in set(bodies_here("token_logprob")) - {"torch"}:
        differing = 0
        with backend.using(f"token_logprob={body}"):
            batch = token_logprob(logits, target)
            for i in range(min(num, 16)):
                alone = token_logprob(logits[i : i + 1], target[i : i + 1])
                differing += any(not torch.equal(a, b[i : i + 1]) for a, b in zip(alone, batch, strict=True))
        yield check(f"token_logprob={body}: rows of {min(num, 16)} that have other bits alone", differing, 0)


def _repeated(rehearse: bool) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    dtype = dtype_here(rehearse)
    made = make_head_problem(*((11, 24, 301) if rehearse else (2048, 1536, 151_936)), dtype)
    for body in bodies_here("linear_loss"):
        if body in ("triton", "offset"):
            yield f"linear_loss={body}", lambda body=body: _head_once(made, body, 4 if rehearse else 1024)  # type: ignore[misc]
    layout = layouts_here(rehearse)["ragged"].to(DEVICE)
    heads = (4, 2, 2) if rehearse else (12, 2, 2)
    leaves = [torch.randn(layout.num_tok, n, 16 if rehearse else 128, device=DEVICE).to(dtype) for n in heads]
    yield "packed_attention=triton", lambda: _attention_once(leaves, layout)


def _head_once(made: HeadProblem, body: str, chunk: int) -> tuple[Tensor, ...]:
    leaves = made.leaves()
    with backend.using(f"linear_loss={body}"):
        loss = linear_loss(
            *leaves,
            made.target_N,
            lambda stats, _: -stats.logprob.sum(),
            row_index_N=made.row_index_N,
            chunk_rows=chunk,
        )
        return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _attention_once(inputs: list[Tensor], layout: PackedLayout) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with backend.using("packed_attention=triton"):
        out = packed_attention(*leaves, layout)
        return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))
