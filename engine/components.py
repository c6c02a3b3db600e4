"""The parts of a run, assembled outside and handed to ``engine.loop.train``."""

from collections.abc import Callable
from dataclasses import dataclass, field

from isomorph.engine.config import RunConfig
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.record.saver import Saver
from isomorph.engine.types import Dialogue, Judge, PromptSource, RunState, Sampler
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
    matches_weights: bool = True  # False: ``state`` is from before a step, the weights are from after it
