"""One sampled token per row and its log-probability, from logits.

Cost model: bytes. The logits are read once; the roofline is a copy of them, which reads and writes. All providers
sample from the same distribution but not the same tokens: the error is that of the sampled token's log-probability.
"""

from collections.abc import Callable

import peers
import pytest
import torch
from compare import COMPILED, DEVICE, EAGER, Case, check, ours
from head_inputs import sizes
from torch import Tensor

from isomorph.kernels.sample_token import sample_token

ROWS = 256 if DEVICE.type == "cuda" else 64  # sequences that decode together


def cases(quick: bool) -> list[Case]:
    return [_case(ROWS, vocab, torch.float32) for _, _, vocab in sizes(quick)]


def tiny_cases() -> list[Case]:
    """A size small enough for Triton's interpreter."""
    return [_case(3, 300, torch.float32)]


def _case(rows: int, vocab: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    logits_BV = (3 * torch.randn(rows, vocab, device=DEVICE)).to(dtype)
    key_B, position_B = torch.arange(rows, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    true_BV = torch.log_softmax(logits_BV.double(), -1)

    def graded(draw: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            token_B, logprob_B = draw(logits_BV)
            return (1 + (logprob_B.double() - true_BV.gather(1, token_B[:, None])[:, 0]),)

        return run

    def multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprob = torch.log_softmax(logits, -1)
        token = torch.multinomial(logprob.exp(), 1)
        return token[:, 0], logprob.gather(1, token)[:, 0]

    def gumbel(logits: Tensor) -> tuple[Tensor, Tensor]:
        token = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
        return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)

    providers = {
        **ours("sample_token", graded(lambda logits: sample_token(logits, key_B, position_B))),
        EAGER: lambda: graded(multinomial),
        f"{EAGER}, Gumbel noise": lambda: graded(gumbel),
        COMPILED: lambda: graded(peers.compiled(gumbel)),
    }
    return Case(
        "sample_token",
        f"B={rows} V={vocab}",
        dtype,
        providers,
        lambda: (torch.ones(rows, dtype=torch.float64, device=DEVICE),),
        lambda: logits_BV.clone(),
        "copy",
        byte=logits_BV.nbytes,
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.size)
def test_sample_token(case: Case) -> None:
    check(case)
