"""A backward runs the implementation of its forward, on any thread; so does a forward that checkpointing repeats."""

import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isomorph.kernels import backend, linear_chunks, token_logprob
from isomorph.kernels import linear as linear_file
from isomorph.kernels.linear_logprob import linear_logprob, linear_loss
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = PackedLayout.from_groups([5], [[3, 2]])
TARGET = torch.tensor([3, 0, 6, 6], device=DEVICE)

OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (linear_file.linear, (4, 8), (7, 8)),
    "token_logprob": (
        lambda x, y: token_logprob.token_logprob(x + y, TARGET).logprob.exp().sum(), (4, 7), (4, 7)
    ),
    "linear_logprob": (lambda x, y: linear_logprob(x, y, TARGET).logprob.exp().sum(), (4, 8), (7, 8)),
    "linear_loss": (
        lambda x, y: linear_loss(x, y, TARGET, lambda stats, rows: stats.logprob.exp().sum()), (4, 8), (7, 8)
    ),
    "packed_attention": (lambda x, y: packed_attention(x, y, y, LAYOUT), (10, 4, 8), (10, 2, 8)),
}  # fmt: skip
CHOICES = [(op, body) for op in OPS for body in backend.bodies(op, DEVICE)]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The bodies whose functions have run, in order; the reference has none."""
    seen: list[str] = []

    def watch(owner: object, names: list[str], body: str) -> None:
        for name in names:
            actual = getattr(owner, name)

            def spy(*args: object, _actual: Callable[..., object] = actual, **kwargs: object) -> object:
                seen.append(body)
                return _actual(*args, **kwargs)

            monkeypatch.setattr(owner, name, spy)

    monkeypatch.setattr(linear_file, "MIN_TERMS", 1)
    monkeypatch.setattr(linear_file, "MIN_WEIGHT", 1)
    for owner in (linear_file, linear_chunks):
        watch(owner, ["product"], "oneDNN")
    watch(token_logprob, ["_scaled"], "torch")
    if backend.native_available():
        names = ["row_stats", "row_gradient", "packed_attention", "packed_attention_backward"]
        watch(backend.native(), names, "native")
    if not backend.triton_reason():
        from isomorph.kernels.gpu import attention, offset, offset_rows, rows

        watch(rows, ["row_stats", "row_gradient"], "triton")
        watch(attention, ["attend", "attend_backward"], "triton")
        watch(offset, ["exp_chunk"], "offset")
        watch(offset_rows, ["row_scales", "whole_gradient_"], "offset")
    yield seen


def _leaves(op: str) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=gen).to(DEVICE).requires_grad_() for shape in OPS[op][1:]]


def _on_another_thread(function: Callable[[], object]) -> None:
    """A thread of Python begins with an empty context, as autograd's do. What it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _bodies_of(seen: list[str]) -> set[str]:
    found = set(seen)
    seen.clear()
    return found


@pytest.mark.parametrize("products", ["torch", "reference"])
@pytest.mark.parametrize(("op", "body"), CHOICES)
def test_a_backward_on_another_thread_runs_the_body_of_its_forward(
    op: str, body: str, products: str, ran: list[str]
) -> None:
    leaves = _leaves(op)
    if op == "linear":
        products = body
    with backend.using(f"linear={products},{op}={body}"):
        out = OPS[op][0](*leaves)
    forward = _bodies_of(ran)
    _on_another_thread(out.sum().backward)
    backward = _bodies_of(ran)
    by_onednn = op.startswith("linear") and body != "reference" and products == "torch" and DEVICE == "cpu"
    expected = {body} if op != "linear" else set()
    assert forward == (expected - {"reference"}) | ({"oneDNN"} if by_onednn else set())
    assert backward == (forward if op != "linear_loss" else set())  # that made its gradients in its forward


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("op", "body"), CHOICES)
def test_what_is_computed_again_is_computed_by_the_same_bodies(
    op: str, body: str, use_reentrant: bool, ran: list[str]
) -> None:
    leaves = _leaves(op)
    with backend.using(f"{op}={body}"):
        direct = OPS[op][0](*leaves)
        expected = torch.autograd.grad(direct.sum(), leaves)
        once = _bodies_of(ran)
        out = checkpoint(backend.bound(OPS[op][0]), *leaves, use_reentrant=use_reentrant)
    assert _bodies_of(ran) <= once
    _on_another_thread(out.sum().backward)
    # linear_loss keeps its gradients and no tensors, so that only a reentrant checkpoint runs it again
    assert _bodies_of(ran) == (set() if op == "linear_loss" and not use_reentrant else once)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)  # type: ignore[arg-type]


def test_bound_hides_what_is_asked_for_where_it_runs() -> None:
    with backend.using("gae=reference"):
        chosen = backend.bound(lambda: backend.choose("gae"))
    free = backend.bound(lambda: backend.choose("gae"))
    assert chosen() == "reference"
    with backend.using("gae=reference"):
        assert free() == backend.bodies("gae", "cpu")[0]
    assert backend.request() == ""


# -- one base of the LSE
@pytest.mark.parametrize("body", [body for body in backend.bodies("packed_attention", DEVICE) if body != "reference"])
def test_every_body_keeps_the_natural_lse(body: str) -> None:
    q, k = (x.detach() for x in _leaves("packed_attention"))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1)) * 8**-0.5
    truth = scores.masked_fill(~LAYOUT.dense_mask().to(DEVICE), -math.inf).logsumexp(-1)
    with backend.using(f"packed_attention={body}"):
        out = packed_attention(q.requires_grad_(), k, k, LAYOUT)
    assert out.grad_fn is not None
    lse = out.grad_fn.saved_tensors[-1]
    if body == "native":
        lse = lse.T
    torch.testing.assert_close(lse.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
def test_a_forward_that_another_gpu_body_ran_again_still_has_the_right_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody took ``bound``: one of them reads what the other kept."""
    from isomorph.kernels.gpu import attention

    def as_flash_does(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float) -> tuple[Tensor, Tensor]:
        """Its output, and the natural LSE [H, T], by their definitions."""
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        scores = scores.masked_fill(~layout.dense_mask().to(q.device), -math.inf)
        return packed_attention_ref(q, k, v, layout, scale=scale).contiguous(), scores.logsumexp(-1)

    forwards = iter([attention.attend, as_flash_does])
    monkeypatch.setattr(attention, "attend", lambda *args: next(forwards)(*args))
    leaves = _leaves("packed_attention")
    truth = torch.autograd.grad(packed_attention_ref(*leaves, leaves[1], LAYOUT).sum(), leaves)
    with backend.using("packed_attention=triton"):
        out = checkpoint(OPS["packed_attention"][0], *leaves, use_reentrant=False)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert next(forwards, None) is None
    for ours, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)
