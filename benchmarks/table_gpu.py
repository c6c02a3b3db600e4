"""Tables of the GPU suite's results (benchmarks/results/gpu/): a section for each machine, and rows for the others."""

from pathlib import Path

from table_rows import OURS, Row, markdown_table, read_rows

LEAST_PERCENT = 0.5  # of a kernel that is shown
PARTS = ("update", "layers", "sampler", "kernels", "gemm", "memory", "optimizers", "energy")
FIGURES = {
    "median_s": "{:.4g} s", "value": "{:.4g}", "tflops": "{:.0f} TFLOP/s", "mfu_percent": "MFU {:.1f} %",
    "packed_tok_s": "{:.0f} packed tokens/s", "gain": "{:.2f} times", "percent": "{:.1f} %",
    "peak_mib": "peak {:.0f} MiB",
}  # fmt: skip
# What was the default implementation where a file was measured, and is no more: its rows are named, and ratios are
# taken to today's default.
DEFAULT_THEN = {"packed_attention": ("varlen", "triton")}


def read(results: Path) -> dict[str, list[Row]]:
    """Machine -> the latest row of each part and check, and every row of ops and steps, file by file."""
    found: dict[str, list[Row]] = {}
    for file in sorted((results / "gpu").glob("*.jsonl")):
        rows = read_rows(file)
        (machine,) = {row["result"] for row in rows if row.get("check") == "machine"}
        found.setdefault(machine, []).extend(rows)
    return found


def kernel_rows(results: Path) -> list[Row]:
    """Rows of ops, in the form of kernels.jsonl."""
    rows = [row for rows in read(results).values() for row in rows if "provider" in row]
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["machine"], row["op"], row["size"], row["dtype"], row["command"]), []).append(row)
    return [now for case in cases.values() for now in _by_todays_default(case)]


def _by_todays_default(case: list[Row]) -> list[Row]:
    then, now = DEFAULT_THEN.get(case[0]["op"], ("", ""))
    by = {row["provider"]: row for row in case}
    if f"{OURS} ({now})" not in by:
        return case
    names = {OURS: f"{OURS} ({then})", f"{OURS} ({now})": OURS}
    median = by[f"{OURS} ({now})"]["median_s"]
    return [
        {**row, "provider": names.get(name, name), **({"ratio": row["median_s"] / median} if "ratio" in row else {})}
        for name, row in by.items()
    ]


def step_rows(results: Path) -> list[Row]:
    """Ratios of whole steps, in the form of step.jsonl."""
    return [row for rows in read(results).values() for row in rows if row.get("who") == "ratio"]


def sections(results: Path) -> list[str]:
    return [_section(machine, rows) for machine, rows in read(results).items()]


def _section(machine: str, rows: list[Row]) -> str:
    latest = {(row["part"], row["check"]): row for row in rows if "check" in row and not row.get("detail")}
    about = latest["machine", "machine"]
    checks = [row for row in _last_run_of_each_part(rows) if "holds" in row]
    broken = [row for row in checks if not row["holds"]]
    lines = [
        (part, row["check"].replace("|", "/"), ", ".join(_figures(row)))
        for part in PARTS
        for (of, _), row in latest.items()
        if of == part and row.get("percent", 100) >= LEAST_PERCENT and _figures(row)
    ]
    kept = "\n".join(f"- {row['part']}: {row['check']}{_beyond(row)}" for row in broken)
    return (
        f"## {machine}: the GPU suite\n\ntorch {about['torch']}, Triton {about['triton']}. `python "
        "benchmarks/gpu_suite.py --out FOLDER`; every row: `benchmarks/results/gpu/`. Medians; where a model is named: "
        f"random weights, bfloat16.\n\n{markdown_table(('Part', 'What', 'Figures'), lines)}\n\n"
        f"{len(checks) - len(broken)} of {len(checks)} checks held. What did not, and what became of it "
        f"([benchmarks/LOG.md](../benchmarks/LOG.md)):\n\n{kept}"
    )


def _last_run_of_each_part(rows: list[Row]) -> list[Row]:
    runs: dict[str, list[Row]] = {}
    last: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["part"], []).append(row)
        if "ended" in row:
            last[row["part"]] = runs.pop(row["part"])
    return [row for part in last.values() for row in part]


def _figures(row: Row) -> list[str]:
    return [form.format(row[name]) for name, form in FIGURES.items() if row.get(name) is not None]


def _beyond(row: Row) -> str:
    return f" ({row['value']:.3g}, bound {row['bound']:.3g})" if "bound" in row else ""
