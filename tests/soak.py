"""Two thousand steps of a tiny run with what a long run uses, watched from outside: does anything grow?

    python tests/soak.py --steps 2000                    prints slopes, ends with 1 if one is above its limit
    python tests/soak.py --steps 2000 --out FILE.jsonl   appends the row, too

The run has demonstrations, an environment of several turns, reward functions in worker processes (one of which prints,
fails and hangs now and then), a KL reference, refills, several optimizer steps on a round, an adaptive mixture,
evaluations, the best model, TensorBoard, and checkpoints in the background. Once a second memory, open files and
threads of the run and of its workers are read from /proc. A slope is a least squares line over the steps after the
first fifth, for 1,000 steps. Bytes of a row of steps.jsonl are compared between the first and the last fifth of these.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """
[model.tiny]
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 16
max_model_len = 160

[run]
threads = 1
checkpoint_every = 20
keep_checkpoints = 2
completions_every = 10

[data.words]
kind = "rows"
path = "rows.jsonl"
prompt = "{n}"
answer = "n"
demonstration = "{n} one"
eval_share = 0.2
deadline_s = 1.0
on_error = "zero"
rewards = [{ function = "game.py:short" }, { function = "game.py:restless", weight = 0.1 }]
[data.game]
kind = "rows"
path = "rows.jsonl"
prompt = "{n}"
eval_share = 0.2
environment = "game.py:Game"
rewards = [{ function = "game.py:short", weight = 0.5 }]

[[stage]]
name = "shown"
steps = SHOWN
objective.name = "sft"
optim.lr = 1e-3
batch = { prompts = 4, micro_batch_tok = 512 }
sampling = { max_new_tok = 12, samples_per_prompt = 1 }
mixture = [{ data = "words" }]

[[stage]]
name = "played"
steps = PLAYED
objective = { name = "grpo", kl_coef = 0.01 }
optim.lr = 1e-5
batch = { prompts = 4, micro_batch_tok = 256, prompts_per_update = 2, num_iterations = 2, refills = 1 }
sampling = { max_new_tok = 12, samples_per_prompt = 4, top_p = 0.95 }
mixture = [{ data = "game", weight = 2 }, { data = "words" }]

[eval]
data = "words"
representations = ["natural"]
prompts = 2
max_new_tok = 8
every = 20
samples = 2
keep_best = "words"
"""
GAME = """
import random
import time

from isomorph.curriculum.environments import Done
from isomorph.curriculum.rewards import Answer


def short(answer: Answer) -> float:
    return 1 / (1 + answer.num_tok)


def restless(answer: Answer) -> float:
    print("looked at", answer.text)
    chance = random.random()
    if chance < 0.002:
        raise ValueError("one in five hundred")
    if chance < 0.0022:
        time.sleep(30)
    return 0.5


class Game:
    def reset(self, row, seed):
        self.random, self.turn = random.Random(seed), 0
        return f"{row['n']} {self.random.randrange(3)}"

    def step(self, text):
        self.turn += 1
        if self.random.random() < 0.002:
            raise RuntimeError("the game is broken")
        return Done(len(text) / 10 + self.random.random()) if self.turn == 2 else f"one {self.random.randrange(3)}"
