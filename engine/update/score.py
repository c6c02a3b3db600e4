"""Text -> reward -> group-relative advantage. Rewards are computed while other responses are still being sampled."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, SimpleQueue
from typing import Self

import torch

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.foreign import shortened
from isomorph.engine.types import Group, Judge, Prompt, Rollout, RunFailed
from isomorph.engine.update.advantage import whitened
from isomorph.kernels.advantage import group_advantage

Decode = Callable[[Sequence[int]], str]
FindsAnswer = Callable[[Prompt, str], bool]  # whether an answer can be found in a response, right or wrong
POLL_S = 0.2  # while waiting for rewards, interval of looking whether a stop was requested


class RewardThread:
    """Computes rewards in a thread of its own while the sampler goes on; groups are handed in by ``add``.

    This overlaps with sampling where the reward function waits for other processes or releases the GIL. Each call of
    it takes all groups that have been added since the call before, as one batch.
    """

    def __init__(
        self, judge: Judge, decode: Decode, prompts: Sequence[Prompt], on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """``on_wait`` is called several times a second while ``results`` waits; what it raises ends the wait."""
        self.judge, self.decode, self.prompts, self.on_wait = judge, decode, prompts, on_wait
        self._queue: SimpleQueue[tuple[int, Sequence[Rollout]]] = SimpleQueue()
        self._done: dict[int, tuple[list[str], list[float]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._calls: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._thread.shutdown(wait=kind is None, cancel_futures=True)  # on an exception, do not wait for rewards

    def add(self, index: int, rollouts: Sequence[Rollout]) -> None:
        """Queues all rollouts of prompt ``index``. Raises what the reward function has raised on earlier ones."""
        for call in self._calls:
            if call.done():
                call.result()
        self._queue.put((index, rollouts))
        self._calls.append(self._thread.submit(self._reward_queued))

    def results(self) -> tuple[list[str], list[float]]:
        """Waits for all rewards; returns text and reward of every response, in the order of the prompts.

        Raises what the reward function or ``on_wait`` raises.
        """
        for call in self._calls:
            while not wait([call], timeout=POLL_S).done:
                self.on_wait()
            call.result()
        done = [self._done[i] for i in range(len(self.prompts))]
        return [text for texts, _ in done for text in texts], [reward for _, rewards in done for reward in rewards]

    def _reward_queued(self) -> None:
        batch: list[tuple[int, list[str]]] = []
        while True:
            try:
                index, rollouts = self._queue.get_nowait()
            except Empty:
                break
            batch.append((index, [self.decode(r.token_ids.tolist()) for r in rollouts]))
        if not batch:  # the call before this one took its group, too
            return
        prompts = [self.prompts[index] for index, texts in batch for _ in texts]
        rewards = checked_rewards(self.judge, prompts, [text for _, texts in batch for text in texts])
        start = 0
        for index, texts in batch:
            self._done[index] = (texts, rewards[start : start + len(texts)])
            start += len(texts)


def score(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Sequence[float], objective: ObjectiveConfig
) -> list[Group]:
    """Returns one Group for each prompt, with rewards and advantages.

    ``rollouts`` and ``rewards``: the same number for each prompt, in the order of the prompts. The KL penalty of
    ``objective.reward_kl_coef`` is subtracted later, by ``advantage.penalised``, when log-probabilities are known.
    Raises ValueError if the rollouts do not match the prompts.
    """
    size, rest = divmod(len(rollouts), len(prompts))
    if rest or size == 0:
        raise ValueError(
            f"every prompt must have the same number of rollouts, got {len(rollouts)} for {len(prompts)} prompts"
        )
    repeated = [prompt for prompt in prompts for _ in range(size)]
    if any(r.prompt_id != prompt.prompt_id for prompt, r in zip(repeated, rollouts, strict=True)):
        raise ValueError("rollouts must be in the order of their prompts, all rollouts of a prompt next to each other")
    offsets = torch.arange(0, len(rollouts) + 1, size)
    reward_S = torch.tensor(rewards, dtype=torch.float32)
    if objective.scale == "batch":  # whitened over the tokens in the loss, as in REINFORCE++
        relative_S = group_advantage(reward_S, offsets, baseline=objective.baseline, scale="none")
        (advantage_S,) = whitened([relative_S], [torch.tensor([r.num_loss_tok for r in rollouts])])
    else:
        advantage_S = group_advantage(reward_S, offsets, baseline=objective.baseline, scale=objective.scale)
    advantages = advantage_S.tolist()
    return [
        Group(
            prompt=prompt,
            rollouts=tuple(rollouts[i * size : (i + 1) * size]),
            rewards=tuple(rewards[i * size : (i + 1) * size]),
            advantages=tuple(advantages[i * size : (i + 1) * size]),
        )
        for i, prompt in enumerate(prompts)
    ]


def answers_found(
    finds_answer: FindsAnswer | None, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[bool] | None:
    """Returns for each text whether an answer was found in it; None without ``finds_answer``.

    ``texts``: the same number for each prompt, in the order of the prompts.
    """
    if finds_answer is None:
        return None
    size = len(texts) // len(prompts)
    return [finds_answer(prompts[i // size], text) for i, text in enumerate(texts)]


def share_without_answer(found: Sequence[bool] | None) -> float:
    """Share of responses in which no answer was found, 0 to 1; NaN if that was not measured."""
    return math.nan if found is None else 1 - sum(found) / len(found)


def warning_of_no_answer(where: str, found: Sequence[bool] | None, texts: Sequence[str], cut_off: float | None) -> str:
    """Returns a warning with an example if no answer was found in any of ``texts``; else "".

    ``cut_off``: share of the responses that were ended by their length limit; None if that is not known.
    """
    if found is None or any(found):
        return ""
    cut = "" if not cut_off else f", {cut_off:.0%} of which were cut off at their length limit"
    return (
        f"warning: no answer was found in any of the {len(texts)} responses of {where}{cut}, so every reward is 0. "
        f'One of them: "{shortened(texts[0])}"'
    )


def checked_rewards(judge: Judge, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Calls the reward function. Raises RunFailed unless it returns one finite reward for each (prompt, text) pair."""
    rewards = judge(prompts, texts)
    if len(rewards) != len(texts):
        raise RunFailed(
            f"the reward function must return one reward for each response, got {len(rewards)} rewards for "
            f"{len(texts)} responses"
        )
    bad = (~torch.tensor(rewards, dtype=torch.float32).isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise RunFailed(
            f"rewards must be finite in float32, got {rewards[first]} for the response {shortened(texts[first])!r}"
        )
    return rewards
