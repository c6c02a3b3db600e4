"""Conditions of a curriculum compared on a GPU in one call of at most nine minutes, most valuable runs first.

    python benchmarks/curriculum_gpu.py --out DIR [--model tiny|PATH] [--limit-s 540] [--device cuda] [--rehearse]
    python benchmarks/curriculum_gpu.py --report DIR

Words only and graph -> words from one warm start, three seeds each; then words -> graph, mixed, fading and adaptive.
--model tiny: the standard exam (curriculum/recipes/exam.toml); a path: data and model's settings of studies/smollm2.

DIR/curriculum_gpu.jsonl gets a row after every exam, on disk at once, with the right answers item by item; so a call
that is cut short loses nothing but the steps since the last exam. The same call again goes on: a finished run is not
repeated, others resume from their last checkpoint, in DIR/work or --work. `isomorph study DIR/STUDY.toml --out
DIR/work` goes on as well, without a limit, and writes the study's page.

Rows have a kind. "call": the settings, of each call. "exam": condition, seed, step, right (representation ->
"0110..."), errors, device, dtype, sampler, versions, seconds and response tokens of the run up to then. "shortcuts":
representation -> shortcut -> share of these items. "run": how a run ended, its seconds, those before its first step.
--report prints tables from the rows alone.

Runs are processes of their own, --jobs at a time, so that their starts overlap: 3 on a GPU (one where the weights
exceed 1 GB, or with vLLM), as many as there are cores elsewhere. --sampler auto takes vLLM where there are a GPU, vLLM
and a model from a path; a tiny model's whole run is shorter than vLLM's start. --rehearse: sizes that two cores bear.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH Python leaves a script's folder out
sys.path.append(str(Path(__file__).resolve().parents[1] / ".links"))  # where isomorph is not installed

from curriculum_design import CLAIM, OTHERS, SEEDS, shared_recipe, size_of, study_file
from curriculum_report import report
from curriculum_rows import ROWS, Follower

from isomorph.curriculum.machine import usable_cores
from isomorph.curriculum.study.design import Design, PlannedRun
from isomorph.curriculum.study.execute import Execution
from isomorph.curriculum.study.results import append_lines, read_lines
from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import locked

TOTAL_S = 540.0
STOP_S = 12.0  # before the limit: for the steps that are under way and their checkpoints
LEAST_SHARE = 0.6  # of a short limit, that is for training
WAIT_S = 60.0  # for the processes of a call that was killed
SAMPLERS = {"auto": None, "builtin": "builtin", "vllm": "vllm"}
LARGE_BYTES = 1 << 30  # of weights: such runs do not share a GPU


def settings_of(args: argparse.Namespace, *, on_gpu: bool) -> dict[str, Any]:
    """What must be the same in each call with one --out."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    vllm = on_gpu and has_vllm and args.model != "tiny" and not args.rehearse
    return {
        "model": args.model if args.model == "tiny" else os.path.abspath(args.model),
        "device": "cuda" if on_gpu else "cpu",
        "dtype": args.dtype or ("float32" if args.model == "tiny" else "bfloat16"),
        "sampler": SAMPLERS[args.sampler] or ("vllm" if vllm else "builtin"),
        "rehearse": args.rehearse,
    }


def choose_device(asked: str) -> bool:
    """Whether runs are on a GPU; with "cpu" none of them sees one."""
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return False
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that PyTorch can use, and finds none: --device cpu, or auto")
    return torch.cuda.is_available()


