"""Traces of chosen steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from isomorph.engine.record.profile import profiled
from isomorph.engine.types import RunFailed


def names(trace: Path) -> set[str]:
    with gzip.open(trace, "rt") as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def test_chosen_steps_leave_a_trace_with_their_phases_and_ops(tmp_path: Path) -> None:
    for step in range(1, 5):
        with profiled(tmp_path, step, (2, 3)), torch.profiler.record_function("generate"):
            torch.ones(8, 8) @ torch.ones(8, 8)
    traces = sorted((tmp_path / "trace").iterdir())
    assert [trace.name for trace in traces] == ["step-00000002.json.gz", "step-00000003.json.gz"]
    assert all({"generate", "aten::mm"} <= names(trace) for trace in traces)


def test_without_a_wish_nothing_is_written(tmp_path: Path) -> None:
    with profiled(tmp_path, 1, None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="cannot be written"), profiled(tmp_path / "gone", 1, (1, 1)):
        pass
