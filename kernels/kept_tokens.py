"""Truncated sampling: which tokens top-k, top-p and min-p keep, and how kept sets of many tokens are stored.

    z        = logits / temperature
    top-k    keeps the v with z[v] >= the k-th largest z: ties with that one, too
    top-p    keeps of these the fewest, largest p = softmax(z) whose sum reaches top_p; of equal z the higher ids
    min-p    keeps of these the v with p[v] >= min_p * max p

In this order, as transformers' TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper. The largest is always kept. A
row without a softmax (NaN, +inf, or -inf only) keeps all tokens, so that what follows finds what is wrong with it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from isomorph.kernels.token_logprob import check_all, check_temperature
from isomorph.kernels.types import stats_dtype

WORD = 32  # bits
BLOCK_BYTES = 64 * 2**20  # of masks [n, V] that are held at a time, and of what they are made of and into
COPIES = 5  # bytes of those for each bit of a mask: bits shifted and taken apart, as bytes and as bool


# -- reference: the specification
def keep_tokens_ref(
    logits_BV: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The specification of ``keep_tokens``: sorts whole rows."""
    z_BV, has_softmax_B1 = _scaled(logits_BV, temperature, top_k, top_p, min_p)
    if top_p < 1:
        sorted_BV, ids_BV = z_BV.sort(stable=True)
        is_removed_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        is_removed_BV[:, -1].fill_(False)  # an assignment would make a tensor of the number first
        z_BV = z_BV.masked_fill(is_removed_BV.scatter(1, ids_BV, is_removed_BV), -torch.inf)
    return _with_min_p(z_BV, min_p) | ~has_softmax_B1


