"""Packed attention of groups by two varlen calls of flash attention, merged by log-sum-exp. CUDA, bfloat16 and float16.

    own     every segment on its own keys, causal                                 o1, l1
    cross   the responses of a group, one entry, on their prompt's keys, full     o2, l2
    merge   l = logaddexp(l1, l2)     o = exp(l1 - l) o1 + exp(l2 - l) o2

The backward of each call, given the merged o and l, is exact: a weight is exp(score - l) wherever its key is. The cross
call adds the prompt's dK and dV up over all responses. No entry of a call is empty: what flash attention writes for a
query without keys differs from version to version, and an entry of no queries changes how it treats those of one.

Trees need as many calls as they are deep: they take ``kernels/gpu/attention.py``. The specification is
``packed_attention_ref`` in ``kernels/packed_attention.py``.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isomorph.kernels.flash import Entries, Flash, flash, flash_reason
from isomorph.kernels.gpu.attention_rows import merge
from isomorph.kernels.packed_layout import PackedLayout, Segment
from isomorph.kernels.packing import consecutive
from isomorph.kernels.strides import check_contiguous, unit_stride


# -- which rows take part in which call
class Cross(NamedTuple):
    """Responses on their prompts, and which packed rows those are."""

    entries: Entries
    queries: Tensor  # [N] int64
    keys: Tensor  # [prompt tokens] int64


class Calls(NamedTuple):
    own: Entries
    cross: Cross | None  # None where no prompt has a response


def calls_of(segments: Sequence[Segment]) -> Calls:
    """The calls for segments of which none has more than one ancestor."""
    own = [(s.start, s.end) for s in segments if s.start < s.end]
    pairs = [s for s in segments if s.start < s.end < s.vis_end]
    queries, keys = [(s.end, s.vis_end) for s in pairs], [(s.start, s.end) for s in pairs]
    cross = Cross(_entries(queries, keys, is_causal=False), _rows(queries), _rows(keys)) if pairs else None
    return Calls(_entries(own, own, is_causal=True), cross)


def _entries(queries: list[tuple[int, int]], keys: list[tuple[int, int]], *, is_causal: bool) -> Entries:
    q_lens, k_lens = ([end - start for start, end in ranges] for ranges in (queries, keys))
    cu_q, cu_k = (
        torch.tensor([*itertools.accumulate(lens, initial=0)], dtype=torch.int32) for lens in (q_lens, k_lens)
    )
    return Entries(cu_q, cu_k, max(q_lens, default=0), max(k_lens, default=0), is_causal)


def _rows(ranges: list[tuple[int, int]]) -> Tensor:
    starts, ends = torch.tensor(ranges).unbind(1)
    return consecutive(starts, ends - starts)


def _calls_on(layout: PackedLayout, device: torch.device) -> Calls:
    """The calls, made and moved once for all layers."""
    key = ("varlen", device)
    if key not in layout.on_device:
        own, cross = calls_of(layout.segments)
        if cross is not None:
            cross = Cross(_moved(cross.entries, device), cross.queries.to(device), cross.keys.to(device))
        layout.on_device[key] = Calls(_moved(own, device), cross)
    return layout.on_device[key]


def _moved(entries: Entries, device: torch.device) -> Entries:
    return entries._replace(cu_q=entries.cu_q.to(device), cu_k=entries.cu_k.to(device))


# -- the two calls
def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float, by: Flash | None = None
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], contiguous, and the natural LSE [H, T]."""
    by = by or _present_flash()
    q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (q_THD, k_TKD, v_TKD))
    own, cross = _calls_on(layout, q_THD.device)
    if not q_THD.numel():
        return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[1::-1], dtype=torch.float32)
    out_THD, lse_HT = by.forward(q_THD, k_TKD, v_TKD, own, scale)
    out_THD = out_THD.contiguous()  # of a permuted q it is permuted
    if cross is not None:
        q, k, v = _cross_inputs(cross, q_THD, k_TKD, v_TKD)
        part_NHD, part_lse_HN = by.forward(q, k, v, cross.entries, scale)
        merge(out_THD, lse_HT, part_NHD.contiguous(), part_lse_HN, cross.queries)
    return out_THD, lse_HT


def attend_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    layout: PackedLayout,
    scale: float,
    by: Flash | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from what ``attend`` returned."""
    by = by or _present_flash()
    check_contiguous(out=out_THD, lse=lse_HT)
    dout_THD, q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (dout_THD, q_THD, k_TKD, v_TKD))
    own, cross = _calls_on(layout, q_THD.device)
    if not q_THD.numel():
        return torch.empty_like(q_THD), torch.empty_like(k_TKD), torch.empty_like(v_TKD)
    grads = by.backward(dout_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, own, scale)
    if cross is not None:
        q, k, v = _cross_inputs(cross, q_THD, k_TKD, v_TKD)
        dout, out = (x.index_select(0, cross.queries) for x in (dout_THD, out_THD))
        parts = by.backward(dout, q, k, v, out, lse_HT.index_select(1, cross.queries), cross.entries, scale)
        for grad, part, rows in zip(grads, parts, (cross.queries, cross.keys, cross.keys), strict=True):
            grad.index_add_(0, rows, part)  # rows are distinct: the order of addition cannot matter
    return grads


def _cross_inputs(cross: Cross, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q_THD.index_select(0, cross.queries),
        k_TKD.index_select(0, cross.keys),
        v_TKD.index_select(0, cross.keys),
    )


def _present_flash() -> Flash:
    found = flash()
    assert found is not None, flash_reason()
    return found
