"""Where the segments of packed groups lie, and the plan by which the CPU body walks them.

Packed order is [P][R1]..[RG] per group, groups one after the other. Key k is visible to query q iff
``k <= q < vis_end[segment of k]``. The same rule with segments in depth-first order describes trees, where a
segment continues another one and sees all of its ancestors.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isomorph.kernels.packing import consecutive

ALONE_SCORES = 128 * 128  # a pair of ranges with that many scores gets a call of its own, on views, without padding
MAX_PADDING = 1.35  # padded scores over real ones in a batch of ranges; more calls cost more than this padding


class Segment(NamedTuple):
    """Packed rows [start, end); its keys are seen by queries before vis_end: by itself and all that continues it."""

    start: int
    end: int
    vis_end: int
    parent: int  # index of the segment that it continues; -1 for the first of a group


class Pair(NamedTuple):
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


class Ranges(NamedTuple):
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


class Batch(NamedTuple):
    """One call of the attention op."""

    queries: Ranges
    keys: Ranges
    is_causal: bool
    hide_padding: Tensor | None  # [B, 1, 1, K] bool, True on padded keys that a query could see


class Plan(NamedTuple):
    own: tuple[Batch, ...]
    cross: tuple[Batch, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayout:
    """Where the segments of packed groups lie. Made by ``from_groups`` or ``from_tree``; one serves all layers.

    Example: ``PackedLayout.from_groups([5], [[3, 0, 2]])`` has 10 tokens in segments of 5, 3, 0 and 2.
    """

    prompt_lens: tuple[int, ...]
    response_lens: tuple[tuple[int, ...], ...]  # per group: its segments after the first
    num_tok: int
    group_offsets: tuple[int, ...]  # [groups + 1] tokens: group g is group_offsets[g] : group_offsets[g + 1]
    segment_group: tuple[int, ...]  # [segments]
    segment_is_prompt: tuple[bool, ...]  # [segments] True for the first of a group
    segments: tuple[Segment, ...] = field(repr=False)
    is_tree: bool  # a response is itself continued: some segment has more than one ancestor
    positions: Tensor  # [T] int64: prompt 0..P-1, every response P..P+R-1; in a tree on from the parent's last
    cu_seqlens: Tensor  # [segments + 1] int32, packed order; zero-length segments are kept
    vis_end: Tensor  # [segments] int32: the segment's keys are seen by queries before it
    plan: Plan = field(repr=False)  # of the CPU body; stays on the CPU
    on_device: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # what bodies made of it, once a device

    @classmethod
    def from_groups(
        cls, prompt_lens: Sequence[int], response_lens_per_group: Sequence[Sequence[int]]
    ) -> "PackedLayout":
        """Layout of groups of these lengths, in tokens. A group without responses is a plain sequence.

        Zero-length prompts and responses are legal. Raises ValueError for a negative length or unequal
        numbers of prompts and groups, TypeError for a length that is not an int.
        """
        if len(prompt_lens) != len(response_lens_per_group):
            raise ValueError(
                "prompt_lens and response_lens_per_group must have one entry per group, got "
                f"{len(prompt_lens)} and {len(response_lens_per_group)}"
            )
        lens: list[int] = []
        parents: list[int] = []
        for prompt_len, response_lens in zip(prompt_lens, response_lens_per_group, strict=True):
            parents += [-1, *[len(lens)] * len(response_lens)]
            lens += [prompt_len, *response_lens]
        return cls.from_tree(lens, parents)

    @classmethod
    def from_tree(cls, lens: Sequence[int], parents: Sequence[int]) -> "PackedLayout":
        """Layout of trees of segments in depth-first order: segment i continues segment ``parents[i]``, -1 none.

        A segment sees itself causally and all of its ancestors; positions go on from its parent's last.
        Raises ValueError for a negative length, unequal numbers of lengths and parents, or an order that is
        not depth first, TypeError for a length that is not an int.

        Example: ``from_tree([4, 3, 2, 2, 5], [-1, 0, 1, 1, 0])`` is a prompt with two responses, the first of
        which goes on in two ways.
        """
        _check_tree(lens, parents)
        offsets = list(itertools.accumulate(lens, initial=0))
        vis_end = offsets[1:]
        for i in reversed(range(len(lens))):  # descendants come after their ancestors
            if parents[i] >= 0:
                vis_end[parents[i]] = max(vis_end[parents[i]], vis_end[i])
        segments = tuple(itertools.starmap(Segment, zip(offsets[:-1], offsets[1:], vis_end, parents, strict=True)))
        first_position: list[int] = []
        for parent in parents:
            first_position.append(first_position[parent] + lens[parent] if parent >= 0 else 0)
        roots = [i for i, parent in enumerate(parents) if parent < 0]
        groups = [tuple(lens[a:b]) for a, b in itertools.pairwise([*roots, len(lens)])]
        return cls(
            prompt_lens=tuple(group[0] for group in groups),
            response_lens=tuple(group[1:] for group in groups),
            num_tok=offsets[-1],
            group_offsets=(*(offsets[root] for root in roots), offsets[-1]),
            segment_group=tuple(g for g, group in enumerate(groups) for _ in group),
            segment_is_prompt=tuple(parent < 0 for parent in parents),
            segments=segments,
            is_tree=any(parent >= 0 and parents[parent] >= 0 for parent in parents),
            positions=consecutive(
                torch.tensor(first_position, dtype=torch.int64), torch.tensor(lens, dtype=torch.int64)
            ),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
            vis_end=torch.tensor(vis_end, dtype=torch.int32),
            plan=_make_plan(segments),
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


def _check_tree(lens: Sequence[int], parents: Sequence[int]) -> None:
    if len(lens) != len(parents):
        raise ValueError(f"lens and parents must have one entry per segment, got {len(lens)} and {len(parents)}")
    open_segments: list[int] = []  # from the last root to the last segment
    for i, (length, parent) in enumerate(zip(lens, parents, strict=True)):
        if not isinstance(length, int):
            raise TypeError(f"lengths must be ints, got {type(length).__name__} {length!r}")
        if length < 0:
            raise ValueError(f"lengths must be >= 0, got {length}")
        while open_segments and open_segments[-1] != parent:
            open_segments.pop()
        if parent != -1 and not open_segments:
            raise ValueError(
                f"segments must stand in depth-first order, each after its parent, but segment {i} names {parent}, "
                "which is not the segment before it nor an ancestor of that one; -1 starts a new tree"
            )
        open_segments.append(i)


def _make_plan(segments: Sequence[Segment]) -> Plan:
    own = [Pair(s.start, s.end, s.start, s.end) for s in segments]
    # what continues a segment looks at it; pairs of one depth share no query: they may be one batch
    cross: dict[int, list[Pair]] = {}
    depths: list[int] = []
    for s in segments:
        depths.append(depths[s.parent] + 1 if s.parent >= 0 else 0)
        cross.setdefault(depths[-1], []).append(Pair(s.end, s.vis_end, s.start, s.end))
    return Plan(
        own=tuple(_batch(pairs, is_causal=True) for pairs in _bucket(own)),
        cross=tuple(_batch(pairs, is_causal=False) for depth in cross for pairs in _bucket(cross[depth])),
    )


def _bucket(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Batches of pairs of similar size, so that padding stays small; big pairs alone; empty ones nowhere."""
    buckets: list[list[Pair]] = []
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


