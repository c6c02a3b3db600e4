"""The built-in sampler: decodes with the trainer's own modules, so there is no second copy of the weights.

Continuous batching: up to ``max_seqs`` responses are decoded at once, each in a slot; when one ends, its slot goes to
the next, of the same prompt or of another. A response that waits for its environment keeps its slot, with its keys and
values, and is not decoded. A prompt is prefilled when its first response is admitted, and its KV cache
is freed when its last response has ended.

Sampling noise is seeded for each request by (seed, prompt_id, sample). The other requests of a batch therefore change a
response by rounding at most, and on the reference implementation of decode_attention not at all.
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.config import SamplerConfig, Truncation, UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.decoder import Decoder, DecoderSpec, num_prompt_slots
from isomorph.engine.rollout.stop_strings import StopStrings
from isomorph.engine.rollout.turns import Conversation, Conversations
from isomorph.engine.types import Dialogue, OnGroup, OnStep, Prompt, Publication, Rollout, Sampling

# decoding steps between two checks for ended responses: each check waits for the GPU's stream
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 8}


class BuiltinSampler:
    """Samples from ``policy``'s own parameters; ``publish`` therefore moves no bytes and sets the version alone.

    ``config.max_seqs``: responses decoded at once. ``config.kv_tok``: upper limit of the KV cache, in tokens.
    ``config.keep_cache``: cache and CUDA graphs stay in ``asleep``, and serve every later call that fits them. Graphs
    read the weights where they are, so that they see the learner's new values.
    """

    def __init__(self, policy: Policy, config: SamplerConfig) -> None:
        self.policy = policy
        self.max_seqs, self.kv_tok, self.keep_cache = config.max_seqs, config.kv_tok, config.keep_cache
        self.policy_version = 0
        self._decoder: Decoder | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        on_step: OnStep | None = None,
        dialogue: Dialogue | None = None,
    ) -> list[Rollout]:
        """``samples_per_prompt`` rollouts for each prompt, in the order of the prompts, samples ascending.

        Raises UserError where prompt and response exceed the model's positions or the KV cache, ValueError for an empty
        prompt.
        """
        self._refuse_what_cannot_fit(prompts, sampling)
        if not prompts:
            return []
        is_timed = self.policy.device.type == "cpu"
        conversations = Conversations(dialogue, sampling.max_new_tok, is_timed=is_timed)
        batch = _Batch(self._decoder_for(prompts, sampling), prompts, sampling, self.policy_version, conversations)
        try:
            with self.policy.prepacked():
                for index, rollouts in batch.run(on_step or (lambda: None)):
                    if on_group is not None:
                        on_group(index, rollouts)
        finally:
            conversations.close()
        return [rollout for group in batch.groups for rollout in group]

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Frees the KV cache and the CUDA graphs, unless they are kept; the next ``generate`` makes them again."""
        if not self.keep_cache:
            self._decoder = None
        yield

    def publish(self, version: int) -> Publication:
        self.policy_version = version
        return Publication(version=version, num_bytes=0, fingerprint="")

    def _refuse_what_cannot_fit(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        lens = [len(p.token_ids) for p in prompts]
        if 0 in lens:
            raise ValueError(
                f"a prompt must hold at least one token, prompt {prompts[lens.index(0)].prompt_id} has none"
            )
        longest = max(lens, default=0) + sampling.max_new_tok
        if longest > self.policy.max_model_len:
            raise UserError(
                f"the longest prompt and sampling.max_new_tok={sampling.max_new_tok} make {longest} tokens, the model "
                f"has positions for {self.policy.max_model_len}: lower max_new_tok or leave long prompts out"
            )

    def _decoder_for(self, prompts: Sequence[Prompt], sampling: Sampling) -> Decoder:
        """The decoder of the last call if its spec is the same, because its CUDA graphs are recorded already.

        One that is kept serves smaller requests, too: prompts of a step that are shorter, a refill of few prompts.
        """
        spec = plan_decoder([len(p.token_ids) for p in prompts], sampling, self.max_seqs, self.kv_tok)
        last = self._decoder
        is_served = last is not None and (last.spec.serves(spec) if self.keep_cache else last.spec == spec)
        if last is None or not is_served:
            last = self._decoder = None  # the old cache goes before the new one comes
            last = self._decoder = Decoder(self.policy, spec)
        return last


def plan_decoder(prompt_lens: Sequence[int], sampling: Sampling, max_seqs: int, kv_tok: int | None) -> DecoderSpec:
    """The decoder with as many sequences as ``max_seqs`` and ``kv_tok`` allow.

    Raises UserError where ``kv_tok`` does not hold a single sequence.
    """

    def spec(seqs: int) -> DecoderSpec:
        return DecoderSpec(
            seqs=seqs,
            prompts=num_prompt_slots(len(prompt_lens), seqs, sampling.samples_per_prompt),
            prompt_tok=max(prompt_lens),
            max_new_tok=sampling.max_new_tok,
            temperature=sampling.temperature,
            stop_ids=sampling.stop_ids,
            truncation=Truncation() if sampling.temperature == 0 else sampling.truncation,
        )

    most = min(max_seqs, len(prompt_lens) * sampling.samples_per_prompt)
    if kv_tok is None:
        return spec(most)
    for seqs in range(most, 0, -1):
        if spec(seqs).kv_tok <= kv_tok:
            return spec(seqs)
    raise UserError(
        f"one sequence, the longest prompt of {max(prompt_lens)} tokens and sampling.max_new_tok="
        f"{sampling.max_new_tok}, must fit sampler.kv_tok, got {kv_tok}: raise it to {spec(1).kv_tok}, or lower "
        "max_new_tok"
    )


class _Batch:
    """The requests of one ``generate``: those that wait, those that run and in which slot, those that are finished."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        policy_version: int,
        conversations: Conversations,
    ) -> None:
        self.decoder, self.prompts, self.sampling, self.policy_version = decoder, prompts, sampling, policy_version
        self.conversations = conversations
        size = sampling.samples_per_prompt
        self.waiting = deque((index, sample) for index in range(len(prompts)) for sample in range(size))
        self.requests: dict[int, _Request] = {}  # by slot: decoded, or waiting for their environment
        self.running: set[int] = set()  # slots that are decoded
        self.free_slots = list(range(decoder.spec.seqs))
        self.free_prompt_slots = list(range(decoder.spec.prompts))
        self.prompt_slots: dict[int, int] = {}  # index of a prompt with unfinished responses -> its slot
        self.finished: list[dict[int, Rollout]] = [{} for _ in prompts]
        self.stops = StopStrings(sampling.stop, decoder.policy.text) if sampling.stop else None
        self.searched: dict[int, list[int]] = {}  # slot -> tokens of its present turn, without a stop string
        self.stopped: set[int] = set()  # slots whose present turn a stop string ended

    @property
    def groups(self) -> list[list[Rollout]]:
        return [[rollouts[sample] for sample in sorted(rollouts)] for rollouts in self.finished]

    def run(self, on_step: OnStep) -> Iterator[tuple[int, list[Rollout]]]:
        """Yields (index of the prompt, its rollouts), samples ascending, as soon as a group's last response ends."""
        num_steps = STEPS_BETWEEN_CHECKS[self.decoder.policy.device.type]
        while self.waiting or self.requests:
            while self._admit():
                yield from self._collect()  # a response may end with its first token
                on_step()
            if self.running:
                # responses of one prompt are neighbours: decode_attention then reads the prompt's keys once for all
                slots = sorted(self.running, key=lambda slot: (self.prompt_slots[self.requests[slot].index], slot))
                self.decoder.advance(slots, num_steps)
                yield from self._collect()
                on_step()
            yield from self._continue(on_step)

    def _admit(self) -> bool:
        """Admits waiting requests into free slots; False if none was admitted."""
        slots: list[int] = []
        new_prompts: list[int] = []
        while self.waiting and self.free_slots:
            index, sample = self.waiting[0]
            if index not in self.prompt_slots:
                if not self.free_prompt_slots:
                    break
                self.prompt_slots[index] = self.free_prompt_slots.pop()
                new_prompts.append(index)
            self.waiting.popleft()
            slots.append(self.free_slots.pop())
            conversation = self.conversations.begin(self.prompts[index], sample)
            self.requests[slots[-1]] = _Request(index, sample, conversation)
            self.searched[slots[-1]] = []
        if new_prompts:
            self.decoder.prefill([self.prompts[i] for i in new_prompts], [self.prompt_slots[i] for i in new_prompts])
        if not slots:
            return False
        self.running.update(slots)
        requests = [self.requests[slot] for slot in slots]
        self.decoder.admit(
            slots,
            [self.prompt_slots[r.index] for r in requests],
            [len(self.prompts[r.index].token_ids) for r in requests],
            [rng_key(self.sampling.seed, self.prompts[r.index].prompt_id, r.sample) for r in requests],
        )
        return True

    def _collect(self) -> Iterator[tuple[int, list[Rollout]]]:
        """Takes the responses that have ended out of ``running``; those whose environment is asked keep their slots."""
        if self.stops:
            self._end_at_stop_strings(self.stops)
        lengths = self.decoder.ended_lengths()
        ended = [slot for slot in self.requests if slot in self.running and lengths[slot]]
        if not ended:
            return
        token_ids, logprob = self.decoder.responses(ended)
        for i, slot in enumerate(ended):
            self.running.discard(slot)
            ids, conversation = token_ids[i, : lengths[slot]], self.requests[slot].conversation
            is_stop = slot in self.stopped or int(ids[-1]) in self.sampling.stop_ids
            if not is_stop or self.conversations.is_over(slot, conversation, ids.tolist()):
                yield from self._finish(slot, ids, logprob[i, : lengths[slot]])

    def _end_at_stop_strings(self, stops: StopStrings) -> None:
        """Ends the running turns that contain a stop string, with the token that completes it."""
        slots = list(self.running)
        if not slots:
            return
        turns = [self.requests[slot].conversation.turn_start for slot in slots]
        lengths = self.decoder.lengths()
        starts = [turn + len(self.searched[slot]) for slot, turn in zip(slots, turns, strict=True)]
        most = max(lengths[slot] - start for slot, start in zip(slots, starts, strict=True))
        for slot, turn, start, new in zip(slots, turns, starts, self.decoder.tokens(slots, starts, most), strict=True):
            self.searched[slot] += new[: lengths[slot] - start]
            end = stops.first_end(self.searched[slot], start - turn)
            if end is not None:
                self.decoder.end(slot, turn + end)
                self.stopped.add(slot)

    def _continue(self, on_step: OnStep) -> Iterator[tuple[int, list[Rollout]]]:
        """Appends what environments have replied, or finishes the response."""
        replies = self.conversations.replies(is_idle=not self.running, on_step=on_step)
        more = {waiting.key: added for waiting, added in replies if added}
        over = [waiting.key for waiting, added in replies if not added]
        if over:
            lengths = self.decoder.ended_lengths()
            token_ids, logprob = self.decoder.responses(over)
            for i, slot in enumerate(over):
                yield from self._finish(slot, token_ids[i, : lengths[slot]], logprob[i, : lengths[slot]])
        if more:
            self.running.update(more)
            self.stopped -= more.keys()
            self.searched |= {slot: [] for slot in more}
            self.decoder.append(list(more), list(more.values()))
            yield from self._collect()
            on_step()

    def _finish(self, slot: int, token_ids: Tensor, logprob: Tensor) -> Iterator[tuple[int, list[Rollout]]]:
        request = self.requests.pop(slot)
        is_stop = slot in self.stopped or int(token_ids[-1]) in self.sampling.stop_ids
        self.stopped.discard(slot)
        self.free_slots.append(slot)
        self.conversations.end(request.conversation)
        index, sample = request.index, request.sample
        self.finished[index][sample] = Rollout(
            prompt_id=self.prompts[index].prompt_id,
            sample=sample,
            token_ids=token_ids.clone(),
            sampler_logprob=None if self.sampling.temperature == 0 else logprob.clone(),
            finish="stop" if is_stop else "length",
            policy_version=self.policy_version,
            kept=self.decoder.kept_of(slot, len(token_ids)),
            **request.conversation.facts(len(token_ids)),
        )
        if len(self.finished[index]) == self.sampling.samples_per_prompt:
            self.free_prompt_slots.append(self.prompt_slots.pop(index))
            yield index, [self.finished[index][s] for s in range(self.sampling.samples_per_prompt)]


@dataclass(frozen=True, slots=True)
class _Request:
    index: int  # of the prompt
    sample: int
    conversation: Conversation


def rng_key(seed: int, prompt_id: int, sample: int) -> int:
    """The key of a request's sampling noise, 0 <= key < 2**63, from a hash of its three numbers."""
    digest = hashlib.blake2b(f"{seed}:{prompt_id}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
