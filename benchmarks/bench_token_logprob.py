"""Log-probability, entropy and LSE of rows of logits, without gradients.

Model: bytes. N * V * size of the dtype are read once; the ceiling is a copy of the logits, which reads and writes them.
"""

import pytest
import torch
from compare import DEVICE, EAGER, Case, Run, check, ours
from head_inputs import dtypes, sizes
from torch import Tensor

from isomorph.kernels.token_logprob import token_logprob, token_logprob_ref


def cases(quick: bool) -> list[Case]:
    shapes = dict.fromkeys((num, vocab) for num, _, vocab in sizes(quick))
    return [_case(num, vocab, dtype) for num, vocab in shapes for dtype in dtypes()]


def _case(num: int, vocab: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    logits_NV = (3 * torch.randn(num, vocab, device=DEVICE)).to(dtype)
    target_N = torch.randint(vocab, (num,), device=DEVICE)

    def eager() -> tuple[Tensor, ...]:
        logprob_NV = torch.log_softmax(logits_NV.float(), -1)
        entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
        return logprob_NV.gather(1, target_N[:, None])[:, 0], entropy_N

    def trl() -> Run:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        return lambda: (selective_log_softmax(logits_NV, target_N), entropy_from_logits(logits_NV))

    def exact() -> tuple[Tensor, ...]:
        chunks = zip(logits_NV.split(1024), target_N.split(1024), strict=True)
        parts = [token_logprob_ref(logits.double(), target) for logits, target in chunks]
        return tuple(torch.cat(stat) for stat in zip(*parts, strict=True))

    providers = {
        **ours("token_logprob", lambda: tuple(token_logprob(logits_NV, target_N))),
        EAGER: lambda: eager,
        "trl": trl,
    }
    return Case(
        "token_logprob",
        f"N={num} V={vocab}",
        dtype,
        providers,
        exact,
        lambda: logits_NV.clone(),
        "copy",
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: f"{case.size} {case.dtype}")
def test_token_logprob(case: Case) -> None:
    with torch.no_grad():
        check(case)