"""
FIRST_SHARE = 0.2  # of the steps, in which caches fill: not looked at
FAULTS = ("/errors", "/deadlines", "/timeouts", "/crashes")  # ends of the keys under which they are counted
# slopes for 1,000 steps above which the command ends with 1; log_ratio: not for 1,000 steps
LIMITS = {"rss_mib": 8.0, "workers_rss_mib": 8.0, "files": 2.0, "threads": 1.0, "processes": 1.0, "log_ratio": 0.1}


@dataclass(frozen=True, slots=True)
class Look:
    """The run and its workers at one moment."""

    step: int
    rss_mib: float
    workers_rss_mib: float
    files: int  # open file descriptors of the run's process
    threads: int
    processes: int  # of the run: itself and its workers


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def children(pid: int) -> list[int]:
    """Processes below ``pid``, at any depth."""
    below = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            below += [child, *children(child)]
    return below


def rss_mib(pids: Sequence[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            total += int(status(pid)["VmRSS"].split()[0]) / 1024
        except (FileNotFoundError, KeyError):  # it has just ended
            continue
    return total


def look(pid: int, run: Path) -> Look | None:
    """None: before the first step, or while processes come and go."""
    try:
        with (run / "steps.jsonl").open("rb") as file:
            step = sum(1 for _ in file)
        workers = children(pid)
        own = status(pid)
        return Look(
            step=step,
            rss_mib=int(own["VmRSS"].split()[0]) / 1024,
            workers_rss_mib=rss_mib(workers),
            files=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(own["Threads"]),
            processes=1 + len(workers),
        )
    except (FileNotFoundError, KeyError, ProcessLookupError):
        return None


def slope(looks: Sequence[Look], name: str) -> float:
    """Of a least squares line, for 1,000 steps."""
    steps = np.array([seen.step for seen in looks], dtype=float)
    values = np.array([getattr(seen, name) for seen in looks], dtype=float)
    return float(np.polyfit(steps, values, 1)[0] * 1000)


def log_ratio(sizes: Sequence[int]) -> float:
    """Mean of the last fifth of ``sizes`` over that of the first fifth, minus 1."""
    fifth = len(sizes) // 5
    return float(np.mean(sizes[-fifth:]) / np.mean(sizes[:fifth]) - 1)


def start(folder: Path, num_steps: int) -> subprocess.Popen[str]:
    rows = ({"n": f"{a} {b}"} for a in "0123456789" for b in ("one", "two", "three"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "game.py").write_text(GAME)
    shown = num_steps // 10
    recipe = RECIPE.replace("SHOWN", str(shown)).replace("PLAYED", str(num_steps - shown))
    (folder / "recipe.toml").write_text(recipe)
    with (folder / "console.log").open("w") as console:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from isomorph.curriculum.cli import main; main()", "train", "recipe.toml"]
            + ["--run", "run"],
            cwd=folder,
            stdout=console,
            stderr=subprocess.STDOUT,
            text=True,
        )


def soak(folder: Path, num_steps: int) -> tuple[dict[str, Any], list[Look]]:
    """Runs it. Returns what the run counted and the slopes; and what was seen."""
    process = start(folder, num_steps)
    run, looks, began = folder / "run", [], time.monotonic()
    while process.poll() is None:
        if (seen := look(process.pid, run)) is not None:
            looks.append(seen)
        time.sleep(1.0)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}:\n{(folder / 'console.log').read_text()[-3000:]}")
    late = [seen for seen in looks if seen.step >= FIRST_SHARE * num_steps]
    lines = (run / "steps.jsonl").read_bytes().splitlines()
    names = ("rss_mib", "workers_rss_mib", "files", "threads", "processes")
    found = {name: slope(late, name) for name in names}
    found["log_ratio"] = log_ratio([len(line) for line in lines[int(FIRST_SHARE * len(lines)) :]])
    rows = [json.loads(line) for line in lines]
    counted = {key: sum(row.get(key) or 0 for row in rows) for key in sorted(rows[-1]) if key.endswith(FAULTS)}
    sizes = {
        f"{path.name}_mib": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
        for path in sorted(run.iterdir())
    }
    first, last = late[0], late[-1]
    row = {
        "steps": len(rows),
        "seconds": time.monotonic() - began,
        "looks": len(late),
        "slopes": found,
        "first": asdict(first),
        "last": asdict(last),
        "faults": {key: num for key, num in counted.items() if num},
        "run_mib": {name: size for name, size in sizes.items() if size > 0.01},
    }
    return row, looks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="JSON Lines file to which the row is added")
    parser.add_argument("--keep", type=Path, help="folder for the run; by default a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        row, _ = soak(folder, given.steps)
    print(f"{row['steps']} steps in {row['seconds']:.0f} s, {row['looks']} looks after the first fifth")
    for name, value in row["slopes"].items():
        verdict = "" if value <= LIMITS[name] else f"   above {LIMITS[name]:g}"
        unit = "bytes of a row, last fifth over first, minus 1" if name == "log_ratio" else "for 1,000 steps"
        print(f"{name:16} {value:+8.3f} {unit}{verdict}")
    print("faults of rewards and environments:", row["faults"])
    print("MiB of the run folder:", {name: round(size, 2) for name, size in row["run_mib"].items()})
    if given.out is not None:
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return int(any(value > LIMITS[name] for name, value in row["slopes"].items()))


if __name__ == "__main__":
    sys.exit(main())