# -- public op
@torch.no_grad()
def keep_tokens(
    logits_BV: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Returns [B, V] bool: which tokens of each row stay after top-k, top-p and min-p, in this order.

    logits [B, V] of any floating-point dtype; computed in float32 (float64 for float64). top_k = 0, top_p = 1 and
    min_p = 0 remove nothing. On the CPU only the tokens that can be kept by top-p are sorted: a row's sum of those with
    p < (1 - top_p) / V is below 1 - top_p. On a GPU nothing synchronises. Rows do not depend on each other.
    Raises ValueError or TypeError for values out of range.
    """
    if logits_BV.is_cuda or top_p == 1:
        return keep_tokens_ref(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    z_BV, has_softmax_B1 = _scaled(logits_BV, temperature, top_k, top_p, min_p)
    if len(z_BV):
        z_BV = z_BV.masked_fill(~_in_nucleus(z_BV, top_p), -torch.inf)
    return _with_min_p(z_BV, min_p) | ~has_softmax_B1


def _in_nucleus(z_BV: Tensor, top_p: float) -> Tensor:
    """[B, V] bool of top-p, by a sort of those that can be in it."""
    p_BV = z_BV.softmax(-1)
    is_small_BV = p_BV < (1 - top_p) / p_BV.shape[1]
    rest_B1 = p_BV.masked_fill(~is_small_BV, 0).sum(-1, keepdim=True)
    most = int((~is_small_BV).sum(-1).max())
    # ascending ids, so that the stable sort has equal logits in the specification's order
    ids_Bm = p_BV.topk(most).indices.sort(-1).values
    # by logits: different ones may have equal probabilities
    order_Bm = z_BV.masked_fill(is_small_BV, -torch.inf).gather(1, ids_Bm).sort(stable=True).indices
    ids_Bm = ids_Bm.gather(1, order_Bm)
    is_kept_Bm = p_BV.masked_fill(is_small_BV, 0).gather(1, ids_Bm).cumsum(-1) + rest_B1 > 1 - top_p
    is_kept_Bm[:, -1] = True
    return torch.zeros_like(is_small_BV).scatter(1, ids_Bm, is_kept_Bm)


def _scaled(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """z after top-k, -inf where it is removed; and [B, 1] which rows have a softmax."""
    if logits_BV.ndim != 2 or not logits_BV.is_floating_point() or logits_BV.shape[1] == 0:
        raise TypeError(f"logits must be floating point [B, V], V > 0, got {logits_BV.dtype} {tuple(logits_BV.shape)}")
    check_temperature(temperature)
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            f"top_k must be >= 0 (0: off), top_p in (0, 1] (1: off) and min_p in [0, 1] (0: off), got {top_k}, {top_p} "
            f"and {min_p}"
        )
    z_BV = logits_BV.to(stats_dtype(logits_BV.dtype)) / temperature
    has_softmax_B1 = z_BV.logsumexp(-1, keepdim=True).isfinite()
    if 0 < top_k < z_BV.shape[1]:
        z_BV = z_BV.masked_fill(z_BV < z_BV.topk(top_k).values[:, -1:], -torch.inf)
    return z_BV, has_softmax_B1


def _with_min_p(z_BV: Tensor, min_p: float) -> Tensor:
    is_kept_BV = z_BV > -torch.inf
    if min_p > 0:
        is_kept_BV &= (z_BV - z_BV.amax(-1, keepdim=True)).exp() >= min_p
    return is_kept_BV


# -- kept sets of many tokens
@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """For each of N drawn tokens the set that it was drawn from, in host memory.

    ``words[offsets[i]:offsets[i + 1]]`` is the set of token i, in the smallest of three forms, told apart by their
    number: no word, all V tokens; less than V / 32 words, the ids, ascending; V / 32 words (rounded up), bit v % 32 of
    word v // 32 for each token v.
    """

    words: Tensor  # [K] int32, on the CPU
    offsets: Tensor  # [N + 1] int64, on the CPU, ascending from 0
    num_vocab: int  # V

    def __post_init__(self) -> None:
        if self.words.dtype != torch.int32 or self.offsets.dtype != torch.int64:
            raise TypeError(f"words must be int32 and offsets int64, got {self.words.dtype} and {self.offsets.dtype}")

    @classmethod
    def from_mask(cls, mask_NV: Tensor) -> Self:
        """Of [N, V] bool: which are kept. Raises ValueError where none is; on CUDA by a device-side assertion."""
        num_vocab = mask_NV.shape[1]
        return cls.cat([cls._from_block(mask_NV[rows]) for rows in _blocks(*mask_NV.shape)], num_vocab)

    @classmethod
    def from_bits(cls, words_NW: Tensor, num_vocab: int) -> Self:
        """Of [N, V / 32 rounded up] int32 by ``packed_bits``."""
        blocks = (unpacked_bits(words_NW[rows], num_vocab) for rows in _blocks(len(words_NW), num_vocab))
        return cls.cat([cls._from_block(mask_nV) for mask_nV in blocks], num_vocab)

    @classmethod
    def _from_block(cls, mask_nV: Tensor) -> Self:
        num_vocab, num_words = mask_nV.shape[1], num_words_of(mask_nV.shape[1])
        num_kept_n = mask_nV.sum(1)
        check_all(num_kept_n > 0, "each set of kept tokens must hold at least the drawn one")
        is_ids_n, is_all_n = num_kept_n < num_words, num_kept_n == num_vocab
        counts_n = torch.where(is_ids_n, num_kept_n, torch.where(is_all_n, 0, num_words))
        is_id_K = is_ids_n.repeat_interleave(counts_n)
        words_K = torch.empty(len(is_id_K), dtype=torch.int32, device=mask_nV.device)
        words_K[is_id_K] = (mask_nV & is_ids_n[:, None]).nonzero()[:, 1].int()
        words_K[~is_id_K] = packed_bits(mask_nV[~is_ids_n & ~is_all_n]).flatten()
        offsets = torch.nn.functional.pad(counts_n.cumsum(0), (1, 0))
        return cls(words_K.cpu(), offsets.cpu(), num_vocab)

    @classmethod
    def all_of(cls, num_tok: int, num_vocab: int) -> Self:
        """``num_tok`` tokens that were drawn from the whole vocabulary, or not drawn."""
        return cls(torch.empty(0, dtype=torch.int32), torch.zeros(num_tok + 1, dtype=torch.int64), num_vocab)

    @classmethod
    def cat(cls, parts: Sequence["KeptTokens"], num_vocab: int) -> Self:
        """The sets of ``parts`` one after the other. Raises ValueError where they are of another vocabulary."""
        if other := {part.num_vocab for part in parts} - {num_vocab}:
            raise ValueError(f"kept tokens must all be of {num_vocab} tokens, got some of {other.pop()}")
        counts = [part.offsets.diff() for part in parts]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0)
        return cls(torch.cat([torch.empty(0, dtype=torch.int32), *(p.words for p in parts)]), offsets, num_vocab)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.offsets.nbytes

    def rows(self, rows: slice) -> Self:
        """The sets of the tokens in ``rows``, as views."""
        start, stop, _ = rows.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return type(self)(self.words[offsets[0] : offsets[-1]], offsets - offsets[0], self.num_vocab)

    def where(self, is_taken_N: Tensor) -> Self:
        """The sets of the tokens where [N] bool is True."""
        counts_N = self.offsets.diff()
        words = self.words[is_taken_N.repeat_interleave(counts_N)]
        offsets = torch.nn.functional.pad(counts_N[is_taken_N].cumsum(0), (1, 0))
        return type(self)(words, offsets, self.num_vocab)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """[N, V] bool on ``device``: which tokens are kept."""
        num_words = num_words_of(self.num_vocab)
        mask_NV = torch.zeros(len(self), self.num_vocab, dtype=torch.bool, device=device)
        counts_N = self.offsets.diff()
        is_bits_N = counts_N == num_words
        is_id_K = (~is_bits_N).repeat_interleave(counts_N)
        row_K = torch.arange(len(self)).repeat_interleave(counts_N)
        mask_NV[row_K[is_id_K].to(device), self.words[is_id_K].to(device).long()] = True
        if is_bits_N.any():
            bits = self.words[~is_id_K].to(device).view(-1, num_words)
            mask_NV[is_bits_N.to(device)] = unpacked_bits(bits, self.num_vocab)
        mask_NV[(counts_N == 0).to(device)] = True
        return mask_NV

    def num_kept(self) -> Tensor:
        """[N] int64: size of each set."""
        parts = [self.rows(rows).mask().sum(1) for rows in _blocks(len(self), self.num_vocab)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def has(self, token_ids_N: Tensor) -> Tensor:
        """[N] bool: whether token_ids[i] (int64, on the CPU) is in set i."""
        counts_N, start_N = self.offsets.diff(), self.offsets[:-1]
        is_bits_N, has_N = counts_N == num_words_of(self.num_vocab), counts_N == 0
        row_K = torch.arange(len(self)).repeat_interleave(counts_N)
        has_N[row_K[~is_bits_N[row_K] & (self.words == token_ids_N[row_K])]] = True
        ids = token_ids_N[is_bits_N]
        has_N[is_bits_N] = (self.words[start_N[is_bits_N] + ids // WORD] >> ids % WORD & 1).bool()
        return has_N

    def exclude_(self, logits_nV: Tensor, target_n: Tensor, rows: slice) -> None:
        """Sets the logits [n, V] of ``rows`` to -inf where they are not kept; a block of masks is held at a time.

        Raises ValueError where a target is not kept; on CUDA by a device-side assertion.
        """
        kept = self.rows(rows)
        for block in _blocks(len(kept), self.num_vocab):
            mask_bV = kept.rows(block).mask(logits_nV.device)
            check_all(mask_bV.gather(1, target_n[block, None]), "each target must be among its kept tokens")
            logits_nV[block].masked_fill_(mask_bV.logical_not_(), -math.inf)


def most_bytes(num_tok: int, num_vocab: int, top_k: int = 0) -> int:
    """The most that the sets of ``num_tok`` tokens can take; ``top_k`` as in ``keep_tokens``, ties left aside."""
    num_words = min(num_words_of(num_vocab), top_k or num_vocab)
    return num_tok * (4 * num_words + 8)


def num_words_of(num_vocab: int) -> int:
    """Words of a set as bits."""
    return -(-num_vocab // WORD)


def packed_bits(mask_NV: Tensor) -> Tensor:
    """[N, V / 32 rounded up] int32: bit v % 32 of word v // 32 is mask[v]. The inverse of ``unpacked_bits``."""
    num_vocab = mask_NV.shape[1]
    bits_NV = torch.nn.functional.pad(mask_NV.to(torch.uint8), (0, -num_vocab % WORD))
    shift_8 = torch.arange(8, dtype=torch.uint8, device=mask_NV.device)
    bytes_N = (bits_NV.unflatten(1, (-1, 8)) << shift_8).sum(-1, dtype=torch.uint8)
    return bytes_N.view(torch.int32)  # CPUs and GPUs alike have the lowest byte first


def unpacked_bits(words_NW: Tensor, num_vocab: int) -> Tensor:
    """[N, V] bool."""
    shift_8 = torch.arange(8, dtype=torch.uint8, device=words_NW.device)
    bits = (words_NW.contiguous().view(torch.uint8)[:, :, None] >> shift_8) & 1
    return bits.flatten(1)[:, :num_vocab].bool()


def _blocks(num_rows: int, num_vocab: int) -> Iterator[slice]:
    size = max(1, BLOCK_BYTES // (COPIES * num_vocab))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
