"""Every op in every implementation that runs here, with inputs and upstream gradients that are not contiguous.

The expected value is the op's specification in float64 on contiguous copies; in bfloat16, whose tolerance would hide a
wrong element, it is the result of the same implementation on contiguous copies. Memory around a view is NaN.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels import linear as linear_file
from isomorph.kernels.advantage import gae, gae_ref, group_advantage, group_advantage_ref
from isomorph.kernels.bit_hash import bit_hash, bit_hash_ref
from isomorph.kernels.decode_attention import CachedKV, decode_attention, decode_attention_ref
from isomorph.kernels.linear import linear, linear_ref
from isomorph.kernels.linear_logprob import (
    TokenStats,
    linear_logprob,
    linear_logprob_ref,
    linear_loss,
    linear_loss_ref,
)
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.packing import take_ragged, take_ragged_ref
from isomorph.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from isomorph.kernels.rotary import rotary, rotary_ref
from isomorph.kernels.sample_token import sample_token, sample_token_ref
from isomorph.kernels.swiglu import swiglu, swiglu_ref
from isomorph.kernels.token_logprob import token_logprob, token_logprob_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Case = tuple[Callable[..., object], Callable[..., object], list[Tensor]]  # the op, its specification, their operands


# -- the ops
def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def _ints(upper: int, num: int) -> Tensor:
    return torch.randint(upper, (num,), generator=torch.Generator().manual_seed(num))


def _sum_of_all(stats: TokenStats, rows: slice) -> Tensor:
    return (stats.logprob.exp() + stats.entropy.square() + stats.lse.sin()).sum()


def _logprobs(stats: TokenStats, rows: slice) -> Tensor:
    return stats.logprob.exp().sum()


def _head(op: Callable[..., object]) -> Callable[..., object]:
    return lambda hidden, weight, target, row, bias: op(hidden, weight, target, row_index_N=row, bias_V=bias)


def _loss(op: Callable[..., object], loss_of: object) -> Callable[..., object]:
    return lambda hidden, weight, target, row: op(hidden, weight, target, loss_of, row_index_N=row, chunk_rows=5)


def _attention(op: Callable[..., object]) -> Callable[..., object]:
    layout = PackedLayout.from_groups([9], [[3, 5]])
    return lambda q, k, v: op(q, k, v, layout)


def _decode(op: Callable[..., object]) -> Callable[..., object]:
    return lambda q, k, v, slot, length, own_k, own_v, own_slot, own_length: op(
        q, CachedKV(k, v, slot, length), CachedKV(own_k, own_v, own_slot, own_length)
    )


def _norm(op: Callable[..., object]) -> Callable[..., object]:
    return lambda *operands: op(*operands, 1e-5)


def _rotary(op: Callable[..., object]) -> Callable[..., object]:
    """Cosines and sines are constants, here every second column of wider ones."""
    angle = _floats(6, 16)
    return lambda q, k: op(q, k, *(f(angle).to(q)[:, ::2] for f in (torch.cos, torch.sin)))


def _groups(op: Callable[..., object]) -> Callable[..., object]:
    return lambda reward: op(reward, torch.tensor([0, 3, 5, 9], device=reward.device))


def _seqs(op: Callable[..., object]) -> Callable[..., object]:
    return lambda reward, value: op(reward, value, torch.tensor([0, 4, 9], device=reward.device), gamma=0.9, lam=0.8)


def _ragged(op: Callable[..., object]) -> Callable[..., object]:
    return lambda value, ids: op(value, torch.tensor([0, 2, 3, 9], device=value.device), ids)


_KV = [_floats(4, 2, 7, 8), _floats(4, 2, 7, 8) + 1, _ints(4, 6), _ints(8, 6)]
CASES: dict[str, Case] = {
    "linear": (linear, linear_ref, [_floats(9, 16), _floats(12, 16), _floats(12)]),
    "rms_norm": (_norm(rms_norm), _norm(rms_norm_ref), [_floats(6, 24), _floats(24)]),
    "rms_norm of a sum": (
        _norm(add_rms_norm),
        _norm(add_rms_norm_ref),
        [_floats(6, 24), _floats(6, 24) + 1, _floats(24)],
    ),
    "swiglu": (swiglu, swiglu_ref, [_floats(6, 24), _floats(6, 24) + 1]),
    "rotary": (_rotary(rotary), _rotary(rotary_ref), [_floats(6, 4, 8), _floats(6, 2, 8)]),
    "token_logprob": (token_logprob, token_logprob_ref, [_floats(6, 37), _ints(37, 6)]),
    "linear_logprob": (
        _head(linear_logprob),
        _head(linear_logprob_ref),
        [_floats(7, 16), _floats(37, 16), _ints(37, 9), _ints(7, 9), _floats(37)],
    ),
    "linear_loss": (
        _loss(linear_loss, _sum_of_all),
        _loss(linear_loss_ref, _sum_of_all),
        [_floats(7, 16), _floats(70, 16), _ints(70, 12), _ints(7, 12)],
    ),
    "linear_loss of logprobs": (
        _loss(linear_loss, _logprobs),
        _loss(linear_loss_ref, _logprobs),
        [_floats(7, 16), _floats(70, 16), _ints(70, 12), _ints(7, 12)],
    ),
    "packed_attention": (
        _attention(packed_attention),
        _attention(packed_attention_ref),
        [_floats(17, 4, 8), _floats(17, 2, 8), _floats(17, 2, 8) + 1],
    ),
    "decode_attention": (_decode(decode_attention), _decode(decode_attention_ref), [_floats(6, 4, 8), *_KV, *_KV]),
    "sample_token": (sample_token, sample_token_ref, [_floats(6, 1100), _ints(2**60, 6), _ints(50, 6)]),
    "group_advantage": (_groups(group_advantage), _groups(group_advantage_ref), [_floats(9)]),
    "gae": (_seqs(gae), _seqs(gae_ref), [_floats(9), _floats(9) + 1]),
    "take_ragged": (_ragged(take_ragged), _ragged(take_ragged_ref), [_floats(9), _ints(3, 4)]),
    "bit_hash": (bit_hash, bit_hash_ref, [_floats(9, 16)]),
}
GRADIENT_FREE = ("decode_attention", "sample_token", "group_advantage", "gae", "take_ragged", "bit_hash")
BODIES = [(name, body) for name in CASES for body in backend.bodies(name.split()[0], DEVICE)[:-1]]
HALF = [
    (name, "native", torch.bfloat16)
    for name in ("token_logprob", "linear_logprob", "linear_loss", "packed_attention", "decode_attention")
    if (name, "native") in BODIES
]


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def _run(op: Callable[..., object], operands: list[Tensor], has_gradient: bool, lay: Callable | None) -> list[Tensor]:
    """Results of the op and its gradients, with upstream gradients that are 1 and, if ``lay``, tensors made by it."""
    leaves = [x.detach() for x in operands]
    if not has_gradient:
        return _tensors(op(*leaves))
    inputs = [x.requires_grad_() for x in leaves if x.is_floating_point()]
    out = _tensors(op(*leaves))
    total = sum(x.sum() for x in out)
    assert isinstance(total, Tensor)
    found = [*out, *torch.autograd.grad(total, inputs, retain_graph=lay is not None)]
    if lay is not None:
        upstream = [_floats(*x.shape).to(x) if x.ndim else x.new_tensor(3.0) for x in out]
        upstream = [lay(x) if x.ndim else x for x in upstream]
        found += torch.autograd.grad(out, inputs, upstream)
    return [x.detach() for x in found]


@pytest.fixture(autouse=True)
def _small_products_take_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_file, "MIN_TERMS", 1)
    monkeypatch.setattr(linear_file, "MIN_WEIGHT", 1)


def test_every_op_that_takes_tensors_is_a_case() -> None:
    assert {name.split()[0] for name in CASES} == set(backend.OPS) - {"assign_groups"}


@pytest.mark.parametrize(("name", "body", "dtype"), [*((*pair, torch.float32) for pair in BODIES), *HALF])
def test_how_a_tensor_lies_in_memory_does_not_matter(
    name: str, body: str, dtype: torch.dtype, lay: Callable[[Tensor], Tensor]
) -> None:
    op, ref, operands = CASES[name]
    operands = [x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in operands]
    laid = [lay(x) for x in operands]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in laid]
    is_half = dtype == torch.bfloat16
    if not is_half and name not in ("sample_token", "bit_hash"):  # noise and words are those of a dtype
        dense = [x.double() if x.is_floating_point() else x for x in dense]
    has_gradient = name not in GRADIENT_FREE
    lay_upstream = lay if has_gradient and not name.startswith("linear_loss") else None  # a loss is differentiated once
    with backend.using(f"{name.split()[0]}={body}"):
        ours = _run(op, laid, has_gradient, lay_upstream)
        truth = _run(op if is_half else ref, dense, has_gradient, lay_upstream)
    tolerance = 1e-2 if is_half else 3e-5
    for our, true in zip(ours, truth, strict=True):
        assert our.isfinite().all()
        largest = max(1.0, float(true.abs().max())) if true.is_floating_point() else 0.0
        torch.testing.assert_close(our, true.to(our.dtype), rtol=0, atol=tolerance * largest)
