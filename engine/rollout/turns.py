"""Rollouts of several turns, as both samplers keep them: what an environment added to a response, and who waits for it.

On the CPU a reply is taken a fixed number of decoding steps after its turn, or when nothing else is left to decode; it
is waited for until then. Which responses are decoded together, and with it every bit of them, therefore does not depend
on how fast environments are. But one that takes longer than PATIENCE_S, as one that hangs, is not waited for: the other
responses are decoded, and its rollout goes on when its reply comes. On a GPU a reply is taken as soon as it is there.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from isomorph.engine.types import Dialogue, EnvironmentFailure, OnStep, Prompt, Reply, Rollout

REPLY_STEPS = 8  # decoding steps on the CPU between a turn and its reply
PATIENCE_S = 2.0  # on the CPU: how long after its turn a reply is waited for while others could be decoded
POLL_S = 0.05  # while waiting for replies, interval of looking whether a stop was requested


@dataclass(slots=True)
class Conversation:
    """One rollout's turns so far."""

    prompt: Prompt
    sample: int
    spans: list[tuple[int, int]] = field(default_factory=list)  # of its tokens: what the environment added
    reward: float | None = None
    failure: EnvironmentFailure | None = None

    @property
    def turn_start(self) -> int:
        """Where the model's present turn begins."""
        return self.spans[-1][1] if self.spans else 0

    def facts(self, num_tok: int) -> dict[str, Any]:
        """The fields of its ``Rollout`` of ``num_tok`` tokens that a response of one turn does not need."""
        mask: Tensor | None = None
        if self.spans:
            mask = torch.zeros(num_tok, dtype=torch.bool)
            for start, end in self.spans:
                mask[start:end] = True
        return {
            "context_mask": mask,
            "num_turns": len(self.spans) + 1,
            "environment_reward": self.reward,
            "environment_failure": self.failure,
        }


def count_failures(rollouts: Iterable[Rollout]) -> dict[EnvironmentFailure, int]:
    """Rollouts that their environment did not end by itself, by the kinds of failure."""
    found = Counter(rollout.environment_failure for rollout in rollouts)
    return {kind: found[kind] for kind in get_args(EnvironmentFailure)}


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A rollout whose turn has ended and whose environment has not replied yet. ``key``: what its sampler calls it."""

    key: Any
    conversation: Conversation
    token_ids: list[int]
    reply: Future[Reply]
    due: int  # decoding step
    asked_at: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        """Whether the reply is not waited for any longer."""
        return not self.reply.done() and time.monotonic() - self.asked_at > PATIENCE_S


class Conversations:
    """The rollouts of one ``generate`` with ``dialogue``; None: every rollout has one turn."""

    def __init__(self, dialogue: Dialogue | None, max_new_tok: int, *, is_timed: bool) -> None:
        """``is_timed``: replies are taken at fixed steps."""
        self.dialogue, self.max_new_tok, self.is_timed = dialogue, max_new_tok, is_timed
        self.waiting: list[Waiting] = []
        self._open: dict[tuple[int, int], Conversation] = {}
        self._step = 0

    def begin(self, prompt: Prompt, sample: int) -> Conversation:
        conversation = Conversation(prompt, sample)
        if self.dialogue is not None:
            self._open[prompt.prompt_id, sample] = conversation
            self.dialogue.begin(prompt, sample)
        return conversation

    def end(self, conversation: Conversation) -> None:
        if self.dialogue is not None:
            del self._open[conversation.prompt.prompt_id, conversation.sample]
            self.dialogue.end(conversation.prompt, conversation.sample)

    def close(self) -> None:
        """Ends those that are still open."""
        for conversation in list(self._open.values()):
            self.end(conversation)

    def is_over(self, key: Any, conversation: Conversation, token_ids: Sequence[int]) -> bool:
        """After a turn: False where the environment is asked now, ``key`` waits and comes back by ``replies``."""
        if self.dialogue is None:
            return True
        ids = list(token_ids)
        reply = self.dialogue.turn(conversation.prompt, conversation.sample, ids, conversation.turn_start)
        self.waiting.append(Waiting(key, conversation, ids, reply, self._step + REPLY_STEPS))
        return False

    def replies(self, is_idle: bool, on_step: OnStep) -> list[tuple[Waiting, tuple[int, ...]]]:
        """Those whose reply is taken now, each with the tokens to append; none: the rollout is over.

        Called once for each decoding step. ``is_idle``: nothing can be decoded before a reply comes, so waits for one.
        """
        self._step += 1
        if not self.waiting:
            return []
        asked = [w for w in self.waiting if not self.is_timed or is_idle or w.due <= self._step]
        if self.is_timed:
            _wait(lambda: all(w.reply.done() or w.is_late for w in asked), asked, on_step)
        if is_idle:
            _wait(lambda: any(w.reply.done() for w in asked), asked, on_step)
        taken = [w for w in asked if w.reply.done()]
        self.waiting = [w for w in self.waiting if w not in taken]
        return [(waiting, self._added(waiting)) for waiting in taken]

    def _added(self, waiting: Waiting) -> tuple[int, ...]:
        reply, start = waiting.reply.result(), len(waiting.token_ids)
        end = start + len(reply.token_ids)
        if not reply.token_ids:
            waiting.conversation.reward, waiting.conversation.failure = reply.reward, reply.failure
        if not reply.token_ids or end >= self.max_new_tok:
            return ()
        waiting.conversation.spans.append((start, end))
        return reply.token_ids


def _wait(is_enough: Callable[[], bool], waiting: Iterable[Waiting], on_step: OnStep) -> None:
    while not is_enough():
        wait([w.reply for w in waiting if not w.reply.done()], timeout=POLL_S, return_when=FIRST_COMPLETED)
        on_step()
