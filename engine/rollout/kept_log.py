"""Which tokens the built-in sampler drew from, for the responses in a decoder's slots.

A decoding step writes each row's set as bits into a ring on the device, so that it can be part of a CUDA graph; after
at most ``RING`` steps the sets are taken from there, in the form in which rollouts keep them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isomorph.kernels.kept_tokens import KeptTokens, num_words_of, packed_bits

RING = 8  # decoding steps between two calls of ``take``, at most


class KeptLog:
    """``num_slots`` slots of a vocabulary of ``num_vocab`` tokens; the ring is on ``device``, what was taken is not."""

    def __init__(self, num_slots: int, num_vocab: int, device: torch.device) -> None:
        self.num_vocab = num_vocab
        self.ring = torch.zeros(num_slots, RING, num_words_of(num_vocab), dtype=torch.int32, device=device)
        self.taken: list[list[KeptTokens]] = [[] for _ in range(num_slots)]
        self.num_taken = [0] * num_slots  # tokens of a slot's response in ``taken``

    def begin(self, slots: Sequence[int]) -> None:
        """New responses in ``slots``."""
        for slot in slots:
            self.taken[slot], self.num_taken[slot] = [], 0

    def note(self, slot_B: Tensor, place_B: Tensor, is_kept_BV: Tensor) -> None:
        """Token ``place_B`` [B] of the response in ``slot_B`` [B] is drawn from ``is_kept_BV`` [B, V] bool."""
        self.ring[slot_B, place_B % RING] = packed_bits(is_kept_BV)

    def skip(self, slot: int, num_tok: int) -> None:
        """The next tokens of ``slot`` are the environment's, which were not drawn."""
        self.taken[slot].append(KeptTokens.all_of(num_tok, self.num_vocab))
        self.num_taken[slot] += num_tok

    def cut(self, slot: int, num_tok: int) -> None:
        """The response in ``slot`` has ended with token ``num_tok``; what was drawn after it is no part of it."""
        if num_tok < self.num_taken[slot]:
            self.taken[slot], self.num_taken[slot] = [self.of(slot, num_tok)], num_tok

    def take(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Takes what was noted of ``slots`` up to each slot's length in ``lengths``, over all slots."""
        new = [(slot, lengths[slot] - self.num_taken[slot]) for slot in slots]
        assert all(0 <= num <= RING for _, num in new), new
        places = [(slot, self.num_taken[slot] + i) for slot, num in new for i in range(num)]
        if not places:
            return
        slot_M, place_M = torch.tensor(places, device=self.ring.device).T
        kept = KeptTokens.from_bits(self.ring[slot_M, place_M % RING], self.num_vocab)
        start = 0
        for slot, num in new:
            self.taken[slot].append(kept.rows(slice(start, start + num)))
            self.num_taken[slot] += num
            start += num

    def of(self, slot: int, num_tok: int) -> KeptTokens:
        """The sets of the first ``num_tok`` tokens of the response in ``slot``."""
        return KeptTokens.cat(self.taken[slot], self.num_vocab).rows(slice(0, num_tok))
