"""``isomorph report``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from isomorph.curriculum.report.page import write_report
from isomorph.engine.config import UserError


def report(runs: Sequence[Path], out: Path | None, console: Console) -> None:
    """Writes one page on all ``runs``; without ``out`` into RUN/report, of several runs into report.

    Raises:
        UserError: a run is given twice, is not a run folder, or the page cannot be written.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("each run may be given once, got one of these folders twice: " + " ".join(map(str, runs)))
    page = write_report(runs, out or (runs[0] / "report" if len(runs) == 1 else Path("report")))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
