"""What an interrupted run leaves behind: nothing that was not asked for."""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_for

SHARED = Path("/dev/shm")
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


def left_in_shared_memory(before: set[str], seconds: float) -> set[str]:
    """Files of /dev/shm that were not there before, stay for ``seconds`` and are held by no process that lives.

    Others on this machine, as the tests beside this one, make some for moments or hold them.
    """
    deadline = time.monotonic() + seconds
    while (new := {file.name for file in SHARED.iterdir() if file.is_file()} - before) and (left := new - held(new)):
        if time.monotonic() >= deadline:
            return left
        time.sleep(0.1)
    return set()


def held(names: set[str]) -> set[str]:
    """Those of the files in /dev/shm that some process has open or mapped."""
    places: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # has just ended
            places |= {line.split()[-1] for line in (folder / "maps").read_text().splitlines() if str(SHARED) in line}
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):  # has just been closed
                    places.add(os.readlink(link))
    return {name for name in names if str(SHARED / name) in places}


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
    shared = set(os.listdir(SHARED))
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
    assert left_in_shared_memory(shared, 5) == set()
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


def test_a_file_in_shared_memory_is_left_behind_when_nobody_holds_it() -> None:
    before = set(os.listdir(SHARED))
    with tempfile.NamedTemporaryFile(dir=SHARED, prefix="isomorph-test-", buffering=0) as file:
        file.write(b"1")
        name = Path(file.name).name
        assert name not in left_in_shared_memory(before, 0)
        with mmap.mmap(file.fileno(), 1):
            file.file.close()
            assert name not in left_in_shared_memory(before, 0)
        assert name in left_in_shared_memory(before, 0)
        assert name not in left_in_shared_memory(before | {name}, 0)
