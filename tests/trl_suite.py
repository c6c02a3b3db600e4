"""TRL's own GRPO and RLOO tests as judges of pack_groups: run as they are, then with every trainer packed.

    git clone https://github.com/huggingface/trl
    python tests/trl_suite.py --trl trl

Needs the extras trl, lora and dev, pillow and jmespath, and no network once TRL is there: the tests' models and data
sets are made locally (tests/trl_stand_ins.py). With liger-kernel 0.8.5 the tests with its layers run, too. The tests
are copied into a scratch folder and run there unchanged with the installed TRL; the checkout's trainers are not
imported, so its tests may be of another version. Takes an hour on two cores. Writes a row for each test and a summary
to benchmarks/results/trl_suite.jsonl:

    test     the test's name
    run      all; or of two steps: liger, with Liger's layers; wide, with the ids of Qwen's vocabulary and a dense model
             under the name of the mixture of experts on which TRL tests tools
    plain    passed, failed, skipped or xfailed, as the test comes
    packed   the same with pack_groups called at the end of every trainer's constructor; "refused" where it raised
             UserError there, before the first step
    passes   micro-batches that were computed packed
    reason   why it did not pass, or why packed differs from plain

This file is also the pytest plugin that packs the trainers and notes the outcomes.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("test_grpo_trainer.py", "test_rloo_trainer.py")
# variables that the plugin reads
PACKS, RUN, STEPS, ROWS = (f"TRL_SUITE_{name}" for name in ("PACKS", "RUN", "STEPS", "ROWS"))
SHORT = 2  # steps, where one takes seconds: with interpreted layers, or a real vocabulary
Row = dict[str, Any]

# what a test says when it cannot pass here, packed or not: the reason in the rows
OTHER_VERSION = "of another version of TRL"
KNOWN = {
    r"couldn't connect to|outgoing traffic has been disabled": "no stand-in for its model, which transformers reads "
    "with torchvision",
    r"no attribute 'eos_token_ids'": f"{OTHER_VERSION}: a trainer without its constructor lacks what 1.16 reads",
    r"DID NOT RAISE .*ValueError": f"{OTHER_VERSION}: 1.16 takes what the test wants refused",
    r"assert 'ref' not in": f"{OTHER_VERSION}: 1.16 adds the adapter 'ref' where PEFT can",
    r"assert not True .*requires_grad": f"{OTHER_VERSION}: entropies of 1.16 always have a gradient",
}

# what each packed test did: the plugin's state
noted: dict[str, Any] = {"refusal": None, "passes": 0}


def pytest_configure(config: pytest.Config) -> None:
    if ROWS not in os.environ:
        return
    Path(os.environ[ROWS]).unlink(missing_ok=True)
    from trl import import_utils

    import_utils.__getattr__ = _asks_for_package  # tests of another version ask for functions that this one lacks
    if os.environ[STEPS]:
        _stop_after(int(os.environ[STEPS]))
    if os.environ[RUN] == "liger":
        _interpret_liger()
    else:
        import_utils.is_liger_kernel_available = lambda *_, **__: False
    if os.environ[PACKS] == "1":
        _pack_every_trainer()


def _asks_for_package(name: str) -> Any:
    found = re.fullmatch(r"is_(\w+)_available", name)
    if not found:
        raise AttributeError(f"trl.import_utils has no {name}")
    return lambda *_, **__: importlib.util.find_spec(found[1]) is not None


def _stop_after(num_steps: int) -> None:
    from trl.trainer.base_config import _BaseConfig

    post_init = _BaseConfig.__post_init__

    def briefly(self: Any) -> None:
        self.max_steps = min(num_steps, self.max_steps) if self.max_steps > 0 else num_steps
        post_init(self)

    _BaseConfig.__post_init__ = briefly


def _interpret_liger() -> None:
    """Without a GPU Liger's layers run in Triton's interpreter, which lacks three things that they need.

    A number given to a kernel stays a float of Python there, without a type; CUDA's rsqrt is absent; and bfloat16 is
    computed as if its bits were a whole number, so these tests run without autocast.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter
    from trl.trainer.base_config import _BaseConfig

    if torch.cuda.is_available():
        return
    convert = interpreter._implicit_cvt

    def with_floats(given: Any) -> Any:
        if isinstance(given, float):
            return tl.tensor(interpreter.TensorHandle(np.array([given], np.float32), tl.float32), tl.float32)
        return convert(given)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up when called: the interpreter replaces it for a while
    post_init = _BaseConfig.__post_init__

    def without_autocast(self: Any) -> None:
        self.bf16 = False
        post_init(self)

    _BaseConfig.__post_init__ = without_autocast


