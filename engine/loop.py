"""The story: ask, answer, judge, learn, publish; again.

Who does each part is decided outside and handed in as a ``Crew``. Nothing here knows a model, a task or a sampler.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial

from isomorph.engine.collect import Draws, answered, greedy, refill
from isomorph.engine.components import Crew, stop_if_requested
from isomorph.engine.config import Stage
from isomorph.engine.drift import Surprise, check_step
from isomorph.engine.record.checkpoint import save_checkpoint
from isomorph.engine.record.profile import profiled
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.record.step_record import answers, completions, step_line, step_row
from isomorph.engine.rescue import Here, StopRequested, rescue
from isomorph.engine.rollout.tripwire import check_publication
from isomorph.engine.types import (
    Exam,
    Group,
    Prompt,
    PromptSource,
    Publication,
    RunState,
    Sampler,
    StepDrift,
    StepStats,
)
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import (
    answers_found,
    warning_of_no_answer,
)


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
        row = step_row(state, stage, stage_step, groups, len(groups) - len(learned), found, stats, publication)
    num_correct = sum(source.is_correct(group.prompt, reward) for group in groups for reward in group.rewards)
    row |= log.end_step(num_tok=stats.num_loss_tok, num_correct=num_correct, gather=crew.ranks.gather)
    with log.time("record"):
        log.write_step(row, step_line(row))
        if stage_step == 0:
            where = f"step {state.step}, the first of stage {stage.name}"
            _warn(log, warning_of_no_answer(where, found, texts, 1 - row["response/stopped"]))
        if state.step % crew.config.completions_every == 0:
            log.write_completions(f"step-{state.step:08d}", completions(crew, groups, texts, found))


def _check_drift(crew: Crew, state: RunState, found: StepDrift) -> None:
    check_step(found, crew.policy.dtype, crew.policy.config.num_hidden_layers, crew.config.max_mean_drift)
    Surprise.of(state.totals).plus(found).check()


def _warn(log: RunLog, warning: str) -> None:
    if warning:
        log.say(warning)


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
    sampling = greedy(crew, exam.max_new_tok)
    _, texts, rewards = answered(crew, crew.sampler, exam.prompts, sampling, lambda phase: contextlib.nullcontext())
    found = answers_found(crew.finds_answer, exam.prompts, texts)
    crew.log.say(crew.source.grade(exam, rewards, found))
    _warn(crew.log, warning_of_no_answer(f"the exam after {exam.label}", found, texts, None))
    crew.log.write_completions(f"exam-{exam.label}", answers(crew, exam, texts, rewards, found))


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
