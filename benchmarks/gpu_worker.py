"""The process in which the parts of the GPU suite run one after the other, and the end of it that gpu_suite.py holds.

The worker says on a pipe of its own what it begins and how it ended ("begin NAME", "end NAME <JSON>"); its output goes
through another one into the log. It ends itself where CUDA's context is lost, because nothing runs in it any more.
"""

import argparse
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_rows import Absent, append

LOG_BYTES = 12 * 2**20  # of 16 MiB that a file may have; device assertions can print without end
TAIL_BYTES = 4000


class Log:
    """Lines of several writers, each on disk at once."""

    def __init__(self, file: Path) -> None:
        self._out = file.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._lines: deque[bytes] = deque(maxlen=200)  # the last of the part that runs
        self._is_full = False

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._out.close()

    def say(self, line: str) -> None:
        self._lines.clear()
        self._write(line.encode() + b"\n", most=LOG_BYTES + 2**20)

    def copy(self, pipe: IO[bytes]) -> None:
        """Until nobody holds the other end."""
        for line in pipe:
            self._lines.append(line)
            self._write(line, most=LOG_BYTES)

    def tail(self) -> str:
        return b"".join(self._lines)[-TAIL_BYTES:].decode(errors="replace")

    def _write(self, line: bytes, most: int) -> None:
        with self._lock:
            if self._out.closed:
                return
            if self._out.tell() + len(line) <= most:
                self._out.write(line)
            elif not self._is_full:
                self._is_full = True
                self._out.write(b"-- the log is full: what follows is left out\n")


class Worker:
    def __init__(
        self,
        calls: Sequence[str],
        results: Path,
        log: Log,
        environment: Mapping[str, str],
        folder: Path,
        *,
        rehearse: bool,
    ) -> None:
        self._events, events = os.pipe()
        command = [sys.executable, __file__, *calls, "--results", str(results), "--events", str(events)]
        self._child = subprocess.Popen(
            [*command, *["--rehearse"][: int(rehearse)]],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment, cwd=folder, pass_fds=[events], start_new_session=True,
        )  # fmt: skip
        os.close(events)
        assert self._child.stdout is not None
        self._copy = threading.Thread(target=log.copy, args=[self._child.stdout], daemon=True)
        self._copy.start()
        self._read = b""
        self.is_fit = True  # to run the next part

    def wait_for(self, what: str, part: str, limit_s: float) -> object:
        """How it ended: 0, or why not."""
        until = time.monotonic() + limit_s
        while b"\n" not in self._read:
            if not select.select([self._events], [], [], max(0.0, until - time.monotonic()))[0]:
                return self._unfit(f"cut after {limit_s:.0f} s")
            piece = os.read(self._events, 65536)
            if not piece:
                return self._unfit(f"the process died with {self._child.wait()}")
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        event, name, ended = line.decode().split(" ", 2)
        assert (event, name) == (what, part), line
        return json.loads(ended)

    def _unfit(self, reason: str) -> str:
        self.is_fit = False
        return reason

    def kill(self) -> None:
        """With all that it has started itself."""
        self.is_fit = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._copy.join(timeout=2)
        if self._events >= 0:
            os.close(self._events)
            self._events = -1


# -- inside the worker
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls", nargs="+", help="NAME=module:function")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    os.set_inheritable(args.events, False)  # a child that outlives this process must not keep the pipe open
    import compare  # noqa: F401  # PyTorch's start is nobody's time

    with os.fdopen(args.events, "w", buffering=1) as events:
        for name, call in (pair.split("=") for pair in args.calls):
            print(f"begin {name} 0", file=events)
            ended, is_fit = _run(name, call, args.rehearse, args.results)
            print(f"end {name} {json.dumps(ended)}", file=events)
            if not is_fit:
                os._exit(70)


def _run(part: str, call: str, rehearse: bool, results: Path) -> tuple[object, bool]:
    """How the part ended, and whether the process is fit for another."""
    module, function = call.split(":")
    try:
        for row in getattr(importlib.import_module(module), function)(rehearse):
            append(results, {"part": part, **row})
        return 0, _frees_memory()
    except Absent as reason:
        return f"absent: {reason}", True
    except Exception as failure:
        traceback.print_exc()
        reason = f"failed: {type(failure).__name__}: {failure}"[:500]
    return reason, _frees_memory()


def _frees_memory() -> bool:
    """Gives cached memory back, which the children of other parts need; False where CUDA's context is lost."""
    from compare import free_memory

    try:
        free_memory()
    except Exception:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    main()
