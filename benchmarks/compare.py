"""Compares providers (implementations) of one op: one process, one set of inputs, alternating round by round.

Time: median of the calls with p20 and p80. On the CPU a round is one call by the host's clock. On CUDA a round is up to
20 calls by events on the device, which does not wait for the host and finds nothing in its L2 cache; ``host_s`` is the
host's time to launch one call. Memory: on CUDA max_memory_allocated above what was allocated before; on the CPU the
growth of the peak resident set (VmHWM, reset through /proc/self/clear_refs; Linux only, else not given). Rate: the cost
model (FLOP or bytes) of the benchmark file, divided by the median. Error: the largest difference from float64 on the
same rounded inputs, divided by the largest value; the worst output counts. A provider whose error exceeds PyTorch's own
in the same dtype by ``BOUND`` (ours) or ``PEER_BOUND`` (others) times, and 8 eps, is "wrong" and gets no speed. So is
one whose difference has a norm above ``NORM_BOUND`` of the value's own, whatever PyTorch's is: zeros have 1.
"""

import ctypes
import functools
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isomorph.kernels import backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUND, PEER_BOUND = 4.0, 16.0
NORM_BOUND = 0.5
OURS, EAGER, COMPILED = "isomorph", "torch eager", "torch.compile"
MIN_ROUNDS = 5
CALLS_A_ROUND, ROUND_S = 20, 2e-3  # on CUDA: calls of one round at most, and what they take together at most
L2_BYTES = 256 * 2**20  # more than any GPU's L2 cache holds
SPIN_HZ = 2e9  # cycles of the spinning kernel a second, at most
CLEAR_REFS = Path("/proc/self/clear_refs")
Run = Callable[[], tuple[Tensor, ...]]


class Absent(Exception):
    """A peer that cannot run here, and why."""


@dataclass(frozen=True)
class Case:
    """One op at one size. ``providers`` return the function to time when called, and may raise ``Absent``."""

    op: str
    size: str
    dtype: torch.dtype
    providers: dict[str, Callable[[], Run]]
    exact: Run  # in float64, from the same rounded inputs
    ceiling: Callable[[], object] | None = None  # the work that cannot be avoided, done by the vendor's library
    ceiling_name: str = ""
    flop: int = 0  # by the file's model, or
    byte: int = 0


def ours(op: str, run: Run) -> dict[str, Callable[[], Run]]:
    """Every implementation of ``op`` that runs here except the reference; the default one is called ``OURS``."""
    default, *others = backend.bodies(op, DEVICE.type)
    found: dict[str, Callable[[], Run]] = {OURS: lambda: run}
    for body in others:
        if body != "reference":
            found[f"{OURS} ({body})"] = lambda body=body: _with_body(f"{op}={body}", run)  # type: ignore[misc]
    return found


def _with_body(request: str, run: Run) -> Run:
    def chosen() -> tuple[Tensor, ...]:
        with backend.using(request):
            return run()

    return chosen


def measure(case: Case, *, max_rounds: int, budget_s: float) -> Iterator[dict[str, Any]]:
    """A row for each provider."""
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    exact = case.exact()
    for name, make in case.providers.items():
        rows[name] = {"provider": name}
        try:
            run = make()
            out, rows[name]["memory_mib"] = _first(run)
        except (Absent, ImportError) as reason:
            rows[name].update(status="absent", reason=f"{reason}")
        except Exception as failure:  # a peer's failure is a result
            rows[name].update(status="failed", reason=f"{type(failure).__name__}: {failure}"[:300])
            free_memory()
        else:
            runs[name] = run
            rows[name].update(status="ok", error=_error(out, exact), norm_error=_norm_error(out, exact))
            del out
    _judge(rows, case.dtype)
    del exact
    runs = {name: run for name, run in runs.items() if rows[name]["status"] == "ok"}
    ceiling = {"ceiling": case.ceiling} if case.ceiling else {}
    seconds, host_s = take_turns({**runs, **ceiling}, max_rounds, budget_s)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name in runs:
        low, high = quantiles(seconds[name])
        rows[name].update(median_s=medians[name], p20_s=low, p80_s=high, rounds=len(seconds[name]))
        if name in host_s:
            rows[name].update(clock="device events, cold L2", host_s=host_s[name])
        if OURS in medians:
            rows[name]["ratio"] = medians[name] / medians[OURS]
        if case.flop or case.byte:
            rows[name]["gflop_s" if case.flop else "gb_s"] = (case.flop or case.byte) / medians[name] / 1e9
        if ceiling:
            rows[name].update(ceiling=case.ceiling_name, ceiling_percent=100 * medians["ceiling"] / medians[name])
    for row in rows.values():
        yield {"op": case.op, "size": case.size, "dtype": str(case.dtype).removeprefix("torch."), **row, **_here()}


