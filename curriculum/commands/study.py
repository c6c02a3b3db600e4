"""``isomorph study``: runs a study, reports it, takes its test exam."""

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from isomorph.curriculum.commands.exit import fail
from isomorph.curriculum.report.run_record import trained_on
from isomorph.curriculum.study.design import Design
from isomorph.curriculum.study.execute import DONE, FAILED, RUNNING, WAITING, Execution, Job, default_jobs
from isomorph.curriculum.study.results import STUDY, newest_warm_starts
from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import locked

STATUS_S = 60.0  # between lines that say how far the runs are, where no terminal shows it
LOCK_S = 60.0  # that the processes of a killed study are waited for
IGNORED = "# large: isomorph study makes it anew\nruns/\nwarm/\nset-aside/\nlogs/\nstarted.json\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says besides the study's file."""

    out: Path | None
    only: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int | None
    stop_after_min: float | None
    test: bool
    test_again: bool


def report_study(folder: Path, out: Console) -> None:
    """``isomorph study --report DIR``: the page from the rows alone."""
    _need_scipy()
    from isomorph.curriculum.study.page import write_study

    out.print(f"page: {write_study(folder)}", highlight=False, soft_wrap=True)


def study(file: Path, options: Options, out: Console) -> None:
    """Makes all runs that are not done, then the page; with ``test`` takes the test exam in place of runs.

    Raises:
        UserError, DataError: the study's file, a condition or an option is wrong.
        KeyboardInterrupt: stopped; unfinished runs have a checkpoint.
    """
    _need_scipy()
    design = Design(file, options.out)
    table = design.spec.study
    conditions = _chosen("--only", options.only, tuple(design.spec.condition))
    seeds = _chosen("--seeds", options.seeds, table.seeds)
    design.check_first_models(seeds)
    design.out.mkdir(parents=True, exist_ok=True)
    with _alone(design.out, out), _stopped_by_sigterm():
        (design.out / ".gitignore").write_text(IGNORED)
        _describe(design)
        if options.test or options.test_again:
            _test(design, out, again=options.test_again)
            failed: list[Job] = []
        else:
            failed = _runs(design, conditions, seeds, options, out)
            _describe(design)
        _page(design, out)
    if failed:
        fail(f"{len(failed)} of the runs failed: " + "; ".join(f"{job.run.name}: {job.why}" for job in failed), 1)


def _need_scipy() -> None:
    if importlib.util.find_spec("scipy") is None:
        raise UserError("isomorph study needs scipy for its statistics: pip install 'isomorph[study]'")


def _chosen(option: str, given: Sequence[Any], known: Sequence[Any]) -> tuple[Any, ...]:
    if unknown := [str(one) for one in given if one not in known]:
        raise UserError(f"{option} {' '.join(unknown)}: the study has {', '.join(map(str, known))}")
    return tuple(one for one in known if not given or one in given)


@contextlib.contextmanager
def _alone(folder: Path, out: Console) -> Iterator[None]:
    """Locks the study's folder; waits for processes of a killed study, which write their checkpoints."""
    until, has_said = time.monotonic() + LOCK_S, False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except UserError:
                if time.monotonic() > until:
                    raise
                if not has_said:
                    out.print("waiting for another process in this folder to end", highlight=False)
                has_said = True
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _runs(
    design: Design, conditions: tuple[str, ...], seeds: tuple[int, ...], options: Options, out: Console
) -> list[Job]:
    """Makes the runs; those that failed."""
    jobs_of_file, threads = design.jobs_threads
    jobs = options.jobs or jobs_of_file or default_jobs(threads)
    display = _Display(out)
    execution = Execution(design, design.runs(conditions, seeds), jobs=jobs, say=display.say)
    out.print(
        f"study folder: {design.out}; {jobs} runs at a time, {threads} threads each", highlight=False, soft_wrap=True
    )
    stop_after_s = None if options.stop_after_min is None else 60 * options.stop_after_min
    again = f"isomorph study {shlex.join(sys.argv[2:])}"
    try:
        with display:
            execution.go(stop_after_s=stop_after_s, show=display.show)
    except KeyboardInterrupt:
        out.print(f"interrupted; go on with: {again}", highlight=False, soft_wrap=True)
        raise
    before = sum(job.was_done for job in execution.jobs)
    counts = Counter(job.status for job in execution.jobs)
    listed = ", ".join(f"{num} {status}" for status, num in counts.items())
    out.print(f"runs: {listed} ({before} of them before)", highlight=False)
    if not execution.is_complete and not execution.failed:
        out.print(f"stopped after {options.stop_after_min:g} min; go on with: {again}", highlight=False, soft_wrap=True)
    return execution.failed


