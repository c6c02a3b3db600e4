"""What an interrupted run leaves behind: nothing that was not asked for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_for

SMOKE = Path(__file__).parents[1] / "curriculum" / "recipes" / "smoke.toml"
ISOMORPH = [sys.executable, "-c", "from isomorph.curriculum.cli import main; main()"]
JUDGING = """
import os, time
from isomorph.curriculum.rewards.pool import RewardPool
pool = RewardPool(max_workers=2)
assert pool.judge("math", "<answer>1/2</answer>", "0.5") == 1.0
print("judged", flush=True)
time.sleep(600)
"""


def processes_of(session: int) -> dict[int, str]:
    """Those that live in the session, with their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # state, ppid, pgrp, session, ..
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError, IndexError):  # no process, or one that has just ended
            continue
    return found


def gone_within(session: int, seconds: float) -> dict[int, str]:
    """What is left of the session after at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture
def sessions() -> Iterator[list[int]]:
    """Whatever a failing test leaves is killed."""
    started: list[int] = []
    yield started
    for session in started:
        for pid in processes_of(session):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_no_file_and_no_shared_memory(
    tmp_path: Path, sessions: list[int], sent: signal.Signals
) -> None:
    scratch, run = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [*ISOMORPH, "train", str(SMOKE), "--run", str(run)],
        # a cache that PyTorch makes when it is imported, and keeps
        env=os.environ | {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    sessions.append(process.pid)
    steps = run / "steps.jsonl"
    wait_for(lambda: steps.is_file() and steps.read_text().count("\n") >= 3, process)
    process.send_signal(sent)
    assert process.wait(timeout=60) == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    assert gone_within(process.pid, 10) == {}
    assert list(scratch.iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= shared
    if sent != signal.SIGKILL:
        hidden = {path.name for path in run.rglob("*") if path.name.startswith(".")}
        assert hidden <= {".lock"}  # empty; taken away, two others could each lock a file of their own


def test_reward_workers_of_a_killed_trainer_end_by_themselves(tmp_path: Path, sessions: list[int]) -> None:
    pytest.importorskip("pint")
    process = subprocess.Popen(
        [sys.executable, "-c", JUDGING], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    sessions.append(process.pid)
    assert process.stdout is not None and process.stdout.readline() == "judged\n"
    assert len(processes_of(process.pid)) >= 3  # two workers
    process.kill()
    process.wait()
    assert gone_within(process.pid, 10) == {}
