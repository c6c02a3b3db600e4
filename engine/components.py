"""The parts of a run, assembled outside and handed to ``engine.loop.train``."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isomorph.engine.config import RunConfig
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.drift import Surprise
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.record.saver import Saver
from isomorph.engine.types import Dialogue, Group, Judge, Prompt, PromptSource, RunState, Sampler, StepStats
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.score import FindsAnswer
from isomorph.engine.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Everything that ``train`` and ``step`` use: model, sampler, prompts, reward function, learner, log, ranks."""

    policy: Policy
    sampler: Sampler
    demonstrations: Sampler  # takes the sampler's place in supervised stages
    source: PromptSource
    judge: Judge
    learner: Learner
    log: RunLog
    config: RunConfig
    stop_requested: Callable[[], bool]  # polled every few decoded tokens, before each micro-batch, and between phases
    ranks: Ranks = ALONE
    finds_answer: FindsAnswer | None = None  # None: judge/no_answer is not measured
    dialogue: Dialogue | None = None  # None: every rollout has one turn
    watch: Watch = field(default_factory=Watch)
    saver: Saver = field(default_factory=Saver)


class StopRequested(Exception):
    """A stop was requested on this rank or on another one."""


def stop_if_requested(components: Components) -> None:
    """Raises StopRequested on every rank if a stop was requested on any. A collective: all ranks must call it."""
    if components.ranks.any(components.stop_requested()):
        raise StopRequested


@dataclass(slots=True)
class RunProgress:
    """The state that a checkpoint written at this moment would hold."""

    state: RunState
    ahead: Sequence[Prompt] = ()  # prompts of the step after, where ``state`` holds rollouts of them
    matches_weights: bool = True  # False: ``state`` is from before a step, the weights are from after it

    def advance(self, source: dict[str, Any], groups: Sequence[Group], stats: StepStats, wall_s: float) -> None:
        """The step has ended. ``source``: the source's state after ``observe``; ``groups``: all that were sampled."""
        before = self.state
        added = {
            "prompt_tok": sum(len(g.prompt.token_ids) for g in groups),
            "response_tok": sum(r.num_model_tok for g in groups for r in g.rollouts),
            "forward_tok": stats.num_forward_tok,
        }
        self.state = dataclasses.replace(
            before,
            step=before.step + 1,
            num_updates=before.num_updates + stats.num_updates,
            policy_version=before.policy_version + (stats.num_updates > 0),
            source=source,
            draws=before.draws[len(before.draws) - before.num_ahead :],
            totals={
                **Surprise.of(before.totals).plus(stats.drift).totals(),
                **{key: before.totals.get(key, 0) + value for key, value in added.items()},
                "wall_s": wall_s,
            },
        )
        self.matches_weights = True
