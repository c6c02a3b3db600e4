"""What the tables of benchmarks/ share: rows of JSON Lines read and grouped, tables in Markdown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

OURS = "isomorph"
NOT_MEASURED = "not measured"
Row = dict[str, Any]


class Headline(NamedTuple):
    """A row of the README's table: one comparison, in the dtypes that it was measured in."""

    machine: str
    what: str
    other: str
    speed: dict[str, str]  # dtype -> the other's time over ours
    memory: dict[str, str]  # dtype -> the other's memory over ours
    section: str  # of benchmarks/RESULTS.md: command, sizes, spread
    dates: str


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def is_gpu(machine: str) -> bool:
    return " cores" not in machine


def markdown_table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = (head, ("---",) * len(head), *lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def titled_part(title: str, says: str, table: str, rows: Iterable[Row]) -> str:
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    return f"## {title}\n\n{says}\n\n{table}\n\n```\n{commands}\n```"


def grouped(rows: Iterable[Row], *names: str) -> Iterable[list[Row]]:
    """Rows that agree in these keys, together, in the order of the first of each."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found.values()


def latest_of(rows: Iterable[Row], *names: str) -> list[Row]:
    return [alike[-1] for alike in grouped(rows, *names)]


def dates(rows: Iterable[Row]) -> str:
    """The day, or the days, on which these rows were measured."""
    days = sorted({row["date"] if "date" in row else row["time"][:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def marked(ratio: float) -> str:
    """Bold where the other side is better."""
    text = f"{ratio:.2f}"
    return f"**{text}**" if ratio < 1 else text


def ratio_text(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}"