def _batch(pairs: list[Pair], *, is_causal: bool) -> Batch:
    queries = _ranges([(pair.q_start, pair.q_end) for pair in pairs])
    keys = queries if is_causal else _ranges([(pair.k_start, pair.k_end) for pair in pairs])
    hide = None
    if not is_causal and keys.is_padding is not None:  # causal: padding comes after all real queries
        hide = keys.is_padding.view(keys.num_ranges, 1, 1, keys.max_len)
    return Batch(queries, keys, is_causal, hide)


def _ranges(bounds: list[tuple[int, int]]) -> Ranges:
    starts = [start for start, _ in bounds]
    lens = [end - start for start, end in bounds]
    max_len = max(lens)
    if len(bounds) == 1:
        return Ranges(slice(*bounds[0]), 1, max_len, None, None, None)
    rows = consecutive(torch.tensor(starts), torch.tensor(lens))
    if min(lens) == max_len:
        return Ranges(rows, len(bounds), max_len, rows, None, None)
    offset_L = torch.arange(max_len)
    lens_B1 = torch.tensor(lens)[:, None]
    padded_rows = torch.tensor(starts)[:, None] + torch.minimum(offset_L, lens_B1 - 1)
    is_padding = (offset_L >= lens_B1).flatten()
    real = (~is_padding).nonzero()[:, 0]
    return Ranges(rows, len(bounds), max_len, padded_rows.flatten(), real, is_padding)
