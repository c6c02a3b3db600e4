"""Compiling for GPUs that are not here. Each test compiles in a process of its own: this one interprets Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")
HERE = Path(__file__).parent


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_every_gate_refuses_the_kernel_that_was_planted_for_it() -> None:
    done = _run(str(HERE / "bad_kernels.py"))
    assert done.returncode == 0, done.stderr
    failures = json.loads(done.stdout)
    assert failures.pop("good") == []
    for gate, found in failures.items():
        assert any(gate in failure for failure in found), (gate, found)


@pytest.mark.slow
def test_every_kernel_passes_the_gates() -> None:
    """For one architecture; .ci/run compiles for all."""
    done = _run("-m", "isomorph.kernels.aot", "--arch", "90", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and {row["arch"] for row in rows} == {90}, done.stderr
    assert [(row["kernel"], row["failures"]) for row in rows if row["failures"]] == []
    assert done.returncode == 0


def test_interpreted_kernels_are_not_compiled_and_the_error_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isomorph.kernels.aot", "--arch", "90"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 1
    assert "unset it before Python starts" in done.stderr
