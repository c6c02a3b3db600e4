"""The training loop: prompts, rollouts, rewards, optimizer steps, weight sync.

All parts are assembled outside and handed in as ``Components``. The calls of one step:

    source.take(P)                   -> list[Prompt]
    publish, if weights have changed -> Publication
    Collector.collect                -> list[Group] and texts: Sampler.generate, Judge, score
    source.observe                   the next step's prompts depend on it; with sampler.overlap they are drawn from here
    pack                             -> list[Update], one for each optimizer step
    Learner.begin, advance, stats    -> StepStats
    RunLog.write_step
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial

from isomorph.engine.ahead import drawing_ahead, staleness_of
from isomorph.engine.collect import Collector, evaluation_sampling, refill, sample_and_reward, sample_for_source
from isomorph.engine.components import Components, RunProgress, StopRequested, stop_if_requested
from isomorph.engine.config import Stage
from isomorph.engine.drift import Surprise, check_step
from isomorph.engine.record.best import BEST, is_better, write_best
from isomorph.engine.record.checkpoint import (
    checkpoint_path,
    discard,
    has_checkpoint,
    keep_copy,
    save_checkpoint,
)
from isomorph.engine.record.profile import profiled
from isomorph.engine.record.step_record import (
    StepResult,
    completion_rows,
    console_line,
    evaluation_rows,
    sample_rows,
    step_row,
)
from isomorph.engine.rescue import KEEP_ALL, rescue
from isomorph.engine.rollout.tripwire import check_publication
from isomorph.engine.rollout.turns import count_failures
from isomorph.engine.types import (
    Answers,
    EvaluationRecord,
    EvaluationRequest,
    Group,
    Prompt,
    Publication,
    RunState,
    Sampler,
    SampleRequest,
    StepDrift,
    StepStats,
)
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import answers_found, warning_of_no_answer
from isomorph.engine.validation import with_validation_loss


def train(components: Components, state: RunState) -> RunState:
    """Trains from ``state`` to the end of the last stage; returns the final state.

    Raises KeyboardInterrupt after a requested stop, when a checkpoint has been written. Any other error is passed on
    after ``engine.rescue`` has written a checkpoint, if the weights allow it; RunFailed if the training itself, the
    machine or the disk is the cause.
    """
    progress = RunProgress(state)
    components.learner.on_batch = partial(stop_if_requested, components)
    try:
        return _all_stages(components, progress)
    except StopRequested:
        with components.log.time("checkpoint"):
            save(components, progress.state)
        raise KeyboardInterrupt from None
    except Exception as error:
        raised = rescue(components, progress, error, save)
        if raised is error:
            raise
        raise raised from error
    finally:
        components.learner.on_batch = lambda: None
        components.saver.join()


def _all_stages(components: Components, progress: RunProgress) -> RunState:
    """The first weight sync; then evaluations, steps and checkpoints until the source has no further stage."""
    log, source = components.log, components.source
    progress.state = dataclasses.replace(progress.state, source=source.state_dict())
    stop_if_requested(components)
    with log.time("publish"):
        publish(components, components.sampler, progress.state.policy_version, _any_prompt(components))
    is_new = False  # whether the present state is of a step or an evaluation that no checkpoint holds
    while True:
        stop_if_requested(components)
        components.saver.settle(components.ranks)
        with log.time("exam"):
            if request := source.pending_evaluation():
                _evaluate(components, progress, request)
                is_new = True
                stop_if_requested(components)
        stage = source.stage()
        with log.time("checkpoint"):
            _save_where_due(components, progress.state, stage, is_new=is_new)
        is_new, progress.state = False, dataclasses.replace(progress.state, best=None)
        if stage is None:
            return progress.state
        if stage.name != progress.state.stage:
            with log.time("enter"):
                components.learner.enter(stage)
            progress.state = dataclasses.replace(progress.state, stage=stage.name)
        with log.time("sample"):
            if wanted := source.pending_samples():
                _begin_round(components, progress, wanted, stage)
                is_new = True
                continue
        profiled_steps = components.config.profile if components.ranks.is_first else None
        with profiled(log.folder, progress.state.step + 1, profiled_steps):
            step(components, progress, stage)
        is_new = True


def _begin_round(components: Components, progress: RunProgress, request: SampleRequest, stage: Stage) -> None:
    """Samples what the source wants, hands it over, and prepares the learner for training on it.

    Interrupted before its end it leaves ``progress.state`` as it was, so that a resumed run samples the same again.
    """
    source, state = components.source, progress.state
    publish_if_stale(components, components.sampler, state.policy_version)
    groups, texts = sample_for_source(components, request, stage)
    components.log.say(source.record_samples(groups, texts))
    progress.matches_weights = False
    components.learner.restart(stage, from_start=request.start_from == "start")
    rows = sample_rows(groups, texts, components.policy.text.decode, source.is_correct)
    components.log.write_completions(request.label, rows)
    added = {
        "prompt_tok": sum(len(group.prompt.token_ids) for group in groups),
        "response_tok": sum(rollout.num_model_tok for group in groups for rollout in group.rollouts),
    }
    progress.state = dataclasses.replace(
        state,
        source=source.state_dict(),
        policy_version=state.policy_version + (request.start_from == "start"),
        totals={**state.totals, **{key: state.totals.get(key, 0) + value for key, value in added.items()}},
    )
    progress.matches_weights = True


def step(components: Components, progress: RunProgress, stage: Stage) -> None:
    """Samples one set of rollouts and makes all optimizer steps on it.

    If ``progress.state.draws`` is set, the step was interrupted: those rollouts are reused and the remaining optimizer
    steps are made. Until the step ends, ``progress.state`` holds the source's state from before ``take``, so that a
    run resumed from it takes the same prompts again.
    """
    log, source = components.log, components.source
    stage_step = source.stage_step()
    sampler = components.demonstrations if stage.objective.is_supervised else components.sampler
    collector = Collector(components, sampler, stage, progress)
    log.begin_step()
    with log.time("ask"):
        prompts = source.take(stage.batch.prompts)
        prompts, progress.ahead = list(progress.ahead) or prompts, ()
    with log.time("publish"):
        publication = publish_if_stale(components, sampler, progress.state.policy_version)
    groups, texts = collector.collect(prompts)
    trained, groups, texts = refill(collector, groups, texts)
    stop_if_requested(components)
    num_replaced = len(groups) - len(trained)
    staleness = staleness_of(groups, progress.state.policy_version)
    with log.time("record"):
        told = source.step_values()
        source.observe(groups)
    with drawing_ahead(components, progress, stage) as ahead:
        sleep = contextlib.nullcontext() if ahead else components.sampler.asleep()
        stats = _update(components, progress, stage, stage_step, trained, num_replaced, collector.drift, sleep)
    with log.time("record"):
        progress.advance(source.state_dict(), groups, stats, log.wall_s())
        found = answers_found(components.finds_answer, [group.prompt for group in groups], texts)
    result = StepResult(
        stage=stage.name,
        stage_step=stage_step,
        groups=groups,
        texts=texts,
        found=found,
        is_supervised=stage.objective.is_supervised,
        told=told,
        num_replaced=num_replaced,
        stats=stats,
        publication=publication,
        staleness=staleness,
        has_environments=components.dialogue is not None,
    )
    _record(components, progress.state, result)
    if ahead is not None:
        ahead.raise_failure()


def _update(
    components: Components,
    progress: RunProgress,
    stage: Stage,
    stage_step: int,
    groups: Sequence[Group],
    num_replaced: int,
    drift: StepDrift | None,
    sleep: contextlib.AbstractContextManager[None],
) -> StepStats:
    """All optimizer steps on ``groups``, within ``sleep``.

    ``num_replaced``: groups that ``refill`` replaced by some of them. ``drift``: their mismatch, where it was measured
    when they were drawn.
    """
    log, learner = components.log, components.learner
    with log.time("pack"):
        updates = pack(
            groups,
            micro_batch_tok=stage.batch.micro_batch_tok,
            prompts_per_update=stage.batch.prompts_per_update,
            objective=stage.objective,
            device=components.policy.device,
            ranks=components.ranks,
        )
    # also in a supervised stage, because an evaluation may have left the sampler's cache allocated
    with log.time("handover"), sleep, log.time("update"):
        check = partial(_check_drift, components, progress.state)
        work = learner.begin(updates, stage, stage_step, check, num_replaced, drift)
        while not work.is_done:
            learner.advance(work)
            if not work.is_done:
                stop_if_requested(components)
        progress.matches_weights = False  # all optimizer steps are made, the state is still that before the step
        return learner.stats(work)


def _check_drift(components: Components, state: RunState, found: StepDrift) -> None:
    policy = components.policy
    check_step(found, policy.dtype, policy.config.num_hidden_layers, components.config.max_mean_drift)
    Surprise.of(state.totals).plus(found).check()


def _record(components: Components, state: RunState, result: StepResult) -> None:
    """Writes the step's row and console line, warnings, and completions where they are due."""
    log, source = components.log, components.source
    with log.time("record"):
        row = step_row(result, state, source.label)
    correct = [group.correct(source.is_correct) for group in result.groups]
    num_correct = sum(map(sum, correct))
    row |= log.end_step(num_tok=result.stats.num_loss_tok, num_correct=num_correct, gather=components.ranks.gather)
    with log.time("record"):
        log.write_step(row, console_line(row))
        if not result.is_supervised:
            solved = [all(of_group) for of_group in correct]
            for sentence in components.watch.observe(state.step, result.stage, result.groups, solved, result.stats):
                log.say(f"warning: {sentence}")
        if result.stage_step == 0:
            where = f"step {state.step}, the first of stage {result.stage}"
            _warn(components, warning_of_no_answer(where, result.found, result.texts, 1 - row["response/stopped"]))
        if state.step % components.config.completions_every == 0:
            rows = completion_rows(result, components.policy.text.decode, source.is_correct)
            log.write_completions(f"step-{state.step:08d}", rows)


