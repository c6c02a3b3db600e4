"""One step off: the rollouts of step k + 1 are drawn in a thread while step k is learned.

They are drawn from a copy of the weights with which step k begins (``engine.rollout.apart``), so that they are one
policy version old when they are learned from. Their log-probabilities are kept from the sampler, and
objective.old_logprob = "sampler" makes the ratio in the loss the probability under the present weights over that under
the weights that drew them. The thread calls no collective; between two steps none runs.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from isomorph.engine.collect import draw_own, training_sampling
from isomorph.engine.components import Components, RunProgress, StopRequested
from isomorph.engine.config import Stage
from isomorph.engine.drift import DriftSums, step_drift
from isomorph.engine.rollout.apart import SamplerApart
from isomorph.engine.types import Group, Prompt, Rollout, RunFailed, ScoredRollouts, Scores
from isomorph.kernels import backend

MOST_STALE = 1  # policy versions between drawing and learning

Drawn = tuple[list[Rollout], list[str], Scores, DriftSums]


class Ahead:
    """Prompts of the next step whose responses are being drawn and rewarded, this rank's share of them in a thread."""

    def __init__(self, components: Components, sampler: SamplerApart, stage: Stage, prompts: Sequence[Prompt]) -> None:
        self.components, self.sampler, self.stage, self.prompts = components, sampler, stage, prompts
        self.failure: BaseException | None = None  # of this rank's thread
        self._is_abandoned = threading.Event()
        self._num_threads = torch.get_num_threads()  # of this thread; OpenMP has a number for each
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._future: Future[Drawn] = pool.submit(backend.bound(self._draw))
        pool.shutdown(wait=False)

    def _draw(self) -> Drawn:
        torch.set_num_threads(self._num_threads)
        components, own = self.components, self.components.ranks.share(self.prompts)
        sampling = training_sampling(components, self.stage)
        rollouts, texts, scores = draw_own(
            components, self.sampler, own, sampling, lambda phase: contextlib.nullcontext(), self._stop_if_abandoned
        )
        batch_tok = self.stage.batch.micro_batch_tok
        sums = self.sampler.drift(own, rollouts, temperature=sampling.temperature, batch_tok=batch_tok)
        return rollouts, texts, scores, sums

    def _stop_if_abandoned(self) -> None:
        if self._is_abandoned.is_set():
            raise StopRequested

    def abandon(self) -> None:
        """Ends the thread within a few tokens; what it has drawn is dropped."""
        self._is_abandoned.set()
        self._future.exception()

    def finish(self) -> ScoredRollouts | None:
        """Waits; the rollouts of all ranks, or None where a rank's drawing has failed. A collective."""
        self.failure, ranks = self._future.exception(), self.components.ranks
        if ranks.any(self.failure is not None):
            return None
        rollouts, texts, scores, sums = self._future.result()
        drift = step_drift(ranks.gather(sums.tensors()), 0, 0)
        size = self.stage.sampling.samples_per_prompt
        rollouts, texts, scores = ranks.exchange(rollouts, texts, scores, size)
        return ScoredRollouts(rollouts=tuple(rollouts), texts=tuple(texts), scores=scores, drift=drift)

    def raise_failure(self) -> None:
        """Raises what the drawing has raised on this rank."""
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def drawing_ahead(components: Components, progress: RunProgress, stage: Stage) -> Iterator[Ahead | None]:
    """Context of a step's learning, entered when the source has observed the step: the next one is drawn meanwhile.

    On leaving, ``progress.state`` holds what was drawn. Where learning is interrupted between two optimizer steps, the
    weights that draw are gone for a resumed run, so that drawing is awaited and kept; otherwise it is abandoned.
    None: the sampler has no weights of its own, the stage is supervised or over, or the rollouts are there already.
    """
    ahead = _begun(components, progress, stage)
    try:
        yield ahead
    except BaseException as error:
        # after another error than a stop the ranks do not meet any more
        meet = isinstance(error, StopRequested) or (isinstance(error, Exception) and components.ranks.size == 1)
        if ahead is not None and meet and components.learner.is_within_round:
            _keep(progress, ahead)
        elif ahead is not None:
            ahead.abandon()
        raise
    if ahead is not None:
        with components.log.time("generate"):
            _keep(progress, ahead)


def _begun(components: Components, progress: RunProgress, stage: Stage) -> Ahead | None:
    source, sampler = components.source, components.sampler
    following = source.stage()
    is_over = following is None or following.name != stage.name
    if not isinstance(sampler, SamplerApart) or stage.objective.is_supervised or is_over:
        return None
    if progress.state.num_ahead or components.learner.is_within_round:  # resumed; weights are not a version's any more
        return None
    with components.log.time("ask"):
        before = source.state_dict()
        progress.ahead = source.take(stage.batch.prompts)
        source.load_state_dict(before)  # evaluations and checkpoints come first
    return Ahead(components, sampler, stage, progress.ahead)


def _keep(progress: RunProgress, ahead: Ahead) -> None:
    drawn = ahead.finish()
    if drawn is not None:
        progress.state = dataclasses.replace(progress.state, draws=(*progress.state.draws, drawn), num_ahead=1)
    else:
        progress.ahead = ()


def staleness_of(groups: Sequence[Group], version: int) -> int:
    """Policy versions between drawing and learning, the most of any rollout. Raises RunFailed beyond MOST_STALE."""
    versions = [rollout.policy_version for group in groups for rollout in group.rollouts]
    found = [version - min(versions), version - max(versions)]
    if not all(0 <= stale <= MOST_STALE for stale in found):
        raise RunFailed(
            f"rollouts of policy versions {min(versions)} to {max(versions)} would be learned from at version "
            f"{version}, at most {MOST_STALE} may lie between: the sampler does not say which weights it has"
        )
    return found[0]
