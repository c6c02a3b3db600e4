"""Time without a clock's luck: a clock that a test sets, and waiting for what a thread does."""

import time
from collections.abc import Callable

import pytest


class PlayedClock:
    """``time.perf_counter`` of the whole process, which stands still until ``now`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float = 1000.0) -> None:
        self.now = now
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def until(what: Callable[[], bool], *, seconds: float = 60) -> None:
    """Waits until ``what`` is true; after ``seconds``, which no healthy machine needs, the test fails."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"it did not happen in {seconds:.0f} s"
        time.sleep(0.005)
