"""Memory and GPU numbers of a step. There is no GPU here: NVML's module is played, the rest is real."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from played_clock import until

from isomorph.engine.record import telemetry
from isomorph.engine.record.telemetry import (
    ENERGY_KEYS,
    GPU_KEYS,
    NUM_GROWING,
    WINDOW,
    Gpu,
    Growth,
    Telemetry,
    connect,
    find_gpu,
)


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


class PlayedNvml:
    """100 W, then 10 W more with every look; the energy counter, where there is one, 50 J more."""

    NVML_CLOCK_SM = 1
    NVMLError, NVMLError_NotSupported = NVMLError, NotSupported

    def __init__(self, *, has_counter: bool = True) -> None:
        self.num_looks, self.has_counter = 0, has_counter

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        self.num_looks += 1
        return SimpleNamespace(gpu=20 * self.num_looks)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(used=(10 - self.num_looks) * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return 90_000 + 10_000 * self.num_looks

    def nvmlDeviceGetClockInfo(self, handle: Any, which: int) -> int:
        return 1000 + self.num_looks

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:
        return {1: 0x1, 2: 0x4 | 0x1}.get(self.num_looks, 0x20)  # idle; power cap; thermal

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        if not self.has_counter:
            raise NotSupported
        return 50_000 * self.num_looks


def watched(nvml: PlayedNvml, uuid: str = "a") -> Telemetry:
    return Telemetry(Gpu(nvml, handle=None, uuid=uuid))


def test_a_steps_looks_are_summed_up() -> None:
    log = watched(PlayedNvml())
    log.begin()
    row = log.end(num_tok=25, num_correct=4)
    assert row["gpu/util"] == pytest.approx(0.3) and row["gpu/mem_gib"] == 9
    assert row["gpu/power_w"] == 105 and row["gpu/clock_mhz"] == 1001.5
    assert row["gpu/throttle"] == "power_cap"
    assert (row["energy/step_j"], row["energy/j_per_tok"], row["energy/j_per_correct"]) == (50, 2, 12.5)
    log.begin()  # the third look: nothing of the step before is left
    assert log.end(num_tok=0, num_correct=0)["gpu/throttle"] == "sw_thermal"


def test_no_token_and_no_right_answer_have_no_price() -> None:
    log = watched(PlayedNvml())
    log.begin()
    row = log.end(num_tok=0, num_correct=0)
    assert row["energy/step_j"] == 50 and row["energy/j_per_tok"] is None and row["energy/j_per_correct"] is None


@pytest.mark.parametrize(("others", "joules"), [([("b", 30.0)], 80), ([("a", 50.0)], 50), ([("b", 30.0), None], None)])
def test_the_energy_is_that_of_all_ranks_and_a_gpu_counts_once(others: list[Any], joules: float | None) -> None:
    log = watched(PlayedNvml())
    log.begin()
    row = log.end(num_tok=10, num_correct=0, gather=lambda own: [own, *others])
    assert row["energy/step_j"] == joules and row["gpu/power_w"] == 105
    assert row["energy/j_per_tok"] == (None if joules is None else joules / 10)


def test_without_a_counter_the_power_is_integrated(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = iter((20.0, 20.5))
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(looked))
    log = watched(PlayedNvml(has_counter=False))
    log.begin()
    row = log.end(num_tok=1, num_correct=1)
    assert row["energy/step_j"] == 105 * 0.5


def test_a_gpu_that_is_lost_in_the_middle_leaves_holes_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = PlayedNvml()
    log = watched(nvml)
    log.begin()

    def lost(handle: Any) -> Any:
        raise NVMLError("GPU is lost")

    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", lost)
    row = log.end(num_tok=1, num_correct=1)
    assert {row[key] for key in (*GPU_KEYS, *ENERGY_KEYS)} == {None} and row["mem/rss_gib"] > 0
    assert log.reason == "NVML: GPU is lost"
    log.begin()


def test_a_thread_looks_while_the_step_runs_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "PERIOD_S", 0.01)
    nvml = PlayedNvml()
    log = watched(nvml)
    with log.watching():
        log.begin()
        until(lambda: nvml.num_looks > 5)
        log.end(num_tok=1, num_correct=1)
    looks = nvml.num_looks
    time.sleep(0.05)
    assert nvml.num_looks == looks


def test_what_is_not_measured_is_none_with_a_reason() -> None:
    gpu, reason = find_gpu(torch.device("cpu"))
    log = Telemetry(gpu, reason)
    with log.watching():
        log.begin()
        row = log.end(num_tok=1, num_correct=1)
    assert log.reason == "the run is on the CPU"
    assert {row[key] for key in (*GPU_KEYS, *ENERGY_KEYS)} == {None}
    assert row["mem/rss_gib"] > 0 and row["mem/peak_rss_gib"] >= row["mem/rss_gib"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the driver is there")
def test_without_a_driver_nvml_says_so() -> None:
    pytest.importorskip("pynvml")
    gpu, reason = connect("GPU-0")
    assert gpu is None and reason.startswith("NVML: ")


def test_without_its_package_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)  # as where it is not installed
    gpu, reason = connect("GPU-0")
    assert gpu is None and "pip install 'isomorph[telemetry]'" in reason


def test_memory_that_only_grows_sets_off_the_alarm() -> None:
    growth = Growth()
    alarms = [growth.observe(1.0 + 0.001 * step) for step in range((NUM_GROWING + 1) * WINDOW)]
    assert alarms.index(True) == len(alarms) - 1 and growth.num_alarms == 1


def test_memory_that_comes_and_goes_or_settles_does_not() -> None:
    growth = Growth()
    assert not any(growth.observe(1.0 + 0.5 * (step % 7 == 0)) for step in range(20 * WINDOW))
    growth = Growth()
    assert not any(growth.observe(min(2.0, 1.0 + 0.02 * step)) for step in range(20 * WINDOW))
    growth = Growth()  # caches fill: each window finds fewer shapes that are new than the one before
    assert not any(growth.observe(2.0 - 0.8 ** (step / WINDOW)) for step in range(20 * WINDOW))


# In a process of its own: the peak counts what every thread of a process allocates.
MEMORY = """
import ctypes, json, sys
import numpy as np, torch
from isomorph.engine.record.telemetry import Telemetry, process_memory_gib
telemetry = Telemetry()
telemetry.begin()
large = np.ones(200 * 2**20 // 8)
del large
first = telemetry.end(num_tok=1, num_correct=1)
telemetry.begin()
second = telemetry.end(num_tok=1, num_correct=1)
given_back = None
if hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).mallopt(-3, 1 << 26)  # M_MMAP_THRESHOLD: from the heap, as blocks are after the first large ones
    telemetry = Telemetry()
    telemetry.begin()
    blocks = [torch.ones(1 << 18) for _ in range(512)]  # 1 MiB each
    small = [torch.ones(1 << 8) for _ in blocks]  # live on, in what the last ones of them leave
    del blocks
    before, _ = process_memory_gib()
    for _ in range(20):
        telemetry.begin()
    after, _ = process_memory_gib()
    given_back = before - after
json.dump({"first": first, "second": second, "given_back": given_back}, sys.stdout)
"""


@pytest.fixture(scope="module")
def measured() -> Any:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_peak_is_the_steps_own(measured: Any) -> None:
    first, second = measured["first"], measured["second"]
    assert first["mem/peak_rss_gib"] - first["mem/rss_gib"] > 0.15
    assert second["mem/peak_rss_gib"] - second["mem/rss_gib"] < 0.05


def test_freed_memory_goes_back_to_the_system_within_a_window_of_steps(measured: Any) -> None:
    if measured["given_back"] is None:
        pytest.skip("the C allocator is not glibc's")
    assert measured["given_back"] > 0.4
