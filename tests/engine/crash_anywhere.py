"""Kills runs with SIGKILL at random moments of every phase, resumes them, and compares their ends bit for bit.

    python tests/engine/crash_anywhere.py --times 100                    a run of one process
    python tests/engine/crash_anywhere.py --times 20 --ranks 2           two processes (gloo), one of which is killed
    python tests/engine/crash_anywhere.py --times 20 --overlap           with sampler.overlap, and without refills
    python tests/engine/crash_anywhere.py --times 1 --seed 7 --keep DIR  one of them again; what differs stays in DIR

The run has demonstrations, an environment of several turns, rewards in worker processes, refills, several optimizer
steps on a round, evaluations every two steps, the best model, and checkpoints every two steps, in the background in
half of the runs. A run that nobody disturbs is timed by phase; then phase, occurrence and moment within it are drawn
at random. The kernel sends the signal: a timer that the process sets when the phase begins. Some resumed runs are
killed again. Of the end must be equal: weights, optimizer moments, all kept checkpoints, the rows of steps.jsonl but
for times, completions, evaluations, the best model, and what summary.json counts. Nothing else may be left over.

It also counts whether another process is refused while the run lives, and let in right after it was killed.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401  # imported once, before processes are forked
from kill_timer import Moment, Watch

from isomorph.curriculum import assemble, cli
from isomorph.curriculum.commands import train as _train  # noqa: F401
from isomorph.curriculum.environments.dialogue import EnvironmentDialogue
from isomorph.curriculum.rewards.table_judge import TableJudge
from isomorph.engine.config import UserError
from isomorph.engine.record import saver
from isomorph.engine.record.runlog import RunLog, locked
from isomorph.engine.rollout import turns

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
checkpoint_every = 2
keep_checkpoints = 2
completions_every = 1

[log]
tensorboard = false

[data.words]
kind = "rows"
path = "rows.jsonl"
prompt = "{n}"
answer = "n"
demonstration = "{n} one"
eval_share = 0.2
rewards = [{ function = "game.py:short" }]
[data.game]
kind = "rows"
path = "rows.jsonl"
prompt = "{n}"
eval_share = 0.2
environment = "game.py:Game"
rewards = [{ function = "game.py:short", weight = 0.5 }]

[sampling]
max_new_tok = 12
samples_per_prompt = 4

[[stage]]
name = "shown"
steps = 3
objective.name = "sft"
optim.lr = 1e-2
batch = { prompts = 4, micro_batch_tok = 512 }
sampling = { max_new_tok = 12, samples_per_prompt = 1 }
mixture = [{ data = "words" }]

[[stage]]
name = "talk"
steps = 3
objective = { name = "grpo", kl_coef = 0.01 }
optim.lr = 1e-3
batch = { prompts = 4, micro_batch_tok = 256, prompts_per_update = 2, num_iterations = 2 }
mixture = [{ data = "game" }]

[[stage]]
name = "both"
steps = 2
objective.name = "dapo"
optim.lr = 1e-3
optimizer_state = "carry"
batch = { prompts = 3, micro_batch_tok = 256, refills = 1 }
mixture = [{ data = "game", weight = 2 }, { data = "words" }]

[eval]
data = "words"
representations = ["natural"]
prompts = 2
max_new_tok = 8
every = 2
samples = 2
keep_best = "words"
"""
GAME = """
import random

from isomorph.curriculum.environments import Done
from isomorph.curriculum.rewards import Answer


def short(answer: Answer) -> float:
    return 1 / (1 + answer.num_tok)


class Game:
    def reset(self, row, seed):
        self.random, self.turn = random.Random(seed), 0
        return f"{row['n']} {self.random.randrange(3)}"

    def step(self, text):
        self.turn += 1
        return Done(len(text) / 10 + self.random.random()) if self.turn == 2 else f"one {random.randrange(3)}"
"""
OVERLAP = (  # old text, new
    ("[sampling]", "[sampler]\noverlap = true\n[sampling]"),
    ('"grpo", kl_coef', '"grpo", old_logprob = "sampler", kl_coef'),
    ('objective.name = "dapo"', 'objective = { name = "dapo", old_logprob = "sampler" }'),
    (", refills = 1", ""),
)
# measured, or of this process alone; and a resumed run publishes before its first step
UNTIMED = ("time/", "wall_s", "mem/", "gpu/", "energy/", "publish/")
OWN = ("wall_s", "best", "judge", "memory_growth_alarms")  # of summary.json: paths, and counts since the resume
WAIT_S = 300
NO_CHECKPOINT = "holds no complete checkpoint"


