"""A pytest plugin: a row for each test, written when it ends, for gpu_runs.py.

A failure after which CUDA no longer answers ends the session, and the row names the file: every later test of the
process would fail for that reason.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_rows import append

ROWS = Path(os.environ["GPU_PYTEST_ROWS"])


class Plugin:
    def __init__(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            append(ROWS, {"check": f"collect {report.nodeid}", "holds": False, "failed": str(report.longrepr)[-1500:]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {"check": report.nodeid, "detail": True, "seconds": report.duration}
        row["result"] = report.outcome
        if report.skipped:
            row["result"] = f"skipped: {report.longrepr[-1] if isinstance(report.longrepr, tuple) else ''}"
        else:
            row["holds"] = report.passed
        if report.failed:
            row["failed"] = str(report.longrepr)[-1500:]
            row["lost"] = str(self.session.config.rootpath / report.nodeid.partition("::")[0]) if _is_lost() else None
            if row["lost"]:
                self.session.shouldstop = "CUDA's context is lost"
        append(ROWS, row)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(Plugin(session))


def _is_lost() -> bool:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
