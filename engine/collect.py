"""The responses of a step: drawn, judged, exchanged between ranks, and refilled."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from isomorph.engine.components import Crew
from isomorph.engine.config import Stage
from isomorph.engine.drift import check_ends
from isomorph.engine.rescue import Here, StopRequested
from isomorph.engine.types import (
    Draw,
    Group,
    Prompt,
    Rollout,
    Sampler,
    Sampling,
)
from isomorph.engine.update.score import (
    Judging,
    score,
)


def answered(
    crew: Crew,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    time: Callable[[str], contextlib.AbstractContextManager[None]],
) -> tuple[list[Rollout], list[str], list[float]]:
    """Each rank draws and judges its share; a group is judged while others are drawn.

    A rank that is asked to stop does so within a few tokens, and drops what it has; the others finish theirs before
    they hear of it. Then all raise StopRequested.
    """

    def look() -> None:
        if crew.stop_requested():
            raise StopRequested

    own, is_stopped = crew.ranks.share(prompts), False
    try:
        # judging, as far as it does not run beside drawing
        with time("judge"), Judging(crew.judge, crew.policy.text.decode, own, look) as judging:
            with time("generate"), crew.policy.unsharded():
                rollouts = sampler.generate(own, sampling, judging.add, look)
            texts, rewards = judging.results()
    except StopRequested:
        is_stopped = True
    with time("exchange"):
        if crew.ranks.any(is_stopped):
            raise StopRequested
        return crew.ranks.exchange(rollouts, texts, rewards, sampling.samples_per_prompt)


class Draws:
    """The responses of a step, drawn and judged; first those that it had when it was interrupted."""

    def __init__(self, crew: Crew, sampler: Sampler, stage: Stage, here: Here) -> None:
        self.crew, self.sampler, self.stage, self.here = crew, sampler, stage, here
        self.known = deque(here.state.draws)
        self.taken: list[Draw] = []

    def take(self, prompts: Sequence[Prompt]) -> tuple[list[Group], list[str]]:
        """A judged group for each prompt, and the texts that were judged."""
        with self.crew.log.time("generate"):
            draw = self.known.popleft() if self.known else self._ask(prompts)
        self.taken.append(draw)
        self.here.state = dataclasses.replace(self.here.state, draws=(*self.taken, *self.known))
        with self.crew.log.time("judge"):
            return score(prompts, draw.rollouts, draw.rewards, self.stage.objective), list(draw.texts)

    def _ask(self, prompts: Sequence[Prompt]) -> Draw:
        sampling = _sampling(self.crew, self.stage)
        rollouts, texts, rewards = answered(self.crew, self.sampler, prompts, sampling, self.crew.log.time)
        if self.sampler is self.crew.sampler:
            check_ends(rollouts, sampling)
        return Draw(rollouts=tuple(rollouts), texts=tuple(texts), rewards=tuple(rewards))


def refill(draws: Draws, groups: list[Group], texts: list[str]) -> tuple[list[Group], list[Group], list[str]]:
    """Dynamic sampling: groups without variance give way to further prompts' groups, in ``batch.refills`` rounds.

    Returns the groups to learn from, as many as before; and all that were drawn, with their texts.
    """
    learned, stage = list(groups), draws.stage
    for _ in range(stage.batch.refills):
        flat = [i for i, group in enumerate(learned) if group.is_flat]
        if not flat:
            break
        more, more_texts = draws.take(draws.crew.source.take(len(flat)))
        for i, group in zip(flat, more, strict=True):
            learned[i] = group
        groups, texts = [*groups, *more], [*texts, *more_texts]
    if stage.objective.scale == "batch" and len(groups) > len(learned):  # over the groups that are learned from
        rollouts, rewards = [r for g in learned for r in g.rollouts], [r for g in learned for r in g.rewards]
        learned = score([g.prompt for g in learned], rollouts, rewards, stage.objective)
    return learned, groups, texts


def _sampling(crew: Crew, stage: Stage) -> Sampling:
    return Sampling(
        temperature=stage.sampling.temperature,
        max_new_tok=stage.sampling.max_new_tok,
        samples_per_prompt=stage.sampling.samples_per_prompt,
        stop_ids=crew.policy.text.stop_ids,
        seed=crew.config.seed,
    )


def greedy(crew: Crew, max_new_tok: int) -> Sampling:
    return Sampling(
        temperature=0.0,
        max_new_tok=max_new_tok,
        samples_per_prompt=1,
        stop_ids=crew.policy.text.stop_ids,
        seed=crew.config.seed,
    )
