"""The section "Measured" of the README, from benchmarks/results/*.jsonl.

python benchmarks/table.py writes it; tests/test_benchmarks.py fails where the README says something else. Of each op,
size, dtype, provider and machine the latest row counts.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
KEY = ("machine", "op", "size", "dtype", "provider")
HEAD = (
    "| Op | Size | Dtype | Provider | Median ms (p20 to p80) | Time over ours | % of ceiling | Extra MiB | Error |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def section(results: Path = RESULTS) -> str:
    """What belongs between the markers."""
    return "\n\n".join([*_steps(_read(results / "step.jsonl")), *_publishing(_read(results / "publish.jsonl")),
                        *_kernels(_read(results / "kernels.jsonl"))])  # fmt: skip


def replaced(readme: str, text: str) -> str:
    """The README with ``text`` between its markers."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md needs the lines {START} and {END}, in this order")
    return f"{before}{START}\n{text}\n{END}{after}"


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    latest = {(row["machine"], row["sampler"], row["dtype"]): row for row in rows if row["who"] == "ratio"}
    return [
        f"One GRPO step of SmolLM2-135M ({row['dtype']}, sampler {row['sampler']}; {row['machine']}; torch "
        f"{row['torch']}; {row['date']}): TRL {row['trl_s']:.1f} s, isomorph {row['isomorph_s']:.1f} s, "
        f"{row['ratio']:.2f} times. `python {row['command']}`"
        for row in latest.values()
    ]


def _publishing(rows: list[dict[str, Any]]) -> list[str]:
    latest = {(row["machine"], row["mode"], row["dtype"]): row for row in rows}
    return [
        f"Publishing {row['parameters'] / 1e6:.0f} M parameters to vLLM, mode {row['mode']} ({row['dtype']}; "
        f"{row['machine']}; load average {row['load_average']:.1f}; {row['time'][:10]}): {row['publish_s']:.2f} s, "
        f"{row['publish_bytes'] / 1e6:.0f} MB copied."
        for row in latest.values()
    ]


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    latest = {tuple(row[name] for name in KEY): row for row in rows}
    return [
        _machine(machine, [row for key, row in latest.items() if key[0] == machine])
        for machine in dict.fromkeys(key[0] for key in latest)
    ]


def _machine(machine: str, rows: list[dict[str, Any]]) -> str:
    last = rows[-1]
    title = f"{machine}; torch {last['torch']}; {last['date']}. `isomorph bench kernels`"
    return "\n".join([f"{title}\n", HEAD, *(_line(row) for row in rows)])


def _line(row: dict[str, Any]) -> str:
    name = f"| {row['op']} | {row['size']} | {row['dtype']} | {row['provider']} |"
    if row["status"] != "ok":
        reason = row["reason"].split("\n")[0].replace("|", "/")
        return f"{name} {row['status']}: {reason} | | | | |"
    time = f"{1e3 * row['median_s']:.2f} ({1e3 * row['p20_s']:.2f} to {1e3 * row['p80_s']:.2f})"
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    percent = f"{row['ceiling_percent']:.0f} ({row['ceiling']})" if "ceiling_percent" in row else ""
    memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
    return f"{name} {time} | {ratio} | {percent} | {memory} | {row['error']:.1e} |"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(replaced(path.read_text(), section()))
