"""Tables of ops, each beside its peers: a line a case, every provider, and one sentence an op."""

from table_rows import OURS, Row, is_gpu

KEY = ("machine", "op", "size", "dtype", "provider")
EAGER, COMPILED = "torch eager", "torch.compile"
SHORT_HEAD = (
    "| Op | Size | Dtype | p20 to p80 | % of ceiling | Eager | Compiled | Best peer | MiB (eager) | Error (eager) |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)  # fmt: skip
FULL_COLUMNS = ("Size", "Dtype", "Provider", "Time over ours (p20 to p80)", "% of ceiling", "Extra MiB", "Error")
GPU_COLUMNS = ("Median, ms", "Rate")


def by_machine(rows: list[Row]) -> dict[str, list[Row]]:
    latest = {tuple(row[name] for name in KEY): row for row in rows}
    return {m: [row for key, row in latest.items() if key[0] == m] for m in dict.fromkeys(key[0] for key in latest)}


def _title(machine: str, rows: list[Row]) -> str:
    last = rows[-1]
    return f"{machine}; {last['threads']} threads; torch {last['torch']}; {last['date']}. `isomorph bench kernels`"


def short_of_machine(machine: str, rows: list[Row]) -> str:
    lines = [_short_line(case, by) for case, by in _cases(rows).items()]
    note = (
        "Eager, compiled, best peer: how many times as long as ours; p20 to p80: our rounds over their median; "
        "% of ceiling: the copy or the products that cannot be avoided, done by PyTorch, over our time (beyond 100 "
        "where our body is faster than PyTorch's). [Every provider, with spread and memory](benchmarks/RESULTS.md)."
    )
    return "\n".join([f"{_title(machine, rows)}. {note}\n", SHORT_HEAD, *lines])


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
    ]
    return f"| {' | '.join(cells)} |"


def full_of_machine(machine: str, rows: list[Row]) -> str:
    parts = [f"## {_title(machine, rows)}"]
    columns = (*FULL_COLUMNS, *GPU_COLUMNS) if is_gpu(machine) else FULL_COLUMNS
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    for op in dict.fromkeys(row["op"] for row in rows):
        ordered = sorted((row for row in rows if row["op"] == op), key=_order(rows))
        parts.append("\n".join([f"### {op}\n", head, *(_full_line(row, len(columns)) for row in ordered)]))
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
        cells += [times, ceiling, _memory(row), f"{row['error']:.1e}"]
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