# -- in the run's process
def watched(watch: Watch) -> None:
    """Opens and closes the phases where the run does; its own ones, and parts of them that have no name there."""
    of_log, of_turn, judge, write = RunLog.time, EnvironmentDialogue.turn, TableJudge.__call__, saver._Job.run

    @contextlib.contextmanager
    def timed(log: RunLog, phase: str) -> Iterator[None]:
        with watch.phase(phase), of_log(log, phase):
            yield

    def turn(*given: Any) -> Any:
        leave = watch.enter("environment-turn")
        reply = of_turn(*given)
        reply.add_done_callback(lambda _: leave())
        return reply

    def run(job: Any, act: Callable[[], Any]) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        with watch.phase("write-in-foreground" if is_main else "write-in-background"):
            write(job, act)

    def within(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with watch.phase(name):
                return act(*given, **named)

        return call

    RunLog.time = timed  # type: ignore[method-assign]
    EnvironmentDialogue.turn = turn  # type: ignore[method-assign]
    TableJudge.__call__ = within("rewards", judge)  # type: ignore[method-assign]
    saver._Job.run = run  # type: ignore[method-assign]
    # neither writes what a resumed run reads, and both take as long as all steps
    assemble.check_stages = lambda *_: None
    assemble.write_report = lambda *_: None
    turns.PATIENCE_S = WAIT_S  # on a busy machine replies are late, and then not taken at fixed steps
    assemble.restore = within("restore", assemble.restore)
    assemble._leave_results = within("results", assemble._leave_results)


# -- in the process that kills
@dataclass(slots=True)
class Counts:
    kills: Counter[str] = field(default_factory=Counter)  # by phase
    open: Counter[str] = field(default_factory=Counter)  # by every phase that was open
    ends: int = 0
    equal: int = 0
    refused: list[bool] = field(default_factory=list)
    let_in: list[bool] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Killer:
    """Starts runs in ``folder``, and kills them."""

    def __init__(self, folder: Path, num_ranks: int, seed: int, *, overlaps: bool = False) -> None:
        self.folder, self.num_ranks, self.random = folder, num_ranks, random.Random(seed)
        rows = ({"n": f"{a} {b}"} for a in "0123" for b in ("one", "two", "three"))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "game.py").write_text(GAME)
        recipe = RECIPE
        for old, new in OVERLAP if overlaps else ():
            assert old in recipe, old
            recipe = recipe.replace(old, new, 1)
        (folder / "recipe.toml").write_text(recipe)
        self.counts = Counts()
        self.seconds: dict[str, list[float]] = {}

    def whole(self) -> None:
        """The run that nobody disturbs, and its times."""
        times = self.folder / "times.json"
        if not times.exists():  # else from the folder that --keep names
            code, _, said = self.run("whole", None, is_background=False, times=times)
            if code:
                raise SystemExit(f"the undisturbed run ended with {code}: {said}")
        self.seconds = json.loads(times.read_text())
        # of phases that this run has not, from those that take as long
        self.seconds["write-in-background"] = self.seconds["write-in-foreground"]
        self.seconds["restore"] = [sum(self.seconds["write-in-foreground"])]

    def moment(self, phases: list[str]) -> Moment:
        phase = self.random.choice(phases)
        occurrence = self.random.randrange(len(self.seconds[phase]))
        return Moment(phase, occurrence, self.random.random() * self.seconds[phase][occurrence])

    def trial(self, name: str, most: int) -> None:
        """One run, killed once, or, each time it is resumed, with one chance in three again, at most ``most`` times."""
        is_background, num_killed = self.random.random() < 0.5, 0
        skipped = {"write-in-background", "write-in-foreground"} - {
            f"write-in-{'back' if is_background else 'fore'}ground"
        }
        phases = [phase for phase in self.seconds if phase not in skipped and phase != "restore"]
        while True:
            wants = num_killed == 0 or (num_killed < most and self.random.random() < 1 / 3)
            is_resumed = (self.folder / name / "run.json").exists()
            target = self.moment([*phases, "restore", "restore"] if is_resumed else phases) if wants else None
            code, was_open, said = self.run(name, target, is_background=is_background)
            if code == -signal.SIGKILL:
                assert target is not None
                num_killed += 1
                names = was_open or ["between"]
                self.counts.kills[target.phase if target.phase in names else names[-1]] += 1
                self.counts.open.update(set(names))
            elif code == 2 and NO_CHECKPOINT in said:
                shutil.rmtree(self.folder / name)  # as the sentence says
            elif code:
                self.counts.faults.append(f"{name}: ended with {code}: {said[-1500:]}")
                break
            elif num_killed or target is None:
                break
        self.counts.ends += 1
        found = differing(self.folder / name, self.folder / "whole") if code == 0 else ["it does not end"]
        self.counts.faults += [f"{name}: {text}" for text in found]
        self.counts.equal += not found
        if not found:
            shutil.rmtree(self.folder / name)

    def run(
        self, name: str, target: Moment | None, *, is_background: bool, times: Path | None = None
    ) -> tuple[int, list[str], str]:
        """Starts or resumes the run ``name``. Its exit code, the phases open when it was killed, and what it said.

        Of several ranks one is the target; the others must end by themselves.
        """
        folder, log = self.folder / name, self.folder / f"{name}.log"
        background = f"run.checkpoint_in_background={str(is_background).lower()}"
        start = ["train", "recipe.toml", "--run", name, background]
        arguments = ["train", "--resume", name] if (folder / "run.json").exists() else start
        if arguments == start and folder.exists():
            shutil.rmtree(folder)
        victim, port = self.random.randrange(self.num_ranks), free_port()
        shared = mmap.mmap(-1, 4096)
        children = []
        for rank in range(self.num_ranks):
            watch = Watch(shared if rank == victim else mmap.mmap(-1, 4096), None, None)
            if rank == victim:
                watch.target, watch.times = target, times
            child = os.fork()
            if child == 0:
                self._become(rank, port, arguments, log, watch)
            children.append(child)
        code = self._wait(children, victim, folder, shared)
        if code == -signal.SIGKILL:
            with contextlib.suppress(FileNotFoundError):
                self.counts.let_in.append(not is_refused(folder))
        return code, shared[: shared.find(b"\0")].decode().split(), log.read_text(errors="replace")

    def _become(self, rank: int, port: int, arguments: list[str], log: Path, watch: Watch) -> None:
        code = 1
        try:
            main = sys.modules["__main__"]
            main.__spec__, main.__file__ = None, None  # as the console script's: workers do not import it again
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rank == 0 else os.O_APPEND))
            for number in (1, 2):
                os.dup2(handle, number)
            os.chdir(self.folder)
            if self.num_ranks > 1:
                os.environ |= {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.num_ranks)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "crash"},
                }
            watched(watch)
            sys.argv = ["isomorph", *arguments]
            try:
                cli.main()
                code = 0
            except SystemExit as stopped:
                code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            except BaseException:
                traceback.print_exc()
            watch.finish()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _wait(self, children: list[int], victim: int, folder: Path, shared: mmap.mmap) -> int:
        """The exit code of the victim, when all have ended. Meanwhile it once tries to get into the run folder."""
        codes: dict[int, int] = {}
        end, is_asked = time.monotonic() + WAIT_S, False
        while len(codes) < len(children):
            for rank, child in enumerate(children):
                if rank not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
            if not codes and not is_asked and shared[0]:  # the first phase begins after the folder has been locked
                is_asked = True
                if is_refused(folder):
                    self.counts.refused.append(True)
                else:  # has it ended meanwhile?
                    time.sleep(1.0)
                    done = os.waitpid(children[0], os.WNOHANG)
                    if done[0]:
                        codes[0] = os.waitstatus_to_exitcode(done[1])
                    else:
                        self.counts.refused.append(False)
            if time.monotonic() > end:
                self.counts.faults.append(f"{folder.name}: ranks did not end in {WAIT_S} s: {codes}")
                for rank, child in enumerate(children):
                    if rank not in codes:
                        os.kill(child, signal.SIGKILL)
                end += WAIT_S
            time.sleep(0.002)
        return codes[victim]


