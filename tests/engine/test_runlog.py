import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from played_clock import PlayedClock
from rich.console import Console

from isomorph.engine.config import UserError
from isomorph.engine.record.runlog import RunLog, locked, read_steps
from isomorph.engine.types import RunFailed


def make_log(folder: Path, *, terminal: bool = False) -> tuple[RunLog, io.StringIO]:
    out = io.StringIO()
    return RunLog(folder, Console(file=out, force_terminal=terminal, width=80)), out


def test_a_step_is_one_row_on_the_disk_and_one_line_on_the_console(tmp_path: Path) -> None:
    log, out = make_log(tmp_path)
    log.write_step({"step": 1, "stage": "a", "loss": 0.5}, "step 1 reward 0.5")
    log.write_step({"step": 2, "stage": "a", "loss": 0.25}, "x" * 300)
    assert read_steps(tmp_path) == [{"step": 1, "stage": "a", "loss": 0.5}, {"step": 2, "stage": "a", "loss": 0.25}]
    assert out.getvalue().splitlines() == ["step 1 reward 0.5", "x" * 300]


def test_the_console_has_a_line_every_so_many_steps_or_seconds_and_for_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    log = RunLog(tmp_path, Console(file=out, width=80), every=50)
    clock = PlayedClock(monkeypatch)
    for step in range(1, 601):
        clock.now += 0.02 if step != 130 else 11.0  # one slow step
        log.write_step({"step": step, "stage": "warm-up" if step <= 520 else "symbols"}, f"step {step}")
    told = [int(line.removeprefix("step ")) for line in out.getvalue().splitlines()]
    assert told == [1, 50, 100, 130, 150, 200, 250, 300, 350, 400, 450, 500, 521, 550, 600]
    assert len(read_steps(tmp_path)) == 600


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    row = {"step": 1, "stage": "a", "kl": math.nan, "deep": {"x": [math.inf, 1.0], "y": (-math.inf, "t", None, True)}}
    log.write_step(row, "")
    assert (tmp_path / "steps.jsonl").read_text() == (
        '{"step": 1, "stage": "a", "kl": null, "deep": {"x": [null, 1.0], "y": [null, "t", null, true]}}\n'
    )


def test_the_console_shows_a_line_as_it_is(tmp_path: Path) -> None:
    log, out = make_log(tmp_path)
    log.say("[graph] 12.0% [10.1%, 14.2%] [/answer] :stir: <answer>")
    assert out.getvalue() == "[graph] 12.0% [10.1%, 14.2%] [/answer] :stir: <answer>\n"


def test_lines_are_printed_above_the_progress_bar_of_a_terminal(tmp_path: Path) -> None:
    log, out = make_log(tmp_path, terminal=True)
    with log.progress(done=3, total=10):
        log.write_step({"step": 4, "stage": "words"}, "step 4")
        assert "step 4" in out.getvalue()
    log.say("after")
    assert "4/10" in out.getvalue() and "words" in out.getvalue()


def test_the_phases_of_a_step_and_those_between_two_steps_are_separate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = PlayedClock(monkeypatch)
    log, _ = make_log(tmp_path)
    with log.time("exam"):
        clock.now += 2
    clock.now += 1  # outside every phase
    log.begin_step()
    for _ in range(2):
        with log.time("generate"):
            clock.now += 4
    with pytest.raises(ZeroDivisionError), log.time("update"):
        clock.now += 8
        1 / 0  # noqa: B018
    row = log.end_step(num_tok=1, num_correct=0)
    assert (row["time/generate_s"], row["time/update_s"], row["time/step_s"]) == (8, 8, 16)
    assert (row["time/between/exam_s"], row["time/between_s"]) == (2, 3)
    assert {key for key in row if key.startswith("time/")} == {
        *(
            f"time/{name}_s"
            for name in ("generate", "update", "record", "step", "between", "between/exam", "between/record")
        )
    }
    with log.time("checkpoint"):
        clock.now += 16
    log.begin_step()
    row = log.end_step(num_tok=1, num_correct=0)
    assert (row["time/step_s"], row["time/between/checkpoint_s"], row["time/between_s"]) == (0, 16, 16)
    assert "time/generate_s" not in row


