"""Who does each part of a run, and whether it was asked to stop."""

from collections.abc import Callable
from dataclasses import dataclass

from isomorph.engine.config import RunConfig
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.rescue import StopRequested
from isomorph.engine.types import (
    Judge,
    PromptSource,
    Sampler,
)
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.score import (
    FindsAnswer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Who does what."""

    policy: Policy
    sampler: Sampler
    demonstrations: Sampler  # of supervised stages
    source: PromptSource
    judge: Judge
    learner: Learner
    log: RunLog
    config: RunConfig
    stop_requested: Callable[[], bool]  # asked every few tokens, between micro-batches and wherever else it may end
    ranks: Ranks = ALONE
    finds_answer: FindsAnswer | None = None  # None: judge/no_answer is not measured


def stop_if_requested(crew: Crew) -> None:
    """Raises StopRequested on every rank where any was asked to stop: all must ask."""
    if crew.ranks.any(crew.stop_requested()):
        raise StopRequested
