"""Runs a recipe: makes the engine's components, trains, and writes run.json, summary.json, model and report."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isomorph.curriculum.accepted import accept_demonstrations
from isomorph.curriculum.environment import describe_run, fallbacks, notes_on_options
from isomorph.curriculum.environments.open import Environments
from isomorph.curriculum.estimate import FirstSteps, short_of_disk, short_of_memory
from isomorph.curriculum.hub import prepare_push, push
from isomorph.curriculum.inputs import changed_files, changed_rewards, describe_files, located, pinned
from isomorph.curriculum.nodes import refuse_other_files, refuse_other_recipe, refuse_other_weights
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.page import write_report
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.restored import base_of, restore
from isomorph.curriculum.resume import Changes, depends_on_steps, refuse_what_is_over
from isomorph.curriculum.rewards.answer import ANSWER_TAGS
from isomorph.curriculum.rewards.pool import RewardPool, answer_found
from isomorph.curriculum.rewards.signature import Progress
from isomorph.curriculum.rewards.spec import RewardTable
from isomorph.curriculum.rewards.table_judge import TableJudge, rewarded_sources
from isomorph.curriculum.rows.spec import ROWS
from isomorph.curriculum.sources import tiny_words
from isomorph.curriculum.stage import Curriculum
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.components import Components
from isomorph.engine.config import UserError
from isomorph.engine.distributed.fsdp import shard
from isomorph.engine.distributed.heartbeat import lost_ranks_explained
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.loop import train
from isomorph.engine.model.load import load_policy, read_weights, silence_loaders
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.best import BEST, read_best, save_model
from isomorph.engine.record.checkpoint import weights_sha256
from isomorph.engine.record.runlog import QuietLog, RunLog
from isomorph.engine.record.sinks import check_sinks, open_sinks
from isomorph.engine.record.telemetry import Telemetry, find_gpu, process_memory_gib
from isomorph.engine.rollout.apart import SamplerApart
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.demonstrations import DemonstrationSampler
from isomorph.engine.rollout.stop_strings import check_stop_strings
from isomorph.engine.types import Prompt, RunFailed, RunState, Sampler
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.self_check import check_stages


def run_recipe(
    recipe: Recipe,
    folder: Path,
    console: Console,
    stop_requested: Callable[[], bool],
    ranks: Ranks,
    *,
    resume: bool,
    changes: Changes | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Trains in ``folder`` to the end of the last stage; returns the summary, which rank 0 writes to summary.json.

    On several ranks, relative paths of a recipe are relative to each rank's working folder.
    ``changes``: what a resumed run changes of the recipe in run.json; ``recipe`` includes it. ``report``: also write
    the HTML report.
    """
    _refuse_ranks(recipe, ranks)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    check_sinks(recipe.log)
    ranks.from_first(lambda: prepare_push(recipe.run.push_to_hub))
    if resume:
        ranks.from_first(lambda: _refuse_changed_files(recipe, folder, partial(console.print, highlight=False)))
    refuse_other_recipe(recipe, ranks)
    if not resume:
        recipe = pinned(located(recipe), ranks)
    refuse_other_files(recipe, ranks)
    log = (RunLog if ranks.is_first else QuietLog)(folder, console, every=recipe.log.every)
    with contextlib.ExitStack() as stack, log.alive():
        with log.time("load"):
            before_gib, _ = process_memory_gib()
            environments = stack.enter_context(
                Environments(recipe, log=log.folder / "environments.log", say=log.say, is_alone=ranks.size == 1)
            )
            components, state = stack.enter_context(
                _open_components(recipe, log, stop_requested, ranks, environments, resume=resume)
            )
            if changes:
                refuse_what_is_over(changes, recipe, folder)  # the checkpoint that is used may not be the newest
            if changes and ranks.is_first:
                _record_changes(recipe, changes, log, state.step)
            assert isinstance(components.source, Curriculum)
            log.exam_keys = components.source.evaluations.row_keys()
            stack.enter_context(log.telemetry.watching())
            if ranks.is_first:
                tables = recipe.model_dump(mode="json")
                log.sinks += stack.enter_context(open_sinks(recipe.log, folder, tables, state.step))
                log.sinks.append(FirstSteps(recipe, components.policy, log, before_gib, ranks.size))
        stack.enter_context(log.progress(state.step, sum(stage.steps for stage in recipe.stage)))
        try:
            with lost_ranks_explained(ranks):
                state = train(components, state)
        except BaseException as error:
            with contextlib.suppress(RunFailed):  # on a full disk this fails, too; the first error is raised
                log.write_json("summary.json", {"status": _status(error), "reason": str(error)})
            raise
        summary = _leave_results(recipe, components, state, folder, report=report)
        ranks.wait()  # for rank 0; then samplers close, and vLLM destroys the process group
        return summary


