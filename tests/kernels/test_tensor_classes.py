"""Tensors without memory of their own, fake tensors and DTensors: C++ would read address 0 and end the process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

from isomorph.kernels import backend
from isomorph.kernels.advantage import gae, group_advantage
from isomorph.kernels.bit_hash import bit_hash
from isomorph.kernels.linear import linear
from isomorph.kernels.linear_logprob import linear_logprob
from isomorph.kernels.rms_norm import add_rms_norm, rms_norm
from isomorph.kernels.rotary import rotary
from isomorph.kernels.sample_token import sample_token
from isomorph.kernels.swiglu import swiglu
from isomorph.kernels.token_logprob import token_logprob

N, D, V = 6, 8, 20


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IDS, HEADS, SQUARE = torch.arange(N), _random(N, 2, D), _random(300, 300)
# a call of its tensors, and the tensors; the products are large enough for oneDNN
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), (_random(N, D), _random(D))),
    "add_rms_norm": (lambda x, r, w: add_rms_norm(x, r, w, 1e-6)[0], (_random(N, D), _random(N, D), _random(D))),
    "swiglu": (swiglu, (_random(N, D), _random(N, D))),
    "rotary": (lambda q, k, c, s: rotary(q, k, c, s)[0], (HEADS, HEADS, _random(N, D), _random(N, D))),
    "sample_token": (lambda z, k, p: sample_token(z, k, p)[1], (_random(N, V), IDS, IDS)),
    "linear": (linear, (SQUARE, SQUARE)),
    "bit_hash": (bit_hash, (_random(N, D),)),
    "token_logprob": (lambda z, y: token_logprob(z, y).logprob, (_random(N, V), IDS)),
    "linear_logprob": (lambda h, w, y: linear_logprob(h, w, y).logprob, (_random(N, D), _random(V, D), IDS)),
    "group_advantage": (group_advantage, (_random(N), torch.tensor([0, 2, N]))),
    "gae": (lambda r, v, o: gae(r, v, o, gamma=1.0, lam=1.0)[0], (_random(N), _random(N), torch.tensor([0, N]))),
}
# these read values on the host, which a fake tensor does not have: they raise PyTorch's own error
READS_VALUES = {"token_logprob", "linear_logprob", "group_advantage", "gae"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in READS_VALUES])
def test_a_fake_tensor_gives_shape_and_dtype(name: str) -> None:
    op, operands = CASES[name]
    expected = op(*operands)
    with FakeTensorMode() as mode:
        got = op(*(mode.from_tensor(x) for x in operands))
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


# the specifications of the others mix a DTensor with tensors of their own, or read addresses: PyTorch refuses
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "rotary", "linear", *sorted(READS_VALUES)[2:]])
def test_a_dtensor_takes_the_specification(name: str, mesh: Any) -> None:
    op, operands = CASES[name]
    with backend.using("reference"):
        expected = op(*operands)
    got = op(*(distribute_tensor(x, mesh, [Replicate()]) for x in operands))
    torch.testing.assert_close(got.full_tensor(), expected)


def test_a_dtensor_beside_plain_tensors_is_refused_by_pytorch(mesh: Any) -> None:
    weight = distribute_tensor(_random(D), mesh, [Replicate()])  # of a module that FSDP has cut, outside its forward
    with pytest.raises(RuntimeError, match="mixed"):
        rms_norm(_random(N, D), weight, 1e-6)
    with pytest.raises(RuntimeError, match="mixed"):
        sample_token(*(distribute_tensor(x, mesh, [Replicate()]) for x in (_random(N, V), IDS, IDS)))


def test_parameters_and_buffers_are_plain() -> None:
    x = _random(N, D)
    assert backend.has_memory(x, None, torch.nn.Parameter(x), torch.nn.Buffer(x), x.t(), x.detach())