def _warn(components: Components, warning: str) -> None:
    if warning:
        components.log.say(warning)


def publish_if_stale(components: Components, sampler: Sampler, version: int) -> Publication | None:
    """Weight sync if the sampler's weights are not those of ``version``; else None."""
    return None if sampler.policy_version == version else publish(components, sampler, version, None)


def publish(components: Components, sampler: Sampler, version: int, probe: Prompt | None) -> Publication:
    """Weight sync: brings the policy's present weights to ``sampler`` and verifies that it uses them.

    Compares a hash of the weights and, with ``probe``, the log-probabilities of a sampled response. Without a probe
    the learner compares trainer and sampler log-probabilities on the step's own tokens before the first optimizer
    step. Raises RunFailed on a difference.
    """
    with components.policy.unsharded():
        publication = sampler.publish(version)
        if sampler is components.sampler:
            limit = components.config.max_mean_drift
            publication = check_publication(components.policy, sampler, publication, probe, limit)
    return publication


def _evaluate(components: Components, progress: RunProgress, request: EvaluationRequest) -> None:
    """Evaluates, and notes in the state what is told of the model where scores are compared. All ranks must call it."""
    record = evaluate(components, progress.state, request)
    told = progress.state.best
    if record.best_by and (told is None or record.score > told["score"]):
        told = {"set": record.best_by, "label": request.label, "step": progress.state.step, "score": record.score}
    progress.state = dataclasses.replace(progress.state, source=components.source.state_dict(), best=told)