def _refuse_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Raises UserError where FSDP2 cannot divide the model over this number of ranks."""
    if recipe.parallel.kind == "fsdp" and ranks.size == 1:
        raise UserError('parallel.kind = "fsdp" needs several ranks, got 1: start with torchrun, or set "data"')
    if (shards := recipe.parallel.shards) and ranks.size % shards:
        raise UserError(f"parallel.shards must divide the number of ranks, got {shards} shards and {ranks.size} ranks")


def _leave_results(
    recipe: Recipe, components: Components, state: RunState, folder: Path, *, report: bool
) -> dict[str, Any]:
    """Writes model, summary.json and report of a finished run, on the first rank; returns the summary. A collective."""
    log, ranks = components.log, components.ranks
    with components.policy.unsharded():
        summary = _summary(components, state)
        if ranks.is_first:
            with log.writing("model"):
                save_model(components.policy, folder)
    if ranks.is_first:
        log.write_json("summary.json", summary)
        if report:
            write_report([folder], folder / "report")
        if address := push(recipe.run.push_to_hub, folder / "model"):
            log.say(f"pushed to {address}")
    return summary


@contextlib.contextmanager
def _open_components(
    recipe: Recipe,
    log: RunLog,
    stop_requested: Callable[[], bool],
    ranks: Ranks,
    environments: Environments,
    *,
    resume: bool,
) -> Iterator[tuple[Components, RunState]]:
    """The components of a run and the state that it begins or resumes with; closes sampler and reward workers."""
    policy = _policy_of_run(recipe, ranks, resume=resume)
    check_stages(recipe.stage, ranks if policy.device.type == "cpu" else ALONE)
    _refuse_long_responses(recipe, policy.max_model_len)
    check_stop_strings([string for stage in recipe.stage for string in stage.sampling.stop], policy.text)
    log.telemetry = Telemetry(*find_gpu(policy.device))
    environments.load(policy.text)
    curriculum = Curriculum(recipe, policy.text, policy.max_model_len, environments)
    for source in curriculum.sources.values():
        for sentence in source.left_out:
            log.say(f"warning: {sentence}")
    state, learned = RunState(base=base_of(policy)), None
    if resume:
        state, learned = restore(policy, curriculum, log, ranks)
    with (
        open_sampler(recipe, policy) as sampler,
        RewardPool() as pool,
        _open_judge(recipe, curriculum, pool, log) as judge,
    ):
        _start_workers(recipe, pool)
        judge.start()  # before run.json, so that a start that is refused leaves nothing
        accept_demonstrations(curriculum.sources, judge, policy.text, log.say)
        # after the sampler, which may have moved the parameters into its own storage
        learner = Learner(policy, ranks, optimizer_on_host=recipe.model.offload_optimizer)
        if learned is not None and state.stage:  # else the run was interrupted before its first stage
            present = curriculum.stage() or recipe.stage[-1]
            learner.restore(next((s for s in recipe.stage if s.name == state.stage), present), learned)
        if not resume and ranks.is_first:
            log.write_json("run.json", describe_run(recipe, policy, curriculum, ranks, log.telemetry))
        _say_what_to_know(recipe, policy, log, ranks)
        components = Components(
            policy=policy,
            sampler=sampler,
            demonstrations=DemonstrationSampler(
                policy.text, curriculum.demonstrate, max_model_len=policy.max_model_len
            ),
            source=curriculum,
            judge=judge,
            learner=learner,
            log=log,
            config=recipe.run,
            stop_requested=stop_requested,
            ranks=ranks,
            finds_answer=finds_answer if len(judge.sources) < len(recipe.data) else None,
            dialogue=environments.dialogue(),
        )
        yield components, state


def _say_what_to_know(recipe: Recipe, policy: Policy, log: RunLog, ranks: Ranks) -> None:
    """Prints what is short, what was mended and what runs slower than it could."""
    if short := short_of_disk(recipe, policy, log.folder):
        log.say(f"warning: {short}")
    for short in short_of_memory(recipe, policy, ranks):
        log.say(f"warning: {short}")
    for note in (*policy.notes, *notes_on_options(recipe)):
        log.say(f"note: {note}")
    for fallback in fallbacks(policy):
        log.say(f"warning: {fallback}")


def _record_changes(recipe: Recipe, changes: Changes, log: RunLog, step: int) -> None:
    """Writes the changed recipe and what changed into run.json, so that later resumes use it."""
    described = read_run_json(log.folder)
    history = [*described.get("changes", []), {"after_step": step, "changed": changes}]
    files = describe_files(recipe)
    log.write_json(
        "run.json", {**described, "recipe": recipe.model_dump(mode="json"), "files": files, "changes": history}
    )
    for key, (before, after) in changes.items():
        log.say(f"changed: {key} was {before}, is {after} from here on")
    for sentence in depends_on_steps(recipe, changes):
        log.say(f"note: {sentence}")


def _refuse_changed_files(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Raises UserError where a data file changed: rows would come in another order, held-out ones into training."""
    recorded = read_run_json(folder).get("files", {})  # runs of older versions have none
    if changed := changed_files(recorded, recipe):
        raise UserError(
            f"{'; '.join(changed)}: the run cannot be resumed with other questions; restore the files, or start a new "
            "run"
        )
    for sentence in changed_rewards(recorded, recipe):
        say(f"warning: {sentence}")


