"""packed_attention by two varlen calls of FlashAttention, merged by log-sum-exp. CUDA, bfloat16 and float16.

    own     each segment attends to its own keys, causally                                        o1, l1
    cross   all responses of a group, as one sequence, attend to all keys of their prompt         o2, l2
    merge   l = logaddexp(l1, l2)     o = exp(l1 - l) o1 + exp(l2 - l) o2

The backward of each call gets the merged o and l. That is exact: an attention weight is exp(score - l) for the keys of
either call. The cross call sums the prompt's dK and dV over all responses. No sequence of a call is empty: what
FlashAttention writes for a query without keys depends on its version, and an empty sequence of queries changes how it
handles sequences of one query.

Trees would need one call per level: they run ``kernels/gpu/attention.py``. The specification is
``packed_attention_ref`` in ``kernels/packed_attention.py``.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isomorph.kernels.flash import Flash, VarlenBatch, flash, flash_reason
from isomorph.kernels.gpu.attention_rows import merge
from isomorph.kernels.packed_layout import PackedLayout, Segment
from isomorph.kernels.packing import consecutive
from isomorph.kernels.strides import check_contiguous, unit_stride


# -- the sequences of the two calls
class Cross(NamedTuple):
    """The call of responses on their prompts, and the packed rows that it reads."""

    batch: VarlenBatch
    queries: Tensor  # [N] int64, rows of the responses
    keys: Tensor  # [prompt tokens] int64, rows of the prompts


class Calls(NamedTuple):
    """The two calls of one layout."""

    own: VarlenBatch
    cross: Cross | None  # None if no prompt has a response


def calls_of(segments: Sequence[Segment]) -> Calls:
    """The calls for segments with at most one ancestor each."""
    own = [(s.start, s.end) for s in segments if s.start < s.end]
    pairs = [s for s in segments if s.start < s.end < s.vis_end]
    queries, keys = [(s.end, s.vis_end) for s in pairs], [(s.start, s.end) for s in pairs]
    cross = Cross(_batch_of(queries, keys, is_causal=False), _rows(queries), _rows(keys)) if pairs else None
    return Calls(_batch_of(own, own, is_causal=True), cross)


def _batch_of(queries: list[tuple[int, int]], keys: list[tuple[int, int]], *, is_causal: bool) -> VarlenBatch:
    q_lens, k_lens = ([end - start for start, end in ranges] for ranges in (queries, keys))
    cu_q, cu_k = (
        torch.tensor([*itertools.accumulate(lens, initial=0)], dtype=torch.int32) for lens in (q_lens, k_lens)
    )
    return VarlenBatch(cu_q, cu_k, max(q_lens, default=0), max(k_lens, default=0), is_causal)


def _rows(ranges: list[tuple[int, int]]) -> Tensor:
    starts, ends = torch.tensor(ranges).unbind(1)
    return consecutive(starts, ends - starts)


def _calls_on(layout: PackedLayout, device: torch.device) -> Calls:
    """The calls of the layout on ``device``; computed and copied once, and reused by all layers."""
    key = ("varlen", device)
    if key not in layout.on_device:
        own, cross = calls_of(layout.segments)
        if cross is not None:
            cross = Cross(_moved(cross.batch, device), cross.queries.to(device), cross.keys.to(device))
        layout.on_device[key] = Calls(_moved(own, device), cross)
    return layout.on_device[key]


def _moved(batch: VarlenBatch, device: torch.device) -> VarlenBatch:
    return batch._replace(cu_q=batch.cu_q.to(device), cu_k=batch.cu_k.to(device))


# -- the two calls
def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float, by: Flash | None = None
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], contiguous, and the natural LSE [H, T] float32. q [T, H, D]; k, v [T, K, D]."""
    by = by or _present_flash()
    q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (q_THD, k_TKD, v_TKD))
    own, cross = _calls_on(layout, q_THD.device)
    if not q_THD.numel():
        return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[1::-1], dtype=torch.float32)
    out_THD, lse_HT = by.forward(q_THD, k_TKD, v_TKD, own, scale)
    out_THD = out_THD.contiguous()  # it has the strides of q
    if cross is not None:
        q, k, v = _cross_inputs(cross, q_THD, k_TKD, v_TKD)
        part_NHD, part_lse_HN = by.forward(q, k, v, cross.batch, scale)
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
    """dq [T, H, D], dk and dv [T, K, D], from dout [T, H, D] and the ``out`` and ``lse`` that ``attend`` returned."""
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
        parts = by.backward(dout, q, k, v, out, lse_HT.index_select(1, cross.queries), cross.batch, scale)
        for grad, part, rows in zip(grads, parts, (cross.queries, cross.keys, cross.keys), strict=True):
            grad.index_add_(0, rows, part)  # rows are distinct, so the result does not depend on the order of addition
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
