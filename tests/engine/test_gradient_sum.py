"""Gradients of data parallel ranks are summed during the backward pass: sums, their order, when they begin."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crowd import Crowd
from torch import Tensor
from torch.nn import Parameter

from isomorph.engine.distributed import gradient_sum
from isomorph.engine.distributed.gradient_sum import GradientSum
from isomorph.engine.distributed.ranks import Ranks

NUM_RANKS = 3
SIZES = (7, 300, 1, 64, 129, 500, 2)


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    crowd = Crowd(NUM_RANKS)
    yield crowd
    crowd.close()


def make_parameters(dtype: torch.dtype = torch.float64) -> dict[str, Parameter]:
    return {f"p{i}": Parameter(torch.zeros(size, dtype=dtype)) for i, size in enumerate(SIZES)}


def coefficients(rank: int, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + batch)
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in SIZES]


def wanted(num_batches: int) -> Tensor:
    """What the gradients of all ranks and batches are together."""
    parts = [torch.cat(coefficients(rank, batch)) for rank in range(NUM_RANKS) for batch in range(num_batches)]
    return torch.stack(parts).sum(dim=0)


def backward(rank: int, batch: int, parameters: dict[str, Parameter], *, is_shuffled: bool = True) -> None:
    """A pass whose gradients are ready in an order of this rank's own, or in the reverse of the parameters'."""
    order = list(range(len(SIZES)))
    if is_shuffled:
        order = torch.randperm(len(SIZES), generator=torch.Generator().manual_seed(rank)).tolist()
    values, factors = list(parameters.values()), coefficients(rank, batch)
    loss = torch.zeros((), dtype=torch.float64)
    for i in order:  # the gradient of what was added last is ready first
        loss = loss + (values[i] * factors[i].to(values[i].dtype)).sum()
    loss.backward()


class Watched:
    """``dist.all_reduce``, which writes down what is summed, and which gradients are then still missing."""

    def __init__(self, summed: GradientSum) -> None:
        self.summed, self.real = summed, dist.all_reduce
        self.sizes: list[int] = []
        self.num_missing: list[int] = []

    def __enter__(self) -> "Watched":
        dist.all_reduce = self
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self.real

    def __call__(self, tensor: Tensor, **named: Any) -> Any:
        assert named == {"async_op": True}
        self.sizes.append(tensor.numel())
        self.num_missing.append(sum(map(len, self.summed._missing)))
        return self.real(tensor, **named)


def sums(
    ranks: Ranks, num_batches: int, num_steps: int, bucket_bytes: int, is_shuffled: bool
) -> tuple[list[Tensor], list[int], list[int]]:
    """The sums of each step; of each all-reduce its size, and how many gradients were missing when it began."""
    gradient_sum.BUCKET_BYTES = bucket_bytes
    parameters = make_parameters()
    summed = GradientSum(parameters, parameters)
    found = []
    with Watched(summed) as watched:
        for _ in range(num_steps):
            summed.begin()
            for batch in range(num_batches):
                if batch == num_batches - 1:
                    summed.last_batch()
                backward(ranks.rank, batch, parameters, is_shuffled=is_shuffled)
            summed.launch_rest()
            ranks.gather(ranks.rank)  # another collective, before the sums are there
            summed.wait()
            found.append(torch.cat([p.grad for p in parameters.values() if p.grad is not None]).clone())
            for parameter in parameters.values():
                parameter.grad = None
    return found, watched.sizes, watched.num_missing


@pytest.mark.parametrize("bucket_bytes", [1, 2048, 1 << 20])
def test_sums_are_those_of_all_ranks_whatever_the_order_of_their_gradients(crowd: Crowd, bucket_bytes: int) -> None:
    answers = crowd.ask(sums, 3, 2, bucket_bytes, True)
    first = answers[0][0][0]
    sizes = {1: [2, 500, 129, 64, 1, 300, 7], 2048: [502, 494, 7], 1 << 20: [1003]}[bucket_bytes]
    for found, summed, _ in answers:
        for step in found:
            assert torch.equal(step, first)
            torch.testing.assert_close(step, wanted(3), rtol=0, atol=1e-13)
        assert summed == 2 * sizes


def test_a_sum_begins_before_the_backward_pass_has_ended(crowd: Crowd) -> None:
    for _, summed, num_missing in crowd.ask(sums, 2, 1, 1, False):
        assert summed == list(reversed(SIZES)) and num_missing == [6, 5, 4, 3, 2, 1, 0]
    for _, summed, num_missing in crowd.ask(sums, 2, 1, 1, True):  # where a bucket waits for the ones before it
        assert summed == list(reversed(SIZES)) and num_missing == sorted(num_missing, reverse=True)


def rounded(ranks: Ranks) -> Tensor:
    """Masters in float32 of parameters in bfloat16, whose gradients other hooks add up, as MasterAdamW's do."""
    parameters = make_parameters(torch.bfloat16)
    masters = {name: p.detach().float().clone() for name, p in parameters.items()}

    def add(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        masters[name].grad.add_(parameter.grad.float())  # type: ignore[union-attr]
        parameter.grad = None

    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: add(name, p))
    summed = GradientSum(parameters, masters)
    summed.begin()
    for batch in range(2):
        if batch == 1:
            summed.last_batch()
        factors = [c.bfloat16() for c in coefficients(ranks.rank, batch)]
        sum((p * c).sum() for p, c in zip(parameters.values(), factors, strict=True)).backward()  # type: ignore[union-attr]
    summed.launch_rest()
    summed.wait()
    return torch.cat([master.grad for master in masters.values() if master.grad is not None])


def test_what_other_hooks_add_to_the_masters_is_summed(crowd: Crowd) -> None:
    exact = [
        torch.cat([c.bfloat16().double() for c in coefficients(rank, b)]) for rank in range(NUM_RANKS) for b in (0, 1)
    ]
    for found in crowd.ask(rounded):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.stack(exact).sum(dim=0), rtol=0, atol=1e-5)


def after_failures(ranks: Ranks) -> Tensor:
    """The sum of a step after one that failed before its last pass, and one that failed after its sums had begun."""
    parameters = make_parameters()
    summed = GradientSum(parameters, parameters)
    for num_batches in (1, 2):
        summed.begin()
        for batch in range(num_batches):
            if batch == 1:
                summed.last_batch()
            backward(ranks.rank, batch, parameters)
        if num_batches == 2:
            summed.launch_rest()
        summed.abandon()
        for parameter in parameters.values():
            parameter.grad = None
    summed.begin()
    summed.last_batch()
    backward(ranks.rank, 0, parameters)
    summed.launch_rest()
    summed.wait()
    summed.close()
    return torch.cat([p.grad for p in parameters.values() if p.grad is not None])


def test_a_step_that_failed_leaves_nothing_for_the_next(crowd: Crowd) -> None:
    for found in crowd.ask(after_failures):
        torch.testing.assert_close(found, wanted(1), rtol=0, atol=1e-13)


def twice(ranks: Ranks) -> str:
    parameters = make_parameters()
    summed = GradientSum(parameters, parameters)
    summed.begin()
    summed.last_batch()
    try:
        for _ in range(2):
            parameters["p1"].sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        summed.abandon()
        ranks.wait()
    return ""


def test_a_second_backward_pass_is_refused_where_sums_may_have_begun(crowd: Crowd) -> None:
    assert all("gradient of p1 arrived twice" in error for error in crowd.ask(twice))
