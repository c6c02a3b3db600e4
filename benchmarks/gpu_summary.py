"""The GPU suite's printed summary: a line for each figure, and how each part ended."""

from collections.abc import Iterable
from typing import Any

OURS, EAGER, COMPILED = "isomorph", "torch eager", "torch.compile"  # as compare.py, which imports PyTorch, has them
FORMATS = {
    "value": "{:.4g}", "bound": "bound {:.2g}", "median_s": "{:.4g} s", "percent": "{:.1f} %",
    "tflops": "{:.1f} TFLOP/s", "mfu_percent": "MFU {:.1f} %", "peak_mib": "{:.0f} MiB",
    "packed_tok_s": "{:.0f} packed tok/s", "gain": "{:.2f} times", "result": "{}",
}  # fmt: skip


def is_bad(row: dict[str, Any]) -> bool:
    """A part that neither ended well nor was absent, a check that does not hold, a body of ours that is wrong."""
    if "ended" in row:
        return row["ended"] != 0 and not str(row["ended"]).startswith("absent")
    if "provider" in row:
        return row["provider"].startswith(OURS) and row["status"] != "ok"
    return row.get("holds") is False


def summary(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows of a case are collected until its part has ended. Rows that are marked "detail" are in the file alone."""
    lines: list[str] = []
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "ended" in row:
            lines += [line for case in cases.values() for line in _case_lines(case)]
            cases = {}
            lines.append(f"== {row['part']}: ended with {row['ended']} after {row['wall_s']} s")
        elif "provider" in row:
            cases.setdefault((row["op"], row["size"], row["dtype"]), []).append(row)
        elif not row.get("detail") or is_bad(row):
            mark = {True: "holds", False: "DOES NOT HOLD", None: ""}[row.get("holds")]
            lines.append(f"   {row['check']}: {', '.join(filter(None, [mark, *_figures(row)]))}")
    return lines


def _figures(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [f"FAILED {(str(row['failed']).strip().splitlines() or ['without a word'])[-1][:200]}"]
    return [form.format(row[name]) for name, form in FORMATS.items() if row.get(name) is not None]


def _case_lines(rows: list[dict[str, Any]]) -> list[str]:
    ok = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_s"])
    bad = [f"{row['provider']} {row['status']}: {row['reason'][:120]}" for row in rows if row["status"] != "ok"]
    head = f"   {rows[0]['op']}, {rows[0]['size']}, {rows[0]['dtype']}"
    others = [row["provider"] for row in ok if not row["provider"].startswith(OURS)]
    shown = {EAGER, COMPILED, *others[:3]}
    kept = [row for row in ok if row["provider"].startswith(OURS) or row["provider"] in shown]
    measured = [f"      {row['provider']:<38} {_speed(row)}" for row in kept]
    return [head, *measured, *(f"      not measured: {line}" for line in bad)]


def _speed(row: dict[str, Any]) -> str:
    percent = f"{row['ceiling_percent']:.0f} % of {row['ceiling']}" if "ceiling_percent" in row else ""
    ratio = f"{row['ratio']:.2f} x ours" if "ratio" in row and row["provider"] != OURS else ""
    memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f} MiB"
    return f"{1e3 * row['median_s']:9.3f} ms  {percent:<18} {ratio:<12} {memory:>10}  error {row['error']:.1e}"
