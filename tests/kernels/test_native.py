"""The C++ modules as such: what they are linked with, what their stubs say, how they run."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from isomorph.kernels import backend, linear_logprob, token_logprob
from isomorph.kernels.advantage import gae, group_advantage
from isomorph.kernels.packing import take_ragged

KERNELS = Path(backend.__file__).parent
needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())


def _module(name: str) -> ModuleType:
    reason = backend.native_reason() if name == "_native" else backend.native_cuda_reason()
    if reason:
        pytest.skip(reason)
    return backend.native() if name == "_native" else backend.native_cuda()


@pytest.mark.parametrize("name", ["_native", "_native_cuda"])
def test_a_module_needs_no_library_of_pytorchs(name: str) -> None:
    linked = Path(str(_module(name).__file__)).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in linked


@pytest.mark.parametrize("name", ["_native", "_native_cuda"])
def test_the_stub_declares_what_is_called_with_the_arguments_that_the_module_takes(name: str) -> None:
    module = _module(name)
    stub = ast.parse((KERNELS / f"{name}.pyi").read_text())
    declared = {f.name: [arg.arg for arg in f.args.args] for f in stub.body if isinstance(f, ast.FunctionDef)}
    for function, arguments in declared.items():
        signature = re.split(r"\n| -> ", getattr(module, function).__doc__)[0]  # of the first overload
        assert re.findall(r"[(,] ?(\w+): ", signature) == arguments, function
    source = "".join(file.read_text() for file in KERNELS.glob("*.py"))
    assert set(re.findall(rf"backend\.{name[1:]}\(\)\.(\w+)\(", source)) <= declared.keys()


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    gen = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 3000, generator=gen)
    offsets = torch.tensor([0, 1, 700, 700, 2999, 3000])

    def results() -> list[torch.Tensor]:
        with backend.using("native"):
            advantage = group_advantage(reward, offsets, baseline="none", scale="batch")
            taken, _ = take_ragged(reward, offsets, torch.tensor([4, 1, 3, 1]))
            return [advantage, taken, *gae(reward, value, offsets, gamma=0.99, lam=0.95)]

    threads, before = torch.get_num_threads(), results()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(results(), before, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_a_processor_without_bfloat16_products_runs_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.native(), "has_bfloat16_gemm", lambda: False)

    def refused(*args: object) -> None:
        raise AssertionError("this processor has no bfloat16 products")

    monkeypatch.setattr(backend.native(), "bfloat16_gemm", refused)
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=gen).bfloat16().requires_grad_() for n in (20, 300))
    target = torch.randint(0, 300, (20,), generator=gen)

    def loss_of(stats: token_logprob.TokenStats, rows: slice) -> torch.Tensor:
        return (stats.logprob + stats.entropy).sum()

    with backend.using("native"):
        ours = linear_logprob.linear_loss(hidden, weight, target, loss_of, chunk_rows=8)
    exact = linear_logprob.linear_loss_ref(hidden.double(), weight.double(), target, loss_of, chunk_rows=8)
    assert abs(ours.item() - exact.item()) <= 1e-5 * abs(exact.item())
    grads, truths = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, exact))
    for grad, truth in zip(grads, truths, strict=True):
        assert (grad - truth).norm() <= 2**-8 * truth.norm()  # both are rounded to bfloat16
