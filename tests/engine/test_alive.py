"""A run that is silent says that it lives, and how long the rest takes."""

import io
import threading
from pathlib import Path

import pytest
from played_clock import until
from rich.console import Console

from isomorph.engine.record import alive, runlog
from isomorph.engine.record.alive import Pace, in_words, signs_of_life
from isomorph.engine.record.runlog import RunLog


def test_signs_become_rare_and_begin_anew_after_other_output() -> None:
    silences = [0.01, 0.04, 0.05, 0.07, 0.09, 0.11, 0.15, 0.21, 0.25, 0.4, 0.43, 0.6]  # whenever the thread looks
    silences += [0.02, 0.04, 0.06, 0.09, 0.13]  # after other output
    asked, said, has_asked_all = iter(silences), [], threading.Event()

    def silence_s() -> float:
        if (silence := next(asked, None)) is None:
            has_asked_all.set()
        return silence or 0.0

    with signs_of_life(silence_s, said.append, first_s=0.05):
        assert has_asked_all.wait(60)
    assert said == [0.05, 0.11, 0.25, 0.6, 0.06, 0.13]  # each after twice the silence of the one before


def test_a_long_phase_is_named_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "LINE_S", 0.05)
    log = RunLog(tmp_path, Console(file=(out := io.StringIO()), width=200))
    with log.alive():
        with log.time("load"):
            until(lambda: "loading model and data; nothing to report for" in out.getvalue())
        with log.progress(2, 10), log.time("generate"):
            until(lambda: "step 3 of 10: sampling; nothing to report for" in out.getvalue())


def test_the_time_left_is_that_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(t) for t in (0, 60, 70, 80))
    monkeypatch.setattr(alive.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(alive, "PACE_STEPS", 2)
    pace = Pace()
    pace._ends = type(pace._ends)(maxlen=3)
    assert pace.left() == ""
    pace.begin(0, 33)
    for step in (1, 2, 3):
        pace.observe(step)
    assert pace.left() == "5 min left"  # 30 steps of 10 s; the first took 60 s
    pace.total = 3
    assert pace.left() == ""


def test_seconds_in_words() -> None:
    assert [in_words(s) for s in (5, 119.4, 120, 7199, 7200, 90_000)] == [
        "5 s", "119 s", "2 min", "120 min", "2.0 h", "25.0 h",
    ]  # fmt: skip
