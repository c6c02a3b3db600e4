"""Two ranks on the command line: a run, a node that is lost, and ranks that die. Real torchrun, gloo, CPU.

Ranks that get no signals are forks of a process that has imported isomorph (conftest's ``warm_script``). Two launchers
on this machine, each with a working folder of its own, stand for two nodes.
"""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import step_rows, wait_for

SMOKE = Path(__file__).parents[1] / "curriculum" / "recipes" / "smoke.toml"
PROGRAM = "import sys; from isomorph.curriculum.cli import main; main()"
EVAL = ("eval.prompts=4", "eval.every=5", "eval.samples=2", "eval.keep_best=plans")
SHORT = ("stage.0.steps=6", "run.checkpoint_every=4", *EVAL)
KINDS = {
    "data": ("parallel.kind=data",),
    "fsdp": ("parallel.kind=fsdp", "model.gradient_checkpointing_every=1"),
}
# what is measured differs; and a resumed run publishes before its first step
UNTIMED = ("time/", "wall_s", "mem/", "gpu/", "energy/", "publish/")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def isomorph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script, which torchrun starts by its path.

    Named as pip names it: Python puts a script's folder first on sys.path, and would import an ``isomorph.py`` from
    there in place of the package.
    """
    script = tmp_path_factory.mktemp("bin") / "isomorph"
    script.write_text(PROGRAM + "\n")
    return script


ONE_NODE = ("--standalone", "--nproc-per-node", "2")


def torchrun(
    isomorph: Path, *arguments: str | Path, cwd: Path, of: tuple[str, ...] = ONE_NODE
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *of]
    return subprocess.Popen(
        [*command, "--", str(isomorph), *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_a_wait_ends_when_the_launcher_has_ended() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit('no such module')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(pytest.fail.Exception, match="the process ended with 1 .*\nno such module"):
        wait_for(lambda: False, launcher, seconds=600)


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """By rank. Each has children of its own, of the judges."""
    found = psutil.Process(launcher.pid).children()
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


@contextlib.contextmanager
def at_work(isomorph: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Launcher and ranks in the midst of a step; afterwards no process of theirs may be left."""
    launcher = torchrun(isomorph, "train", SMOKE, "--run", "run", "stage.0.steps=5000", cwd=folder)
    try:
        wait_for(lambda: (folder / "run" / "steps.jsonl").exists(), launcher)
        ranks = ranks_of(launcher)
        everyone = [process for rank in ranks for process in (rank, *rank.children(recursive=True))]
        yield launcher, ranks
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert alive == []
    finally:
        launcher.kill()
        launcher.wait()


