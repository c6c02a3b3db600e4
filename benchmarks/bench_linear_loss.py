"""The head and a clipped GRPO loss, forward and backward: loss, gradient of the hidden states and of the weight.

Model: 6 N H V FLOP, three GEMMs. The ceiling is these three of this shape and dtype.
"""

from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, EAGER, Case, Run, check, ours
from head_inputs import Head, dtypes, make_head, require, sizes
from torch import Tensor

from isomorph.kernels.linear_logprob import linear_loss
from isomorph.kernels.token_logprob import TokenStats


def cases(quick: bool) -> list[Case]:
    return [_case(*size, dtype) for size in sizes(quick) for dtype in dtypes()]


def _case(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Case:
    head = make_head(num, dim, vocab, dtype)
    with torch.no_grad():
        old_N = _eager_logprob(head).double() + 0.1 * torch.randn(num, device=DEVICE)
    advantage_N = torch.randn(num, device=DEVICE, dtype=torch.float64)

    def grpo(logprob_n: Tensor, rows: slice = slice(None)) -> Tensor:
        old_n, advantage_n = (x[rows].to(logprob_n.dtype) for x in (old_N, advantage_N))
        ratio_n = (logprob_n - old_n).exp()
        return -torch.minimum(ratio_n * advantage_n, ratio_n.clamp(0.8, 1.2) * advantage_n).sum() / num

    def ours_loss(inputs: Head) -> Tensor:
        def loss_of(stats: TokenStats, rows: slice) -> Tensor:
            return grpo(stats.logprob, rows)

        return linear_loss(*inputs, loss_of, chunk_rows=4096)

    def trl() -> Run:
        from trl.trainer.utils import selective_log_softmax

        return lambda: _gradients(head, lambda x: grpo(selective_log_softmax(x.hidden_ND @ x.weight_VD.T, x.target_N)))

    def liger() -> Run:
        require("liger_kernel")
        raise ImportError("not measured: its chunked GRPO loss takes padded [B, T] batches, not packed rows")

    def exact() -> tuple[Tensor, ...]:
        hidden_ND, weight_VD, target_N = head.double()
        loss, weight_grad, hidden_grads = 0.0, torch.zeros_like(weight_VD), []
        for start in range(0, num, 1024):  # all logits in float64 would not fit on a GPU
            rows = slice(start, start + 1024)
            part = Head(hidden_ND[rows], weight_VD, target_N[rows])
            part_loss, hidden_grad, part_grad = _gradients(part, lambda x, rows=rows: grpo(_eager_logprob(x), rows))  # type: ignore[misc]
            loss, weight_grad = loss + part_loss, weight_grad.add_(part_grad)
            hidden_grads.append(hidden_grad)
        return torch.as_tensor(loss), torch.cat(hidden_grads), weight_grad

    providers = {
        **ours("linear_loss", lambda: _gradients(head, ours_loss)),
        EAGER: lambda: lambda: _gradients(head, lambda x: grpo(_eager_logprob(x))),
        "trl": trl,
        "liger": liger,
    }
    return Case(
        "linear_loss", f"N={num} H={dim} V={vocab}", dtype, providers, exact, lambda: _three_gemms(head), "3 GEMMs"
    )


def _eager_logprob(head: Head) -> Tensor:
    logits_NV = head.hidden_ND @ head.weight_VD.T
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return torch.log_softmax(logits_NV, -1).gather(1, head.target_N[:, None])[:, 0]


def _gradients(head: Head, loss_of: Callable[[Head], Tensor]) -> tuple[Tensor, ...]:
    leaves = Head(head.hidden_ND.detach().requires_grad_(), head.weight_VD.detach().requires_grad_(), head.target_N)
    loss = loss_of(leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves[:2]))


def _three_gemms(head: Head) -> None:
    logits_NV = head.hidden_ND @ head.weight_VD.T
    torch.mm(logits_NV, head.weight_VD)
    torch.mm(logits_NV.T, head.hidden_ND)


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_linear_loss(case: Case) -> None:
    check(case)
