"""The process of one run of a study: trains as ``isomorph train`` does, and ends when the study does."""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from isomorph.curriculum.commands.exit import fail
from isomorph.curriculum.commands.train import train_in
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import resumed_recipe
from isomorph.curriculum.rewards.spawn import CleanSpawnContext
from isomorph.curriculum.study.design import PlannedRun
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError
from isomorph.engine.foreign import PrintableConsole

PR_SET_PDEATHSIG = 1
DEVICES = "/dev", "nvidia[0-9]*"


def has_gpu() -> bool:
    """By the driver's device files: asking CUDA would keep processes that are forked from this one from using it."""
    return any(Path(DEVICES[0]).glob(DEVICES[1]))


def start(run: PlannedRun, log: Path, *, resume: bool) -> BaseProcess:
    """Starts the run; what it prints is appended to ``log``. Its exit code is that of ``isomorph train``.

    Forked, which saves the seconds of all imports; spawned where there is a GPU, whose driver does not survive a fork.
    """
    if has_gpu():
        process: BaseProcess = CleanSpawnContext().Process(target=train_run, args=(run, log, os.getpid(), resume))
    else:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=train_run, args=(run, log, os.getpid(), resume))
    process.start()
    return process


def train_run(run: PlannedRun, log: Path, parent: int, resume: bool) -> None:
    """What the process does."""
    _stop_with(parent)
    _print_to(log)
    console = PrintableConsole(file=sys.stdout, markup=False, emoji=False, width=120)
    try:
        recipe = run.recipe
        if resume:
            recipe, _ = resumed_recipe(read_run_json(run.folder), [], run.folder)
        train_in(run.folder, recipe, console, is_named=True, resume=resume, report=False)
    except (UserError, DataError) as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _stop_with(parent: int) -> None:
    """The kernel sends SIGTERM when the study dies, however it does: the run then writes a checkpoint and ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died already
            sys.exit(130)


def _print_to(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((0, nowhere), (1, handle), (2, handle)):
        os.dup2(target, number)
    # for the process's life
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
