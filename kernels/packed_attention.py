"""Attention over packed segments; the prompt of a group stands once and is computed once.

Packed order is [P][R1]..[RG] per group, groups one after the other. Key k is visible to query q iff
``k <= q < vis_end[segment of k]``: a prompt is seen by itself and by all responses of its group, a response
by itself alone; both causally.

On the CPU, by ATen's flash attention, in two parts that are merged by log-sum-exp:

    own     every segment on its own keys, causal                 o1, l1
    cross   all responses of a group on its prompt's keys, full   o2, l2
    merge   l = logaddexp(l1, l2)     o = exp(l1 - l) o1 + exp(l2 - l) o2

The backward of each part, given the merged o and l, is exact: a weight is exp(score - l) wherever its key is.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend
from isomorph.kernels.packing import consecutive

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

ALONE_SCORES = 128 * 128  # a pair of ranges with that many scores gets a call of its own, on views, without padding
MAX_PADDING = 1.35  # padded scores over real ones in a batch of ranges; more calls cost more than this padding


# -- where everything lies
class _Pair(NamedTuple):
    """Queries [q_start, q_end) look at keys [k_start, k_end)."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int

    @property
    def num_q(self) -> int:
        return self.q_end - self.q_start

    @property
    def num_k(self) -> int:
        return self.k_end - self.k_start


class _Ranges(NamedTuple):
    """B ranges of packed rows as a [B, L] batch: one range is a view, more are padded with last rows."""

    rows: slice | Tensor  # of the packed rows, in order
    num_ranges: int
    max_len: int
    padded_rows: Tensor | None  # [B * L] int64
    real: Tensor | None  # [n] int64 into B * L
    is_padding: Tensor | None  # [B * L] bool; None where nothing is padded

    def gather(self, x: Tensor) -> Tensor:
        """[T, H, ...] -> [B, H, L, ...]."""
        picked = x[self.rows] if self.padded_rows is None else x.index_select(0, self.padded_rows)
        return picked.view(self.num_ranges, self.max_len, *x.shape[1:]).transpose(1, 2)

    def strip(self, x: Tensor) -> Tensor:
        """[B, H, L, ...] -> [n, H, ...], without the padding."""
        flat = x.transpose(1, 2).reshape(self.num_ranges * self.max_len, x.shape[1], *x.shape[3:])
        return flat if self.real is None else flat.index_select(0, self.real)

    def put(self, into: Tensor, x: Tensor) -> None:
        if isinstance(self.rows, slice):
            into[self.rows] = self.strip(x)
        else:
            into.index_copy_(0, self.rows, self.strip(x))

    def add(self, into: Tensor, x: Tensor) -> None:
        if isinstance(self.rows, slice):
            into[self.rows] += self.strip(x)
        else:
            into.index_add_(0, self.rows, self.strip(x))  # rows are distinct: the order of addition cannot matter


class _Batch(NamedTuple):
    """One call of the attention op."""

    queries: _Ranges
    keys: _Ranges
    is_causal: bool
    hide_padding: Tensor | None  # [B, 1, 1, K] bool, True on padded keys that a query could see


