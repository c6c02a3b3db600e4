"""The head and a loss, forward and backward: the loss, the gradients of the hidden states and of the weight.

Two losses: GRPO's, clipped, and the mean cross-entropy, which more libraries fuse. Cost model: 6 N H V FLOP,
three GEMMs (recomputing the logits makes it four). The roofline is these three, in this shape and dtype.
"""

from collections.abc import Callable

import peers
import pytest
import torch
from compare import COMPILED, DEVICE, EAGER, Case, Run, check, ours
from head_inputs import Head, dtypes, make_head, sizes
from torch import Tensor

from isomorph.kernels.linear_logprob import linear_loss
from isomorph.kernels.token_logprob import TokenStats

Logprobs = dict[str, Callable[[], peers.Logprob]]
LossOfLogprob = Callable[[Tensor, slice], Tensor]


def cases(quick: bool) -> list[Case]:
    found = [_case(*size, dtype) for size in sizes(quick) for dtype in dtypes()]
    return found + [_cross_entropy(*size, dtype) for size in sizes(quick=True) for dtype in dtypes()]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_case(4, 16, 300, torch.float32)]


def _case(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Case:
    head = make_head(num, dim, vocab, dtype)
    with torch.no_grad():
        old_N = peers.eager(*head).double() + 0.1 * torch.randn(num, device=DEVICE)
    advantage_N = torch.randn(num, device=DEVICE, dtype=torch.float64)

    def grpo(logprob_n: Tensor, rows: slice = slice(None)) -> Tensor:
        old_n, advantage_n = (x[rows].to(logprob_n.dtype) for x in (old_N, advantage_N))
        ratio_n = (logprob_n - old_n).exp()
        return -torch.minimum(ratio_n * advantage_n, ratio_n.clamp(0.8, 1.2) * advantage_n).sum() / num

    whole = {"liger LigerFusedLinearGRPOLoss": lambda: peers.liger_grpo(head.target_N, old_N, advantage_N)}
    return _of(f"GRPO, N={num} H={dim} V={vocab}", head, grpo, whole, peers.LOGPROBS)


def _cross_entropy(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Case:
    head = make_head(num, dim, vocab, dtype)

    def mean(logprob_n: Tensor, rows: slice = slice(None)) -> Tensor:
        return -logprob_n.sum() / num

    whole = {name: lambda make=make: make(head.target_N) for name, make in peers.CROSS_ENTROPIES.items()}  # type: ignore[misc]
    logprobs = {name: make for name, make in peers.LOGPROBS.items() if name.startswith("cce")}  # the rest is for RL
    return _of(f"cross-entropy, N={num} H={dim} V={vocab}", head, mean, whole, logprobs)


def _of(
    size: str, head: Head, loss_of: LossOfLogprob, whole: dict[str, Callable[[], peers.Loss]], logprobs: Logprobs
) -> Case:
    target_N = head.target_N
    num, dim = head.hidden_ND.shape

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        def of_stats(stats: TokenStats, rows: slice) -> Tensor:
            return loss_of(stats.logprob, rows)

        return linear_loss(hidden, weight, target_N, of_stats, chunk_rows=4096)

    def eager(hidden: Tensor, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        return loss_of(peers.eager(hidden, weight, target_N[rows]), rows)

    def on(make: Callable[[], peers.Logprob]) -> Callable[[], Run]:
        def made() -> Run:
            logprob = make()
            return _run(head, lambda hidden, weight: loss_of(logprob(hidden, weight, target_N)[0], slice(None)))

        return made

    def exact() -> tuple[Tensor, ...]:
        hidden_ND, weight_VD, _ = head.double()
        loss, weight_grad, hidden_grads = hidden_ND.new_zeros(()), torch.zeros_like(weight_VD), []
        for start in range(0, num, 1024):  # all logits in float64 would not fit on a GPU
            rows = slice(start, start + 1024)
            part = _gradients(hidden_ND[rows], weight_VD, lambda h, w, rows=rows: eager(h, w, rows))  # type: ignore[misc]
            loss, weight_grad = loss + part[0], weight_grad.add_(part[2])
            hidden_grads.append(part[1])
        return loss, torch.cat(hidden_grads), weight_grad

    providers = {
        **ours("linear_loss", _run(head, fused)),
        EAGER: lambda: _run(head, eager),
        COMPILED: lambda: _run(head, peers.compiled(eager)),
        **(_of_our_precision(head, eager) if head.weight_VD.dtype == torch.bfloat16 else {}),
        **{name: on(make) for name, make in logprobs.items()},
        **{name: lambda make=make: _run(head, make()) for name, make in whole.items()},  # type: ignore[misc]
    }
    return Case(
        "linear_loss",
        size,
        head.weight_VD.dtype,
        providers,
        exact,
        lambda: _three_gemms(head),
        "3 GEMMs",
        flop=6 * num * dim * len(head.weight_VD),
    )


def _of_our_precision(head: Head, eager: peers.Loss) -> dict[str, Callable[[], Run]]:
    """PyTorch with logits that are not rounded to bfloat16. On the CPU it has no such product of bfloat16 matrices."""

    def wide(hidden: Tensor, weight: Tensor) -> Tensor:
        return eager(hidden.float(), weight.float())

    return {
        f"{EAGER}, float32 logits": lambda: _run(head, wide),
        f"{COMPILED}, float32 logits": lambda: _run(head, peers.compiled(wide)),
    }


def _run(head: Head, loss: peers.Loss) -> Run:
    return lambda: _gradients(head.hidden_ND, head.weight_VD, loss)


def _gradients(hidden_ND: Tensor, weight_VD: Tensor, loss_of: peers.Loss) -> tuple[Tensor, ...]:
    leaves = (hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_())
    loss = loss_of(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _three_gemms(head: Head) -> None:
    logits_NV = head.hidden_ND @ head.weight_VD.T
    torch.mm(logits_NV, head.weight_VD)
    torch.mm(logits_NV.T, head.hidden_ND)


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_linear_loss(case: Case) -> None:
    check(case)