def test_a_phase_within_another_is_taken_off_the_outer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PlayedClock(monkeypatch)
    log, _ = make_log(tmp_path)
    log.begin_step()
    with log.time("handover"):
        clock.now += 1
        with log.time("update"):
            clock.now += 4
        clock.now += 2
    row = log.end_step(num_tok=1, num_correct=0)
    assert (row["time/update_s"], row["time/handover_s"], row["time/step_s"]) == (4, 3, 7)


def test_completions_are_json_lines(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    rows = [{"text": "zwölf\n\u2028 ✓", "reward": 1.0}, {"text": "", "reward": math.nan}]
    log.write_completions("step-00000010", rows)
    lines = (tmp_path / "completions" / "step-00000010.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows[0], {"text": "", "reward": None}]


def test_a_json_file_is_replaced_in_one_piece(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    log.write_json("run.json", {"seed": 1})
    with pytest.raises(TypeError):
        log.write_json("run.json", {"seed": object()})
    log.write_json("summary.json", {"x": math.nan})
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 1}
    assert json.loads((tmp_path / "summary.json").read_text()) == {"x": None}


def test_a_disk_that_refuses_fails_the_run(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path / "gone")
    with pytest.raises(RunFailed, match="steps.jsonl cannot be written"):
        log.write_step({"step": 1, "stage": "a"}, "")
    with pytest.raises(RunFailed, match="completions/exam.jsonl cannot be written"):
        log.write_completions("exam", [])
    with pytest.raises(RunFailed, match="run.json cannot be written"):
        log.write_json("run.json", {})


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    for step in range(1, 8):
        log.write_step({"step": step, "stage": "a"}, "")
        log.write_completions(f"step-{step:08d}", [])
    log.write_completions("exam-start", [])
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 8, "sta')  # killed while writing
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    log.cut_after(4)
    log.write_step({"step": 5, "stage": "a"}, "")
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2, 3, 4, 5]
    names = sorted(p.name for p in (tmp_path / "completions").iterdir())
    assert names == ["exam-start.jsonl"] + [f"step-{step:08d}.jsonl" for step in range(1, 5)]


def test_resuming_before_the_first_row_finds_nothing_to_drop(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    log.cut_after(0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_while_a_lost_run_is_cut_ends_the_run_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = make_log(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(RunFailed, match="steps.jsonl cannot be written"):
        log.cut_after(1)
    assert (tmp_path / "steps.jsonl").read_text().count("\n") == 2


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    """The other one is a process, because a lock belongs to it; killed, it holds nothing any more."""
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from isomorph.engine.record.runlog import locked\n"
            "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on "), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_an_evaluation_fills_in_the_row_of_its_step_and_reaches_the_sinks(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Console(file=io.StringIO()))
    seen: list[dict[str, object]] = []
    log.sinks, log.exam_keys = [seen.append], ("exam/a", "exam/b")
    log.write_evaluation(0, {"exam/a": 0.5, "exam/b": None})  # before the first step: no row
    long = "x" * 200_000  # more than is read at once
    for step in (1, 2):
        log.write_step({"step": step, "stage": "a", "text": long}, "")
    log.write_evaluation(2, {"exam/a": 1, "exam/b": math.nan})  # shorter than the nulls
    log.write_evaluation(1, {"exam/a": 0.25, "exam/b": 0.25})  # not the last row
    log.write_step({"step": 3, "stage": "a"}, "")
    first, second, third = read_steps(tmp_path)
    assert [row["exam/a"] for row in (first, second, third)] == [None, 1, None]
    assert second == {"step": 2, "stage": "a", "text": long, "exam/a": 1, "exam/b": None}
    assert seen[0] == {"step": 0, "exam/a": 0.5, "exam/b": None} and seen[3]["exam/b"] is None
    assert (tmp_path / "steps.jsonl").read_text().count("\n") == 3
