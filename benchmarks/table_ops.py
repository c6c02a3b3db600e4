"""Tables of ops, each beside its peers: a line a case, every provider, and one sentence an op."""

from collections.abc import Sequence

from table_rows import OURS, Headline, Row, dates, is_gpu, marked

KEY = ("machine", "op", "size", "dtype", "provider")
EAGER, COMPILED = "torch eager", "torch.compile"
SUMMARY, ALL = "Every op: summary", "Every op, every provider"  # titles
SHORT_COLUMNS = (
    *("Op", "Size", "Dtype", "p20 to p80", "% of roofline", "Eager", "Compiled", "Best peer"),
    *("MiB (eager)", "Error (eager)", "Date"),
)
FULL_COLUMNS = ("Size", "Dtype", "Provider", "Time / ours (p20 to p80)", "% of roofline", "Extra MiB", "Error", "Date")
HEADLINES = {  # op -> its size in the README's table, or how it begins; that of another machine: the first
    "linear_loss": "GRPO, N=256 H=576",
    "packed_attention": "P=256 R=64 G=8",
}
GPU_COLUMNS = ("Median, ms", "Rate")


def by_machine(rows: list[Row]) -> dict[str, list[Row]]:
    latest = {tuple(row[name] for name in KEY): row for row in rows}
    return {m: [row for key, row in latest.items() if key[0] == m] for m in dict.fromkeys(key[0] for key in latest)}


def headlines(rows: list[Row]) -> list[Headline]:
    """The README's rows of ops: beside the fastest provider that is not ours."""
    found = []
    for machine, here in by_machine(rows).items():
        for op, wanted in HEADLINES.items():
            cases = {case: by for case, by in _cases(here).items() if case[0] == op}
            sizes = list(dict.fromkeys(size for _, size, _ in cases))
            size = next((size for size in sizes if size.startswith(wanted)), sizes[0] if sizes else None)
            others = {dtype: (by[OURS], _other(by)) for (_, s, dtype), by in cases.items() if s == size}
            rows_of = {dtype: (ours, other) for dtype, (ours, other) in others.items() if other is not None}
            if rows_of:
                found.append(_headline(machine, f"op `{op}`, {size}", rows_of))
    return found


def _headline(machine: str, what: str, rows_of: dict[str, tuple[Row, Row]]) -> Headline:
    names = list(dict.fromkeys(other["provider"] for _, other in rows_of.values()))
    speed, memory = {}, {}
    for dtype, (ours, other) in rows_of.items():
        beside = "" if len(names) == 1 else f", {other['provider']}"
        speed[dtype] = f"{marked(other['ratio'])} ({_spread(other, other['ratio'])}{beside})"
        if ours.get("memory_mib") and other.get("memory_mib") is not None:
            memory[dtype] = marked(other["memory_mib"] / ours["memory_mib"])
    name = names[0] if len(names) == 1 else "fastest other"
    ours_rows = [ours for ours, _ in rows_of.values()]
    return Headline(machine, what, name, speed, memory, SUMMARY, dates(ours_rows))


def _other(by: dict[str, Row]) -> Row | None:
    """The fastest provider that is not ours, PyTorch included."""
    others = [row for name, row in by.items() if not name.startswith(OURS) and row["status"] == "ok"]
    return min(others, key=lambda row: row["median_s"], default=None)


