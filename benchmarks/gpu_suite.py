"""Everything to be checked and measured on a GPU machine: one call of at most nine minutes, most valuable parts first.

    python benchmarks/gpu_suite.py --out FOLDER [--part NAME ...] [--limit-s 540] [--rehearse]

FOLDER gets two files and nothing else: gpu_suite.jsonl, to which every result is appended the moment it exists, and
gpu_suite.log, all output of all parts, line by line. If the call is cut short, what was measured until then is there. A
short table is printed at the end. Works from any folder, with relative paths, with isomorph installed or not: the
checkout's own .links stand at the end of the path.

Time. Every part has a share of the total. It may use its share and what earlier parts have left over; where less time
is left than the remaining shares, all are shortened in proportion. A part that exceeds its limit is killed with all its
child processes, and the next one starts. With --part the parts named have the whole time. Where isomorph is built in
the same command, give --limit-s what that leaves of the command's own limit.

Parts run in one worker process, so that PyTorch starts once; one that ends badly gets a new worker after it. What a
part needs and the machine lacks (trl, vllm) makes it "absent", and the first part lists it. --rehearse runs every part
at tiny sizes on the CPU, Triton interpreted. .ci/rehearse_gpu does so in an environment as bare as a GPU machine
without a package index, and lists what has to be brought there: the tests need hypothesis with sortedcontainers, the
step beside TRL needs trl, and datasets with pandas, xxhash, dill and multiprocess.

A new part is a function that yields rows, and a line in PARTS.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

from gpu_rows import append
from gpu_summary import is_bad, summary
from gpu_worker import Log, Worker

LINKS = Path(__file__).resolve().parents[1] / ".links"
TOTAL_S = 540.0
# name: module:function, and its share of the time in seconds. Ours and the ceilings come first, peers last.
PARTS: dict[str, tuple[str, float]] = {
    "machine": ("gpu_runs:machine", 15.0),
    "correct_head": ("gpu_correct:head", 20.0),
    "correct_attention": ("gpu_correct:attention", 16.0),
    "correct_decode": ("gpu_correct:decode", 25.0),
    "gemm": ("gpu_parts:gemm_ceiling", 8.0),
    "ours_head": ("gpu_parts:ours_head", 35.0),
    "ours_attention": ("gpu_parts:ours_attention", 30.0),
    "ours_rows": ("gpu_parts:ours_rows", 22.0),
    "correct_draws": ("gpu_correct_bits:draws", 12.0),
    "sampler": ("gpu_parts:sampler", 14.0),
    "update": ("gpu_parts:update", 55.0),
    "kernels": ("gpu_profile:kernels", 20.0),
    "layers": ("gpu_parts:layer_stack", 20.0),
    "correct_repeats": ("gpu_correct_bits:repeats", 8.0),
    "run": ("gpu_runs:train_builtin", 43.0),
    "step": ("gpu_runs:step_beside_trl", 72.0),
    "tests": ("gpu_runs:gpu_tests", 45.0),
    "tune": ("gpu_tune:tune", 20.0),
    "memory": ("gpu_parts:head_memory", 6.0),
    "optimizers": ("gpu_parts:optimizers", 6.0),
    "energy": ("gpu_parts:energy", 5.0),
    "more_tests": ("gpu_runs:kernel_tests", 10.0),
    "run_vllm": ("gpu_runs:train_vllm", 5.0),
    "peers_head": ("gpu_parts:peers_head", 10.0),
    "peers_attention": ("gpu_parts:peers_attention", 8.0),
    "peers_rows": ("gpu_parts:peers_rows", 5.0),
    "trl_adapter": ("gpu_runs:trl_adapter", 5.0),
}
START_S = 60.0  # at most, until a worker begins its first part
LEAST_S = 3.0  # with less than this left nothing is begun
REHEARSAL_S = 3000.0  # an interpreter on two busy cores proves that a part runs, not how fast


def limit_of_first(shares: Sequence[float], left_s: float) -> float:
    """Seconds for the first of the parts that are still to come."""
    planned = sum(shares)
    return shares[0] * left_s / planned if planned > left_s else shares[0] + left_s - planned


def run(names: Sequence[str], total_s: float, results: Path, log: Log, scratch: Path, *, rehearse: bool) -> None:
    """Every part of ``names`` in order, a row at the end of each; returns before ``total_s`` have passed."""
    until = time.monotonic() + total_s
    waiting, worker = list(names), None
    environment = environment_of_parts(scratch, rehearse=rehearse)
    try:
        while waiting and until - time.monotonic() >= LEAST_S:
            if worker is None:
                calls = [f"{name}={PARTS[name][0]}" for name in waiting]
                worker = Worker(calls, results, log, environment, scratch, rehearse=rehearse)
            _run_first(waiting, worker, until, results, log)
            if not worker.is_fit:
                worker.kill()
                worker = None
            waiting.pop(0)
    finally:  # also where this process is told to stop
        if worker is not None:
            worker.kill()
    for name in waiting:
        append(results, {"part": name, "ended": "no time left", "wall_s": 0.0})


def _run_first(waiting: Sequence[str], worker: Worker, until: float, results: Path, log: Log) -> None:
    part, started = waiting[0], time.monotonic()
    ended: object = "stopped"
    log.say(f"== {part}")
    try:
        begun = worker.wait_for("begin", part, min(START_S, until - started))
        if begun == 0:
            started = time.monotonic()
            limit_s = limit_of_first([PARTS[name][1] for name in waiting], until - started)
        ended = worker.wait_for("end", part, limit_s) if begun == 0 else begun
    finally:
        wall_s = round(time.monotonic() - started, 1)
        append(results, {"part": part, "ended": ended, "wall_s": wall_s, "output": log.tail() if ended else ""})
        log.say(f"== {part}: ended with {ended} after {wall_s} s")


def environment_of_parts(scratch: Path, *, rehearse: bool) -> dict[str, str]:
    """Paths made absolute, because parts run in folders of their own; what libraries write goes to ``scratch``."""
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = os.pathsep.join([*given, str(LINKS)])
    named = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "TMPDIR": str(scratch)}
    on_cpu = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | named | (on_cpu if rehearse else {})


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every part ended well or was absent and every check held, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="these parts only, in this order")
    parser.add_argument("--limit-s", type=float, help=f"seconds for the whole call; {TOTAL_S:.0f} if not given")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args(argv)
    total_s = args.limit_s or (REHEARSAL_S if args.rehearse else TOTAL_S)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out.resolve() / "gpu_suite.jsonl"
    old_rows = len(results.read_text().splitlines()) if results.exists() else 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (
        tempfile.TemporaryDirectory(prefix="gpu_suite-", ignore_cleanup_errors=True) as scratch,
        Log(args.out.resolve() / "gpu_suite.log") as log,
    ):
        run(args.part, total_s, results, log, Path(scratch), rehearse=args.rehearse)
        rows = [json.loads(line) for line in results.read_text().splitlines()[old_rows:]]
        for line in summary(rows):
            log.say(line)
            print(line, flush=True)
    return int(any(map(is_bad, rows)))


if __name__ == "__main__":
    sys.exit(main())
