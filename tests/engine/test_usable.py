"""A damaged checkpoint is named, and the one before it is used; a disk that fails takes nothing that was saved."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_world import one_thread  # noqa: F401
from toy_run import gold, make_components, make_stage, resumed, sha, source_of

from isomorph.engine.components import Components
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.loop import train
from isomorph.engine.record import checkpoint
from isomorph.engine.record.checkpoint import UnusableCheckpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from isomorph.engine.record.runlog import RunLog, locked, read_steps
from isomorph.engine.record.usable import load_newest, newest_state
from isomorph.engine.types import Prompt, RunFailed, RunState


def save(root: Path, step: int, keep: int = 9) -> Path:
    state = RunState(step=step, totals={"wall_s": 1.0})
    return save_checkpoint(root, state, {"w": torch.full((3,), float(step))}, {}, keep=keep)


def loaded(root: Path) -> tuple[int, list[str]]:
    """The step of the checkpoint that is used, and what is said."""
    said: list[str] = []
    _, (state, weights, _) = load_newest(root, load_checkpoint, ALONE, said.append)
    assert weights["w"][0] == state.step
    return state.step, said


def torn(folder: Path) -> str:
    (folder / "state.json").unlink()
    return "No such file"


def truncated(folder: Path) -> str:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "were written"


def flipped(folder: Path) -> str:
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "optimizer.safetensors").write_bytes(content)
    return "CRC-32 differs"


def of_the_future(folder: Path) -> str:
    fields = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**fields, "format": 99}))
    return "the checkpoint format must be 2 or 3, got 99"


@pytest.mark.parametrize("damage", [torn, truncated, flipped, of_the_future])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    before, newest = save(tmp_path, 4), save(tmp_path, 6)
    why = damage(newest)
    step, (line,) = loaded(tmp_path)
    assert step == 4
    assert line.startswith(f"warning: {newest}: ") and why in line and "\n" not in line
    assert line.endswith(f"it is kept as damaged-step-00000006, and {before} is used instead")
    # it is kept, and pushes out none of those that can be used
    save(tmp_path, 5, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000006", "step-00000005"]
    assert loaded(tmp_path) == (5, [])


def test_a_checkpoint_whose_successor_never_got_its_name_has_it_again(tmp_path: Path) -> None:
    """A kill between the two renames of a step's second checkpoint; the end of a stage copies it by its name."""
    made = save(tmp_path, 4)
    made.rename(tmp_path / f"{checkpoint.REPLACED}{made.name}")
    found, (state, _, _) = load_newest(tmp_path, load_checkpoint, ALONE, print)
    assert found == made and state.step == 4
    checkpoint.keep_copy(checkpoint.checkpoint_path(tmp_path, state.step), tmp_path / "stage-one")
    assert load_checkpoint(tmp_path / "stage-one")[0].step == 4 and sorted(p.name for p in tmp_path.iterdir()) == [
        "stage-one",
        made.name,
    ]


def test_several_damaged_ones_are_all_named(tmp_path: Path) -> None:
    first, second, third = (save(tmp_path, step) for step in (2, 4, 6))
    truncated(third)
    torn(second)
    (tmp_path / "damaged-step-00000006").mkdir()  # of an earlier resume
    step, lines = loaded(tmp_path)
    assert step == 2 and [str(folder) in line for folder, line in zip((third, second), lines, strict=True)]
    assert (tmp_path / "damaged-step-00000006-2" / "weights.safetensors").is_file()
    assert first.is_dir()


def test_without_one_that_can_be_used_nothing_is_touched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete checkpoint: start a new run"):
        loaded(tmp_path)
    for step, damage in ((2, truncated), (4, of_the_future)):
        damage(save(tmp_path, step))
    with pytest.raises(UserError, match=r"step-00000004: .* got 99.*step-00000002: .* were written.*start a new run"):
        loaded(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_what_the_machine_does_not_allow_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Else a run would lose its newest steps to a limit of handles, a right or a lack of memory."""
    save(tmp_path, 2)
    newest = save(tmp_path, 4)

    def refuse(file: Path) -> list[int]:
        raise error

    monkeypatch.setattr(checkpoint, "_sum", refuse)
    with pytest.raises(UserError, match="cannot be read .*: mend that, and try again") as refused:
        loaded(tmp_path)
    assert not isinstance(refused.value, UnusableCheckpoint)
    assert newest.is_dir()


def test_the_state_before_is_read_where_the_newest_is_damaged(tmp_path: Path) -> None:
    assert newest_state(tmp_path) is None
    before, newest = save(tmp_path, 4), save(tmp_path, 6)
    of_the_future(newest)
    found = newest_state(tmp_path)
    assert found is not None and found[0] == before and found[1]["step"] == 4
    assert newest.is_dir()  # another process may be writing there


def test_the_newest_is_that_of_the_most_steps_whatever_the_clock_says(tmp_path: Path) -> None:
    newest, now = save(tmp_path, 6), time.time()
    before = save(tmp_path, 4)
    os.utime(newest, (now - 9e6, now - 9e6))
    os.utime(before, (now + 9e6, now + 9e6))
    assert latest_checkpoint(tmp_path) == newest
    assert loaded(tmp_path) == (6, [])


# -- a row that does not fit on the disk
@contextlib.contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """The kernel writes a part, then refuses: as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_row_that_does_not_fit_leaves_no_half_of_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Console(file=io.StringIO()))
    log.exam_keys = ("exam/a",)
    log.write_step({"step": 1, "stage": "a"}, "")
    before = (tmp_path / "steps.jsonl").read_bytes()
    with no_file_longer_than(len(before) + 9):
        with pytest.raises(RunFailed, match=r"steps.jsonl cannot be written"):
            log.write_step({"step": 2, "stage": "a"}, "")
        with pytest.raises(RunFailed, match=r"steps.jsonl cannot be written"):
            log.write_evaluation(1, {"exam/a": 0.123456789012345})
    assert (tmp_path / "steps.jsonl").read_bytes() == before
    (tmp_path / "steps.jsonl").unlink()  # the folder has been emptied: a file of later rows alone would be no record
    with pytest.raises(RunFailed, match="No such file"):
        log.write_step({"step": 2, "stage": "a"}, "")


