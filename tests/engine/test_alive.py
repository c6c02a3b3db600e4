"""A run that is silent says that it lives, and how long the rest takes."""

import io
import time
from pathlib import Path

from rich.console import Console

from isomorph.engine.record import alive, runlog
from isomorph.engine.record.alive import Pace, in_words, signs_of_life
from isomorph.engine.record.runlog import RunLog


def test_signs_become_rare_and_begin_anew_after_other_output() -> None:
    silent_since, said = time.perf_counter(), []
    with signs_of_life(lambda: time.perf_counter() - silent_since, said.append, first_s=0.05):
        time.sleep(0.6)
        first = list(said)
        silent_since = time.perf_counter()
        time.sleep(0.2)
    assert 2 <= len(first) <= 4  # after 0.05, 0.1, 0.2 and 0.4 s
    assert all(later >= 1.9 * before for before, later in zip(first, first[1:], strict=False))
    again = said[len(first) :]
    assert again and again[0] < first[-1]


def test_a_long_phase_is_named_with_its_step(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(runlog, "LINE_S", 0.05)
    log = RunLog(tmp_path, Console(file=(out := io.StringIO()), width=200))
    with log.alive():
        with log.time("load"):
            time.sleep(0.15)
        with log.progress(2, 10), log.time("generate"):
            time.sleep(0.4)
    text = out.getvalue()
    assert "loading model and data; nothing to report for" in text
    assert "step 3 of 10: sampling; nothing to report for" in text


def test_the_time_left_is_that_of_the_last_steps(monkeypatch) -> None:  # type: ignore[no-untyped-def]
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