def _head(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def _title(machine: str, rows: list[Row]) -> str:
    last = rows[-1]
    return f"{machine}; {last['threads']} threads; torch {last['torch']}; `isomorph bench kernels`"


def short_of_machine(machine: str, rows: list[Row]) -> str:
    """A table with a line a case: ours, PyTorch, the fastest peer."""
    lines = [_short_line(case, by) for case, by in _cases(rows).items()]
    note = (
        "Eager, compiled, best peer: their time divided by ours. p20 to p80: percentiles of our rounds divided by our "
        "median. % of roofline: PyTorch's time for the op's minimal copy or for its matmuls alone, divided by our time "
        "(above 100 where our implementation is faster than PyTorch's). MiB: peak memory above that before the call. "
        "Error: largest difference from float64, divided by the largest float64 value."
    )
    return "\n".join([f"{_title(machine, rows)}. {note}\n", _head(SHORT_COLUMNS), *lines])


def _cases(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Of every (op, size, dtype) where ours has a speed, the rows by provider."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["size"], row["dtype"]), {})[row["provider"]] = row
    return {case: by for case, by in found.items() if by.get(OURS, {}).get("status") == "ok"}


def _best_peer(by: dict[str, Row]) -> Row | None:
    peers = [row for name, row in by.items() if not name.startswith((OURS, EAGER, COMPILED))]
    return min((row for row in peers if row["status"] == "ok"), key=lambda row: row["median_s"], default=None)


def sentences(machine: str, rows: list[Row]) -> str:
    """Where an op stands, in a line: its first two sizes."""
    cases = _cases(rows)
    if not cases:
        return ""
    sizes = list(dict.fromkeys(size for _, size, _ in cases))
    parts = []
    for (_, size, dtype), by in cases.items():
        if size not in sizes[:2]:
            continue
        others = [(name, by[name]) for name in (EAGER, COMPILED) if by.get(name, {}).get("status") == "ok"]
        best = _best_peer(by)
        others += [(best["provider"], best)] if best else []
        than = [f"{name} {_times(row)} times as long" for name, row in others]
        ours = [f"{1e3 * by[OURS]['median_s']:.2f} ms"] if is_gpu(machine) else []
        parts.append(f"{size}, {dtype}: {', '.join([*ours, *than])}")
    return f"Measured ({machine}): {'; '.join(parts)}. [All](../benchmarks/RESULTS.md)"


def _short_line(case: tuple[str, ...], by: dict[str, Row]) -> str:
    ours, eager = by[OURS], by.get(EAGER, {"status": "absent"})
    best = _best_peer(by)
    cells = [
        *case,
        f"{1e3 * ours['median_s']:.2f} ms, {_spread(ours)}" if is_gpu(ours["machine"]) else _spread(ours),
        _percent(ours),
        _times(eager),
        _times(by.get(COMPILED, {"status": "absent"})),
        f"{best['provider']}: {_times(best)}" if best else "",
        f"{_memory(ours)} ({_memory(eager)})",
        f"{ours['error']:.0e} ({eager['error']:.0e})" if "error" in eager else f"{ours['error']:.0e}",
        ours["date"],
    ]
    return f"| {' | '.join(cells)} |"


def full_of_machine(machine: str, rows: list[Row]) -> str:
    """A table an op: every provider, also those that are absent or wrong."""
    parts = [f"### {_title(machine, rows)}"]
    columns = (*FULL_COLUMNS, *GPU_COLUMNS) if is_gpu(machine) else FULL_COLUMNS
    for op in dict.fromkeys(row["op"] for row in rows):
        ordered = sorted((row for row in rows if row["op"] == op), key=_order(rows))
        parts.append("\n".join([f"#### {op}\n", _head(columns), *(_full_line(row, len(columns)) for row in ordered)]))
    return "\n\n".join(parts)


def _order(rows: list[Row]):  # type: ignore[no-untyped-def]
    """Cases as they were measured; in a case the fastest first, and at its end what has no speed."""
    cases = list(dict.fromkeys((row["op"], row["size"], row["dtype"]) for row in rows))
    return lambda row: (cases.index((row["op"], row["size"], row["dtype"])), row.get("median_s", float("inf")))


def _full_line(row: Row, num_columns: int) -> str:
    cells = [row["size"], row["dtype"], row["provider"]]
    if row["status"] != "ok":
        reason = row["reason"].split("\n")[0].replace("|", "/")
        cells += [f"{row['status']}: {reason}"]
    else:
        ceiling = f"{_percent(row)} ({row['ceiling']})" if "ceiling" in row else ""
        times = f"{_times(row)} ({_spread(row, row['ratio'])})" if "ratio" in row else ""
        cells += [times, ceiling, _memory(row), f"{row['error']:.1e}", row["date"]]
        if is_gpu(row["machine"]):
            rate = f"{row['gflop_s']:.0f} GFLOP/s" if "gflop_s" in row else ""
            cells += [f"{1e3 * row['median_s']:.2f}", f"{row['gb_s']:.1f} GB/s" if "gb_s" in row else rate]
    return f"| {' | '.join([*cells, *[''] * (num_columns - len(cells))])} |"


def _spread(row: Row, median: float = 1.0) -> str:
    """p20 to p80, where the row's median is ``median``."""
    return " to ".join(f"{median * row[quantile] / row['median_s']:.2f}" for quantile in ("p20_s", "p80_s"))


def _percent(row: Row) -> str:
    return f"{row['ceiling_percent']:.0f}" if "ceiling_percent" in row else ""


def _times(row: Row) -> str:
    return f"{row['ratio']:.2f}" if "ratio" in row else row["status"]


def _memory(row: Row) -> str:
    return f"{row['memory_mib']:.0f}" if row.get("memory_mib") is not None else "-"
