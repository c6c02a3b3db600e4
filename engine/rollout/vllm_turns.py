"""vLLM's side of rollouts of several turns: each turn is a request over the prompt and all tokens so far.

The keys and values of earlier turns come from vLLM's prefix cache, but for the last, unfinished block. A rollout that
waits for its environment has no request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from isomorph.engine.rollout.stop_strings import StopStrings
from isomorph.engine.rollout.turns import Conversation, Conversations, Waiting
from isomorph.engine.rollout.vllm_engine import turn_params, watch_for_strings
from isomorph.engine.types import Finish, OnStep, Prompt, Rollout, RunFailed, Sampling


@dataclass(slots=True)
class _Talk:
    """A rollout so far."""

    index: int  # of the prompt
    conversation: Conversation
    token_ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    finish: Finish = "stop"


class VllmTurns:
    """The requests of one ``generate`` with a dialogue."""

    def __init__(
        self,
        llm: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        policy_version: int,
        conversations: Conversations,
        stops: StopStrings | None,
    ) -> None:
        self.llm, self.prompts, self.sampling, self.policy_version = llm, prompts, sampling, policy_version
        self.conversations, self.stops = conversations, stops
        self.running: dict[str, _Talk] = {}  # by the name that results have
        self.finished: list[dict[int, Rollout]] = [{} for _ in prompts]

    @property
    def groups(self) -> list[list[Rollout]]:
        return [[rollouts[sample] for sample in sorted(rollouts)] for rollouts in self.finished]

    def run(self, on_step: OnStep) -> Iterator[tuple[int, list[Rollout]]]:
        """Yields (index of the prompt, its rollouts), samples ascending, as soon as a group's last rollout ends."""
        samples = range(self.sampling.samples_per_prompt)
        self._request(
            [_Talk(i, self.conversations.begin(prompt, s)) for i, prompt in enumerate(self.prompts) for s in samples]
        )
        while self.running or self.conversations.waiting:
            if self.running:
                for result in self.llm.llm_engine.step():
                    if result.finished:
                        yield from self._turn_ended(self.running.pop(result.request_id), result.outputs[0])
            on_step()
            replies = self.conversations.replies(is_idle=not self.running, on_step=on_step)
            for waiting, added in replies:
                if not added:
                    yield from self._finish(waiting.key)
            self._request([self._continued(waiting, added) for waiting, added in replies if added])

    def _request(self, talks: Sequence[_Talk]) -> None:
        if not talks:
            return
        requests = [{"prompt_token_ids": [*self.prompts[t.index].token_ids, *t.token_ids]} for t in talks]
        params = [
            turn_params(
                self.prompts[t.index],
                self.sampling,
                sample=t.conversation.sample,
                start=len(t.token_ids),
            )
            for t in talks
        ]
        names = self.llm.enqueue(requests, params, use_tqdm=False)
        if self.stops:
            watch_for_strings(self.llm, self.stops)
        # vLLM names the request "12-9f3c", but its result "12"
        self.running |= {name.partition("-")[0]: talk for name, talk in zip(names, talks, strict=True)}

    def _turn_ended(self, talk: _Talk, output: Any) -> Iterator[tuple[int, list[Rollout]]]:
        if output.finish_reason not in ("stop", "length"):
            raise RunFailed(
                f"vLLM ended a response with finish_reason {output.finish_reason!r} "
                f"(prompt {self.prompts[talk.index].prompt_id})"
            )
        talk.finish = output.finish_reason
        talk.token_ids += output.token_ids
        if self.sampling.temperature > 0:
            talk.logprob += output.logprobs.logprobs
        if talk.finish == "length" or self.conversations.is_over(talk, talk.conversation, talk.token_ids):
            yield from self._finish(talk)

    def _continued(self, waiting: Waiting, added: tuple[int, ...]) -> _Talk:
        talk: _Talk = waiting.key
        talk.token_ids += added
        if self.sampling.temperature > 0:
            talk.logprob += [float("nan")] * len(added)
        return talk

    def _finish(self, talk: _Talk) -> Iterator[tuple[int, list[Rollout]]]:
        self.conversations.end(talk.conversation)
        group, sample = self.finished[talk.index], talk.conversation.sample
        group[sample] = Rollout(
            prompt_id=self.prompts[talk.index].prompt_id,
            sample=sample,
            token_ids=torch.tensor(talk.token_ids, dtype=torch.int64),
            sampler_logprob=None if self.sampling.temperature == 0 else torch.tensor(talk.logprob, dtype=torch.float32),
            finish=talk.finish,
            policy_version=self.policy_version,
            **talk.conversation.facts(len(talk.token_ids)),
        )
        if len(group) == self.sampling.samples_per_prompt:
            yield talk.index, [group[s] for s in range(self.sampling.samples_per_prompt)]
