"""Layout of packed sequences that share prompts, and the attention mask that it implies.

Packed order is [P][R1]..[RG] per group: prompt, then its responses; groups follow each other. Key k is visible to query
q iff ``k <= q < vis_end[segment of k]``. With segments in depth-first order the same rule describes trees, in which a
segment continues its parent and attends to all of its ancestors.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isomorph.kernels.packing import consecutive


class Segment(NamedTuple):
    """Packed rows [start, end). Its keys are visible to queries before vis_end: its own and its descendants'."""

    start: int
    end: int
    vis_end: int
    parent: int  # index of the segment that it continues; -1 for a prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayout:
    """Layout of packed groups, from ``from_groups`` or ``from_tree``. All layers of a model share one.

    Example: ``PackedLayout.from_groups([5], [[3, 0, 2]])`` has 10 tokens in segments of 5, 3, 0 and 2.
    """

    prompt_lens: tuple[int, ...]
    response_lens: tuple[tuple[int, ...], ...]  # per group, in tokens: its segments after the prompt
    num_tok: int
    group_offsets: tuple[int, ...]  # [groups + 1] tokens: group g is group_offsets[g] : group_offsets[g + 1]
    segment_group: tuple[int, ...]  # [segments]
    segment_is_prompt: tuple[bool, ...]  # [segments] True for the first segment of a group
    segments: tuple[Segment, ...] = field(repr=False)
    is_tree: bool  # some segment has more than one ancestor
    positions: Tensor  # [T] int64: prompt 0..P-1, every response P..P+R-1; in a tree, after the parent's last
    cu_seqlens: Tensor  # [segments + 1] int32, in tokens; zero-length segments are kept
    vis_end: Tensor  # [segments] int32: as in Segment
    on_device: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # caches of implementations, per device

    @classmethod
    def from_groups(
        cls, prompt_lens: Sequence[int], response_lens_per_group: Sequence[Sequence[int]]
    ) -> "PackedLayout":
        """Layout of groups with these lengths in tokens. A group without responses is an ordinary sequence.

        Prompts and responses may be empty. Raises ValueError for a negative length or different numbers of prompts and
        groups, TypeError for a length that is not an int.
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
        """Layout of trees of segments in depth-first order: segment i continues segment ``parents[i]``; -1 is a root.

        A segment attends causally to itself and to all of its ancestors; its positions follow its parent's last.
        Raises ValueError for a negative length, different numbers of lengths and parents, or an order that is not
        depth-first, TypeError for a length that is not an int.

        Example: ``from_tree([4, 3, 2, 2, 5], [-1, 0, 1, 1, 0])`` is a prompt with two responses; the first of them has
        two continuations.
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
        )

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with ``positions``, ``cu_seqlens`` and ``vis_end`` on ``device``."""
        names = ("positions", "cu_seqlens", "vis_end")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def padded(self, multiple: int) -> "PackedLayout":
        """This layout with one more segment at the end, visible to itself only, so that ``multiple`` divides num_tok.

        Returns ``self`` if it does already. Computed once, so that all layers and passes share one ``on_device``.
        """
        if self.num_tok % multiple == 0:
            return self
        key = ("padded", multiple)
        if key not in self.on_device:
            lens = [*(segment.end - segment.start for segment in self.segments), -self.num_tok % multiple]
            parents = [*(segment.parent for segment in self.segments), -1]
            self.on_device[key] = PackedLayout.from_tree(lens, parents).to(self.positions.device)
        return self.on_device[key]

    def dense_mask(self) -> Tensor:
        """Returns [T, T] bool: True where key (column) is visible to query (row)."""
        vis_end_T = torch.repeat_interleave(self.vis_end, self.cu_seqlens.diff().long())
        token_T = torch.arange(self.num_tok, device=vis_end_T.device)
        return (token_T <= token_T[:, None]) & (token_T[:, None] < vis_end_T)


def _check_tree(lens: Sequence[int], parents: Sequence[int]) -> None:
    if len(lens) != len(parents):
        raise ValueError(f"lens and parents must have one entry per segment, got {len(lens)} and {len(parents)}")
    open_segments: list[int] = []  # the last segment and its ancestors, root first
    for i, (length, parent) in enumerate(zip(lens, parents, strict=True)):
        if not isinstance(length, int):
            raise TypeError(f"lengths must be ints, got {type(length).__name__} {length!r}")
        if length < 0:
            raise ValueError(f"lengths must be >= 0, got {length}")
        while open_segments and open_segments[-1] != parent:
            open_segments.pop()
        if parent != -1 and not open_segments:
            raise ValueError(
                f"segments must be in depth-first order, but the parent of segment {i} is {parent}, neither the "
                "segment before it nor an ancestor of that one; -1 starts a new tree"
            )
        open_segments.append(i)
