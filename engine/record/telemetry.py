"""Measures memory of this process, and the GPU through NVML once a second, during a step.

What could not be measured is None, never 0; ``Telemetry.reason`` says why. Units are part of the keys.

    mem/rss_gib  mem/peak_rss_gib  mem/gpu_peak_gib          at the end of the step; maxima within the step
    gpu/util  gpu/power_w  gpu/clock_mhz  gpu/mem_gib        means over the step; mem: maximum
    gpu/throttle                                             throttle reasons of all samples, joined by commas
    energy/step_j  energy/j_per_tok  energy/j_per_correct    all ranks' GPUs; per token in loss; per correct response
"""

import contextlib
import ctypes
import importlib
import itertools
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Energy = tuple[str, float] | None  # uuid of a rank's GPU and joules of the step; None: not measured
Gather = Callable[[Energy], list[Energy]]

PERIOD_S = 1.0  # between two samples of the GPU
WINDOW, MIN_GROWTH, NUM_GROWING = 20, 0.005, 4  # steps; relative growth between windows; consecutive windows
STEPS_BETWEEN_TRIMS = 10  # of the C allocator's heap
MIN_PACE = 0.75  # growth in the later half of those windows / in the earlier half; a filling cache is below
# bits of NVML's throttle reasons; idle (1) and the limit that the user set (2) are left out
THROTTLE = {0x4: "power_cap", 0x8: "hw_slowdown", 0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "power_brake"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of a GPU."""

    at_s: float  # perf_counter
    util: float  # share of the last second in which a kernel ran
    mem_gib: float  # in use, by all processes
    power_w: float
    clock_mhz: float
    throttle: int  # bits of THROTTLE
    energy_j: float | None  # since the driver was loaded; None on cards without that counter


class Gpu:
    """One GPU through NVML. ``nvml`` is the module pynvml; no other GPU has the same ``uuid``."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self.nvml, self.handle, self.uuid = nvml, handle, uuid

    def sample(self) -> Sample:
        nvml, handle = self.nvml, self.handle
        return Sample(
            at_s=time.perf_counter(),
            util=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            mem_gib=nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            throttle=nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            energy_j=self._energy_j(),
        )

    def _energy_j(self) -> float | None:
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except self.nvml.NVMLError_NotSupported:  # before Volta: power is integrated instead
            return None


def find_gpu(device: torch.device) -> tuple[Gpu | None, str]:
    """Returns the GPU of ``device`` and "", or None and the reason."""
    if device.type != "cuda":
        return None, f"the run is on the {device.type.upper()}"
    return connect(str(torch.cuda.get_device_properties(device).uuid))  # NVML ignores CUDA_VISIBLE_DEVICES


def connect(uuid: str) -> tuple[Gpu | None, str]:
    """Returns the GPU with this UUID and "", or None and the reason."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "nvidia-ml-py is not installed: pip install 'isomorph[telemetry]'"
    try:
        nvml.nvmlInit()
        gpu = Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}"), uuid)
        gpu.sample()
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"
    return gpu, ""


@dataclass(slots=True)
class Growth:
    """Detects a possible memory leak: growth of the minimum of each window of steps that does not slow down.

    Growth from filling caches and from shapes that occur for the first time slows down.
    """

    window: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)  # minima of the last complete windows, at most NUM_GROWING + 1
    num_alarms: int = 0

    def observe(self, rss_gib: float) -> bool:
        """Adds a step's resident memory; returns True once for every NUM_GROWING consecutive growing windows."""
        self.window.append(rss_gib)
        if len(self.window) < WINDOW:
            return False
        self.floors = [*self.floors, min(self.window)][-NUM_GROWING - 1 :]
        self.window = []
        steps = [after - before for before, after in itertools.pairwise(self.floors)]
        are_growing = all(step > MIN_GROWTH * floor for step, floor in zip(steps, self.floors, strict=False))
        if len(steps) < NUM_GROWING or not are_growing:
            return False
        half = NUM_GROWING // 2
        if sum(steps[half:]) < MIN_PACE * sum(steps[:half]):
            return False
        self.floors = self.floors[-1:]
        self.num_alarms += 1
        return True


class Telemetry:
    """Measures the machine from ``begin`` to ``end`` of each step; the GPU in a thread of its own."""

    def __init__(self, gpu: Gpu | None = None, reason: str = "not requested") -> None:
        self.gpu, self.reason = gpu, "" if gpu else reason
        self.growth = Growth()
        self._num_begun = 0
        self._samples: deque[Sample] = deque()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which the GPU is sampled every PERIOD_S."""
        if self.gpu is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="telemetry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def begin(self) -> None:
        self._samples.clear()
        if self._num_begun % STEPS_BETWEEN_TRIMS == 0:
            give_back_freed_memory()
        self._num_begun += 1
        _forget_peak()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._sample()

    def end(self, *, num_tok: int, num_correct: int, gather: Gather = lambda own: [own]) -> dict[str, Any]:
        """Returns the step's keys, as in the module's table. Arguments as those of ``RunLog.end_step``."""
        rss_gib, peak_gib = process_memory_gib()
        gpu_peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None
        memory = {"mem/rss_gib": rss_gib, "mem/peak_rss_gib": peak_gib, "mem/gpu_peak_gib": gpu_peak}
        self._sample()
        own = (self.gpu.uuid, _energy_j(list(self._samples))) if self.gpu else None
        energy = _energy(gather(own), num_tok, num_correct)
        if self.gpu is None:
            return {**memory, **dict.fromkeys(GPU_KEYS), **energy}
        return {**memory, **_summed_up(list(self._samples)), **energy}

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        """Samples the GPU. If NVML fails, sampling ends and the keys are None: that must not end a run."""
        gpu = self.gpu
        if gpu is None:
            return
        try:
            self._samples.append(gpu.sample())
        except gpu.nvml.NVMLError as error:
            self.gpu, self.reason = None, f"NVML: {error}"


GPU_KEYS = tuple(f"gpu/{name}" for name in ("util", "mem_gib", "power_w", "clock_mhz", "throttle"))
ENERGY_KEYS = tuple(f"energy/{name}" for name in ("step_j", "j_per_tok", "j_per_correct"))


def _energy(of_ranks: list[Energy], num_tok: int, num_correct: int) -> dict[str, float | None]:
    """Energy of all ranks' GPUs, a shared GPU counted once; None if any rank did not measure."""
    known = [one for one in of_ranks if one is not None]
    if len(known) < len(of_ranks):
        return dict.fromkeys(ENERGY_KEYS)
    step_j = sum(dict(known).values())
    each = (step_j / num if num else None for num in (num_tok, num_correct))
    return dict(zip(ENERGY_KEYS, (step_j, *each), strict=True))


def _summed_up(samples: list[Sample]) -> dict[str, Any]:
    seen = 0
    for sample in samples:
        seen |= sample.throttle
    values = (
        sum(s.util for s in samples) / len(samples),
        max(s.mem_gib for s in samples),
        sum(s.power_w for s in samples) / len(samples),
        sum(s.clock_mhz for s in samples) / len(samples),
        ",".join(name for bit, name in THROTTLE.items() if seen & bit),
    )
    return dict(zip(GPU_KEYS, values, strict=True))


def _energy_j(samples: list[Sample]) -> float:
    """Joules by the GPU's energy counter, or by integrating power with the trapezoidal rule."""
    first, last = samples[0].energy_j, samples[-1].energy_j
    if first is not None and last is not None:
        return last - first
    pairs = zip(samples, samples[1:], strict=False)
    return sum((b.at_s - a.at_s) * (a.power_w + b.power_w) / 2 for a, b in pairs)


# -- this process
def process_memory_gib() -> tuple[float | None, float | None]:
    """Returns resident memory now, and its peak since ``begin`` (since the process began, if it cannot be reset)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None, max_rss / (2**30 if sys.platform == "darwin" else 2**20)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    rss, peak = (int(fields[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    return rss, peak


def give_back_freed_memory() -> None:
    """Returns freed memory from glibc's allocator to the system; does nothing with another allocator.

    A step frees blocks of many sizes, and small live blocks between them prevent merging: without this the heap of a
    tiny model grew to four times what was in use. One step in ten then has its page faults again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # not on Linux, or forbidden in a container: the peak is that of the run
        Path("/proc/self/clear_refs").write_text("5")