# data parallel steps of two ranks are in test_torchrun_turns.py, too
@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.weekly if kind == "data" else ()) for kind in KINDS]
)
def whole_run(request: pytest.FixtureRequest, warm_script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    out = finished(
        torchrun(warm_script, "train", SMOKE, "--run", request.param, *KINDS[request.param], *SHORT, cwd=folder)
    )
    assert out.count(f"run folder: {request.param}") == 1  # one rank speaks
    return folder / request.param


def test_a_run_on_two_ranks_leaves_what_one_would(whole_run: Path) -> None:
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 14
    assert set(summary["accuracy"]["after"]) == {"natural", "graph", "code", "table"}
    assert json.loads((whole_run / "run.json").read_text())["ranks"] == 2
    rows = step_rows(whole_run, UNTIMED)
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert {row["groups/all"] for row in rows} == {16, 4}  # of both ranks
    assert (whole_run / "report" / "report.html").is_file()


def processes_of(node: Path) -> list[psutil.Process]:
    """Launcher, ranks and workers: what has the node's working folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(node):
                found.append(process)
    return found


def number_of(launcher: subprocess.Popen[str]) -> int:
    """torchrun's number of the launcher's node."""
    return int(psutil.Process(launcher.pid).children()[0].environ()["GROUP_RANK"])


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.weekly)])  # node 0 has rank 0, and the store
def test_a_lost_node_ends_the_run_which_goes_on_bit_for_bit_on_the_other(
    warm_script: Path, whole_run: Path, tmp_path: Path, lost: int
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    of = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    of += ("--local-addr", "127.0.0.1", "--rdzv-conf")
    folder, folders = tmp_path / "lost", [tmp_path / name for name in "ab"]
    command = ("train", SMOKE, "--run", folder, *KINDS[whole_run.name], *SHORT)
    for own in folders:
        own.mkdir()
    # else torchrun's own store is with whoever is first, and its loss ends the other launcher, too
    hosts = (f"is_host={number}" for number in (1, 0))
    launchers = [
        torchrun(warm_script, *command, cwd=own, of=(*of, is_host)) for own, is_host in zip(folders, hosts, strict=True)
    ]
    wait_for((folder / "checkpoints" / "step-00000008" / "state.json").exists, launchers[0], seconds=400)
    victim = next(i for i, launcher in enumerate(launchers) if number_of(launcher) == lost)
    dead, other = launchers[victim], launchers[1 - victim]
    for process in (killed := processes_of(folders[victim])):
        process.kill()
    started = time.monotonic()
    assert len(killed) >= 3  # launcher, torchrun's child, the rank
    dead.communicate()
    _, err = other.communicate(timeout=90)
    assert other.returncode == 1 and time.monotonic() - started < 60
    assert processes_of(folders[1 - victim]) == []
    host = socket.gethostname()
    told = {
        1: rf"rank 1 \(node 1, {host}\)",
        0: rf"(rank 0 \(|the launcher \(torchrun\) of this run on )node 0, {host}\)?",
    }[lost]
    assert re.search(f"error: a collective failed because {told} (exited|has exited) or cannot be reached", err), err
    if lost == 1:
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["status"] == "failed" and re.search(told, summary["reason"])
    out = finished(torchrun(warm_script, "train", "--resume", folder, cwd=tmp_path))
    assert "resuming after step" in out and "warning: the run had" not in out  # as many ranks as before
    whole, resumed = (json.loads((run / "summary.json").read_text()) for run in (whole_run, folder))
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["accuracy"] == whole["accuracy"] and resumed["tokens"] == whole["tokens"]
    assert step_rows(folder, UNTIMED) == step_rows(whole_run, UNTIMED)


def test_a_run_that_goes_on_with_another_number_of_ranks_says_so(warm_isomorph: list[str], whole_run: Path) -> None:
    command = [*warm_isomorph, "train", "--resume", str(whole_run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if whole_run.name == "fsdp":
        assert done.returncode == 2 and "needs several ranks, got 1: start with torchrun" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "warning: the run had 2 ranks and resumes with 1" in done.stdout.replace("\n", " ")


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's CPU build")
@pytest.mark.parametrize("publish", ["copy", pytest.param("shared", marks=pytest.mark.weekly)])
def test_every_rank_has_a_vllm_of_its_own(isomorph: Path, tmp_path: Path, publish: str) -> None:
    small = ("stage.0.steps=2", "stage.1.steps=2", "stage.2.steps=1", "eval.prompts=1", "model.tiny.hidden_size=64")
    sampler = ("sampler.kind=vllm", f"sampler.publish={publish}", "sampler.max_seqs=16", "sampler.max_model_len=192")
    finished(torchrun(isomorph, "train", SMOKE, "--run", "run", *small, *sampler, cwd=tmp_path))
    rows = [row for row in step_rows(tmp_path / "run", UNTIMED) if row["stage"] != "warm-up"]
    assert len(rows) == 3 and all(row["drift/max"] is None or row["drift/max"] < 1e-4 for row in rows)
    assert any(row["drift/max"] is not None for row in rows)


# -- a rank that dies ends the others
def test_a_killed_rank_ends_the_run_with_a_sentence(isomorph: Path, tmp_path: Path) -> None:
    with at_work(isomorph, tmp_path) as (launcher, ranks):
        ranks[1].kill()
        started = time.monotonic()
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1 and time.monotonic() - started < 60
    told = f"a collective failed because rank 1 (node 0, {socket.gethostname()}) exited or cannot be reached"
    assert f"error: {told}" in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and told in summary["reason"]


def test_a_killed_launcher_leaves_no_rank_behind(isomorph: Path, tmp_path: Path) -> None:
    with at_work(isomorph, tmp_path) as (launcher, ranks):
        launcher.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert alive == []
        _, err = launcher.communicate(timeout=60)
    assert f"error: the launcher (torchrun) of this run on node 0, {socket.gethostname()} has exited" in err


@pytest.mark.weekly  # twenty seconds of waiting
def test_a_rank_that_hangs_ends_the_run_with_a_sentence(isomorph: Path, tmp_path: Path) -> None:
    with at_work(isomorph, tmp_path) as (launcher, ranks):
        ranks[1].send_signal(signal.SIGSTOP)
        _, alive = psutil.wait_procs(ranks[:1], timeout=60)
        assert alive == []
        ranks[1].kill()  # torchrun would give it 30 s to end
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
    assert f"error: rank 1 (node 0, {socket.gethostname()}) of this run sent no heartbeat for 20 s" in err


def test_a_stop_ends_all_ranks_with_a_checkpoint(isomorph: Path, tmp_path: Path) -> None:
    with at_work(isomorph, tmp_path) as (launcher, ranks):
        ranks[1].send_signal(signal.SIGINT)  # one is enough
        launcher.communicate(timeout=60)
    steps = len(step_rows(tmp_path / "run", UNTIMED))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "state.json").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
