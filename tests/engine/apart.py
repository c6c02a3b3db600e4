"""Processes of their own for tests that train in them and kill them.

They are forks of a server without threads. A fork of pytest's process has that one's locks, taken by threads that it
does not have, and can wait for them for ever.
"""

import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

PRELOADED = ["isomorph.engine.loop", "isomorph.engine.model.load", "isomorph.engine.rollout.builtin"]  # seconds


def apart() -> ForkServerContext:
    """What makes such processes, and the pipes to them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_apart(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Runs ``function`` in a process, whose ``exitcode`` tells its end. ``arguments`` are pickled: no shared memory."""
    process = apart().Process(target=_call, args=(home_of(function), function.__qualname__, arguments), daemon=True)
    process.start()
    return process


def home_of(function: Callable[..., Any]) -> tuple[str, str]:
    """Name and file of the module of ``function``."""
    file = sys.modules[function.__module__].__file__
    assert file is not None
    return function.__module__, file


def load_home(name: str, file: str) -> Any:
    """The module ``name``, imported from ``file``: pytest gives test modules names that only its own process finds."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _call(home: tuple[str, str], function: str, arguments: tuple[Any, ...]) -> None:
    getattr(load_home(*home), function)(*arguments)
