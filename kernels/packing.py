"""Which group goes into which micro-batch, and copies of ragged rows.

Ragged rows: values one after the other, and offsets [n + 1]; row i is values[offsets[i] : offsets[i + 1]].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isomorph.kernels import backend


# -- reference: the specification
def assign_groups_ref(cost_tok: Sequence[int], max_tok: int) -> list[list[int]]:
    """What ``assign_groups`` computes."""
    _check_costs(cost_tok, max_tok)
    order = sorted(range(len(cost_tok)), key=lambda group: -cost_tok[group])  # stable: ties by index
    fitted = _first_fit(cost_tok, order, max_tok)
    num_fitted = max(fitted, default=-1) + 1
    for num_bins in range(max(1, -(-sum(cost_tok) // max_tok)), num_fitted + 1):
        balanced = _least_loaded(cost_tok, order, max_tok, num_bins)
        if balanced is not None:
            return _as_lists(balanced)
    return _as_lists(fitted)


def _first_fit(cost_tok: Sequence[int], order: list[int], max_tok: int) -> list[int]:
    load: list[int] = []
    bin_of = [0] * len(cost_tok)
    for group in order:
        bin_of[group] = next((b for b, tok in enumerate(load) if tok + cost_tok[group] <= max_tok), len(load))
        if bin_of[group] == len(load):
            load.append(0)
        load[bin_of[group]] += cost_tok[group]
    return bin_of


def _least_loaded(cost_tok: Sequence[int], order: list[int], max_tok: int, num_bins: int) -> list[int] | None:
    load = [0] * num_bins
    bin_of = [0] * len(cost_tok)
    for group in order:
        bin_of[group] = load.index(min(load))
        load[bin_of[group]] += cost_tok[group]
    return bin_of if max(load) <= max_tok else None


def _as_lists(bin_of: Sequence[int]) -> list[list[int]]:
    bins: dict[int, list[int]] = {}
    for group, b in enumerate(bin_of):
        bins.setdefault(b, []).append(group)
    return list(bins.values())  # a bin enters with its first group


def take_ragged_ref(value: Tensor, offsets: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What ``take_ragged`` computes."""
    _check_ragged(value, offsets, row_ids)
    lens = offsets.diff()[row_ids]
    return value[consecutive(offsets[row_ids], lens)], offsets_of(lens)


# -- argument checks
def _check_costs(cost_tok: Sequence[int], max_tok: int) -> None:
    if max_tok < 1:
        raise ValueError(f"max_tok must be >= 1, got {max_tok}")
    for group, cost in enumerate(cost_tok):
        if cost < 0:
            raise ValueError(f"costs must be >= 0 tokens, got {cost} for group {group}")
        if cost > max_tok:
            raise ValueError(
                f"group {group} has {cost} tokens, more than a micro-batch's {max_tok}, and groups stay "
                "whole: raise the token budget, or lower prompt length, response length or samples_per_prompt"
            )


def _check_ragged(value: Tensor, offsets: Tensor, row_ids: Tensor) -> None:
    if value.ndim != 1 or value.requires_grad:
        raise ValueError(
            f"value must be [n] and need no gradient, got {tuple(value.shape)}, requires_grad={value.requires_grad}"
        )
    for name, ids in (("offsets", offsets), ("row_ids", row_ids)):
        if ids.ndim != 1 or ids.dtype != torch.int64 or ids.device != value.device:
            raise TypeError(f"{name} must be int64 [n] on {value.device}, got {ids.dtype} {tuple(ids.shape)}")
    if len(offsets) < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != len(value) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must ascend from 0 to {len(value)}, the number of values")
    num_rows = len(offsets) - 1
    if len(row_ids) and not (int(row_ids.min()) >= 0 and int(row_ids.max()) < num_rows):
        raise ValueError(f"row_ids must lie in 0..{num_rows - 1}, got {int(row_ids.min())}..{int(row_ids.max())}")


# -- public
def assign_groups(cost_tok: Sequence[int], max_tok: int) -> list[list[int]]:
    """Whole groups into micro-batches of at most ``max_tok`` tokens: few, evenly filled, deterministic.

    ``cost_tok[g]`` is the tokens of group g. Groups ascend in a micro-batch, micro-batches by first group.
    Their number is the least for which heaviest-first into the lightest fits, at most first-fit-decreasing's.
    Raises ValueError for a group above max_tok.
    """
    if backend.choose("assign_groups") == "reference":
        return assign_groups_ref(cost_tok, max_tok)
    _check_costs(cost_tok, max_tok)
    bin_of = torch.empty(len(cost_tok), dtype=torch.int64)
    backend.native().assign_groups(torch.tensor(cost_tok, dtype=torch.int64), max_tok, bin_of)
    return _as_lists(bin_of.tolist())


def balanced_bins(cost_tok: Sequence[int], num_bins: int) -> list[list[int]]:
    """Every group into one of exactly ``num_bins`` bins, heaviest first into the lightest; groups ascend in a bin.

    The heaviest bin is at most a third above the best possible one's (Graham 1969). Bins may be empty.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    _check_costs(cost_tok, max([1, *cost_tok]))
    order = sorted(range(len(cost_tok)), key=lambda group: -cost_tok[group])
    bin_of = _least_loaded(cost_tok, order, sum(cost_tok), num_bins)
    assert bin_of is not None, "no bin can hold more than all groups"
    return [[group for group, b in enumerate(bin_of) if b == wanted] for wanted in range(num_bins)]


def consecutive(firsts: Tensor, lens: Tensor) -> Tensor:
    """[sum(lens)] int64: for each i, the ``lens[i]`` numbers from ``firsts[i]`` on."""
    shifts = torch.repeat_interleave(firsts - (lens.cumsum(0) - lens), lens)
    return torch.arange(len(shifts), device=lens.device) + shifts


def offsets_of(lens: Tensor) -> Tensor:
    """[n + 1] int64 offsets of rows of these lengths."""
    return torch.cat([lens.new_zeros(1), lens.cumsum(0)])


def concat_ragged(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [n_i] of one dtype, one after the other, and their offsets [rows + 1] int64."""
    if not rows:
        raise ValueError("rows must not be empty: there is no dtype to take")
    if any(row.ndim != 1 or row.dtype != rows[0].dtype for row in rows):
        got = sorted({f"{row.dtype} {row.ndim}-d" for row in rows})
        raise TypeError(f"rows must be 1-d and of one dtype, got {', '.join(got)}")
    lens = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return torch.cat(list(rows)), offsets_of(lens)


def take_ragged(value: Tensor, offsets: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``row_ids`` of a ragged array, in that order, and their offsets.

    value [n] of any dtype, without gradient; offsets [rows + 1] and row_ids [m] int64, on value's device.
    Raises ValueError or TypeError where they do not fit each other.
    """
    if backend.choose("take_ragged", value.device) == "reference":
        return take_ragged_ref(value, offsets, row_ids)
    _check_ragged(value, offsets, row_ids)
    taken = offsets_of(offsets.diff()[row_ids])
    out = value.new_empty(int(taken[-1]))
    value_bytes, out_bytes = value.contiguous().view(torch.uint8), out.view(torch.uint8)
    backend.native().take_ragged(
        value_bytes, offsets.contiguous(), value.element_size(), row_ids.contiguous(), out_bytes
    )
    return out, taken
