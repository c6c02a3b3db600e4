"""The reward pool: deadlines, workers that die, and what an ending trainer leaves of them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from answers import answer, needs_math

from isomorph.curriculum.rewards import pool as pool_module
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.types import Prompt, Rollout
from isomorph.engine.update.score import RewardThread


@dataclass(frozen=True)
class Asked:
    payload: object


def task_of(family: str, answer: str) -> Task:
    return Task(family=family, representation="natural", question="?", answer=answer, key="0")


# Is 5, and SymPy would multiply it out for longer than anybody waits to prove it.
HANG = answer("5 + (2a+2b+2c+2d+2f)^{100} - 2^{100}(a+b+c+d+f)^{100}")


@needs_math
def test_a_hang_ends_at_its_deadline_and_is_counted() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool(max_workers=2, deadline_s=2.0) as pool:
        pool.judge("math", answer("5"), "5")  # starts the workers
        prompts = [Asked(task_of("math", "5")), Asked(task_of("async_plan", "20 min")), Asked(task_of("math", "5"))]
        start = time.perf_counter()
        rewards = pool(prompts, [HANG, answer("20 min"), answer("5")])
        assert rewards == [0.0, 1.0, 1.0]
        assert time.perf_counter() - start < 30  # two seconds, and a new worker on a loaded machine
        assert pool.num_timeouts == 1
        assert pool.judge("math", answer("5"), "5") == 1.0  # goes on with a new worker
    assert set(multiprocessing.active_children()) <= others


@needs_math
def test_mathematics_is_scored_while_further_responses_are_sampled() -> None:
    is_judged = threading.Event()
    texts = {4: answer("4"), 5: HANG, 6: answer("5")}
    prompts = [
        Prompt(prompt_id=i, token_ids=(1,), task="math", representation="natural", payload=task_of("math", "5"))
        for i in range(2)
    ]

    def drawn(prompt_id: int, token: int) -> Rollout:
        return Rollout(
            prompt_id=prompt_id,
            sample=0,
            token_ids=torch.tensor([token]),
            sampler_logprob=None,
            finish="stop",
            policy_version=0,
        )

    with RewardPool(max_workers=1, deadline_s=2.0) as pool:

        def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
            rewards = pool(prompts, texts)
            is_judged.set()
            return rewards

        with RewardThread(judge, lambda token_ids: texts[token_ids[0]], prompts) as rewarding:
            rewarding.add(1, [drawn(1, 4), drawn(1, 6)])
            assert is_judged.wait(60)  # by workers that the judge's thread has started
            rewarding.add(0, [drawn(0, 6), drawn(0, 5)])
            assert rewarding.results()[1].rewards == (1.0, 0.0, 0.0, 1.0)
        assert pool.num_timeouts == 1


@needs_math
def test_a_worker_that_dies_costs_its_response_alone() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool(max_workers=1, deadline_s=60.0) as pool:
        pool.judge("math", answer("5"), "5")
        (worker,) = set(multiprocessing.active_children()) - others
        assert worker.pid is not None
        killer = threading.Timer(1.0, os.kill, (worker.pid, signal.SIGKILL))
        killer.start()
        assert pool.judge("math", HANG, "5") == 0.0
        killer.join()
        assert (pool.num_crashes, pool.num_timeouts) == (1, 0)
        assert pool.judge("math", answer("5"), "5") == 1.0


@needs_math
def test_workers_import_neither_torch_nor_an_unguarded_main_module(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, pathlib, sys\n"
        "sys.modules['torch'] = None  # importing torch would raise, here and in whatever runs this script\n"
        "print('main', flush=True)\n"
        "from isomorph.curriculum.judge import judge\n"
        "print(judge('math', '<answer>1/2</answer>', '0.5'))\n"
        "workers = multiprocessing.active_children()\n"
        "print(['libtorch' in pathlib.Path(f'/proc/{w.pid}/maps').read_text() for w in workers])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["main", "1.0", "[False]", ""], done.stderr
    assert done.returncode == 0


@needs_math
def test_workers_may_not_allocate_without_bound() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool(max_workers=1, deadline_s=20.0) as pool:
        pool.judge("math", answer("5"), "5")
        (worker,) = set(multiprocessing.active_children()) - others
        limits = Path(f"/proc/{worker.pid}/limits").read_text().splitlines()
    (line,) = (line for line in limits if line.startswith("Max address space"))
    assert line.split()[3] == str(pool_module.MAX_WORKER_BYTES)


@needs_math
def test_a_hanging_worker_does_not_outlive_a_killed_trainer(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, signal, threading\n"
        "from isomorph.curriculum.rewards.pool import RewardPool\n"
        "pool = RewardPool(max_workers=1, deadline_s=2.0)\n"
        "pool.judge('math', '<answer>5</answer>', '5')\n"
        "print(*(w.pid for w in multiprocessing.active_children()), flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        f"pool.judge('math', {HANG!r}, '5')\n"
    )
    printed = tmp_path / "printed"
    with printed.open("w") as file:  # not a pipe: the worker holds its other end, too
        done = subprocess.run([sys.executable, str(script)], stdout=file, stderr=file, timeout=120)
    assert done.returncode == -signal.SIGKILL
    stat = Path(f"/proc/{int(printed.read_text().split()[0])}/stat")
    assert _is_running(stat)
    waited = time.monotonic() + 30
    while _is_running(stat) and time.monotonic() < waited:
        time.sleep(0.2)
    assert not _is_running(stat)


def _is_running(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_plans_need_no_worker() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool() as pool:
        asked = [Asked(task_of("async_plan", "20 min")), Asked(task_of("async_plan", "7.0"))]
        assert pool(asked, [answer("20 minutes"), answer("8")]) == [1.0, 0.0]
        assert set(multiprocessing.active_children()) <= others


def test_callers_mistakes_raise() -> None:
    with RewardPool() as pool:
        with pytest.raises(TypeError, match="Task"):
            pool([Asked("text")], ["x"])
        with pytest.raises(ValueError, match="zip"):
            pool([Asked(task_of("async_plan", "20 min"))], [])
        with pytest.raises(ValueError, match="family"):
            pool([Asked(task_of("chess", "e4"))], ["x"])
        with pytest.raises(ValueError, match="accepted answer"):
            pool([Asked(task_of("async_plan", "soon"))], ["x"])
    with pytest.raises(ValueError, match="deadline_s"):
        RewardPool(deadline_s=0)
    with pytest.raises(ValueError, match="max_workers"):
        RewardPool(max_workers=0)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with RewardPool() as pool, pytest.raises(ImportError, match=r"isomorph\[math\]"):
        pool.judge("math", answer("5"), "5")
