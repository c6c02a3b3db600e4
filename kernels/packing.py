"""Assignment of groups to micro-batches, and gathering of ragged rows.

A ragged array is its values [n] and offsets [rows + 1]; row i is values[offsets[i] : offsets[i + 1]].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.strides import dense


# -- reference: the specification
def assign_groups_ref(cost_tok: Sequence[int], max_tok: int) -> list[list[int]]:
    """The specification of ``assign_groups``."""
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
    return list(bins.values())  # in order of each bin's first group


def take_ragged_ref(value: Tensor, offsets: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of ``take_ragged``."""
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
                f"group {group} has {cost} tokens, more than a micro-batch's {max_tok}, and groups are not split: "
                "raise the token budget, or lower prompt length, response length or samples_per_prompt"
            )


def _check_ragged(value: Tensor, offsets: Tensor, row_ids: Tensor) -> None:
    if value.ndim != 1 or value.requires_grad:
        raise ValueError(
            f"value must be [n] without requires_grad, got {tuple(value.shape)}, requires_grad={value.requires_grad}"
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
    """Assigns groups to micro-batches of at most ``max_tok`` tokens; returns the group numbers per micro-batch.

    ``cost_tok[g]`` is the number of tokens of group g; groups are not split. Deterministic: groups ascend within a
    micro-batch, and micro-batches by their first group. The groups go, heaviest first, into the least loaded of as few
    micro-batches as this rule can fill without exceeding max_tok, at most as many as first-fit-decreasing.
    Raises ValueError for max_tok < 1, a negative cost, and a group with more than max_tok tokens.
    """
    if backend.choose("assign_groups") == "reference":
        return assign_groups_ref(cost_tok, max_tok)
    _check_costs(cost_tok, max_tok)
    bin_of = torch.empty(len(cost_tok), dtype=torch.int64)
    backend.native().assign_groups(torch.tensor(cost_tok, dtype=torch.int64), max_tok, bin_of)
    return _as_lists(bin_of.tolist())


def balanced_bins(cost_tok: Sequence[int], num_bins: int) -> list[list[int]]:
    """Assigns groups to exactly ``num_bins`` bins, heaviest first into the least loaded; returns group numbers per bin.

    Group numbers ascend within a bin; bins may be empty. The largest load is at most 4/3 of the smallest possible one
    (Graham 1969). Raises ValueError for num_bins < 1 and a negative cost.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    _check_costs(cost_tok, max([1, *cost_tok]))
    order = sorted(range(len(cost_tok)), key=lambda group: -cost_tok[group])
    bin_of = _least_loaded(cost_tok, order, sum(cost_tok), num_bins)
    assert bin_of is not None, "no bin can hold more than all groups"
    return [[group for group, b in enumerate(bin_of) if b == wanted] for wanted in range(num_bins)]


def consecutive(firsts: Tensor, lens: Tensor) -> Tensor:
    """Returns [sum(lens)] int64: for each i, the ``lens[i]`` consecutive numbers that start at ``firsts[i]``."""
    shifts = torch.repeat_interleave(firsts - (lens.cumsum(0) - lens), lens)
    return torch.arange(len(shifts), device=lens.device) + shifts


def offsets_of(lens: Tensor) -> Tensor:
    """Returns [n + 1] int64, the offsets of rows with lengths ``lens`` [n]."""
    return torch.cat([lens.new_zeros(1), lens.cumsum(0)])


def concat_ragged(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenates rows [n_i] of one dtype; returns the values [sum n_i] and their offsets [rows + 1] int64.

    Raises ValueError for no rows, TypeError for rows of different dtypes or not 1-d.
    """
    if not rows:
        raise ValueError("rows must not be empty: the dtype of the result is theirs")
    if any(row.ndim != 1 or row.dtype != rows[0].dtype for row in rows):
        got = sorted({f"{row.dtype} {row.ndim}-d" for row in rows})
        raise TypeError(f"rows must be 1-d and of one dtype, got {', '.join(got)}")
    lens = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return torch.cat(list(rows)), offsets_of(lens)


def take_ragged(value: Tensor, offsets: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers the rows ``row_ids`` of a ragged array; returns their values, in that order, and offsets [m + 1] int64.

    value [n] of any dtype, without gradient; offsets [rows + 1] and row_ids [m] int64, on value's device. A row may be
    taken more than once.
    Raises ValueError or TypeError for arguments that do not fit each other.
    """
    body = backend.choose("take_ragged", value.device)
    if body == "reference" or not backend.has_memory(value, offsets, row_ids):
        return take_ragged_ref(value, offsets, row_ids)
    _check_ragged(value, offsets, row_ids)
    taken = offsets_of(offsets.diff()[row_ids])
    out = value.new_empty(int(taken[-1]))
    value_bytes, out_bytes = dense(value).view(torch.uint8), out.view(torch.uint8)
    backend.native().take_ragged(
        value_bytes, offsets.contiguous(), value.element_size(), row_ids.contiguous(), out_bytes
    )
    return out, taken
