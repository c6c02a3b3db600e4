"""What the machine did while a step ran: this process's memory, and of the GPU what NVML says once a second.

A number that nobody measured is None, never 0; ``Telemetry.reason`` says why. Units stand in the names.

    mem/rss_gib  mem/peak_rss_gib  mem/gpu_peak_gib          at the end; the most within the step
    gpu/util  gpu/mem_gib  gpu/power_w  gpu/clock_mhz        mean; mem: the most
    gpu/throttle                                             reasons seen in any sample, joined by commas
    energy/step_j  energy/j_per_tok  energy/j_per_correct    of all ranks' GPUs; per token in the loss; per right answer
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

Told = tuple[str, float] | None  # a rank's GPU and its joules
Gather = Callable[[Told], list[Told]]

PERIOD_S = 1.0
WINDOW, MIN_GROWTH, NUM_GROWING = 20, 0.005, 4  # steps; share of the memory, from window to window; windows in a row
STEPS_BETWEEN_TRIMS = 10  # of the C allocator's heap
MIN_PACE = 0.75  # growth in the later half of those windows over that in the earlier half: below, a cache is filling
# bits of NVML's reasons for a clock below its maximum; idleness (1) and the user's own limit (2) are none
THROTTLE = {0x4: "power_cap", 0x8: "hw_slowdown", 0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "power_brake"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at a GPU."""

    at_s: float  # perf_counter
    util: float  # share of the last second in which a kernel ran
    mem_gib: float  # in use, by anybody
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
        except self.nvml.NVMLError_NotSupported:  # before Volta; the power is integrated instead
            return None


def find_gpu(device: torch.device) -> tuple[Gpu | None, str]:
    """The GPU that ``device`` names, or None and the reason."""
    if device.type != "cuda":
        return None, f"the run is on the {device.type.upper()}"
    return connect(str(torch.cuda.get_device_properties(device).uuid))  # NVML does not know CUDA_VISIBLE_DEVICES


def connect(uuid: str) -> tuple[Gpu | None, str]:
    """The GPU with this identity, or None and the reason."""
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
    """Memory that only ever grows, and does not slow down: by the least of each window of steps.

    Caches that fill, and shapes that are seen for the first time, grow less and less; what is never freed does not.
    """

    window: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)  # of the last whole windows, NUM_GROWING + 1 at most
    num_alarms: int = 0

    def observe(self, rss_gib: float) -> bool:
        """True where the alarm goes off: once for every NUM_GROWING windows in a row."""
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
    """Looks at the machine from ``begin`` to ``end`` of each step; the GPU between them too, in a thread of its own."""

    def __init__(self, gpu: Gpu | None = None, reason: str = "nobody asked for it") -> None:
        self.gpu, self.reason = gpu, "" if gpu else reason
        self.growth = Growth()
        self._num_begun = 0
        self._samples: deque[Sample] = deque()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open the GPU is looked at every PERIOD_S."""
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
        self._look()

    def end(self, *, num_tok: int, num_correct: int, gather: Gather = lambda own: [own]) -> dict[str, Any]:
        """The step's numbers. ``num_tok``: that counted in the loss, of all ranks; ``gather``: what each rank says."""
        rss_gib, peak_gib = process_memory_gib()
        gpu_peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None
        memory = {"mem/rss_gib": rss_gib, "mem/peak_rss_gib": peak_gib, "mem/gpu_peak_gib": gpu_peak}
        self._look()
        own = (self.gpu.uuid, _energy_j(list(self._samples))) if self.gpu else None
        energy = _energy(gather(own), num_tok, num_correct)
        if self.gpu is None:
            return {**memory, **dict.fromkeys(GPU_KEYS), **energy}
        return {**memory, **_summed_up(list(self._samples)), **energy}

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(PERIOD_S):
            self._look()

    def _look(self) -> None:
        """A GPU that NVML loses is looked at no more: numbers that are missing must not end a run."""
        gpu = self.gpu
        if gpu is None:
            return
        try:
            self._samples.append(gpu.sample())
        except gpu.nvml.NVMLError as error:
            self.gpu, self.reason = None, f"NVML: {error}"


GPU_KEYS = tuple(f"gpu/{name}" for name in ("util", "mem_gib", "power_w", "clock_mhz", "throttle"))
ENERGY_KEYS = tuple(f"energy/{name}" for name in ("step_j", "j_per_tok", "j_per_correct"))


def _energy(told: list[Told], num_tok: int, num_correct: int) -> dict[str, float | None]:
    """Of all ranks' GPUs, one that two ranks share counted once; None where any rank did not measure."""
    known = [one for one in told if one is not None]
    if len(known) < len(told):
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
    """By the card's own counter, or by trapezoids under the power."""
    first, last = samples[0].energy_j, samples[-1].energy_j
    if first is not None and last is not None:
        return last - first
    pairs = zip(samples, samples[1:], strict=False)
    return sum((b.at_s - a.at_s) * (a.power_w + b.power_w) / 2 for a, b in pairs)


# -- this process
def process_memory_gib() -> tuple[float | None, float | None]:
    """Resident memory now, and the most since ``begin`` (where the system cannot forget: since the start)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None, max_rss / (2**30 if sys.platform == "darwin" else 2**20)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    rss, peak = (int(fields[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    return rss, peak


def give_back_freed_memory() -> None:
    """Returns to the system what the C allocator keeps of freed memory; where it is not glibc's, nothing.

    A step frees blocks of a hundred sizes, and small ones that live on keep them from being joined: without this the
    heap of a tiny model grew to four times what was in use. A step then touches its pages anew, one in ten.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # not on Linux, or a container forbids it: the peak is then the run's
        Path("/proc/self/clear_refs").write_text("5")
