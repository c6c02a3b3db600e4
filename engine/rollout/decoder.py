"""The decoding step of the built-in sampler: one more token for many responses, by the trainer's own modules.

The KV cache has prompt slots and response slots. A prompt's keys and values are stored once for all its responses; a
response slot holds those of its own tokens. The state of a response is on the device, indexed by its slot:

    prompt_slot, prompt_len, rng_key    fixed when the response is admitted
    length, token_ids, logprob, ended   updated by every step; with top-k, top-p or min-p also ``kept_log``

Between two turns a response keeps its slot: ``append`` adds the environment's tokens to it, many tokens in one pass.

A step therefore needs from the host only the list of slots. On a GPU it is recorded as a CUDA graph, once for each
captured batch size; smaller batches are padded with a dummy slot. The graphs share one memory pool, since they run one
after the other and what a step leaves is in the state above; logits have one buffer for all sizes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from isomorph.engine.config import Truncation
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.kept_log import KeptLog
from isomorph.engine.types import Prompt
from isomorph.kernels import backend
from isomorph.kernels.decode_attention import CachedKV, decode_attention
from isomorph.kernels.kept_tokens import KeptTokens, keep_tokens
from isomorph.kernels.linear_chunks import logits_buffer, make_logits
from isomorph.kernels.packed_attention import packed_attention
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.sample_token import sample_token

PREFILL_TOK = 8192  # prompt tokens in one forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """KV-cache capacity and sampling settings of a decoder; a decoder is reused while they are equal."""

    seqs: int  # responses decoded at once
    prompts: int  # prompts whose keys and values are held at once
    prompt_tok: int  # length of the longest prompt
    max_new_tok: int
    temperature: float
    stop_ids: tuple[int, ...]
    truncation: Truncation = Truncation()

    @property
    def kv_tok(self) -> int:
        """Tokens that the KV cache has space for."""
        return self.seqs * self.max_new_tok + self.prompts * self.prompt_tok

    def serves(self, wanted: "DecoderSpec") -> bool:
        """Whether a decoder of this spec can sample what ``wanted`` asks for: its cache may be larger."""
        sizes = {name: getattr(wanted, name) for name in ("seqs", "prompts", "prompt_tok")}
        return replace(self, **sizes) == wanted and all(getattr(self, name) >= n for name, n in sizes.items())


def num_prompt_slots(num_prompts: int, num_seqs: int, samples: int) -> int:
    """Prompts whose keys and values are held at once, where ``num_seqs`` responses are decoded, ``samples`` a prompt.

    2 * ceil(num_seqs / samples) + 2, at most one for each prompt: the cache of a prompt is freed only when the last
    response of its group has ended, so groups that are nearly done hold prompt slots besides those that fill the
    response slots.
    """
    return min(num_prompts, num_seqs, 2 * -(-num_seqs // samples) + 2)


class Decoder:
    """KV cache and state of all slots, prefill, and the decoding step."""

    def __init__(self, policy: Policy, spec: DecoderSpec) -> None:
        self.policy, self.spec, device = policy, spec, policy.device
        num_layers, kv = policy.config.num_hidden_layers, (policy.num_kv_heads, policy.head_dim)
        num_slots = spec.seqs + 1  # the last one is the dummy slot that pads a batch
        # [layers, keys and values, slots, K, entries, d]
        self.prompt_kv = self._empty(num_layers, 2, spec.prompts, kv[0], spec.prompt_tok, kv[1])
        self.response_kv = self._empty(num_layers, 2, num_slots, kv[0], spec.max_new_tok, kv[1])
        # hidden state of the last prompt token, which predicts the first token of every response
        self.prompt_hidden = self._empty(spec.prompts, policy.config.hidden_size)
        self.prompt_slot, self.prompt_len, self.rng_key = (_zeros(device, num_slots) for _ in range(3))
        # tokens so far, sampled or appended
        self.length = torch.ones(num_slots, dtype=torch.int64, device=device)
        self.ended = torch.ones(num_slots, dtype=torch.bool, device=device)
        self.token_ids = _zeros(device, num_slots, spec.max_new_tok)
        self.logprob = torch.zeros(num_slots, spec.max_new_tok, dtype=torch.float32, device=device)
        self.kept = KeptLog(num_slots, len(policy.unembedding), device) if spec.truncation.is_on else None
        self.stop_ids = torch.tensor(spec.stop_ids, dtype=torch.int64, device=device)
        # the reference implementation runs each row by itself: the last bits of a matrix product depend on its number
        # of rows
        self.is_row_by_row = backend.choose("decode_attention", device) == "reference"
        self.logits = logits_buffer(policy.unembedding, padded_size(spec.seqs))
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.policy.dtype, device=self.policy.device)

    # -- admission
    def prefill(self, prompts: Sequence[Prompt], prompt_slots: Sequence[int]) -> None:
        """Computes the keys and values of ``prompts`` into ``prompt_slots``, at most PREFILL_TOK tokens in one pass."""
        for part in self._passes(prompts):
            if len(prompts[part[0]].token_ids) > PREFILL_TOK:  # is alone
                self._prefill_long(prompts[part[0]], prompt_slots[part[0]])
            else:
                self._prefill([prompts[i] for i in part], [prompt_slots[i] for i in part])

    def _passes(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        part: list[int] = []
        num_tok = 0
        for i, prompt in enumerate(prompts):
            num_tok += len(prompt.token_ids)
            if part and (num_tok > PREFILL_TOK or self.is_row_by_row):
                yield part
                part, num_tok = [], len(prompt.token_ids)
            part.append(i)
        if part:
            yield part

    def _prefill(self, prompts: Sequence[Prompt], prompt_slots: Sequence[int]) -> None:
        device = self.policy.device
        lens = [len(p.token_ids) for p in prompts]
        layout = PackedLayout.from_groups(lens, [[] for _ in lens]).to(device)
        token_ids_T = torch.tensor([i for p in prompts for i in p.token_ids], device=device)
        len_P, slot_P = torch.tensor(lens, device=device), torch.tensor(prompt_slots, device=device)
        slot_T = slot_P.repeat_interleave(len_P)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            q_THd, k_TKd, v_TKd = (x[0].transpose(0, 1) for x in (q, k, v))
            for cache_SKLd, new_TKd in zip(self.prompt_kv[layer], (k_TKd, v_TKd), strict=True):
                cache_SKLd[slot_T, :, layout.positions] = new_TKd
            return packed_attention(q_THd, k_TKd, v_TKd, layout, scale=scale)[None]

        hidden_TD = self.policy.backbone(token_ids_T[None], layout.positions[None], attend)[0]
        self.prompt_hidden[slot_P] = hidden_TD[len_P.cumsum(0) - 1]

    def _prefill_long(self, prompt: Prompt, prompt_slot: int) -> None:
        """In chunks, so that activations do not grow with the prompt; each attends to the chunks before it, cached."""
        token_ids_T = torch.tensor(prompt.token_ids, device=self.policy.device)
        for start in range(0, len(token_ids_T), PREFILL_TOK):
            chunk_C = token_ids_T[start : start + PREFILL_TOK]
            end = start + len(chunk_C)
            hidden_CD = self._chunk(chunk_C, prompt_slot, start, end)
        self.prompt_hidden[prompt_slot] = hidden_CD[-1]

    def _chunk(self, token_ids_C: Tensor, prompt_slot: int, start: int, end: int) -> Tensor:
        """Hidden states [C, D] of the tokens ``start`` to ``end`` of a prompt, their keys and values written."""
        mask = causal_lower_right(end - start, end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            cache_KPd = self.prompt_kv[layer, :, prompt_slot, :, :end]  # keys and values
            for of_prompt, new in zip(cache_KPd, (k, v), strict=True):
                of_prompt[:, start:] = new[0]
            keys, values = cache_KPd[0][None], cache_KPd[1][None]
            out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
            return out.transpose(1, 2)

        positions = torch.arange(start, end, device=self.policy.device)
        return self.policy.backbone(token_ids_C[None], positions[None], attend)[0]

    def admit(
        self, slots: Sequence[int], prompt_slots: Sequence[int], prompt_lens: Sequence[int], rng_keys: Sequence[int]
    ) -> None:
        """Assigns new responses to ``slots`` and samples the first token of each; all arguments have one entry each."""
        device = self.policy.device
        slot_B = torch.tensor(slots, device=device)
        for state, values in zip(
            (self.prompt_slot, self.prompt_len, self.rng_key), (prompt_slots, prompt_lens, rng_keys), strict=True
        ):
            state[slot_B] = torch.tensor(values, device=device)
        self.length[slot_B] = 0
        self.ended[slot_B] = False
        if self.kept is not None:
            self.kept.begin(slots)
        for part_B in self._parts(slot_B):
            self._sample(part_B, self.prompt_hidden[self.prompt_slot[part_B]])
        self._take_kept(slots)

    # -- turns
    def append(self, slots: Sequence[int], added: Sequence[Sequence[int]]) -> None:
        """Adds tokens that were not sampled to responses that have ended, and samples the next token of each.

        ``added[i]``, at least one token, follows the last token of ``slots[i]``; the keys and values of all before that
        one are in the slot already. PREFILL_TOK tokens in one pass. Their log-probability is NaN.
        """
        rows: list[tuple[int, int, int]] = []  # slot, place in the slot, 1 for the last row of a response
        for slot, ids in zip(slots, added, strict=True):
            n, m = int(self.length[slot]), len(ids)
            self.token_ids[slot, n : n + m] = torch.tensor(ids, device=self.policy.device)
            self.logprob[slot, n : n + m] = torch.nan
            self.length[slot], self.ended[slot] = n + m, False
            if self.kept is not None:
                self.kept.skip(slot, m)
            # the token that ended the turn has been sampled, but never been an input
            rows += [(slot, place, place == n + m - 1) for place in range(n - 1, n + m)]
        size = 1 if self.is_row_by_row else PREFILL_TOK
        for start in range(0, len(rows), size):
            slot_R, place_R, is_last_R = torch.tensor(rows[start : start + size], device=self.policy.device).T
            hidden_RD = self._hidden(slot_R, place_R)
            ends_R = is_last_R.nonzero().flatten()
            if len(ends_R):
                self._sample(slot_R[ends_R], hidden_RD[ends_R])
        self._take_kept(slots)

    def _hidden(self, slot_R: Tensor, place_R: Tensor) -> Tensor:
        """The hidden row [D] of each token at ``place_R`` of ``slot_R`` [R], its keys and values written on the way.

        The tokens of one slot are in their order; what is before them is in the cache, or among them.
        """
        prompt_slot_R, prompt_len_R, seen_R = self.prompt_slot[slot_R], self.prompt_len[slot_R], place_R + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            for cache_SKLd, new_RK1d in zip(self.response_kv[layer], (k, v), strict=True):
                cache_SKLd[slot_R, :, place_R] = new_RK1d[:, :, 0]
            prompt = CachedKV(self.prompt_kv[layer, 0], self.prompt_kv[layer, 1], prompt_slot_R, prompt_len_R)
            own = CachedKV(self.response_kv[layer, 0], self.response_kv[layer, 1], slot_R, seen_R)
            return decode_attention(q[:, :, 0], prompt, own, scale=scale)[:, None]

        token_R, position_R = self.token_ids[slot_R, place_R], prompt_len_R + place_R
        return self.policy.backbone(token_R[:, None], position_R[:, None], attend)[:, 0]

    # -- the step
    def advance(self, slots: Sequence[int], num_steps: int) -> None:
        """Samples up to ``num_steps`` more tokens for each of ``slots``; a response that ends stays as it is."""
        if self.policy.device.type == "cuda" and not self.is_row_by_row:
            graph, slot_B = self._graph(padded_size(len(slots)))
            slot_B.copy_(torch.tensor(pad_slots(slots, len(slot_B), self.spec.seqs)), non_blocking=True)
            for _ in range(num_steps):
                graph.replay()
        else:
            slot_B = torch.tensor(slots, device=self.policy.device)
            for _ in range(num_steps):
                for part_B in self._parts(slot_B):
                    self._advance(part_B)
        self._take_kept(slots)

    def _take_kept(self, slots: Sequence[int]) -> None:
        if self.kept is not None:
            self.kept.take(slots, self.lengths())

    def _parts(self, slot_B: Tensor) -> tuple[Tensor, ...]:
        return slot_B.split(1) if self.is_row_by_row else (slot_B,)

    def _graph(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if size not in self.graphs:
            slot_B = torch.full((size,), self.spec.seqs, device=self.policy.device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a warm-up: first calls compile and allocate, which must not be recorded
                self._advance(slot_B)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._advance(slot_B)
            self.graphs[size] = graph, slot_B
        return self.graphs[size]

    def _advance(self, slot_B: Tensor) -> None:
        """One token more for the responses in ``slot_B`` [B]. Shapes depend on B alone; nothing is read on the host."""
        self._sample(slot_B, self._hidden(slot_B, self.length[slot_B] - 1))

    def _sample(self, slot_B: Tensor, hidden_BD: Tensor) -> None:
        """Samples a token from each of ``hidden_BD`` [B, D]; written only where the response has not ended."""
        length_B, had_ended_B = self.length[slot_B], self.ended[slot_B]
        logits_BV = make_logits(hidden_BD, self.policy.unembedding.detach(), self.logits)
        if self.spec.temperature == 0:
            token_B, logprob_B = logits_BV.argmax(-1), torch.zeros_like(logits_BV[:, 0])
        else:
            if self.kept is not None:
                cut, temperature = self.spec.truncation, self.spec.temperature
                is_kept_BV = keep_tokens(
                    logits_BV, temperature=temperature, top_k=cut.top_k, top_p=cut.top_p, min_p=cut.min_p
                )
                self.kept.note(slot_B, length_B, is_kept_BV)
                logits_BV.masked_fill_(~is_kept_BV, -torch.inf)
            rng_key_B = self.rng_key[slot_B]
            token_B, logprob_B = sample_token(logits_BV, rng_key_B, length_B, temperature=self.spec.temperature)
        at_B = length_B.clamp(max=self.spec.max_new_tok - 1)
        self.token_ids[slot_B, at_B] = torch.where(had_ended_B, self.token_ids[slot_B, at_B], token_B)
        self.logprob[slot_B, at_B] = torch.where(had_ended_B, self.logprob[slot_B, at_B], logprob_B.float())
        length_B = torch.where(had_ended_B, length_B, length_B + 1)
        self.length[slot_B] = length_B
        stops_B = (token_B[:, None] == self.stop_ids).any(1)
        self.ended[slot_B] = had_ended_B | stops_B | (length_B == self.spec.max_new_tok)

    def end(self, slot: int, length: int) -> None:
        """Ends the response in ``slot`` after its first ``length`` tokens."""
        self.length[slot] = length
        self.ended[slot] = True
        if self.kept is not None:
            self.kept.cut(slot, length)

    # -- results
    def lengths(self) -> list[int]:
        """For each slot the length of its response, ended or not. Waits for the device."""
        return self.length.tolist()

    def tokens(self, slots: Sequence[int], starts: Sequence[int], num_tok: int) -> list[list[int]]:
        """For each of ``slots`` its ``num_tok`` tokens from ``starts`` on; beyond its length they mean nothing."""
        slot_B, start_B = (torch.tensor(values, device=self.policy.device) for values in (slots, starts))
        at_BN = start_B[:, None] + torch.arange(num_tok, device=self.policy.device)
        return self.token_ids[slot_B[:, None], at_BN.clamp(max=self.spec.max_new_tok - 1)].tolist()

    def ended_lengths(self) -> list[int]:
        """For each slot the length of its response if it has ended, else 0. Waits for the device."""
        return torch.where(self.ended, self.length, 0).tolist()

    def responses(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids int64 and log-probabilities float32 (nats), [B, max_new_tok] each, on the CPU.

        Valid are the first ``ended_lengths`` entries of a row.
        """
        slot_B = torch.tensor(slots, device=self.policy.device)
        return self.token_ids[slot_B].cpu(), self.logprob[slot_B].cpu()

    def kept_of(self, slot: int, num_tok: int) -> KeptTokens | None:
        """What each of the first ``num_tok`` tokens of ``slot`` was drawn from; None without truncation."""
        return None if self.kept is None else self.kept.of(slot, num_tok)


def padded_size(num_rows: int) -> int:
    """The captured batch size for ``num_rows``: at most a quarter larger, so that few sizes are captured."""
    step = max(1, 2 ** (num_rows.bit_length() - 3))
    return -(-num_rows // step) * step


def pad_slots(slots: Sequence[int], size: int, dummy: int) -> list[int]:
    """``slots``, padded to ``size`` with ``dummy``."""
    return [*slots, *[dummy] * (size - len(slots))]


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=device)
