"""Profiles chosen steps with PyTorch's profiler: one Chrome trace a step (chrome://tracing, https://ui.perfetto.dev).

trace/step-00000012.json.gz
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from isomorph.engine.types import RunFailed


@contextlib.contextmanager
def profiled(folder: Path, step: int, steps: tuple[int, int] | None) -> Iterator[None]:
    """Context that records a trace if ``step`` is in ``steps`` (first, last), both included. Phases appear by name.

    Raises RunFailed if the trace cannot be written.
    """
    if steps is None or not steps[0] <= step <= steps[1]:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as recorded:
        yield
    trace = folder / "trace" / f"step-{step:08d}.json.gz"
    try:
        trace.parent.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(trace))
    except OSError as error:
        raise RunFailed(f"{trace} cannot be written: {error}") from error
