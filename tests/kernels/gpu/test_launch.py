"""The launches of Triton kernels refuse tensors whose strides their kernels do not take."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.strides import aligned

pytestmark = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V, T, H, D = 4, 24, 5, 2, 8

# a call of its tensors, the tensors, and which of them need unit stride alone
Launch = tuple[Callable[..., object], dict[str, Tensor], set[str]]


def _row_launches() -> dict[str, Launch]:
    from isomorph.kernels.gpu import advantage, offset, offset_rows, rows, sample

    ids, row = torch.zeros(N, dtype=torch.int64, device=DEVICE), torch.zeros(N, device=DEVICE)
    logits, weight, offsets = torch.zeros(N, V), torch.zeros(V, D), torch.tensor([0, 2, N])
    stats = offset.Stats(*(torch.ones(N, device=DEVICE) for _ in range(5)))
    return {
        "row_stats": (
            lambda logits, target, bias: rows.row_stats(logits, target, bias, 1.0),
            dict(logits=logits, target=ids, bias=torch.zeros(V)),
            {"logits"},
        ),
        "row_gradient": (
            lambda logits, out, target, bias, logprob, entropy: rows.row_gradient(
                logits, target, (logprob, entropy, logprob), (row, row, row), bias, 1.0, out
            ),
            dict(logits=logits, out=logits, target=ids, bias=torch.zeros(V), logprob=row, entropy=row),
            {"logits", "out"},
        ),
        "add_rows": (lambda into, rows_: rows.add_rows(into, ids, rows_), dict(into=logits, rows_=logits), set()),
        "draw_token": (
            lambda logits, key, position, token, logprob: sample.draw_token(logits, key, position, 1.0, token, logprob),
            dict(logits=logits, key=ids, position=ids, token=ids, logprob=row),
            {"logits"},
        ),
        "exp_chunk": (
            lambda hidden, weight, target, exp: offset.exp_chunk(hidden, weight, target, 1.0, exp),
            dict(hidden=torch.zeros(N, D), weight=weight, target=ids, exp=logits),
            {"exp"},
        ),
        "target_logits": (offset_rows.target_logits, dict(hidden=torch.zeros(N, D), weight=weight, target=ids), set()),
        "rescue_": (
            lambda hidden, weight, logit, exp: offset_rows.rescue_(hidden, weight, logit, exp, stats, 1.0),
            dict(hidden=torch.zeros(N, D), weight=weight, logit=row, exp=logits),
            {"exp"},
        ),
        "whole_gradient_": (
            lambda exp, target: offset_rows.whole_gradient_(exp, stats, (row, row, row), target, 1.0),
            dict(exp=logits, target=ids),
            {"exp"},
        ),
        "group_advantage": (
            lambda reward, offsets: advantage.group_advantage(reward, offsets, "mean", "std"),
            dict(reward=row, offsets=offsets),
            set(),
        ),
        "gae": (
            lambda reward, value, offsets: advantage.gae(reward, value, offsets, 1.0, 1.0),
            dict(reward=row, value=row, offsets=offsets),
            set(),
        ),
    }  # fmt: skip


def _attention_launches() -> dict[str, Launch]:
    from isomorph.kernels.gpu import attention, attention_rows

    layout = PackedLayout.from_groups([2], [[3]])
    out, lse, place = torch.zeros(T, H, D), torch.zeros(H, T), torch.arange(T)
    partial = torch.zeros(2, 1, H, 32, D)
    tiles = torch.tensor([[0, 3, 0, 1], [3, 5, 0, 1]], dtype=torch.int32)
    return {
        "deltas": (attention_rows.deltas, dict(out_THD=out, dout_THD=out, lse_HT=lse), {"dout_THD"}),
        "add_pieces": (
            attention_rows.add_pieces, dict(partial=partial, dk_TKD=out, dv_TKD=out, tiles=tiles), set(),
        ),
        "merge": (
            attention_rows.merge,
            dict(out_THD=out, lse_HT=lse, part_NHD=out, part_lse_HN=lse, rows_N=place),
            set(),
        ),
        "attend_backward": (
            lambda out, lse: attention.attend_backward(out, out, out, out, out, lse, layout, 1.0),
            dict(out=out, lse=lse),
            set(),
        ),
    }  # fmt: skip


NAMES = [
    "row_stats", "row_gradient", "add_rows", "draw_token", "exp_chunk", "target_logits", "rescue_",
    "whole_gradient_", "deltas", "add_pieces", "merge", "attend_backward", "group_advantage", "gae",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_refuses_what_its_kernel_would_misread(name: str) -> None:
    launch, tensors, takes_row_strides = (_row_launches() | _attention_launches())[name]
    tensors = {key: x.to(DEVICE) for key, x in tensors.items()}
    launch(*tensors.values())
    for key, x in tensors.items():
        sliced = x.repeat_interleave(2, -1)[..., ::2]
        with pytest.raises(ValueError, match=r"must be (contiguous|of stride 1).* with strides .*call .contiguous\(\)"):
            launch(*{**tensors, key: sliced}.values())
        apart = x.repeat_interleave(2, 0)[::2]
        if key in takes_row_strides:
            launch(*{**tensors, key: apart}.values())
        else:
            with pytest.raises(ValueError, match="must be contiguous"):
                launch(*{**tensors, key: apart}.values())


def test_operands_of_tensor_descriptors_begin_at_16_bytes() -> None:
    from isomorph.kernels.gpu import offset

    target = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    off = torch.zeros(V * D + 1, device=DEVICE)[1:].view(V, D)
    for hidden, weight in ((off[:N], off.clone()), (off[:N].clone(), off)):
        with pytest.raises(ValueError, match="must begin at a multiple of 16 bytes"):
            offset.exp_chunk(hidden, weight, target, 1.0, None)
    dense = off.clone()
    assert aligned(dense) is dense and torch.equal(aligned(off), off) and aligned(off).data_ptr() % 16 == 0
    assert aligned(dense.T).is_contiguous()
