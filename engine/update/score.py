"""Text -> reward -> advantage. Rewards are given while other responses are still being drawn."""

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
FindsAnswer = Callable[[Prompt, str], bool]  # whether a response states an answer at all, right or wrong
LOOK_S = 0.2  # between two looks at whether the run is to end while it waits for the judge


class Judging:
    """Judges groups as they are handed in by ``add``, in a thread of its own: a judge whose work is done in other
    processes, or in C, costs the sampler nothing.

    One call of the judge takes all that has gathered during the call before, so that many groups are judged at once
    where one takes long.
    """

    def __init__(
        self, judge: Judge, decode: Decode, prompts: Sequence[Prompt], on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.judge, self.decode, self.prompts, self.on_wait = judge, decode, prompts, on_wait
        self._waiting: SimpleQueue[tuple[int, Sequence[Rollout]]] = SimpleQueue()
        self._done: dict[int, tuple[list[str], list[float]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._calls: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._thread.shutdown(wait=kind is None, cancel_futures=True)  # a run that ends does not wait for the judge

    def add(self, index: int, rollouts: Sequence[Rollout]) -> None:
        """All responses to prompt ``index``, finished. Raises what the judge has raised on earlier ones."""
        for call in self._calls:
            if call.done():
                call.result()
        self._waiting.put((index, rollouts))
        self._calls.append(self._thread.submit(self._judge_what_waits))

    def results(self) -> tuple[list[str], list[float]]:
        """Text and reward of every response, in the order of the prompts.

        Raises what the judge raised, and what ``on_wait`` raises, which is called several times a second.
        """
        for call in self._calls:
            while not wait([call], timeout=LOOK_S).done:
                self.on_wait()
            call.result()
        done = [self._done[i] for i in range(len(self.prompts))]
        return [text for texts, _ in done for text in texts], [reward for _, rewards in done for reward in rewards]

    def _judge_what_waits(self) -> None:
        gathered: list[tuple[int, list[str]]] = []
        while True:
            try:
                index, rollouts = self._waiting.get_nowait()
            except Empty:
                break
            gathered.append((index, [self.decode(r.token_ids.tolist()) for r in rollouts]))
        if not gathered:  # the call before this one took them along
            return
        asked = [self.prompts[index] for index, texts in gathered for _ in texts]
        rewards = judged(self.judge, asked, [text for _, texts in gathered for text in texts])
        start = 0
        for index, texts in gathered:
            self._done[index] = (texts, rewards[start : start + len(texts)])
            start += len(texts)


def score(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Sequence[float], objective: ObjectiveConfig
) -> list[Group]:
    """The rollouts grouped by prompt, with rewards and advantages.

    ``rollouts`` hold the same number of responses for each prompt, in the order of the prompts. What
    ``objective.reward_kl_coef`` takes off the rewards is not yet known here: ``advantage.penalised``.
    """
    size, rest = divmod(len(rollouts), len(prompts))
    if rest or size == 0:
        raise ValueError(
            f"every prompt must have the same number of rollouts, got {len(rollouts)} for {len(prompts)} prompts"
        )
    repeated = [prompt for prompt in prompts for _ in range(size)]
    if any(r.prompt_id != prompt.prompt_id for prompt, r in zip(repeated, rollouts, strict=True)):
        raise ValueError("rollouts must stand in the order of their prompts, all of a prompt side by side")
    offsets = torch.arange(0, len(rollouts) + 1, size)
    reward_S = torch.tensor(rewards, dtype=torch.float32)
    if objective.scale == "batch":  # over the tokens that are learned from, as REINFORCE++ does
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
    """For each text whether an answer was found in it; None where nobody can say.

    ``texts`` hold the same number of responses for each prompt, in the order of the prompts.
    """
    if finds_answer is None:
        return None
    size = len(texts) // len(prompts)
    return [finds_answer(prompts[i // size], text) for i, text in enumerate(texts)]


def share_without_answer(found: Sequence[bool] | None) -> float:
    """In 0..1; NaN where nobody can say."""
    return math.nan if found is None else 1 - sum(found) / len(found)


def warning_of_no_answer(where: str, found: Sequence[bool] | None, texts: Sequence[str], cut_off: float | None) -> str:
    """A sentence with an example where none of ``texts`` states an answer; else "".

    ``cut_off``: share of the responses that the limit of their length ended; None where that is not known.
    """
    if found is None or any(found):
        return ""
    cut = "" if not cut_off else f", {cut_off:.0%} of which were cut off at their length limit"
    return (
        f"warning: no answer was found in any of the {len(texts)} responses of {where}{cut}: each is worth 0, whatever "
        f'it says. One of them: "{shortened(texts[0])}"'
    )


def judged(judge: Judge, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """One reward for each (prompt, text) pair. Raises RunFailed where the judge returns anything else."""
    rewards = judge(prompts, texts)
    if len(rewards) != len(texts):
        raise RunFailed(f"the judge must return one reward a response: got {len(rewards)} for {len(texts)}")
    bad = (~torch.tensor(rewards, dtype=torch.float32).isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise RunFailed(f"rewards must be finite in float32: the judge gave {rewards[first]} for {texts[first]!r}")
    return rewards