def is_refused(folder: Path) -> bool:
    """Whether another process gets no access to the run folder."""
    try:
        with locked(folder):
            return False
    except UserError as error:
        if "is in use by" not in str(error):
            raise
        return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# -- what must be equal
def differing(run: Path, whole: Path) -> list[str]:
    """A sentence for each thing at the end of ``run`` that is not as in ``whole``."""
    names, wanted = (sorted(str(path.relative_to(top)) for path in _files(top)) for top in (run, whole))
    found = [f"{name} is missing" for name in wanted if name not in names]
    found += [f"{name} is left over" for name in names if name not in wanted]
    for name in wanted:
        if name in names and not name.startswith("report/") and _told(run / name) != _told(whole / name):
            found.append(f"{name} differs")
    return found


def _files(top: Path) -> list[Path]:
    logs = ("tensorboard", "trackio", "wandb")
    return [path for path in top.rglob("*") if path.is_file() and not any(name in path.parts for name in logs)]


def _told(file: Path) -> Any:
    """What ``file`` says, without times."""
    if file.name == "steps.jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith(UNTIMED)} for row in rows]
    if file.name == "summary.json":
        return {key: value for key, value in json.loads(file.read_text()).items() if key not in OWN}
    if file.name == "state.json":
        state = json.loads(file.read_text())
        return {**state, "totals": {key: value for key, value in state["totals"].items() if key != "wall_s"}}
    if file.name == "checksums.json":
        return {key: value for key, value in json.loads(file.read_text()).items() if key != "state.json"}
    if file.name in (".lock", "run.json", "rewards.log", "environments.log"):
        return None
    return file.read_bytes()