class _Display:
    """A line for each event, and how far the running ones are: a table in a terminal, else a line now and then."""

    def __init__(self, out: Console) -> None:
        self.out, self.started, self.shown_at = out, time.monotonic(), time.monotonic()
        # refreshed by hand: a thread could hold a lock while a run is forked
        self.live = Live(console=out, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> "_Display":
        if self.out.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def say(self, line: str) -> None:
        self.out.print(f"[{_clock(time.monotonic() - self.started)}] {line}", highlight=False, soft_wrap=True)

    def show(self, jobs: Sequence[Job]) -> None:
        now = time.monotonic()
        if self.out.is_terminal:
            if now - self.shown_at > 1:
                self.live.update(self._table(jobs), refresh=True)
                self.shown_at = now
        elif now - self.shown_at > STATUS_S:
            running = [f"{job.run.name} {_far(job)}" for job in jobs if job.status == RUNNING]
            self.say(f"{_counted(jobs)}; running: {', '.join(running)}")
            self.shown_at = now

    def _table(self, jobs: Sequence[Job]) -> Table:
        table = Table(title=_counted(jobs), title_justify="left", show_header=False)
        for job in jobs:
            if job.status == RUNNING:
                table.add_row(job.run.name, _far(job))
        return table


def _counted(jobs: Sequence[Job]) -> str:
    counts = Counter(job.status for job in jobs)
    return ", ".join(f"{counts[status]} {status}" for status in (DONE, RUNNING, WAITING, FAILED) if counts[status])


def _far(job: Job) -> str:
    step, left = job.progress()
    return f"step {step}/{job.run.steps}" + ("" if left is None else f", {_clock(left)} to end")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _describe(design: Design) -> None:
    """study.json: the design, as the page needs it."""
    from isomorph.curriculum.study.exam import read_taken

    table, seed = design.spec.study, design.spec.study.seeds[0]
    conditions = {}
    for name, condition in design.spec.condition.items():
        stages = design.run(name, seed).recipe.stage
        said = condition.says or trained_on(stages)
        conditions[name] = f"{said} ({' + '.join(str(stage.steps) for stage in stages)} steps)"
    warm = None
    if design.spec.warm_start is not None:
        run = design.warm_run(seed)
        warm = f"{trained_on(run.recipe.stage)} ({run.steps} steps), once per seed, shared by all conditions"
    described = {
        "name": table.name,
        "question": table.question,
        "recipe": table.recipe,
        "seeds": list(table.seeds),
        "budgets": list(table.budgets),
        "test_budgets": list(design.spec.test_budgets),
        "max_response_tok": table.max_response_tok,
        "baseline": table.baseline,
        "measure": list(table.measure),
        "reach": list(table.reach),
        "unequal": table.unequal,
        "conditions": conditions,
        "contrasts": [[one.first, one.second] for one in design.spec.contrasts],
        "warm_start": warm,
        "test_taken": read_taken(design.out),
        "identities": design.identities(newest_warm_starts(design.out)),
    }
    partial = design.out / f"{STUDY}.partial"
    partial.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, design.out / STUDY)


def _test(design: Design, out: Console, *, again: bool) -> None:
    from isomorph.curriculum.study.exam import check_test, take_test

    table = design.spec.study
    runs = [
        run for run in design.runs(tuple(design.spec.condition), table.seeds) if run.condition in design.spec.condition
    ]
    record = check_test(design, runs, again=again)
    take_test(design, runs, record, lambda line: out.print(line, highlight=False, soft_wrap=True))
    _describe(design)


def _page(design: Design, out: Console) -> None:
    """After a call that has finished no run yet there is nothing to show."""
    from isomorph.curriculum.study.page import write_study
    from isomorph.curriculum.study.results import read_results

    if read_results(design.out).points:
        out.print(f"page: {write_study(design.out)}", highlight=False, soft_wrap=True)
