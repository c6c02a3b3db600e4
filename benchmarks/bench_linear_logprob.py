"""Log-probability and entropy from hidden states and the head's weight, without gradients: the old log-probabilities.

Model: 2 N H V FLOP. The ceiling is the GEMM of this shape and dtype.
"""

import pytest
import torch
from compare import EAGER, Case, Run, check, ours
from head_inputs import dtypes, make_head, need_gpu, require, sizes
from torch import Tensor

from isomorph.kernels.linear_logprob import linear_logprob, linear_logprob_ref


def cases(quick: bool) -> list[Case]:
    return [_case(*size, dtype) for size in sizes(quick) for dtype in dtypes()]


def _case(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Case:
    head = make_head(num, dim, vocab, dtype)
    hidden_ND, weight_VD, target_N = head

    def eager() -> tuple[Tensor, ...]:
        logprob_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float(), -1)
        entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
        return logprob_NV.gather(1, target_N[:, None])[:, 0], entropy_N

    def trl() -> Run:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        def run() -> tuple[Tensor, ...]:
            logits_NV = hidden_ND @ weight_VD.T
            return selective_log_softmax(logits_NV, target_N), entropy_from_logits(logits_NV)

        return run

    def torch_fused() -> Run:
        fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
        if fused is None:
            raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
        return lambda: (-fused(hidden_ND, weight_VD, target_N, reduction="none"),)

    def cce() -> Run:
        require("cut_cross_entropy")
        need_gpu("cut-cross-entropy")
        from cut_cross_entropy import linear_cross_entropy

        return lambda: (-linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none"),)

    def exact() -> tuple[Tensor, ...]:
        hidden, weight, target = head.double()
        parts = [linear_logprob_ref(h, weight, t) for h, t in zip(hidden.split(1024), target.split(1024), strict=True)]
        return tuple(torch.cat(stat) for stat in zip(*parts, strict=True))

    providers = {
        **ours("linear_logprob", lambda: tuple(linear_logprob(*head))),
        EAGER: lambda: eager,
        "trl": trl,
        "torch linear_cross_entropy (no entropy)": torch_fused,
        "cce (no entropy)": cce,
    }
    return Case(
        "linear_logprob",
        f"N={num} H={dim} V={vocab}",
        dtype,
        providers,
        exact,
        lambda: hidden_ND @ weight_VD.T,
        "GEMM",
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_linear_logprob(case: Case) -> None:
    with torch.no_grad():
        check(case)