def _judge(rows: dict[str, dict[str, Any]], dtype: torch.dtype) -> None:
    eager = rows.get(EAGER, {}).get("error", 0.0)
    for name, row in rows.items():
        bound = (BOUND if name.startswith(OURS) else PEER_BOUND) * eager + 8 * torch.finfo(dtype).eps
        if row["status"] == "ok" and not row["error"] <= bound:
            row.update(status="wrong", reason=f"error {row['error']:.1e}, bound {bound:.1e}")
        elif row["status"] == "ok" and not row["norm_error"] <= NORM_BOUND:
            row.update(status="wrong", reason=f"norm of the error {row['norm_error']:.2f} of the value's")


def only_ours(case: Case) -> Case:
    """Our implementations and PyTorch's own operations; the latter set the error that is usual in this dtype."""
    kept = {name: make for name, make in case.providers.items() if name.startswith(OURS) or name == EAGER}
    return replace(case, providers=kept)


def beside_each_peer(case: Case, *, max_rounds: int, budget_s: float) -> Iterator[dict[str, Any]]:
    """A row for each peer, measured in turns with ours, as soon as it is there; what compiles comes last."""
    exact = functools.cache(case.exact)
    peers = [name for name in case.providers if not name.startswith(OURS) and name != EAGER]
    for name in sorted(peers, key=lambda name: COMPILED in name):
        three = {who: case.providers[who] for who in (OURS, EAGER, name)}
        for row in measure(replace(case, providers=three, exact=exact), max_rounds=max_rounds, budget_s=budget_s):
            if row["provider"] == name:
                yield row
        free_memory()


def take_turns(
    runs: dict[str, Callable[[], object]], max_rounds: int, budget_s: float, *, by_host: bool = DEVICE.type != "cuda"
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the calls, round by round, and on CUDA the host's time to launch one call."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    host_s = {} if by_host else {name: _host_and_whole(run) for name, run in runs.items()}
    until = time.perf_counter() + budget_s
    for index in range(max_rounds):
        if index >= MIN_ROUNDS and time.perf_counter() > until:
            break
        for name, run in runs.items():
            if by_host:
                start = now()
                run()
                seconds[name].append(now() - start)
            else:
                seconds[name] += _device_seconds(run, *host_s[name])
    return seconds, {name: host for name, (host, _) in host_s.items()}


def _host_and_whole(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the call returns, and until the device has finished its work."""
    start = now()
    run()
    host = time.perf_counter() - start
    return host, now() - start


def _device_seconds(run: Callable[[], object], host_s: float, whole_s: float) -> list[float]:
    """Of several calls in a row. The device spins until the host has given all of them out: it never waits."""
    calls = max(1, min(CALLS_A_ROUND, int(ROUND_S / whole_s)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(2 * calls * host_s, 0.05) * SPIN_HZ))
    for start, end in events:
        _l2_filler().zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


@functools.cache
def _l2_filler() -> Tensor:
    return torch.empty(L2_BYTES, dtype=torch.int8, device=DEVICE)


def free_memory() -> None:
    """After a failure or a large case. Raises what CUDA says where its context is lost."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _first(run: Run) -> tuple[tuple[Tensor, ...], float | None]:
    """The outputs, and the peak of memory above the start in MiB; the second call, so that nothing is compiled."""
    run()
    memory = PeakMemory()
    out = run()
    return out, memory.mib()


class PeakMemory:
    """MiB at the peak since this was made, above what was in use then."""

    def __init__(self) -> None:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        elif CLEAR_REFS.exists():
            ctypes.CDLL(None).malloc_trim(0)  # what is free must not serve the next allocation unseen
            CLEAR_REFS.write_text("5")
            self.before = _status_mib("VmRSS")

    def mib(self) -> float | None:
        if DEVICE.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return max(0.0, _status_mib("VmHWM") - self.before) if CLEAR_REFS.exists() else None


def _status_mib(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def _error(out: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """A provider may give fewer outputs than the reference: the first ones."""
    worst = 0.0
    for got, want in zip(out, exact, strict=False):
        if got.shape != want.shape:
            return math.inf
        difference = (got.detach().double() - want.double()).abs().max() if want.numel() else torch.zeros(())
        error = float(difference / want.double().abs().max().clamp(min=1e-30)) if want.numel() else 0.0
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            return math.inf
    return worst


def _norm_error(out: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The norm of the difference over that of the exact value; of the outputs that are not all zero, the worst."""
    errors = [
        float((got.detach().double() - want.double()).norm() / want.double().norm())
        for got, want in zip(out, exact, strict=False)
        if got.shape == want.shape and want.any()
    ]
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def quantiles(times: list[float]) -> tuple[float, float]:
    ordered = sorted(times)
    return ordered[round(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    _wait()
    return time.perf_counter()


def append_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def machine(device_type: str) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _here() -> dict[str, Any]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "machine": machine(DEVICE.type),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "triton": triton_version,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *(Path(arg).name if arg.startswith("/") else arg for arg in sys.argv)]),
    }


def check(case: Case) -> None:
    """For pytest: our own implementations must be right; prints every row."""
    rows = list(measure(case, max_rounds=3, budget_s=2.0))
    for row in rows:
        print(json.dumps(row))
    bad = [row for row in rows if row["provider"].startswith(OURS) and row["status"] != "ok"]
    assert not bad, bad
