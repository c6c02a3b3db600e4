"""Cores, memory and processor time that this process can use. PyTorch is imported only to measure."""

import os
import statistics
import time
from pathlib import Path

PROBE_S = 0.4
SLOW_BFLOAT16 = "this processor has no AVX-512, without which PyTorch multiplies bfloat16 slowly"


def usable_cores() -> float:
    """Number of cores, limited by affinity and by a container's quota."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        cores = cores if allowed == "max" else min(cores, int(allowed) / int(period))
    return cores


def available_gib() -> float | None:
    """Free memory in GiB, limited by a container; None on systems other than Linux."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) / 2**20
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, (int(text) - int(used.read_text())) / 2**30)
    return free


def measure_contention(seconds: float = PROBE_S) -> tuple[float, float]:
    """(processor time / wall time per thread, speedup over one thread) of matrix products over ``seconds``.

    The first is below 1 where other processes take the cores: OpenMP threads then wait for a descheduled one.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = _products(seconds / 2)
        torch.set_num_threads(threads)
        together, share = _products(seconds)
    finally:
        torch.set_num_threads(threads)
    return share / threads, alone / together


def _products(seconds: float) -> tuple[float, float]:
    """Median seconds of one product, and processor seconds per wall second over all of them."""
    import torch

    a = torch.ones(640, 640)
    a @ a  # starts the threads
    times: list[float] = []
    wall, processor = time.perf_counter(), time.process_time()
    while not times or time.perf_counter() - wall < seconds:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    return statistics.median(times), share
