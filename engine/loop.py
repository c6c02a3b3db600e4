"""The story: ask, answer, judge, learn, publish; again.

Who does each part is decided outside and handed in as a ``Crew``. Nothing here knows a model, a task or a sampler.
"""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from isomorph.engine.config import RunConfig, Stage
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.drift import Surprise, check_ends, check_step
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.checkpoint import save_checkpoint
from isomorph.engine.record.profile import profiled
from isomorph.engine.record.runlog import Row, RunLog
from isomorph.engine.rescue import Here, StopRequested, rescue
from isomorph.engine.rollout.tripwire import check_publication
from isomorph.engine.types import (
    Draw,
    Exam,
    Group,
    Judge,
    Prompt,
    PromptSource,
    Publication,
    Rollout,
    RunState,
    Sampler,
    Sampling,
    StepDrift,
    StepStats,
)
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import (
    FindsAnswer,
    Judging,
    answers_found,
    score,
    share_without_answer,
    warning_of_no_answer,
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


def train(crew: Crew, state: RunState) -> RunState:
    """From ``state`` to the end of the last stage.

    Raises KeyboardInterrupt after a requested stop: then a checkpoint has been written. What ends the run otherwise
    (RunFailed where it is the run's, its machine's or its disk's fault) leaves a checkpoint, too, where the weights
    allow it: ``engine.rescue``.
    """
    here = Here(state)
    crew.learner.on_batch = partial(stop_if_requested, crew)
    try:
        return _all_stages(crew, here)
    except StopRequested:
        with crew.log.time("checkpoint"):
            save(crew, here.state)
        raise KeyboardInterrupt from None
    except Exception as error:
        told = rescue(crew, here, error, save)
        if told is error:
            raise
        raise told from error
    finally:
        crew.learner.on_batch = lambda: None


def _all_stages(crew: Crew, here: Here) -> RunState:
    log = crew.log
    here.state = dataclasses.replace(here.state, source=crew.source.state_dict())
    stop_if_requested(crew)
    with log.time("publish"):
        publish(crew, crew.sampler, here.state.policy_version, _any_prompt(crew))
    while True:
        stop_if_requested(crew)
        with log.time("exam"):
            if exam := crew.source.exam():
                sit(crew, here.state, exam)
                here.state = dataclasses.replace(here.state, source=crew.source.state_dict())
                stop_if_requested(crew)
        stage = crew.source.stage()
        if stage is None:
            save(crew, here.state)
            return here.state
        if stage.name != here.state.stage:
            with log.time("enter"):
                crew.learner.enter(stage)
            here.state = dataclasses.replace(here.state, stage=stage.name)
        with profiled(log.folder, here.state.step + 1, crew.config.profile if crew.ranks.is_first else None):
            step(crew, here, stage)
        stop_if_requested(crew)
        if here.state.step % crew.config.checkpoint_every == 0:
            with log.time("checkpoint"):
                save(crew, here.state)


def step(crew: Crew, here: Here, stage: Stage) -> None:
    """One round of rollouts and every update on it; of an interrupted one, what is left of it.

    ``here.state`` holds at every moment what a checkpoint would need to go on from it, the source's state as it was
    when the step began: it asks the same once more.
    """
    log, source = crew.log, crew.source
    stage_step = source.stage_step()
    sampler = crew.demonstrations if stage.objective.is_supervised else crew.sampler
    draws = Draws(crew, sampler, stage, here)
    log.begin_step()
    with log.time("ask"):
        prompts = source.take(stage.batch.prompts)
    with log.time("publish"):
        publication = bring_up_to_date(crew, sampler, here.state.policy_version)
    groups, texts = draws.take(prompts)
    learned, groups, texts = refill(draws, groups, texts)
    stop_if_requested(crew)
    with log.time("pack"):
        updates = pack(
            learned,
            micro_batch_tok=stage.batch.micro_batch_tok,
            prompts_per_update=stage.batch.prompts_per_update,
            objective=stage.objective,
            device=crew.policy.device,
            ranks=crew.ranks,
        )
    # in a supervised stage, too: an exam may have left the sampler awake
    with log.time("handover"), crew.sampler.asleep(), log.time("update"):
        check, num_replaced = partial(_check_drift, crew, here.state), len(groups) - len(learned)
        work = crew.learner.begin(updates, stage, stage_step, check, num_replaced)
        while not work.is_done:
            crew.learner.advance(work)
            if not work.is_done:
                stop_if_requested(crew)
        here.is_whole = False  # the weights are those after the step already
        stats = crew.learner.stats(work)
    with log.time("record"):
        source.observe(groups)
        here.state = state = _advanced(here.state, source, groups, stats, log.wall_s())
        here.is_whole = True
        found = answers_found(crew.finds_answer, [group.prompt for group in groups], texts)
        row = _row(state, stage, stage_step, groups, len(groups) - len(learned), found, stats, publication)
    num_correct = sum(source.is_correct(group.prompt, reward) for group in groups for reward in group.rewards)
    row |= log.end_step(num_tok=stats.num_loss_tok, num_correct=num_correct, gather=crew.ranks.gather)
    with log.time("record"):
        log.write_step(row, _line(row))
        if stage_step == 0:
            where = f"step {state.step}, the first of stage {stage.name}"
            _warn(log, warning_of_no_answer(where, found, texts, 1 - row["response/stopped"]))
        if state.step % crew.config.completions_every == 0:
            log.write_completions(f"step-{state.step:08d}", _completions(crew, groups, texts, found))


def _check_drift(crew: Crew, state: RunState, found: StepDrift) -> None:
    check_step(found, crew.policy.dtype, crew.policy.config.num_hidden_layers, crew.config.max_mean_drift)
    Surprise.of(state.totals).plus(found).check()


def _surprise(run: Surprise) -> Row:
    return {"surprise/z": run.z, "surprise/limit": run.limit, "surprise/needs_tok": run.tokens_needed()}


def _warn(log: RunLog, warning: str) -> None:
    if warning:
        log.say(warning)


def stop_if_requested(crew: Crew) -> None:
    """Raises StopRequested on every rank where any was asked to stop: all must ask."""
    if crew.ranks.any(crew.stop_requested()):
        raise StopRequested


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


def bring_up_to_date(crew: Crew, sampler: Sampler, version: int, probe: Prompt | None = None) -> Publication | None:
    """Publishes where the sampler is behind; None where it is not."""
    return None if sampler.policy_version == version else publish(crew, sampler, version, probe)


def publish(crew: Crew, sampler: Sampler, version: int, probe: Prompt | None) -> Publication:
    """Brings the sampler to the policy's present weights, and proves that it is there.

    Without a ``probe`` the last proof is left to the learner: it compares every token that a step learns from with what
    the sampler said of it, and refuses before its first update.
    """
    with crew.policy.unsharded():
        publication = sampler.publish(version)
        if sampler is crew.sampler:
            publication = check_publication(crew.policy, sampler, publication, probe, crew.config.max_mean_drift)
    return publication


def sit(crew: Crew, state: RunState, exam: Exam) -> None:
    """Greedy answers to the exam's questions, judged and taken down."""
    bring_up_to_date(crew, crew.sampler, state.policy_version, exam.prompts[0])
    sampling = _greedy(crew, exam.max_new_tok)
    _, texts, rewards = answered(crew, crew.sampler, exam.prompts, sampling, lambda phase: contextlib.nullcontext())
    found = answers_found(crew.finds_answer, exam.prompts, texts)
    crew.log.say(crew.source.grade(exam, rewards, found))
    _warn(crew.log, warning_of_no_answer(f"the exam after {exam.label}", found, texts, None))
    crew.log.write_completions(f"exam-{exam.label}", _answers(crew, exam, texts, rewards, found))


def save(crew: Crew, state: RunState, keep: int | None = None) -> None:
    """A checkpoint of everything, written by the first rank; before the first stage there is nothing but weights.

    ``keep``: how many stay, this one included; None: as the run is configured.
    """
    totals = {**state.totals, "wall_s": crew.log.wall_s()}
    state = dataclasses.replace(state, num_ranks=crew.ranks.size, totals=totals)
    tensors = crew.learner.state_tensors() if state.stage else {}
    with crew.policy.unsharded():
        if crew.ranks.is_first:
            root = crew.log.folder / "checkpoints"
            weights = {name: p.detach() for name, p in crew.policy.named_parameters().items()}
            save_checkpoint(root, state, weights, tensors, keep=keep or crew.config.keep_checkpoints)
    crew.ranks.wait()  # whoever goes on may count on it


def _any_prompt(crew: Crew) -> Prompt:
    """For the first probe, when nobody has asked anything yet."""
    token_ids = crew.policy.text.encode_prompt("First things first.")
    return Prompt(prompt_id=0, token_ids=token_ids, task="probe", representation="probe", payload=None)


def _sampling(crew: Crew, stage: Stage) -> Sampling:
    return Sampling(
        temperature=stage.sampling.temperature,
        max_new_tok=stage.sampling.max_new_tok,
        samples_per_prompt=stage.sampling.samples_per_prompt,
        stop_ids=crew.policy.text.stop_ids,
        seed=crew.config.seed,
    )


def _greedy(crew: Crew, max_new_tok: int) -> Sampling:
    return Sampling(
        temperature=0.0,
        max_new_tok=max_new_tok,
        samples_per_prompt=1,
        stop_ids=crew.policy.text.stop_ids,
        seed=crew.config.seed,
    )


def _advanced(
    state: RunState,
    source: PromptSource,
    groups: Sequence[Group],
    stats: StepStats,
    wall_s: float,
) -> RunState:
    added = {
        "prompt_tok": sum(len(g.prompt.token_ids) for g in groups),
        "response_tok": sum(len(r.token_ids) for g in groups for r in g.rollouts),
        "forward_tok": stats.num_forward_tok,
    }
    return dataclasses.replace(
        state,
        step=state.step + 1,
        num_updates=state.num_updates + stats.num_updates,
        policy_version=state.policy_version + (stats.num_updates > 0),
        source=source.state_dict(),
        draws=(),
        totals={
            **Surprise.of(state.totals).plus(stats.drift).totals(),
            **{key: state.totals.get(key, 0) + value for key, value in added.items()},
            "wall_s": wall_s,
        },
    )


def _row(
    state: RunState,
    stage: Stage,
    stage_step: int,
    groups: Sequence[Group],
    num_refilled: int,
    found: Sequence[bool] | None,
    stats: StepStats,
    publication: Publication | None,
) -> Row:
    """One line of steps.jsonl, but for what ``RunLog.end_step`` adds."""
    rewards = [r for g in groups for r in g.rewards]
    by_representation: dict[str, list[float]] = {}
    for group in groups:
        by_representation.setdefault(group.prompt.representation, []).extend(group.rewards)
    response_tok = [len(r.token_ids) for g in groups for r in g.rollouts]
    return {
        "step": state.step,
        "stage": stage.name,
        "stage_step": stage_step + 1,
        "policy_version": state.policy_version,
        "reward/mean": sum(rewards) / len(rewards),
        **{f"reward/{name}": sum(values) / len(values) for name, values in by_representation.items()},
        "judge/no_answer": share_without_answer(found),
        "groups/flat": sum(g.is_flat for g in groups),
        "groups/all": len(groups),
        "groups/refilled": num_refilled,
        "response/tok_mean": sum(response_tok) / len(response_tok),
        "response/stopped": sum(r.finish == "stop" for g in groups for r in g.rollouts) / len(response_tok),
        "tok/prompt": sum(len(g.prompt.token_ids) for g in groups),
        "tok/response": sum(response_tok),
        "tok/trunk": stats.num_forward_tok,
        "tok/loss": stats.num_loss_tok,
        "tok/dropped": stats.num_dropped_tok,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.lr,
        "clip_frac": stats.clip_frac,
        "entropy": stats.entropy,
        "kl": stats.kl,
        "drift/mean": stats.drift.mean,
        "drift/p999": stats.drift.p999,
        "drift/max": stats.drift.largest,
        "drift/mass": stats.drift.mass,
        "drift/slope": stats.drift.slope,
        **_surprise(Surprise.of(state.totals)),
        "updates": stats.num_updates,
        "publish/bytes": publication.num_bytes if publication else None,
        "publish/move_s": publication.move_s if publication else None,
        "publish/fingerprint_s": publication.fingerprint_s if publication else None,
        "publish/probe_s": publication.probe_s if publication else None,
        "wall_s": state.totals["wall_s"],
    }


def _line(row: Row) -> str:
    parts = [
        f"step {row['step']:4d} {row['stage']:<10}",
        f"reward {row['reward/mean']:.3f}",
        f"no answer {row['judge/no_answer']:.0%}" if row["judge/no_answer"] > 0 else "",
        f"flat {row['groups/flat']}/{row['groups/all']}",
        "no update" if row["updates"] == 0 else f"entropy {row['entropy']:.3f}  grad {row['grad_norm']:.2f}",
        "" if math.isnan(row["drift/mean"]) else f"drift {row['drift/mean']:.0e}  clip {row['clip_frac']:.1%}",
        f"{row['tok/response'] / row['time/step_s']:.0f} tok/s",
        *(f"{phase} {row[f'time/{phase}_s']:.2f}s" for phase in ("publish", "generate", "update")),
    ]
    return "  ".join(part for part in parts if part)


def _completions(crew: Crew, groups: Sequence[Group], texts: Sequence[str], found: Sequence[bool] | None) -> list[Row]:
    rows: list[Row] = []
    known: Sequence[bool | None] = found or [None] * len(texts)
    for group in groups:
        for rollout, reward, advantage in zip(group.rollouts, group.rewards, group.advantages, strict=True):
            drawn = {"sample": rollout.sample, "advantage": advantage, "finish": rollout.finish}
            answer = _judged(crew, group.prompt, texts[len(rows)], known[len(rows)], reward)
            rows.append({**_asked(crew, group.prompt), **drawn, **answer})
    return rows


def _answers(
    crew: Crew, exam: Exam, texts: Sequence[str], rewards: Sequence[float], found: Sequence[bool] | None
) -> list[Row]:
    known: Sequence[bool | None] = found or [None] * len(texts)
    return [
        {**_asked(crew, prompt), **_judged(crew, prompt, text, is_found, reward)}
        for prompt, text, is_found, reward in zip(exam.prompts, texts, known, rewards, strict=True)
    ]


def _judged(crew: Crew, prompt: Prompt, text: str, is_found: bool | None, reward: float) -> Row:
    return {"text": text, "answered": is_found, "reward": reward, "correct": crew.source.is_correct(prompt, reward)}


def _asked(crew: Crew, prompt: Prompt) -> Row:
    return {
        "prompt_id": prompt.prompt_id,
        "task": prompt.task,
        "representation": prompt.representation,
        "prompt": crew.policy.text.decode(prompt.token_ids),
    }