def evaluate(components: Components, state: RunState, request: EvaluationRequest) -> EvaluationRecord:
    """Samples and rewards responses to the request's prompts, has the source record them, and writes all of it.

    Nothing that training reads changes, but for what the source records: prompts, seeds and weights stay the same.
    """
    if components.sampler.policy_version != state.policy_version:
        publish(components, components.sampler, state.policy_version, request.prompts[0])
    log, source = components.log, components.source
    greedy = with_validation_loss(components, request, _answers(components, request, is_greedy=True))
    sampled = _answers(components, request, is_greedy=False) if request.samples else None
    record = source.record_evaluation(request, greedy, sampled)
    log.say(record.line)
    _warn(components, warning_of_no_answer(f"the evaluation after {request.label}", greedy.found, greedy.texts, None))
    decode = components.policy.text.decode
    rows = evaluation_rows(request.prompts, greedy, decode, is_greedy=True)
    if sampled is not None:
        rows += evaluation_rows(request.prompts, sampled, decode, is_greedy=False)
    log.write_completions(f"exam-{request.label}", rows)
    log.write_items(request.label, record.items)
    log.write_evaluation(state.step, record.values)
    return record


def _answers(components: Components, request: EvaluationRequest, *, is_greedy: bool) -> Answers:
    """Responses of all ranks to the request's prompts, with their rewards."""
    sampling = evaluation_sampling(components, request, is_greedy=is_greedy)
    rollouts, texts, scores = sample_and_reward(
        components, components.sampler, request.prompts, sampling, lambda phase: contextlib.nullcontext()
    )
    found = answers_found(components.finds_answer, request.prompts, texts)
    asked = [prompt for prompt in request.prompts for _ in range(sampling.samples_per_prompt)]
    correct = scores.correct or [
        components.source.is_correct(prompt, reward) for prompt, reward in zip(asked, scores.rewards, strict=True)
    ]
    return Answers(
        texts=tuple(texts),
        rewards=tuple(scores.rewards),
        correct=tuple(correct),
        found=None if found is None else tuple(found),
        environment_failures=count_failures(rollouts),
    )


