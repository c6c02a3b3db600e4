"""How reward workers start, spawned without importing the program's main module, and how they end."""

import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.popen_spawn_posix import Popen
from typing import Any, Self

from pebble import ProcessPool

_MAIN_LOCK = threading.Lock()


@contextmanager
def _without_main_module() -> Iterator[None]:
    """A spawned child imports its parent's main module: torch with it, or a script that has no guard."""
    with _MAIN_LOCK:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class CleanSpawnProcess(SpawnProcess):
    """A process that starts with an empty main module."""

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        with _without_main_module():
            return Popen(process_obj)


class CleanSpawnContext(SpawnContext):
    """Spawns ``CleanSpawnProcess``."""

    Process = CleanSpawnProcess


class WorkerPool:
    """Worker processes that start when they are first asked for, in any thread; ``close`` ends them all.

    A context manager: leaving it closes the pool.
    """

    def __init__(self) -> None:
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()

    def _new_pool(self) -> ProcessPool:
        raise NotImplementedError

    def _workers(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                self._pool = self._new_pool()
            return self._pool

    def close(self) -> None:
        """Kills the workers and waits for them. The pool can be used again afterwards."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