class _Plan(NamedTuple):
    own: tuple[_Batch, ...]
    cross: tuple[_Batch, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayout:
    """Where the segments of packed groups lie. Made by ``from_groups``; one serves all layers of a forward.

    Example: ``PackedLayout.from_groups([5], [[3, 0, 2]])`` has 10 tokens in segments of 5, 3, 0 and 2.
    """

    prompt_lens: tuple[int, ...]
    response_lens: tuple[tuple[int, ...], ...]  # per group
    num_tok: int
    group_offsets: tuple[int, ...]  # [groups + 1] tokens: group g is group_offsets[g] : group_offsets[g + 1]
    segment_group: tuple[int, ...]  # [segments]
    segment_is_prompt: tuple[bool, ...]  # [segments]
    positions: Tensor  # [T] int64: prompt 0..P-1, every response P..P+R-1
    cu_seqlens: Tensor  # [segments + 1] int32, packed order; zero-length segments are kept
    vis_end: Tensor  # [segments] int32: the segment's keys are seen by queries before it
    plan: _Plan = field(repr=False)  # of the CPU body; stays on the CPU

    @classmethod
    def from_groups(
        cls, prompt_lens: Sequence[int], response_lens_per_group: Sequence[Sequence[int]]
    ) -> "PackedLayout":
        """Layout of groups of these lengths, in tokens. A group without responses is a plain sequence.

        Zero-length prompts and responses are legal. Raises ValueError for a negative length or unequal
        numbers of prompts and groups, TypeError for a length that is not an int.
        """
        _check_lens(prompt_lens, response_lens_per_group)
        groups = [(prompt, *responses) for prompt, responses in zip(prompt_lens, response_lens_per_group, strict=True)]
        group_offsets = tuple(itertools.accumulate(map(sum, groups), initial=0))
        segment_lens = list(itertools.chain.from_iterable(groups))
        cu_seqlens = list(itertools.accumulate(segment_lens, initial=0))
        segment_group = [g for g, group in enumerate(groups) for _ in group]
        is_prompt = [i == 0 for group in groups for i in range(len(group))]
        vis_end = [
            group_offsets[g + 1] if prompt else end
            for g, prompt, end in zip(segment_group, is_prompt, cu_seqlens[1:], strict=True)
        ]
        first_position = [0 if prompt else groups[g][0] for g, prompt in zip(segment_group, is_prompt, strict=True)]
        return cls(
            prompt_lens=tuple(prompt_lens),
            response_lens=tuple(group[1:] for group in groups),
            num_tok=group_offsets[-1],
            group_offsets=group_offsets,
            segment_group=tuple(segment_group),
            segment_is_prompt=tuple(is_prompt),
            positions=consecutive(
                torch.tensor(first_position, dtype=torch.int64), torch.tensor(segment_lens, dtype=torch.int64)
            ),
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
            vis_end=torch.tensor(vis_end, dtype=torch.int32),
            plan=_make_plan(prompt_lens, group_offsets, cu_seqlens),
        )

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with ``positions``, ``cu_seqlens`` and ``vis_end`` on ``device``."""
        names = ("positions", "cu_seqlens", "vis_end")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def dense_mask(self) -> Tensor:
        """[T, T] bool: True where query (row) sees key (column)."""
        vis_end_T = torch.repeat_interleave(self.vis_end, self.cu_seqlens.diff().long())
        token_T = torch.arange(self.num_tok, device=vis_end_T.device)
        return (token_T <= token_T[:, None]) & (token_T[:, None] < vis_end_T)


def _check_lens(prompt_lens: Sequence[int], response_lens_per_group: Sequence[Sequence[int]]) -> None:
    if len(prompt_lens) != len(response_lens_per_group):
        raise ValueError(
            "prompt_lens and response_lens_per_group must have one entry per group, got "
            f"{len(prompt_lens)} and {len(response_lens_per_group)}"
        )
    for length in itertools.chain(prompt_lens, *response_lens_per_group):
        if not isinstance(length, int):
            raise TypeError(f"lengths must be ints, got {type(length).__name__} {length!r}")
        if length < 0:
            raise ValueError(f"lengths must be >= 0, got {length}")


# -- the plan of the CPU body
def _make_plan(prompt_lens: Sequence[int], group_offsets: Sequence[int], cu_seqlens: Sequence[int]) -> _Plan:
    own = [_Pair(a, b, a, b) for a, b in itertools.pairwise(cu_seqlens)]
    cross = [
        _Pair(start + prompt_len, end, start, start + prompt_len)
        for prompt_len, (start, end) in zip(prompt_lens, itertools.pairwise(group_offsets), strict=True)
    ]
    return _Plan(
        own=tuple(_batch(pairs, is_causal=True) for pairs in _bucket(own)),
        cross=tuple(_batch(pairs, is_causal=False) for pairs in _bucket(cross)),
    )


def _bucket(pairs: Iterable[_Pair]) -> list[list[_Pair]]:
    """Batches of pairs of similar size, so that padding stays small; big pairs alone; empty ones nowhere."""
    buckets: list[list[_Pair]] = []
    num_real = max_q = max_k = 0
    for pair in sorted(pairs, key=lambda pair: (-pair.num_k, -pair.num_q, pair)):
        num_scores = pair.num_q * pair.num_k
        if num_scores == 0:
            continue
        grown_q, grown_k = max(max_q, pair.num_q), max(max_k, pair.num_k)
        padded = grown_q * grown_k * (len(buckets[-1]) + 1) if buckets else 0
        if not buckets or num_scores >= ALONE_SCORES or padded > MAX_PADDING * (num_real + num_scores) + ALONE_SCORES:
            buckets.append([])
            num_real, grown_q, grown_k = 0, pair.num_q, pair.num_k
        buckets[-1].append(pair)
        num_real, max_q, max_k = num_real + num_scores, grown_q, grown_k
    return buckets


def _batch(pairs: list[_Pair], *, is_causal: bool) -> _Batch:
    queries = _ranges([(pair.q_start, pair.q_end) for pair in pairs])
    keys = queries if is_causal else _ranges([(pair.k_start, pair.k_end) for pair in pairs])
    hide = None
    if not is_causal and keys.is_padding is not None:  # causal: padding comes after all real queries
        hide = keys.is_padding.view(keys.num_ranges, 1, 1, keys.max_len)
    return _Batch(queries, keys, is_causal, hide)


def _ranges(bounds: list[tuple[int, int]]) -> _Ranges:
    starts = [start for start, _ in bounds]
    lens = [end - start for start, end in bounds]
    max_len = max(lens)
    if len(bounds) == 1:
        return _Ranges(slice(*bounds[0]), 1, max_len, None, None, None)
    rows = consecutive(torch.tensor(starts), torch.tensor(lens))
    if min(lens) == max_len:
        return _Ranges(rows, len(bounds), max_len, rows, None, None)
    offset_L = torch.arange(max_len)
    lens_B1 = torch.tensor(lens)[:, None]
    padded_rows = torch.tensor(starts)[:, None] + torch.minimum(offset_L, lens_B1 - 1)
    is_padding = (offset_L >= lens_B1).flatten()
    real = (~is_padding).nonzero()[:, 0]
    return _Ranges(rows, len(bounds), max_len, padded_rows.flatten(), real, is_padding)


# -- reference: the specification
def packed_attention_ref(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """What ``packed_attention`` computes, with all T x T scores."""
    scale = _check(q_THD, k_TKD, v_TKD, layout, scale)
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(repeats, 1) for x in (k_TKD, v_TKD))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scale
    mask_TT = layout.dense_mask().to(q_THD.device)
    prob_HTT = scores_HTT.masked_fill(~mask_TT, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", prob_HTT, v_THD)


def _check(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float | None) -> float:
    if q_THD.ndim != 3 or k_TKD.ndim != 3 or k_TKD.shape != v_TKD.shape or k_TKD.shape[2] != q_THD.shape[2]:
        raise ValueError(
            "q must be [T, H, D] and k, v [T, K, D] with the same D, got "
            f"{tuple(q_THD.shape)}, {tuple(k_TKD.shape)}, {tuple(v_TKD.shape)}"
        )
    if q_THD.shape[0] != layout.num_tok or k_TKD.shape[0] != layout.num_tok:
        raise ValueError(
            f"q, k, v must have the layout's {layout.num_tok} rows, got {q_THD.shape[0]} and {k_TKD.shape[0]}"
        )
    num_heads, num_kv_heads = q_THD.shape[1], k_TKD.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if not q_THD.is_floating_point() or not q_THD.dtype == k_TKD.dtype == v_TKD.dtype:
        raise TypeError(f"q, k, v must have one floating-point dtype, got {q_THD.dtype}, {k_TKD.dtype}, {v_TKD.dtype}")
    scale = q_THD.shape[2] ** -0.5 if scale is None else scale
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be > 0 and finite, got {scale}")
    return scale


# -- CPU body
class _FlashMerged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: _Plan, scale: float) -> Tensor:
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_dtype = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=lse_dtype)
        for batch in plan.own:
            out, lse = _attend(batch, q_THD, k_TKD, v_TKD, scale)
            batch.queries.put(out_THD, out)
            batch.queries.put(lse_TH, lse)
        for batch in plan.cross:
            _merge(batch.queries, out_THD, lse_TH, *_attend(batch, q_THD, k_TKD, v_TKD, scale))
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, lse_TH)
        ctx.plan, ctx.scale = plan, scale
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TKD, v_TKD, out_THD, lse_TH = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_TKD, v_TKD))
        for batch in (*ctx.plan.own, *ctx.plan.cross):
            queries, keys = batch.queries, batch.keys
            parts = _flash_backward(
                queries.gather(dout_THD),
                queries.gather(q_THD),
                keys.gather(k_TKD),
                keys.gather(v_TKD),
                queries.gather(out_THD),
                _gather_lse(queries, lse_TH),
                0.0,
                batch.is_causal,
                attn_mask=_mask(batch, q_THD.dtype),
                scale=ctx.scale,
            )
            for ranges, grad, part in zip((queries, keys, keys), grads, parts, strict=True):
                # own batches come first and cover every row
                (ranges.put if batch.is_causal else ranges.add)(grad, part)
        return *grads, None, None


def _attend(batch: _Batch, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, D] and LSE [B, H, L]; values on padded queries are meaningless."""
    return _flash(
        batch.queries.gather(q_THD),
        batch.keys.gather(k_TKD),
        batch.keys.gather(v_TKD),
        0.0,
        batch.is_causal,
        attn_mask=_mask(batch, q_THD.dtype),
        scale=scale,
    )


def _mask(batch: _Batch, dtype: torch.dtype) -> Tensor | None:
    if batch.hide_padding is None:
        return None
    return torch.zeros(batch.hide_padding.shape, dtype=dtype).masked_fill_(batch.hide_padding, -math.inf)


def _gather_lse(queries: _Ranges, lse_TH: Tensor) -> Tensor:
    lse_BHL = queries.gather(lse_TH)
    if queries.is_padding is None:
        return lse_BHL
    # exp(score - inf) = 0: a padded query gives nothing to any gradient
    is_padding = queries.is_padding.view(queries.num_ranges, 1, queries.max_len)
    return lse_BHL.masked_fill_(is_padding, math.inf)


def _merge(queries: _Ranges, out_THD: Tensor, lse_TH: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    out_nHD, lse_nH = queries.strip(part_out), queries.strip(part_lse)
    own_out_nHD, own_lse_nH = out_THD[queries.rows], lse_TH[queries.rows]
    weight_nH1 = torch.sigmoid(lse_nH - own_lse_nH)[..., None]
    merged_nHD = torch.lerp(own_out_nHD.to(lse_nH.dtype), out_nHD.to(lse_nH.dtype), weight_nH1)
    out_THD[queries.rows] = merged_nHD.to(out_THD.dtype)
    lse_TH[queries.rows] = torch.logaddexp(own_lse_nH, lse_nH)


# -- public op
def packed_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """[T, H, D] attention of packed tokens; a response sees its prompt and itself, a prompt itself, causally.

    q [T, H, D], k and v [T, K, D] of one floating-point dtype, rotary embedding (at ``layout.positions``)
    already applied; H is a multiple of K (grouped-query attention). scale defaults to D ** -0.5.
    Differentiable once.
    Raises ValueError or TypeError for shapes and dtypes that do not fit each other or the layout.
    """
    if backend.choose("packed_attention", q_THD.device) == "reference":
        return packed_attention_ref(q_THD, k_TKD, v_TKD, layout, scale=scale)
    scale = _check(q_THD, k_TKD, v_TKD, layout, scale)
    return _FlashMerged.apply(q_THD, k_TKD, v_TKD, layout.plan, scale)
