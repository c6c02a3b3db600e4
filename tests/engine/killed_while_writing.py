"""Kills runs with SIGKILL while a checkpoint is being written in the background, and resumes them.

    python tests/engine/killed_while_writing.py 10

prints of how many runs the checkpoint before was found, and the resumed run ended in the weights, bit for bit, of a run
that nobody killed. In each the disk stops answering at another point of the checkpoint of step 4: while the files, the
checksums or the state are written, or before the folder gets its name. Training goes on meanwhile; the kill comes when
the step after has been logged.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from apart import start_apart
from toy_run import gold_but_for_one, make_components, make_stage, resumed, sha

from isomorph.engine.config import Stage
from isomorph.engine.loop import train
from isomorph.engine.record import checkpoint
from isomorph.engine.types import RunState

NUM_POINTS = 6  # weights, optimizer, draws, checksums, state; the folder
WAIT_S = 300


def count(folder: Path, num: int) -> int:
    """How many of ``num`` killed runs resumed from the checkpoint before, and ended as one that was not killed."""
    stage = make_stage(steps=6)
    whole = make_components(folder / "whole", stage, judge=gold_but_for_one, checkpoint_every=2)
    train(whole, RunState())
    return sum(_one(folder / f"run-{i}", stage, i % NUM_POINTS) == sha(whole) for i in range(num))


def _one(folder: Path, stage: Stage, point: int) -> str:
    """The weights of a run that was killed at ``point`` and resumed; what is not as it must be, in their place."""
    process = start_apart(_train_on_a_dying_disk, folder, stage, point)
    log, end = folder / "steps.jsonl", time.monotonic() + WAIT_S
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        if process.exitcode is not None or time.monotonic() > end:
            return "the run has not trained on while its checkpoint was written"
        time.sleep(0.01)
    process.kill()
    process.join()
    components, state = resumed(folder, stage, judge=gold_but_for_one)
    if state.step != 2 or not (folder / "checkpoints" / ".partial-00000004").is_dir():
        return f"resumed from step {state.step}"
    train(components, state)
    return sha(components)


def _train_on_a_dying_disk(folder: Path, stage: Stage, point: int) -> None:
    torch.set_num_threads(1)
    real, num_calls = checkpoint.sync, 0

    def sync(path: Path) -> None:
        nonlocal num_calls
        if ".partial-00000004" in str(path):
            if num_calls == point:
                time.sleep(10 * WAIT_S)
            num_calls += 1
        real(path)

    checkpoint.sync = sync
    train(make_components(folder, stage, judge=gold_but_for_one, checkpoint_every=2), RunState())


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        found = count(Path(place), wanted)
    print(f"killed while a checkpoint was written, resumed from the one before, bit for bit: {found} of {wanted}")
    sys.exit(found != wanted)
