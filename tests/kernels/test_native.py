"""The C++ modules: linked libraries, stubs, scratch memory, overlap of operands."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from isomorph.kernels import backend, linear_logprob, token_logprob

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


def _far(*shape: int) -> torch.Tensor:
    """A tensor of far more entries than there is memory, all in one place."""
    return torch.zeros((), dtype=torch.bfloat16).expand(shape)


@needs_native
@pytest.mark.parametrize("op", ["bfloat16_gemm", "bfloat16_outer", "packed_attention", "decode_attention"])
def test_scratch_that_does_not_fit_the_memory_is_a_memory_error(op: str) -> None:
    native, ids, far = backend.native(), torch.zeros(1, dtype=torch.int64), 2**46
    if op.startswith("bfloat16"):
        if not native.has_bfloat16_gemm():
            pytest.skip("needs AVX-512 and bfloat16 dot products")
        left, right = (_far(far, 2), _far(1, 2)) if op == "bfloat16_gemm" else (_far(far, 1), _far(far, 1))
        arguments = (left, right, torch.zeros(1).expand(far, 1))
    elif op == "packed_attention":
        segments = torch.tensor([[0, 1, 1, -1]])
        arguments = (*[_far(1, 1, far)] * 3, segments, 1.0, _far(1, 1, far), torch.zeros(1, 1))  # type: ignore[assignment]
    else:
        caches = (_far(1, 1, far, 16), _far(1, 1, far, 16), ids, ids + far)
        arguments = (_far(1, 1, 16), *caches, *caches, 1.0, torch.zeros(1, 1, 16).bfloat16())  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        getattr(native, op)(*arguments)


@needs_native
def test_a_gradient_is_written_over_its_own_row_or_elsewhere() -> None:
    whole = torch.zeros(5, 40)
    logits, target, stat = whole[:4, :20], torch.zeros(4, dtype=torch.int64), torch.zeros(4)

    def write(out: torch.Tensor) -> None:
        backend.native().row_gradient(logits, target, stat, stat, stat, None, None, None, 1.0, out)

    for out in (logits, logits.view(torch.bfloat16)[:, :20], torch.empty(4, 20)):
        write(out)
    for out in (
        whole[1:, :20],
        whole[:4, 10:30],
        whole.view(torch.bfloat16)[:4, 2:22],
        whole.view(-1)[:80].view(4, 20),
    ):
        with pytest.raises(ValueError, match="the first half of each of their rows"):
            write(out)
    with pytest.raises(ValueError, match="out must be the logits"):  # wider than what is read
        narrow = whole.view(torch.bfloat16)[:, :20]
        backend.native().row_gradient(narrow[:4], target, stat, stat, stat, None, None, None, 1.0, logits)


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
