"""Log-probability and entropy from hidden states and the head's weight, without gradients: the old log-probabilities.

Cost model: 2 N H V FLOP. The roofline is the GEMM of this shape and dtype. Some peers return no entropy.
"""

from collections.abc import Callable

import peers
import pytest
import torch
from compare import COMPILED, EAGER, Case, Run, check, ours
from head_inputs import dtypes, make_head, sizes
from torch import Tensor

from isomorph.kernels.linear_logprob import linear_logprob, linear_logprob_ref


def cases(quick: bool) -> list[Case]:
    return [_case(*size, dtype) for size in sizes(quick) for dtype in dtypes()]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_case(4, 16, 300, torch.float32)]


def _case(num: int, dim: int, vocab: int, dtype: torch.dtype) -> Case:
    head = make_head(num, dim, vocab, dtype)
    hidden_ND, weight_VD, target_N = head

    def eager() -> tuple[Tensor, ...]:
        return peers.row_stats(hidden_ND @ weight_VD.T, target_N)

    def exact() -> tuple[Tensor, ...]:
        hidden, weight, target = head.double()
        parts = [linear_logprob_ref(h, weight, t) for h, t in zip(hidden.split(1024), target.split(1024), strict=True)]
        return tuple(torch.cat(stat) for stat in zip(*parts, strict=True))

    def on(make: Callable[[], peers.Logprob]) -> Callable[[], Run]:
        def made() -> Run:
            logprob = make()
            return lambda: logprob(*head)

        return made

    providers = {
        **ours("linear_logprob", lambda: tuple(linear_logprob(*head))),
        EAGER: lambda: eager,
        COMPILED: lambda: peers.compiled(eager),
        **{name: on(make) for name, make in peers.LOGPROBS.items()},
    }
    return Case(
        "linear_logprob",
        f"N={num} H={dim} V={vocab}",
        dtype,
        providers,
        exact,
        lambda: hidden_ND @ weight_VD.T,
        "GEMM",
        flop=2 * num * dim * vocab,
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_linear_logprob(case: Case) -> None:
    check(case)