def save(components: Components, state: RunState, keep: int | None = None, *, waits: bool = True) -> None:
    """Writes a checkpoint. A collective: all ranks must call it.

    ``keep``: how many checkpoints stay, this one included; None: ``run.keep_checkpoints``. Before the first stage
    there is no optimizer, and the checkpoint holds the weights only. ``waits``: it is complete on return; else a copy
    is written while training goes on, if ``run.checkpoint_in_background``.
    """
    totals = {**state.totals, "wall_s": components.log.wall_s()}
    state = dataclasses.replace(state, num_ranks=components.ranks.size, totals=totals)
    components.saver.save(
        components.log.folder / "checkpoints",
        state,
        components.policy.stored(),
        components.learner.state_tensors() if state.stage else {},
        components.ranks,
        keep=keep or components.config.keep_checkpoints,
        waits=not components.config.checkpoint_in_background or waits,
        save_whole=save_checkpoint,
    )


def _save_where_due(components: Components, state: RunState, stage: Stage | None, *, is_new: bool) -> None:
    """Writes a checkpoint every so many steps and at the end; keeps the best one, and those of the ends of stages.

    ``stage``: the next step's; None: the run is over. ``is_new``: no checkpoint holds ``state`` yet. A collective: all
    ranks must call it.
    """
    folder, best = components.log.folder, state.best
    if best is not None and not components.ranks.from_first(partial(is_better, folder, best["score"])):
        best = None  # or it is there already: a run that was stopped or killed goes on from here
    has_ended = state.stage not in ("", "" if stage is None else stage.name)
    is_due = state.step > 0 and state.step % components.config.checkpoint_every == 0
    is_kept = not is_new or is_due or stage is None  # as one of the newest, which the others do not push out
    is_copied = best is not None or has_ended
    if stage is None or (is_new and is_due):
        save(components, state, waits=stage is None or is_copied)
    if not is_copied:
        return
    components.saver.settle(components.ranks, waits=True)  # what is copied must be complete
    stays = is_kept
    if not is_kept:  # one that a stop or a failure left before this evaluation is renewed, and stays
        stays = components.ranks.from_first(lambda: has_checkpoint(folder / "checkpoints", state.step))
        save(components, state, KEEP_ALL)
    with components.policy.unsharded():
        if components.ranks.is_first:
            checkpoint = checkpoint_path(folder / "checkpoints", state.step)
            if has_ended:
                keep_copy(checkpoint, checkpoint.with_name(f"stage-{state.stage}"))
            if best is not None:
                write_best(folder, checkpoint, components.policy, best)
                components.log.say(f"best so far by {best['set']}: {best['score']:.1%}, kept in {folder / BEST}")
            if not stays:
                discard(checkpoint)
    components.ranks.wait()


def _any_prompt(components: Components) -> Prompt:
    """A prompt for the first probe, before the source has been asked for any."""
    token_ids = components.policy.text.encode_prompt("First things first.")
    return Prompt(prompt_id=0, token_ids=token_ids, task="probe", representation="probe", payload=None)
