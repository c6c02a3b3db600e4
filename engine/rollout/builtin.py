"""The built-in sampler: decodes with the trainer's own modules, so there is no second copy of anything.

All responses of a wave advance together, one token a round. A prompt is prefilled once and its keys and values are
stored once, whatever the number of its responses; rows stand as [P prompts, G rows each]. Finished rows leave when
enough of them have gathered, because leaving costs a copy of the living ones' keys and values.

A token is drawn by inverting the cumulative distribution at one uniform number, which belongs to
(seed, prompt, sample, position). So a response does not depend on what else is in the batch, up to rounding.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.policy import Policy
from isomorph.engine.types import Finish, OnGroup, Prompt, Publication, Rollout, Sampling
from isomorph.kernels.decode_attention import decode_attention
from isomorph.kernels.packed_attention import PackedLayout, packed_attention

FIRST_CAPACITY = 64  # tokens of response the cache starts with; it doubles when full
LIVE_SHARE = 0.75  # below it the finished rows are dropped


class BuiltinSampler:
    """Samples from ``policy`` as it is now: publishing is a new version number."""

    def __init__(self, policy: Policy, config: SamplerConfig) -> None:
        self.policy = policy
        self.max_seqs = config.max_seqs
        self.policy_version = 0

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_group: OnGroup | None = None) -> list[Rollout]:
        """``samples_per_prompt`` rollouts a prompt, in order. Raises UserError for a prompt that cannot fit."""
        self._refuse_what_cannot_fit(prompts, sampling)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))  # less padding in a wave
        per_wave = self.max_seqs // sampling.samples_per_prompt
        drawn: dict[int, list[Rollout]] = {}
        for start in range(0, len(by_length), per_wave):
            wave = by_length[start : start + per_wave]
            for index, rollouts in zip(wave, self._wave([prompts[i] for i in wave], sampling), strict=True):
                drawn[index] = rollouts
                if on_group is not None:
                    on_group(index, rollouts)
        return [rollout for i in range(len(prompts)) for rollout in drawn[i]]

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        yield  # the cache lives only inside generate

    def publish(self, version: int) -> Publication:
        self.policy_version = version
        return Publication(version=version, num_bytes=0, fingerprint="")

    def _refuse_what_cannot_fit(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        lens = [len(p.token_ids) for p in prompts]
        if 0 in lens:
            raise ValueError(
                f"a prompt must hold at least one token, prompt {prompts[lens.index(0)].prompt_id} has none"
            )
        if sampling.samples_per_prompt > self.max_seqs:
            raise UserError(
                f"the responses of a prompt are decoded together: sampler.max_seqs must be >= "
                f"samples_per_prompt={sampling.samples_per_prompt}, got {self.max_seqs}"
            )
        longest = max(lens, default=0) + sampling.max_new_tok
        if longest > self.policy.max_tok:
            raise UserError(
                f"the longest prompt and sampling.max_new_tok={sampling.max_new_tok} make {longest} tokens, the model "
                f"has positions for {self.policy.max_tok}: lower max_new_tok or leave long prompts out"
            )

    def _wave(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        policy, device = self.policy, self.policy.device
        num_prompts, group = len(prompts), sampling.samples_per_prompt
        cache, hidden_PD = _prefill(policy, prompts)
        cache.open_responses(group, min(FIRST_CAPACITY, sampling.max_new_tok))
        drawn = _Drawn(prompts, sampling, device)
        rows = torch.arange(num_prompts * group, device=device)  # which response each cache row decodes
        hidden_BD = hidden_PD.repeat_interleave(group, 0)
        logits = _unembedded(policy)
        for position in range(sampling.max_new_tok):
            next_B, logprob_B = _draw(logits(hidden_BD), sampling.temperature, drawn.uniform(rows, position))
            is_live_B = drawn.append(rows, position, next_B, logprob_B)
            num_live = int(is_live_B.sum())  # the one synchronisation of a round
            if num_live == 0 or position + 1 == sampling.max_new_tok:
                break
            if num_live < LIVE_SHARE * len(rows):
                kept = cache.compact(is_live_B)
                rows, next_B = rows[kept], next_B[kept]
            hidden_BD = _advance(policy, cache, next_B)
        return drawn.rollouts(self.policy_version)


class _Drawn:
    """What has been drawn so far: [B, max_new_tok] tokens and log-probabilities, and where each response ended."""

    def __init__(self, prompts: list[Prompt], sampling: Sampling, device: torch.device) -> None:
        self.prompts, self.sampling = prompts, sampling
        shape = (len(prompts) * sampling.samples_per_prompt, sampling.max_new_tok)
        self.token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(shape, dtype=torch.float32, device=device)
        self.length = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.stopped = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.stop_ids = torch.tensor(sampling.stop_ids, device=device)
        self._uniform = None if sampling.temperature == 0 else self._uniform_numbers().to(device)

    def uniform(self, rows: Tensor, position: int) -> Tensor | None:
        return None if self._uniform is None else self._uniform[rows, position]

    def append(self, rows: Tensor, position: int, next_B: Tensor, logprob_B: Tensor) -> Tensor:
        """Takes one token a row; returns which rows go on. A row that had stopped before takes nothing."""
        was_live_B = ~self.stopped[rows]
        taking = rows[was_live_B]
        self.token_ids[taking, position] = next_B[was_live_B]
        self.logprob[taking, position] = logprob_B[was_live_B]
        self.length[taking] = position + 1
        self.stopped[rows] |= torch.isin(next_B, self.stop_ids)
        return ~self.stopped[rows]

    def rollouts(self, policy_version: int) -> list[list[Rollout]]:
        token_ids, logprob = self.token_ids.cpu(), self.logprob.cpu()
        length, stopped = self.length.tolist(), self.stopped.tolist()
        group = self.sampling.samples_per_prompt
        is_greedy = self.sampling.temperature == 0

        def one(row: int) -> Rollout:
            finish: Finish = "stop" if stopped[row] else "length"
            return Rollout(
                prompt_id=self.prompts[row // group].prompt_id,
                sample=row % group,
                token_ids=token_ids[row, : length[row]].clone(),
                sampler_logprob=None if is_greedy else logprob[row, : length[row]].clone(),
                finish=finish,
                policy_version=policy_version,
            )

        return [[one(p * group + g) for g in range(group)] for p in range(len(self.prompts))]

    def _uniform_numbers(self) -> Tensor:
        generator = torch.Generator()
        numbers = torch.empty(self.token_ids.shape)
        for row in range(numbers.shape[0]):
            prompt, sample = divmod(row, self.sampling.samples_per_prompt)
            generator.manual_seed(_seed_of(self.sampling.seed, self.prompts[prompt].prompt_id, sample))
            numbers[row] = torch.rand(numbers.shape[1], generator=generator)
        return numbers


@dataclass(slots=True)
class _Cache:
    """Keys and values, a list entry a layer. Prompts [P, K, Lp, d], stored once; responses [P, G, K, L, d]."""

    prompt_k: list[Tensor]
    prompt_v: list[Tensor]
    prompt_len_P: Tensor
    own_k: list[Tensor]
    own_v: list[Tensor]
    own_len: int = 0  # the same for all rows: they advance together

    @property
    def num_rows(self) -> int:
        return self.own_k[0].shape[0] * self.own_k[0].shape[1]

    def open_responses(self, group: int, capacity: int) -> None:
        num_prompts, num_kv_heads, _, head_dim = self.prompt_k[0].shape
        shape = (num_prompts, group, num_kv_heads, capacity, head_dim)
        self.own_k = [k.new_empty(shape) for k in self.prompt_k]
        self.own_v = [v.new_empty(shape) for v in self.prompt_v]

    def make_room(self) -> None:
        if self.own_len == self.own_k[0].shape[3]:
            self.own_k = [_doubled(k) for k in self.own_k]
            self.own_v = [_doubled(v) for v in self.own_v]

    def compact(self, is_live_B: Tensor) -> Tensor:
        """Drops finished rows as far as the rectangle [P, G] allows; returns the kept rows, [P' * G'] indices.

        Drops none where the rectangle would hardly shrink: a copy of all keys and values would win nothing.
        """
        group = self.own_k[0].shape[1]
        is_live_PG = is_live_B.view(-1, group)
        prompts = is_live_PG.any(1).nonzero()[:, 0]
        width = int(is_live_PG.sum(1).max())
        if len(prompts) * width > LIVE_SHARE * len(is_live_B):
            return torch.arange(len(is_live_B), device=is_live_B.device)
        # living rows first; the rectangle is filled up with finished rows of the same prompt
        order_PG = is_live_PG[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :width]
        for entries in (self.own_k, self.own_v):
            for layer, kv in enumerate(entries):
                entries[layer] = kv[prompts[:, None], order_PG]
        for entries in (self.prompt_k, self.prompt_v):
            for layer, kv in enumerate(entries):
                entries[layer] = kv[prompts]
        self.prompt_len_P = self.prompt_len_P[prompts]
        return (prompts[:, None] * group + order_PG).flatten()


def _prefill(policy: Policy, prompts: list[Prompt]) -> tuple[_Cache, Tensor]:
    """All prompts in one packed pass: the cache, and the last hidden row of each, [P, D]."""
    lens = [len(p.token_ids) for p in prompts]
    layout = PackedLayout.from_groups(lens, [[] for _ in lens]).to(policy.device)
    token_ids_T = torch.tensor([i for p in prompts for i in p.token_ids], device=policy.device)
    len_P = torch.tensor(lens, device=policy.device)
    prompt_of_T = torch.arange(len(lens), device=policy.device).repeat_interleave(len_P)
    shape = (len(lens), policy.num_kv_heads, max(lens), policy.head_dim)
    cache = _Cache(prompt_k=[], prompt_v=[], prompt_len_P=len_P, own_k=[], own_v=[])

    def spread(kv_BKTd: Tensor) -> Tensor:
        spread_PKLd = kv_BKTd.new_zeros(shape)
        spread_PKLd[prompt_of_T, :, layout.positions] = kv_BKTd[0].transpose(0, 1)
        return spread_PKLd

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cache.prompt_k.append(spread(k))
        cache.prompt_v.append(spread(v))
        q_THd, k_TKd, v_TKd = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed_attention(q_THd, k_TKd, v_TKd, layout, scale=scale)[None]

    hidden_TD = policy.trunk(token_ids_T[None], layout.positions[None], attend)[0]
    return cache, hidden_TD[len_P.cumsum(0) - 1]


def _advance(policy: Policy, cache: _Cache, token_ids_B: Tensor) -> Tensor:
    """One token further on every row: the next hidden rows, [B, D]."""
    cache.make_room()
    num_prompts, group = cache.own_k[0].shape[:2]
    position = cache.own_len
    cache.own_len = position + 1
    positions_B = (cache.prompt_len_P + position).repeat_interleave(group)
    own_len_PG = torch.full((num_prompts, group), cache.own_len, device=policy.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own_k, own_v = cache.own_k[layer], cache.own_v[layer]
        own_k[:, :, :, position] = k.view(num_prompts, group, *k.shape[1:2], -1)
        own_v[:, :, :, position] = v.view(num_prompts, group, *v.shape[1:2], -1)
        out_PGHd = decode_attention(
            q.view(num_prompts, group, q.shape[1], -1),
            cache.prompt_k[layer],
            cache.prompt_v[layer],
            cache.prompt_len_P,
            own_k[:, :, :, : cache.own_len],
            own_v[:, :, :, : cache.own_len],
            own_len_PG,
            scale=scale,
        )
        return out_PGHd.view(num_prompts * group, 1, q.shape[1], -1)

    return policy.trunk(token_ids_B[:, None], positions_B[:, None], attend)[:, 0]


def _unembedded(policy: Policy) -> Callable[[Tensor], Tensor]:
    """Hidden rows [B, D] -> float32 logits [B, V], as the trainer makes them: bf16 logits cost up to 0.07 nats."""
    weight_DV = policy.unembedding.detach().T
    if weight_DV.dtype in (torch.float32, torch.float64):
        return lambda hidden_BD: hidden_BD @ weight_DV
    if weight_DV.is_cuda:
        return lambda hidden_BD: torch.mm(hidden_BD, weight_DV, out_dtype=torch.float32)
    wide_DV = weight_DV.float()
    return lambda hidden_BD: hidden_BD.float() @ wide_DV


def _draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their log-probability [B] float32; greedy without uniform numbers."""
    z_BV = logits_BV.float()
    if uniform_B is None:
        next_B = z_BV.argmax(-1)
        return next_B, torch.zeros_like(next_B, dtype=torch.float32)
    if temperature != 1.0:
        z_BV = z_BV / temperature
    logprob_BV = torch.log_softmax(z_BV, -1)
    cdf_BV = logprob_BV.exp().cumsum(-1)
    total_B = cdf_BV[:, -1]
    # strictly below the total, so that the found token has a positive probability
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    next_B = torch.searchsorted(cdf_BV, target_B[:, None], right=True)[:, 0]
    next_B.clamp_(max=z_BV.shape[1] - 1)  # only NaN logits get there; the learner refuses their log-probability
    return next_B, logprob_BV.gather(1, next_B[:, None])[:, 0]


def _doubled(kv: Tensor) -> Tensor:
    num_prompts, group, num_kv_heads, capacity, head_dim = kv.shape
    larger = kv.new_empty(num_prompts, group, num_kv_heads, 2 * capacity, head_dim)
    larger[:, :, :, :capacity] = kv
    return larger


def _seed_of(seed: int, prompt_id: int, sample: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{prompt_id}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
