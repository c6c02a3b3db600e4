"""Log-probability and entropy of rows of logits: alone, and with the gradient of the logits.

Cost model: bytes. The logits are read once; with the gradient they are read again and it is written. The roofline is a
copy of the logits, which reads and writes them.
"""

import peers
import pytest
import torch
from compare import COMPILED, DEVICE, EAGER, Case, Run, check, ours
from head_inputs import dtypes, sizes
from torch import Tensor

from isomorph.kernels.token_logprob import token_logprob, token_logprob_ref


def cases(quick: bool) -> list[Case]:
    shapes = dict.fromkeys((num, vocab) for num, _, vocab in sizes(quick))
    return [_case(*shape, dtype, backward=b) for shape in shapes for dtype in dtypes() for b in (False, True)]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_case(4, 300, torch.float32)]


def _case(num: int, vocab: int, dtype: torch.dtype, *, backward: bool = False) -> Case:
    torch.manual_seed(0)
    logits_NV = (3 * torch.randn(num, vocab, device=DEVICE)).to(dtype)
    target_N = torch.randint(vocab, (num,), device=DEVICE)
    coefficient_2N = torch.randn(2, num, device=DEVICE)  # of log-probability and entropy in the loss

    def ours_stats(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return token_logprob(logits, target)[:2]

    def trl() -> Run:
        from trl.trainer.utils import selective_log_softmax_and_entropy

        return run(selective_log_softmax_and_entropy)

    def gradient(stats_of, logits: Tensor, target: Tensor, coefficient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        leaf = logits.detach().requires_grad_()
        stats = stats_of(leaf, target)
        loss = sum((c * stat).sum() for c, stat in zip(coefficient.to(stats[0].dtype), stats, strict=False))
        return (*(stat.detach() for stat in stats), *torch.autograd.grad(loss, leaf))

    def run(stats_of) -> Run:  # type: ignore[no-untyped-def]
        if backward:
            return lambda: gradient(stats_of, logits_NV, target_N, coefficient_2N)
        return lambda: stats_of(logits_NV, target_N)

    def exact() -> tuple[Tensor, ...]:
        parts = []
        for rows in torch.arange(num, device=DEVICE).split(1024):
            logits, target = logits_NV[rows].double(), target_N[rows]
            stats_of = lambda *args: token_logprob_ref(*args)[:2]  # noqa: E731
            part = gradient(stats_of, logits, target, coefficient_2N[:, rows]) if backward else stats_of(logits, target)
            parts.append(part)
        return tuple(torch.cat(stat) for stat in zip(*parts, strict=True))

    providers = {
        **ours("token_logprob", run(ours_stats)),
        EAGER: lambda: run(peers.row_stats),
        COMPILED: lambda: run(peers.compiled(peers.row_stats)),
        "trl selective_log_softmax_and_entropy": trl,
    }
    if not backward:  # the loss has the entropy in it
        providers |= {name: lambda make=make: run(make()) for name, make in peers.ROW_LOGPROBS.items()}  # type: ignore[misc]
    return Case(
        "token_logprob",
        f"{'forward and backward, ' if backward else ''}N={num} V={vocab}",
        dtype,
        providers,
        exact,
        lambda: logits_NV.clone(),
        "copy",
        byte=num * vocab * dtype.itemsize * (3 if backward else 1),
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_token_logprob(case: Case) -> None:
    check(case)
