"""One chunk of rows of a linear head: its logits, its stats, and what it adds to the gradients.

Logits are float32, accumulated in float32, whatever the inputs: bfloat16 logits cost up to 7 % on a ratio.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # of logits at a time where the caller does not say how many rows


class TokenStats(NamedTuple):
    """Facts about N target tokens, each [N], nats; float32, or float64 when the inputs are float64."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


class Head(NamedTuple):
    """The operands of one call, in the dtype the GEMMs run in."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_ids_N: Tensor
    row_index_N: Tensor | None
    bias_V: Tensor | None
    temperature: float

    def hidden_rows(self, rows: slice) -> Tensor:
        hidden_TD = self.hidden_TD
        hidden_nD = hidden_TD[rows] if self.row_index_N is None else hidden_TD.index_select(0, self.row_index_N[rows])
        return hidden_nD.to(self.weight_VD.dtype)


class Chunk(NamedTuple):
    hidden_nD: Tensor
    shifted_nV: Tensor  # z - max(z)
    exp_nV: Tensor  # exp of that
    exp_sum_n: Tensor
    stats: TokenStats


def make_head(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    row_index_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: float,
) -> Head:
    # Upcast once per call: no CPU GEMM takes bfloat16 and returns float32.
    dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    bias_V = None if bias_V is None else bias_V.to(dtype) / temperature
    return Head(hidden_TD, weight_VD.to(dtype), target_ids_N, row_index_N, bias_V, temperature)


def row_chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def default_chunk_rows(weight_VD: Tensor) -> int:
    return max(1, CHUNK_BYTES // (weight_VD.shape[0] * weight_VD.element_size()))


def make_buffers(head: Head, chunk_rows: int) -> tuple[Tensor, Tensor]:
    num_rows = min(chunk_rows, len(head.target_ids_N))
    shape = (num_rows, head.weight_VD.shape[0])
    return head.weight_VD.new_empty(shape), head.weight_VD.new_empty(shape)


def compute_chunk(head: Head, rows: slice, buffers: tuple[Tensor, Tensor]) -> Chunk:
    num_rows = rows.stop - rows.start
    logits_nV, exp_nV = (buffer[:num_rows] for buffer in buffers)
    hidden_nD = head.hidden_rows(rows)
    inv_temperature = 1.0 / head.temperature
    if head.bias_V is None:
        # beta = 0: what the buffer holds is not read
        torch.addmm(logits_nV, hidden_nD, head.weight_VD.T, beta=0, alpha=inv_temperature, out=logits_nV)
    else:
        torch.addmm(head.bias_V, hidden_nD, head.weight_VD.T, alpha=inv_temperature, out=logits_nV)
    max_n1 = logits_nV.amax(1, keepdim=True)
    shifted_nV = logits_nV.sub_(max_n1)
    torch.exp(shifted_nV, out=exp_nV)
    exp_sum_n = exp_nV.sum(1)
    log_sum_n = exp_sum_n.log()
    target_n = shifted_nV.gather(1, head.target_ids_N[rows, None])[:, 0]
    weighted_n = torch.bmm(exp_nV[:, None, :], shifted_nV[:, :, None])[:, 0, 0]  # a dot per row, no temporary
    stats = TokenStats(target_n - log_sum_n, log_sum_n - weighted_n / exp_sum_n, max_n1[:, 0] + log_sum_n)
    return Chunk(hidden_nD, shifted_nV, exp_nV, exp_sum_n, stats)


def dlogits(head: Head, rows: slice, chunk: Chunk, grads: tuple[Tensor | None, ...]) -> Tensor:
    """d loss / d z of the chunk, written over ``exp_nV`` (and ``shifted_nV``)."""
    dlogprob_n, dentropy_n, dlse_n = grads
    prob_scale_n = torch.zeros_like(chunk.exp_sum_n)
    if dlogprob_n is not None:
        prob_scale_n = prob_scale_n - dlogprob_n
    if dlse_n is not None:
        prob_scale_n = prob_scale_n + dlse_n
    if dentropy_n is None:
        dlogits_nV = chunk.exp_nV.mul_((prob_scale_n / chunk.exp_sum_n)[:, None])
    else:
        # -p (log p + H) with log p = shifted - log_sum
        offset_n = chunk.stats.entropy - chunk.exp_sum_n.log()
        factor_nV = chunk.shifted_nV.add_(offset_n[:, None]).mul_((-dentropy_n / chunk.exp_sum_n)[:, None])
        factor_nV.add_((prob_scale_n / chunk.exp_sum_n)[:, None])
        dlogits_nV = chunk.exp_nV.mul_(factor_nV)
    if dlogprob_n is not None:
        dlogits_nV.scatter_add_(1, head.target_ids_N[rows, None], dlogprob_n[:, None])
    return dlogits_nV


class Gradients:
    """Sums of one call's gradients, float32 (float64 for float64); ``None`` where nobody asked."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        new_zeros = head.weight_VD.new_zeros
        self.hidden_TD = new_zeros(head.hidden_TD.shape) if needs[0] else None
        self.weight_VD = new_zeros(head.weight_VD.shape) if needs[1] else None
        self.bias_V = new_zeros(head.weight_VD.shape[0]) if needs[2] else None

    def add(self, head: Head, rows: slice, hidden_nD: Tensor, dlogits_nV: Tensor) -> None:
        inv_temperature = 1.0 / head.temperature
        if self.hidden_TD is not None:
            dhidden_nD = torch.mm(dlogits_nV, head.weight_VD).mul_(inv_temperature)
            if head.row_index_N is None:
                self.hidden_TD[rows] = dhidden_nD
            else:
                # On the CPU index_add_ adds in index order: the same bits each time.
                self.hidden_TD.index_add_(0, head.row_index_N[rows], dhidden_nD)
        if self.weight_VD is not None:
            self.weight_VD.addmm_(dlogits_nV.T, hidden_nD, alpha=inv_temperature)
        if self.bias_V is not None:
            self.bias_V.add_(dlogits_nV.sum(0), alpha=inv_temperature)

    def cast(self, dtypes: tuple[torch.dtype | None, ...]) -> tuple[Tensor | None, ...]:
        sums = (self.hidden_TD, self.weight_VD, self.bias_V)
        return tuple(None if s is None else s.to(dtype) for s, dtype in zip(sums, dtypes, strict=True))