FEW = make_stage(steps=5, objective="grpo")


def test_a_step_whose_row_was_not_written_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after that step would make the resumed run go on without its row."""
    train(whole := make_components(tmp_path / "whole", FEW, checkpoint_every=2), RunState())
    components = make_components(tmp_path / "run", FEW, checkpoint_every=2)
    write_step, steps = components.log.write_step, tmp_path / "run" / "steps.jsonl"

    def write(row: dict[str, Any], line: str) -> None:
        limit = steps.stat().st_size + 100 if row["step"] == 3 else resource.RLIM_INFINITY
        with no_file_longer_than(limit):
            write_step(row, line)

    monkeypatch.setattr(components.log, "write_step", write)
    with pytest.raises(RunFailed, match=r"steps.jsonl cannot be written .*a resumed run would not write steps.jsonl"):
        train(components, RunState())
    goes_on_to_the_same_end(tmp_path / "run", whole, from_step=2)


def goes_on_to_the_same_end(folder: Path, whole: Components, from_step: int) -> None:
    again, state = resumed(folder, FEW, checkpoint_every=2)
    assert state.step == from_step
    again.log.cut_after(state.step)
    train(again, state)
    assert sha(again) == sha(whole)
    untimed = ("time/", "mem/", "publish/", "wall_s")
    rows, wanted = (
        [{key: value for key, value in row.items() if not key.startswith(untimed)} for row in read_steps(of)]
        for of in (folder, whole.log.folder)
    )
    assert rows == wanted


# -- a disk that fails in the third step
@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def remounted(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


HARM: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "full": (fill, lambda disk: (disk / "filler").unlink(), "No space left on device"),
    "read-only": (lambda disk: remounted(disk, "ro"), lambda disk: remounted(disk, "rw"), "Read-only file system"),
    "vanished": (
        lambda disk: (disk / "run").rename(disk / "elsewhere"),
        lambda disk: (disk / "elsewhere").rename(disk / "run"),
        "the run folder has gone: bring it back",
    ),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_disk_that_fails_takes_nothing_that_was_saved(tmp_path: Path, disk: Path, kind: str) -> None:
    harm, mend, said = HARM[kind]
    train(whole := make_components(tmp_path / "whole", FEW, checkpoint_every=2), RunState())
    components, folder = make_components(disk / "run", FEW, checkpoint_every=2), disk / "run"

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if len(source_of(components).observed) == 2 and not harmed:
            harmed.append(harm(disk))
        return gold(prompts, texts)

    harmed: list[object] = []
    components = dataclasses.replace(components, judge=judge)
    with pytest.raises(RunFailed) as failed:
        train(components, RunState())
    assert harmed and said in str(failed.value) and f"isomorph train --resume {folder}" in str(failed.value)
    if kind == "vanished":
        assert not folder.exists()  # made again, it would be a run without its beginning
    if kind == "read-only":
        with pytest.raises(UserError, match="the run folder cannot be written: .*Read-only"), locked(folder):
            pass
    mend(disk)
    goes_on_to_the_same_end(folder, whole, from_step=2)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(whole := make_components(tmp_path / "whole", FEW, checkpoint_every=2), RunState())
    clock = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    components = make_components(tmp_path / "run", FEW, checkpoint_every=2)

    def stop_requested() -> bool:
        return (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()

    components = dataclasses.replace(components, stop_requested=stop_requested)
    with pytest.raises(KeyboardInterrupt):
        train(components, RunState())
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    goes_on_to_the_same_end(tmp_path / "run", whole, from_step=int(newest.name.removeprefix("step-")))
    rows = read_steps(tmp_path / "run")
    assert all(row["time/step_s"] > 0 for row in rows)