def _pack_every_trainer() -> None:
    import trl

    from isomorph.engine.adapters import trl as adapter
    from isomorph.engine.config import UserError

    pack_rows = adapter.pack_rows

    def counted(*arguments: Any) -> Any:
        noted["passes"] += 1
        return pack_rows(*arguments)

    adapter.pack_rows = counted

    def packed(init: Any) -> Any:
        @functools.wraps(init)
        def construct(self: Any, *arguments: Any, **named: Any) -> None:
            init(self, *arguments, **named)
            try:
                adapter.pack_groups(self)
            except UserError as error:
                noted["refusal"] = str(error)
                raise

        return construct

    for kind in (trl.GRPOTrainer, trl.RLOOTrainer):
        kind.__init__ = packed(kind.__init__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    noted.update(refusal=None, passes=0)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One row for each test, appended at once, so that a run that dies leaves what it did."""
    if ROWS not in os.environ or not (report.when == "call" or report.outcome != "passed"):
        return
    outcome, reason = report.outcome, ""
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.outcome == "skipped" else "xpassed"
        reason = report.wasxfail
    elif report.outcome == "skipped":
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).strip()
    row = {"test": report.nodeid, "outcome": outcome, "reason": " ".join(reason.split())[:300], **noted}
    with Path(os.environ[ROWS]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def run(scratch: Path, tests: list[str], packs: bool, name: str, num_steps: int | None) -> dict[str, Row]:
    """Runs these tests in a process of their own; under the name "liger" with Liger's layers, which stay for good."""
    rows = scratch / f"{name}-{'packed' if packs else 'plain'}.jsonl"
    environment = os.environ | {PACKS: str(int(packs)), RUN: name, STEPS: str(num_steps or ""), ROWS: str(rows)}
    environment["PYTHONPATH"] = str(scratch)
    if name == "liger" and not _has_gpu():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-m", "pytest", "-p", "trl_suite", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(scratch), "--timeout", "300", "-q", "--tb=short", "-W", "ignore"]
    command += [str(scratch / test) for test in tests]
    done = subprocess.run(command, cwd=scratch / "wide" if name == "wide" else scratch, env=environment)
    if done.returncode not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest ended with {done.returncode}: see its output above")
    return {row["test"]: row for row in map(json.loads, rows.read_text().splitlines())}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_both(scratch: Path, tests: list[str], name: str, num_steps: int | None) -> list[Row]:
    """A row for each test, of a run as it comes and a packed one."""
    plain, packed = (run(scratch, tests, packs, name, num_steps) for packs in (False, True))
    return compared(plain, packed, name)


def compared(plain: dict[str, Row], packed: dict[str, Row], name: str) -> list[Row]:
    rows = []
    for test, before in plain.items():
        after = packed[test]
        refused = after["refusal"] and after["outcome"] == "failed"
        told = after["refusal"] if refused else after["reason"] or before["reason"]
        outcomes = {"plain": before["outcome"], "packed": "refused" if refused else after["outcome"]}
        rows.append({"test": test, "run": name, **outcomes, "passes": after["passes"], "reason": _why(told)})
    return rows


def run_suite(scratch: Path, num_steps: int | None) -> list[Row]:
    """All tests, then some again: with Liger where it is installed, and where they need the ids of a real vocabulary.

    A row of the second kind replaces that of the first, unless the first was refused.
    """
    rows = {row["test"]: row for row in run_both(scratch, [f"tests/{file}" for file in FILES], "all", num_steps)}
    again = [("wide", needs_ids(rows))]
    if importlib.util.find_spec("liger_kernel"):
        again.append(("liger", needs_liger(rows)))
    beside: list[Row] = []
    for name, tests in again:
        for row in run_both(scratch, tests, name, SHORT) if tests else []:
            if rows[row["test"]]["packed"] == "refused":
                beside.append(row)
            else:
                rows[row["test"]] = row
    return [row | {"test": _short(row["test"])} for row in [*rows.values(), *beside]]


def needs_liger(rows: dict[str, Row]) -> list[str]:
    return [test for test, row in rows.items() if "liger" in f"{test} {row['reason']}"]


def needs_ids(rows: dict[str, Row]) -> list[str]:
    """Tests that give a model's answers as ids, use tools, or count on an end of text being rare."""
    says = re.compile(r"index out of range|mask_truncated_completions|::test_\w+(?:\[tools\d\])? .*'qwen3_moe'")
    return [test for test, row in rows.items() if says.search(f"{test} {row['reason']}")]


def _short(test: str) -> str:
    return test.removeprefix("tests/").replace("trl-internal-testing/", "")


def _why(told: str) -> str:
    return next((why for pattern, why in KNOWN.items() if re.search(pattern, told)), told)


def summary(rows: list[Row], checkout: Path) -> Row:
    passed = [row for row in rows if row["plain"] == "passed"]
    return {
        "summary": True,
        "date": datetime.date.today().isoformat(),
        "trl": importlib.metadata.version("trl"),
        "tests_of": (checkout / "VERSION").read_text().strip(),
        "transformers": importlib.metadata.version("transformers"),
        "device": "gpu" if _has_gpu() else "cpu",
        "tests": len(rows),
        "plain": Counter(row["plain"] for row in rows),
        "packed": Counter(row["packed"] for row in rows),
        "passed_plain_then": Counter(row["packed"] for row in passed),
        "passed_computing_packed": sum(row["packed"] == "passed" and row["passes"] > 0 for row in rows),
    }


def make_scratch(checkout: Path, scratch: Path) -> None:
    """The tests unchanged, this plugin, and the stand-ins; the checkout's own trainers stay outside."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "home")}  # before transformers is imported
    sys.path.append(str(Path(__file__).parent))
    import trl_stand_ins

    trl_stand_ins.make(checkout, scratch)
    shutil.copytree(checkout / "tests", scratch / "tests")
    shutil.copy(__file__, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a checkout of TRL: its tests and scripts are read")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trl_suite.jsonl")
    parser.add_argument("--steps", type=int, help="end every training after so many; otherwise as the tests say")
    parser.add_argument("--scratch", type=Path, help="an empty folder to run in, kept; otherwise a temporary one")
    arguments = parser.parse_args()
    checkout = arguments.trl.resolve()
    if missing := [file for file in FILES if not (checkout / "tests" / file).exists()]:
        raise SystemExit(f"--trl needs a checkout of TRL with tests/{missing[0]}, got {checkout}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = (arguments.scratch or Path(folder)).resolve()
        make_scratch(checkout, scratch)
        rows = run_suite(scratch, arguments.steps)
    last = summary(rows, checkout)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    print(json.dumps(last, indent=1))


if __name__ == "__main__":
    main()
