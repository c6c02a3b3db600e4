"""Rollouts of a step and their rewards: sampled on each rank, exchanged between ranks, refilled (dynamic sampling)."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from isomorph.engine.components import Components, RunProgress, StopRequested
from isomorph.engine.config import Stage
from isomorph.engine.drift import check_ends, check_kept
from isomorph.engine.types import (
    EvaluationRequest,
    Group,
    Prompt,
    Rollout,
    Sampler,
    SampleRequest,
    Sampling,
    ScoredRollouts,
    Scores,
    StepDrift,
)
from isomorph.engine.update.score import RewardThread, score


def sample_and_reward(
    components: Components,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    time: Callable[[str], contextlib.AbstractContextManager[None]],
) -> tuple[list[Rollout], list[str], Scores]:
    """Returns rollouts, decoded texts and scores of all ranks, in the order of ``prompts``, samples ascending.

    Each rank samples and rewards its share of the prompts; a group's rewards are computed while others are sampled.
    A rank on which a stop is requested drops its rollouts within a few tokens; the others finish theirs first. Then
    all ranks raise StopRequested.
    """

    def stop_here() -> None:
        if components.stop_requested():
            raise StopRequested

    is_stopped = False
    try:
        rollouts, texts, scores = draw_own(
            components, sampler, components.ranks.share(prompts), sampling, time, stop_here
        )
    except StopRequested:
        is_stopped = True
    with time("exchange"):
        if components.ranks.any(is_stopped):
            raise StopRequested
        return components.ranks.exchange(rollouts, texts, scores, sampling.samples_per_prompt)


def draw_own(
    components: Components,
    sampler: Sampler,
    own: Sequence[Prompt],
    sampling: Sampling,
    time: Callable[[str], contextlib.AbstractContextManager[None]],
    stop_here: Callable[[], None],
) -> tuple[list[Rollout], list[str], Scores]:
    """The same on this rank, for its share of the prompts; it waits for no other rank.

    ``stop_here`` is called every few tokens and while rewards are waited for; what it raises ends the call.
    """
    # phase "judge": the part of the reward computation that does not overlap with sampling
    with time("judge"), RewardThread(components.judge, components.policy.text.decode, own, stop_here) as rewarding:
        with time("generate"), components.policy.unsharded():
            dialogue = components.dialogue if sampler is components.sampler else None
            rollouts = sampler.generate(own, sampling, rewarding.add, stop_here, dialogue)
        return rollouts, *rewarding.results()


class Collector:
    """Collects the groups of one step; rollouts that ``progress.state`` holds, of an interrupted step or drawn while
    the step before was learned, come first.
    """

    def __init__(self, components: Components, sampler: Sampler, stage: Stage, progress: RunProgress) -> None:
        self.components, self.sampler, self.stage, self.progress = components, sampler, stage, progress
        self._left = deque(progress.state.draws)
        self._taken: list[ScoredRollouts] = []

    def collect(self, prompts: Sequence[Prompt]) -> tuple[list[Group], list[str]]:
        """Returns a group for each prompt, and the decoded text of every response, in the same order."""
        log = self.components.log
        with log.time("generate"):
            scored = self._left.popleft() if self._left else self._sample(prompts)
        if self.sampler is self.components.sampler:
            sampling = training_sampling(self.components, self.stage)
            check_ends(scored.rollouts, sampling)
            check_kept(scored.rollouts, sampling)
        self._taken.append(scored)
        self.progress.state = dataclasses.replace(
            self.progress.state,
            draws=(*self._taken, *self._left),
            num_ahead=min(self.progress.state.num_ahead, len(self._left)),
        )
        with log.time("judge"):
            return score(prompts, scored.rollouts, scored.scores, self.stage.objective), list(scored.texts)

    @property
    def drift(self) -> StepDrift | None:
        """The mismatch of the step's rollouts that was measured when they were drawn ahead; None: they were not."""
        return self._taken[0].drift

    def _sample(self, prompts: Sequence[Prompt]) -> ScoredRollouts:
        components, sampling = self.components, training_sampling(self.components, self.stage)
        rollouts, texts, scores = sample_and_reward(components, self.sampler, prompts, sampling, components.log.time)
        return ScoredRollouts(rollouts=tuple(rollouts), texts=tuple(texts), scores=scores)


def refill(collector: Collector, groups: list[Group], texts: list[str]) -> tuple[list[Group], list[Group], list[str]]:
    """Dynamic sampling: replaces zero-variance groups by groups of further prompts, in ``batch.refills`` rounds.

    Returns the groups to train on, as many as ``groups``; all groups that were sampled; and the texts of the latter.
    """
    trained, stage = list(groups), collector.stage
    for _ in range(stage.batch.refills):
        flat = [i for i, group in enumerate(trained) if group.has_zero_variance]
        if not flat:
            break
        more, more_texts = collector.collect(collector.components.source.take(len(flat)))
        for i, group in zip(flat, more, strict=True):
            trained[i] = group
        groups, texts = [*groups, *more], [*texts, *more_texts]
    scores = Scores.joined([group.scores or Scores(rewards=group.rewards) for group in trained])
    is_over_step = stage.objective.scale == "batch" or scores.relative is not None
    if is_over_step and len(groups) > len(trained):  # statistics are over the groups trained on
        rollouts = [r for g in trained for r in g.rollouts]
        trained = score([g.prompt for g in trained], rollouts, scores, stage.objective)
    return trained, groups, texts


def training_sampling(components: Components, stage: Stage) -> Sampling:
    """How the responses of a step of ``stage`` are sampled."""
    return Sampling(
        temperature=stage.sampling.temperature,
        max_new_tok=stage.sampling.max_new_tok,
        samples_per_prompt=stage.sampling.samples_per_prompt,
        stop_ids=components.policy.text.stop_ids,
        stop=stage.sampling.stop,
        seed=components.config.seed,
        truncation=stage.sampling.truncation,
    )


def sample_for_source(components: Components, request: SampleRequest, stage: Stage) -> tuple[list[Group], list[str]]:
    """Responses to a source's request, of all ranks: a group for each prompt, and the texts of all responses."""
    sampling = Sampling(
        temperature=request.temperature,
        max_new_tok=request.max_new_tok,
        samples_per_prompt=request.samples,
        stop_ids=components.policy.text.stop_ids,
        stop=request.stop,
        seed=request.seed,
    )
    rollouts, texts, scores = sample_and_reward(
        components, components.sampler, request.prompts, sampling, lambda phase: contextlib.nullcontext()
    )
    return score(request.prompts, rollouts, scores, stage.objective), texts


def evaluation_sampling(components: Components, request: EvaluationRequest, *, is_greedy: bool) -> Sampling:
    """One greedy response a prompt, or the samples that ``request`` asks for."""
    return Sampling(
        temperature=0.0 if is_greedy else request.temperature,
        max_new_tok=request.max_new_tok,
        samples_per_prompt=1 if is_greedy else request.samples,
        stop_ids=components.policy.text.stop_ids,
        stop=request.stop,
        seed=request.seed,
    )
