"""Runs in processes of their own: what several test files wait for, and read of what a run leaves."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def wait_for(what: Callable[[], T], process: subprocess.Popen[str], *, seconds: float = 120, every: float = 0.02) -> T:
    """Returns the first value of ``what`` that is true; fails at once, with the output, where the process has ended."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if process.poll() is not None:
            pytest.fail(f"the process ended with {process.returncode} before it happened:\n{_printed(process)}")
        assert time.monotonic() < end, f"it did not happen in {seconds:.0f} s"
        time.sleep(every)
    return found


def _printed(process: subprocess.Popen[str]) -> str:
    try:  # with a limit: children that it has left hold its output open
        return "\n".join(text for text in process.communicate(timeout=5) if text)
    except subprocess.TimeoutExpired as expired:
        return f"its children have not ended, and hold its output: {expired.output!r}"


def step_rows(run: Path, untimed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of steps.jsonl without the keys that begin with one of ``untimed``."""
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(untimed)} for row in rows]
