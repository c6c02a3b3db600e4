"""``EnvironmentDialogue``: the engine's Dialogue over the environments of a recipe's data."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from isomorph.curriculum.environments.pool import Call, EnvironmentPool
from isomorph.curriculum.environments.worker import EnvironmentSpec, Outcome
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.model.reply import ReplyFormat
from isomorph.engine.types import Prompt, Reply


@dataclass(frozen=True, slots=True)
class Turns:
    """How rollouts on one [data.NAME] go on after the model's turn."""

    spec: EnvironmentSpec
    max_turns: int
    format: ReplyFormat


@dataclass(slots=True)
class _Rollout:
    key: int
    seed: int
    said: list[str] = field(default_factory=list)
    is_held: bool = False  # a worker holds its environment


class EnvironmentDialogue:
    """Hands the model's turns to environments, and their messages back as tokens."""

    def __init__(
        self, turns: Mapping[str, Turns], pool: EnvironmentPool, decode: Callable[[Sequence[int]], str], seed: int
    ) -> None:
        """``turns``: by the name of the data; rollouts of other data have one turn. ``seed``: of the run."""
        self.turns, self.pool, self.decode, self.seed = turns, pool, decode, seed
        self._open: dict[tuple[int, int], _Rollout] = {}

    def begin(self, prompt: Prompt, sample: int) -> None:
        if prompt.payload.data in self.turns:
            self._open[prompt.prompt_id, sample] = _Rollout(self.pool.new_key(), seed_of(self.seed, prompt.payload))

    def turn(self, prompt: Prompt, sample: int, token_ids: Sequence[int], start: int) -> Future[Reply]:
        task: Task = prompt.payload
        reply: Future[Reply] = Future()
        if task.data not in self.turns:
            reply.set_result(Reply())
            return reply
        turns, rollout = self.turns[task.data], self._open[prompt.prompt_id, sample]
        rollout.said.append(self.decode(token_ids[start:]))
        is_stopped = token_ids[-1] in turns.format.text.stop_ids
        first = tuple(task.messages or ({"role": "user", "content": task.question},))
        is_last = len(rollout.said) == turns.max_turns
        call = Call(turns.spec, rollout.key, task.row, rollout.seed, first, tuple(rollout.said), is_last)

        def answered(answer: Future[Outcome]) -> None:
            try:
                outcome = answer.result()
                rollout.is_held = outcome.done is None and not outcome.failed
                reply.set_result(_reply(turns, outcome, is_last, is_stopped))
            except BaseException as error:  # a future has to hear of it, or the sampler waits for ever
                reply.set_exception(error)

        rollout.is_held = True
        self.pool.step(call).add_done_callback(answered)
        return reply

    def end(self, prompt: Prompt, sample: int) -> None:
        rollout = self._open.pop((prompt.prompt_id, sample), None)
        if rollout is not None and rollout.is_held:
            self.pool.forget(rollout.key)


def seed_of(run_seed: int, task: Task) -> int:
    """The seed of the environments of all rollouts on ``task``, below 2**31."""
    digest = hashlib.blake2b(f"{run_seed}:{task.data}:{task.key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


def _reply(turns: Turns, outcome: Outcome, is_last: bool, is_stopped: bool) -> Reply:
    if outcome.failed:
        return Reply(reward=0.0 if turns.spec.environment is not None else None, failure=outcome.kind)
    if outcome.done is not None:
        return Reply(reward=outcome.done.reward)
    if is_last:
        return Reply(failure="out_of_turns")
    return Reply(token_ids=turns.format.encode(outcome.messages, is_stopped=is_stopped))
