"""A linear layer, forward and backward, on the CPU: what every decoder layer spends most of an update on.

Cost model: 6 T I O FLOP. The roofline is the forward product three times, by PyTorch's default backend.
"""

from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, EAGER, Case, check, ours
from torch import Tensor

from isomorph.kernels.linear import linear, linear_ref


def cases(quick: bool) -> list[Case]:
    if DEVICE.type != "cpu":
        return []
    return [_case(64, 64, 96)] if quick else [_case(2700, 576, 1536), _case(2700, 1536, 576)]


def _case(num_rows: int, num_in: int, num_out: int) -> Case:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, num_in, requires_grad=True), torch.randn(num_out, num_in, requires_grad=True)
    dy = torch.randn(num_rows, num_out)

    def both(layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = layer(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))

    def exact() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        y = linear_ref(*wide)
        return (y.detach(), *torch.autograd.grad(y, wide, dy.double()))

    providers = {**ours("linear", lambda: both(linear)), EAGER: lambda: lambda: both(linear_ref)}
    return Case(
        "linear",
        f"forward and backward, T={num_rows} I={num_in} O={num_out}",
        torch.float32,
        providers,
        exact,
        lambda: [x.detach() @ weight.detach().T for _ in range(3)],
        "3 products",
        flop=6 * num_rows * num_in * num_out,
    )


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.op)
def test_linear(case: Case) -> None:
    check(case)