def finds_answer(prompt: Prompt, text: str) -> bool | None:
    """Whether ``text`` states an answer; None for rows, of which only their rewards know what an answer is."""
    task: Task = prompt.payload
    return None if task.family == ROWS else answer_found(task.family, text)


def _refuse_long_responses(recipe: Recipe, max_model_len: int) -> None:
    """Raises UserError where a stage's or an evaluation's responses leave no positions for a prompt."""
    limits = {f"stage {stage.name}: sampling.max_new_tok": stage.sampling.max_new_tok for stage in recipe.stage}
    for name, num_tok in {**limits, "eval.max_new_tok": recipe.eval.max_new_tok}.items():
        if num_tok >= max_model_len:
            raise UserError(f"{name} must leave positions for a prompt: the model has {max_model_len}, got {num_tok}")


def _policy_of_run(recipe: Recipe, ranks: Ranks, *, resume: bool) -> Policy:
    """The recipe's model; with FSDP2 this rank's shards, before the sampler, which copies its weights from them.

    ``resume``: a checkpoint is going to fill the shards, so that no file of the model is read.
    """
    is_sharded = recipe.parallel.kind == "fsdp"
    policy = open_policy(recipe, defers=is_sharded)
    if not resume:
        refuse_other_weights(policy, ranks)
    if is_sharded:
        shard(policy, recipe.parallel.shards)
        if not resume:
            read_weights(policy)
    return policy


def open_policy(recipe: Recipe, *, defers: bool = False) -> Policy:
    """Loads the recipe's model on this machine's device. ``defers``: as of ``load_policy``."""
    silence_loaders()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (words, notes), seed = tiny_words(recipe), recipe.run.seed
    policy = load_policy(
        recipe.model, vocabulary=words, seed=seed, device=device, lora=recipe.lora, tags=ANSWER_TAGS, defers=defers
    )
    policy.notes += notes
    return policy


@contextlib.contextmanager
def open_sampler(recipe: Recipe, policy: Policy) -> Iterator[Sampler]:
    """Starts the recipe's sampler; closes it at the end."""
    if recipe.sampler.kind == "builtin":
        kind = SamplerApart if recipe.sampler.overlap else BuiltinSampler
        yield kind(policy, recipe.sampler)
        return
    from isomorph.engine.rollout.vllm import start_vllm  # importing vLLM takes seconds and a lot of memory

    sampler = start_vllm(policy, recipe.sampler, seed=recipe.run.seed)
    try:
        yield sampler
    finally:
        sampler.close()


def _start_workers(recipe: Recipe, pool: RewardPool) -> None:
    """Starts reward workers before the first response comes. Raises UserError where a package is missing."""
    known = [data for data in recipe.data.values() if not isinstance(data, RewardTable)]
    for family, reward in sorted({(data.family, data.reward) for data in known}):
        try:
            pool.start_worker(family, reward)
        except ImportError as error:
            raise UserError(str(error)) from error


def _open_judge(recipe: Recipe, curriculum: Curriculum, pool: RewardPool, log: RunLog) -> TableJudge:
    """The reward function of a run; what users' functions print goes to rewards.log."""
    total = sum(stage.steps for stage in recipe.stage)
    columns = {name: source.columns for name, source in curriculum.sources.items()}
    return TableJudge(
        rewarded_sources(recipe.data, columns),
        pool,
        log=log.folder / "rewards.log",
        say=log.say,
        seed=recipe.run.seed,
        max_new_tok=curriculum.max_new_tok,
        progress=lambda: Progress(step=curriculum.total_steps(), max_steps=total),
    )


def _summary(components: Components, state: RunState) -> dict[str, Any]:
    assert isinstance(components.source, Curriculum) and isinstance(components.judge, TableJudge)
    accuracy = components.source.evaluations.accuracy()
    best = read_best(components.log.folder) if components.source.recipe.eval.keep_best else None
    return {
        "status": "done",
        "steps": state.step,
        "wall_s": components.log.wall_s(),
        "tokens": {key: state.totals.get(key, 0) for key in ("prompt_tok", "response_tok", "forward_tok")},
        "accuracy": {
            when: {name: result["rate"] for name, result in results.items()} for when, results in accuracy.items()
        },
        "intervals": accuracy,
        "no_answer": {
            when: done.get("no_answer", {}) for when, done in components.source.evaluations.boundaries().items()
        },
        "floor": components.source.evaluations.sequential_baseline(),
        "shortcuts": components.source.evaluations.shortcuts(),
        "stages": components.source.finished,
        "exams": components.source.evaluations.done,
        "rows": {
            **{name: source.summary() for name, source in components.source.sources.items()},
            **{name: {"redrawn": count} for name, count in components.source.redrawn.items()},  # too long to fit
        },
        "best": best and {**best, "folder": str(components.log.folder / BEST)},
        "judge": components.judge.failures(components.ranks),
        "environments": components.source.environment_counts(),
        "memory_growth_alarms": components.log.telemetry.growth.num_alarms,
        "weights_sha256": weights_sha256(components.policy.weights()),
    }


def _status(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
