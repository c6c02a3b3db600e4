"""What a GPU machine is asked first, in one call of at most nine minutes, most valuable first.

    PYTHONPATH=.links:.peers python benchmarks/gpu_suite.py --out FOLDER [--rehearse] [--part NAME ...]

Every part is a child process with its own time limit; every result is appended to FOLDER/gpu_suite.jsonl the moment it
is there, a failure with its output. A short table comes last. Nothing needs an installed isomorph or its C++ module.
--rehearse runs each part at tiny sizes on the CPU, Triton interpreted. What the machine lacks of pydantic, pytest,
hypothesis and of the peers (trl with accelerate and datasets, liger-kernel, cut-cross-entropy, verl) is taken from
.peers, made elsewhere by pip install --no-deps --target .peers; without a peer its rows read absent.

A new part is a function of gpu_parts.py and a line in PARTS.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

import gpu_parts as ask
from compare import COMPILED, EAGER, OURS

TOTAL_S = 540.0
# name: what runs, seconds at most; most valuable first
PARTS: dict[str, tuple[Callable[[bool], ask.Rows], float]] = {
    "gpu_tests": (ask.gpu_tests, 90.0),
    "gemm": (ask.gemm_ceiling, 30.0),
    "alone": (ask.rows_alone, 30.0),
    "linear_loss": (ask.ops("bench_linear_loss"), 120.0),
    "memory": (ask.head_memory, 30.0),
    "packed_attention": (ask.ops("bench_packed_attention"), 60.0),
    "layers": (ask.layer_stack, 60.0),
    "update": (ask.update, 60.0),
    "smoke": (ask.smoke_run, 90.0),
    "decode_attention": (ask.ops("bench_decode_attention"), 30.0),
    "sampler": (ask.sampler_speed, 45.0),
    "step": (ask.step_beside_trl, 90.0),
    "trl_adapter": (ask.trl_adapter, 45.0),
    "energy": (ask.energy, 15.0),
    "optimizers": (ask.optimizers, 45.0),
    "linear_logprob": (ask.ops("bench_linear_logprob"), 60.0),
    "token_logprob": (ask.ops("bench_token_logprob"), 30.0),
    "sample_token": (ask.ops("bench_sample_token"), 20.0),
    "advantage": (ask.ops("bench_advantage"), 30.0),
    "kernel_tests": (ask.kernel_tests, 120.0),
}


def _child(part: str, rehearse: bool, file: Path) -> None:
    for row in PARTS[part][0](rehearse):
        _append(file, {"part": part, **row})


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _run_part(part: str, limit_s: float, rehearse: bool, file: Path) -> None:
    command = [sys.executable, __file__, "--out", str(file.parent), "--child", part, *["--rehearse"][: int(rehearse)]]
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {})
    started = time.monotonic()
    with (file.parent / f"{part}.log").open("w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code: int | str = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)  # with what it started itself
            child.wait()
            code = f"cut after {limit_s:.0f} s"
        log.seek(0)
        output = log.read()[-6000:] if code else ""
    _append(file, {"part": part, "ended": code, "wall_s": round(time.monotonic() - started, 1), "output": output})
    print(part, "ended with", code, flush=True)


def summary(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each figure; of each case ours, PyTorch's and the three best peers'; and how each part ended."""
    lines = []
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "ended" in row:
            lines += [line for case in cases.values() for line in _case_lines(case)]
            cases = {}
            lines.append(f"== {row['part']}: ended with {row['ended']} after {row.get('wall_s', 0)} s")
        elif "provider" in row:
            cases.setdefault((row["op"], row["size"], row["dtype"]), []).append(row)
        else:
            lines.append(f"   {row['check']}: {_figures(row)}")
            lines += [f"      {line[:150]}" for line in row.get("failed", [])[:10] if isinstance(row["failed"], list)]
    return lines


def _figures(row: dict[str, Any]) -> str:
    if isinstance(row.get("failed"), str):
        return f"FAILED {row['failed'].splitlines()[-1][:150]}" if row["failed"] else "FAILED"
    formats = {"value": "{:.4g}", "median_s": "{:.4g} s", "tflops": "{:.1f} TFLOP/s", "peak_mib": "{:.0f} MiB",
               "packed_tok_s": "{:.0f} packed tok/s", "gain": "{:.2f} times", "result": "{}"}  # fmt: skip
    return ", ".join(form.format(row[name]) for name, form in formats.items() if row.get(name) is not None)


def _case_lines(rows: list[dict[str, Any]]) -> list[str]:
    ok = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_s"])
    bad = [f"{row['provider']} {row['status']}" for row in rows if row["status"] != "ok"]
    head = f"   {rows[0]['op']}, {rows[0]['size']}, {rows[0]['dtype']}; not measured: {', '.join(bad) or 'none'}"
    others = [row["provider"] for row in ok if not row["provider"].startswith(OURS)]
    shown = {EAGER, COMPILED, *others[:3]}
    kept = [row for row in ok if row["provider"].startswith(OURS) or row["provider"] in shown]
    return [head, *(f"      {row['provider']:<38} {_speed(row)}" for row in kept)]


def _speed(row: dict[str, Any]) -> str:
    percent = f"{row['ceiling_percent']:.0f} % of {row['ceiling']}" if "ceiling_percent" in row else ""
    memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f} MiB"
    return f"{1e3 * row['median_s']:9.3f} ms  {percent:<18} {memory:>10}  error {row['error']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="these parts only")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu_suite.jsonl"
    if args.child:
        return _child(args.child, args.rehearse, file)
    patience = 10 if args.rehearse else 1  # an interpreter on two busy cores proves that a part runs, not how fast
    until = time.monotonic() + TOTAL_S * patience
    for part in args.part:
        left_s = until - time.monotonic()
        if left_s < 5:
            _append(file, {"part": part, "ended": "no time left"})
        else:
            _run_part(part, min(PARTS[part][1] * patience, left_s), args.rehearse, file)
    print("\n".join(summary(map(json.loads, file.read_text().splitlines()))))


if __name__ == "__main__":
    main()
