"""How reward workers start: spawned, without importing the program's main module."""

import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.popen_spawn_posix import Popen
from typing import Any

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