def count(
    folder: Path,
    num_times: int,
    num_ranks: int,
    seed: int,
    say: Callable[[str], None] = print,
    *,
    overlaps: bool = False,
) -> Counts:
    """Kills ``num_times`` times; what happened."""
    killer = Killer(folder, num_ranks, seed, overlaps=overlaps)
    killer.whole()
    counts = killer.counts
    while (done := sum(counts.kills.values())) < num_times:
        before = counts.kills.copy()
        killer.trial(f"run-{counts.ends:03d}", num_times - done)
        killed = ", ".join((counts.kills - before).elements())
        say(f"{sum(counts.kills.values())}/{num_times}  killed in {killed}: {counts.equal} of {counts.ends} ends equal")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept afterwards and used again")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        counts = count(
            folder.resolve(),
            given.times,
            given.ranks,
            given.seed,
            lambda text: print(text, flush=True),
            overlaps=given.overlap,
        )
    for fault in counts.faults:
        print(f"fault: {fault}")
    print("kills by phase: " + ", ".join(f"{name} {num}" for name, num in sorted(counts.kills.items())))
    print("open at a kill: " + ", ".join(f"{name} {num}" for name, num in sorted(counts.open.items())))
    print(f"another process refused while the run lived: {sum(counts.refused)} of {len(counts.refused)}")
    print(f"let in right after the kill: {sum(counts.let_in)} of {len(counts.let_in)}")
    print(
        f"{sum(counts.kills.values())} kills of {counts.ends} runs on {given.ranks} rank(s), seed {given.seed}: "
        f"{counts.equal} of {counts.ends} ended bit-equal to the undisturbed run"
    )
    sys.exit(counts.equal != counts.ends or bool(counts.faults) or not all([*counts.refused, *counts.let_in]))


if __name__ == "__main__":
    main()