def jobs_of(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    if args.jobs:
        return int(args.jobs)
    if settings["device"] == "cpu":
        return max(1, int(usable_cores()))
    weights = 0 if args.model == "tiny" else sum(file.stat().st_size for file in weight_files(Path(args.model)))
    return 1 if settings["sampler"] == "vllm" or weights > LARGE_BYTES else 3


def weight_files(model: Path) -> list[Path]:
    return [model] if model.is_file() else [*model.glob("*.safetensors")]


def open_design(args: argparse.Namespace, settings: dict[str, Any], jobs: int) -> Design:
    """Writes the study's files and checks all its recipes. Raises UserError."""
    size = size_of(args.model, rehearse=args.rehearse)
    threads = max(1, min(4, int(usable_cores()) // jobs))
    shared = {name: settings[name] for name in ("model", "dtype", "sampler")}
    (args.out / "shared.toml").write_text(shared_recipe(size, **shared, memory_frac=0.7 / jobs))
    (args.out / "STUDY.toml").write_text(study_file(size, threads=threads))
    return Design(args.out / "STUDY.toml", args.work or args.out / "work")


def runs_of(design: Design, conditions: Sequence[str], seeds: Sequence[int]) -> list[PlannedRun]:
    """The two conditions of the claim with all seeds, their warm starts before them; then the others."""
    first = tuple(name for name in CLAIM if name in conditions)
    others = [design.run(name, seed) for name in OTHERS if name in conditions for seed in seeds]
    return design.runs(first, tuple(seeds)) + others


@contextlib.contextmanager
def alone(folder: Path, runs: Sequence[PlannedRun]) -> Iterator[None]:
    """Locks the folder; waits until processes that a killed call has left have written their checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        _when_free(folder, stack)
        for run in runs:
            if run.folder.is_dir():
                with contextlib.ExitStack() as briefly:
                    _when_free(run.folder, briefly)
        yield


def _when_free(folder: Path, stack: contextlib.ExitStack) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            stack.enter_context(locked(folder))
            return
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def make_runs(
    design: Design, runs: Sequence[PlannedRun], rows: Path, *, jobs: int, left_s: float, say: Callable[[str], None]
) -> int:
    """Runs for ``left_s`` seconds; 1 where one failed."""
    execution = Execution(design, runs, jobs=jobs, say=say)
    follower = Follower(execution, rows, say)
    try:
        execution.go(stop_after_s=left_s, show=lambda _: follower.look())
    finally:
        follower.look(ended=True)
    return int(bool(execution.failed))


def age_s() -> float:
    """Seconds since this process was started, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Clock:
    """Seconds of one call, ``spent_s`` of which were over when it was made."""

    def __init__(self, spent_s: float) -> None:
        self._zero = time.monotonic() - spent_s

    def spent_s(self) -> float:
        return time.monotonic() - self._zero

    def say(self, line: str) -> None:
        print(f"[{self.spent_s():6.1f} s] {line}", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the rows; a second call with it goes on")
    parser.add_argument("--report", type=Path, metavar="DIR", help="print the tables of a folder, and run nothing")
    parser.add_argument("--limit-s", type=float, default=TOTAL_S, help=f"for the whole call; default {TOTAL_S:.0f}")
    parser.add_argument("--model", default="tiny", metavar="tiny|PATH", help="a model folder or .gguf file")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 if tiny, else bfloat16")
    parser.add_argument("--sampler", choices=SAMPLERS, default="auto")
    parser.add_argument("--jobs", type=int, help="runs at a time")
    parser.add_argument("--work", type=Path, help="run folders with checkpoints, large; default: work in --out")
    parser.add_argument("--only", nargs="+", choices=CLAIM + OTHERS, default=CLAIM + OTHERS, help="these conditions")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, which show that it runs")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.report is None):
        parser.error("exactly one of --out and --report is needed")
    return args


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _train(args: argparse.Namespace, clock: Clock) -> int:
    """Raises UserError, KeyboardInterrupt."""
    settings = settings_of(args, on_gpu=choose_device(args.device))
    if settings["model"] != "tiny" and not (found := Path(settings["model"])).exists():
        raise UserError(f"--model must be tiny, a model folder or a .gguf file; {found} is none")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / ROWS
    before = [row["settings"] for row in read_lines(rows) if row["kind"] == "call"]
    if before and before[-1] != settings:
        raise UserError(f"{rows} holds rows of {before[-1]}, this call is {settings}: take another --out")
    jobs = jobs_of(args, settings)
    design = open_design(args, settings, jobs)
    runs = runs_of(design, args.only, args.seeds)
    with alone(design.out, runs):
        append_lines(rows, [{"kind": "call", "settings": settings, "jobs": jobs, "limit_s": args.limit_s}])
        clock.say(f"{len(runs)} runs, {jobs} at a time, {settings['device']}, sampler {settings['sampler']}: {rows}")
        left_s = max(args.limit_s - STOP_S, LEAST_SHARE * args.limit_s) - clock.spent_s()
        if left_s <= 0:
            raise UserError(f"no time is left after a start of {clock.spent_s():.0f} s: raise --limit-s")
        return make_runs(design, runs, rows, jobs=jobs, left_s=left_s, say=clock.say)


def main(argv: Sequence[str] | None = None, spent_s: float = 0.0) -> int:
    """0; 1 where a run failed; 2 for a wrong argument; 130 interrupted. Runs that have no time left are no failure.

    ``spent_s``: seconds of the limit that are over already.
    """
    args, code, clock = _arguments(argv), 0, Clock(spent_s)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if args.out is not None:
            code = _train(args, clock)
        elif not (args.report / ROWS).is_file():
            raise UserError(f"--report must name a folder with {ROWS}, got {args.report}")
        print("\n".join(report(read_lines((args.out or args.report) / ROWS))), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same call goes on", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main(spent_s=age_s()))
