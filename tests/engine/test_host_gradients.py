"""Gradients for masters in host memory, on the CPU: when they are added up, and when they move."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from isomorph.engine.update.host_gradients import HostGradients

NAMES = ("first", "second", "third")  # in the order of a forward pass


def make(dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Parameter], dict[str, Tensor], HostGradients]:
    parameters = {name: Parameter(torch.ones(5, dtype=dtype)) for name in NAMES}
    masters = {name: p.detach().float().clone() for name, p in parameters.items()}
    return parameters, masters, HostGradients(parameters, masters)


def backward(parameters: dict[str, Parameter], factor: float) -> None:
    """Gradients are ``factor``; ready in the reverse of the parameters' order."""
    hidden = torch.zeros(5, dtype=parameters["first"].dtype)
    for parameter in parameters.values():
        hidden = hidden + factor * parameter
    hidden.sum().backward()


def test_sums_stay_on_the_device_until_the_last_pass_and_move_while_it_computes() -> None:
    parameters, masters, gradients = make()
    seen: list[tuple[set[str], set[str]]] = []
    for parameter in parameters.values():  # after the hooks of ``gradients``
        parameter.register_post_accumulate_grad_hook(
            lambda _: seen.append((set(gradients._sums), {n for n, m in masters.items() if m.grad is not None}))
        )
    for factor in (1.0, 0.0078125):  # the second is below half of bfloat16's spacing at 1
        backward(parameters, factor)
    assert seen[-1] == (set(NAMES), set())
    gradients.last_batch()
    backward(parameters, 0.5)
    assert [(len(sums), len(moved)) for sums, moved in seen[-3:]] == [(2, 1), (1, 2), (0, 3)]
    gradients.wait()
    for name in NAMES:
        assert parameters[name].grad is None
        assert torch.equal(masters[name].grad, torch.full((5,), 1.5078125))  # type: ignore[arg-type]


def test_without_a_last_pass_gradients_move_when_they_are_waited_for() -> None:
    parameters, masters, gradients = make()
    backward(parameters, 2.0)
    gradients.wait()
    assert all(torch.equal(m.grad, torch.full((5,), 2.0)) for m in masters.values())  # type: ignore[arg-type]


def test_what_is_discarded_is_not_in_the_next_step() -> None:
    parameters, masters, gradients = make()
    backward(parameters, 2.0)
    gradients.last_batch()
    gradients.discard()
    backward(parameters, 1.0)
    assert all(master.grad is None for master in masters.values())  # the next pass is not the last one
    gradients.wait()
    assert all(torch.equal(m.grad, torch.ones(5)) for m in masters.values())  # type: ignore[arg-type]


def test_a_gradient_that_is_set_before_is_overwritten_in_place() -> None:
    parameters, masters, gradients = make()
    buffer = torch.zeros(15)
    for master, part in zip(masters.values(), buffer.split(5), strict=True):
        master.grad = part
    backward(parameters, 1.0)
    gradients.last_batch()
    backward(parameters, 2.0)
    assert torch.equal(buffer, torch.full((15,), 3.0))


def test_a_gradient_that_another_hook_took_is_an_error() -> None:
    parameter = Parameter(torch.ones(2))
    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    HostGradients({"a": parameter}, {"a": torch.ones(2)})
    with pytest.raises(RuntimeError, match="another learner is open on these weights"):
        parameter.sum().backward()
