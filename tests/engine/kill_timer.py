"""SIGKILL at a chosen moment of a phase, sent by the kernel to the process that sets its timer."""

import contextlib
import ctypes
import json
import mmap
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Moment:
    phase: str
    occurrence: int
    delay_s: float


class Watch:
    """Marks in shared memory which phases are open, and sets the timer of the kill."""

    def __init__(self, shared: mmap.mmap, target: Moment | None, times: Path | None) -> None:
        self.shared, self.target, self.times = shared, target, times
        self.open: list[str] = []
        self.seconds: dict[str, list[float]] = {}
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        leave = self.enter(name)
        try:
            yield
        finally:
            leave()

    def enter(self, name: str) -> Callable[[], None]:
        start = time.perf_counter()
        with self.lock:
            self.open.append(name)
            occurrence = len(self.seconds.setdefault(name, []))
            self.seconds[name].append(0.0)
            self._mark()
            if self.target is not None and (name, occurrence) == (self.target.phase, self.target.occurrence):
                kill_after(self.target.delay_s)

        def leave() -> None:
            with self.lock:
                self.open.remove(name)
                self.seconds[name][occurrence] = time.perf_counter() - start
                self._mark()

        return leave

    def _mark(self) -> None:
        text = " ".join(self.open).encode()
        self.shared[: len(text) + 1] = text + b"\0"

    def finish(self) -> None:
        if self.times is not None:
            self.times.write_text(json.dumps(self.seconds))


def kill_after(seconds: float) -> None:
    """Has the kernel send SIGKILL to this process."""

    class Event(ctypes.Structure):
        _fields_ = (
            ("value", ctypes.c_void_p),
            ("signo", ctypes.c_int),
            ("notify", ctypes.c_int),
            ("rest", 48 * ctypes.c_byte),
        )

    class Spec(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "s", "ns"))

    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = Event(None, signal.SIGKILL, 0)
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    spec = Spec(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    if libc.timer_settime(timer, 0, ctypes.byref(spec), None):
        raise OSError(ctypes.get_errno(), "timer_settime")
