"""The README's section "Measured", the rows in kernels/README.md and benchmarks/RESULTS.md, from benchmarks/results/.

python benchmarks/table.py writes all three; tests/test_benchmarks.py fails where they say something else. Of each op,
size, dtype, provider and machine the latest row counts. The README has a line a case: ours, PyTorch, the best peer.
Times of a processor are given as multiples of ours, with their spread: seconds and rates stand here of a GPU only, and
of every machine in benchmarks/results/.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
OP_MARKERS = r"(<!-- bench:(\w+) -->)\n.*?(<!-- /bench -->)"
KEY = ("machine", "op", "size", "dtype", "provider")
STEP_KEY = ("machine", "model", "sampler", "dtype", "kl", "prompts", "group", "max_new_tok", "trl_generation")
OURS, EAGER, COMPILED = "isomorph", "torch eager", "torch.compile"
SHORT_HEAD = (
    "| Op | Size | Dtype | p20 to p80 | % of ceiling | Eager | Compiled | Best peer | MiB (eager) | Error (eager) |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)  # fmt: skip
FULL_COLUMNS = ("Size", "Dtype", "Provider", "Time over ours (p20 to p80)", "% of ceiling", "Extra MiB", "Error")
GPU_COLUMNS = ("Median, ms", "Rate")
Row = dict[str, Any]


def section(results: Path = RESULTS) -> str:
    """What belongs between the README's markers."""
    parts = [
        *_steps(_read(results / "step.jsonl")),
        *_updates(_read(results / "update.jsonl")),
        *_decoding(_read(results / "sampler.jsonl")),
        *_publishing(_read(results / "publish.jsonl")),
    ]
    machines = _by_machine(_read(results / "kernels.jsonl"))
    return "\n\n".join([*parts, *(_short(name, rows) for name, rows in machines.items())])


def full(results: Path = RESULTS) -> str:
    """benchmarks/RESULTS.md: every provider, also those that are absent or wrong."""
    machines = _by_machine(_read(results / "kernels.jsonl"))
    head = (
        "# Every op beside its peers\n\nWritten by `python benchmarks/table.py`, measured by `isomorph bench kernels`."
    )
    return "\n\n".join([head, *(_full(name, rows) for name, rows in machines.items())]) + "\n"


def with_rows(page: str, results: Path = RESULTS) -> str:
    """kernels/README.md with each op's cases between its markers."""
    machines = _by_machine(_read(results / "kernels.jsonl"))

    def rows(op: str) -> str:
        found = [_sentences(name, [r for r in rows if r["op"] == op]) for name, rows in machines.items()]
        return "".join(f"{text}\n" for text in found if text)

    return re.sub(OP_MARKERS, lambda m: f"{m[1]}\n{rows(m[2])}{m[3]}", page, flags=re.DOTALL)


def replaced(readme: str, text: str) -> str:
    """The README with ``text`` between its markers."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md needs the lines {START} and {END}, in this order")
    return f"{before}{START}\n{text}\n{END}{after}"


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _by_machine(rows: list[Row]) -> dict[str, list[Row]]:
    latest = {tuple(row[name] for name in KEY): row for row in rows}
    return {m: [row for key, row in latest.items() if key[0] == m] for m in dict.fromkeys(key[0] for key in latest)}


def _is_gpu(machine: str) -> bool:
    return " cores" not in machine


# -- a whole step, and its parts
def _steps(rows: list[Row]) -> list[str]:
    latest = {tuple(row[name] for name in STEP_KEY): row for row in rows if row["who"] == "ratio"}
    return [
        f"One GRPO step of {row['model']} ({row['dtype']}, sampler {row['sampler']}, KL {row['kl']:g}, "
        f"{row['prompts']} prompts of {row['group']} completions; {row['machine']}; torch {row['torch']}; "
        f"{row['date']}): TRL takes {_beside_trl(row)}. `{row['command']}`\n\n{_anatomy(row)}"
        for row in latest.values()
    ]


def _beside_trl(row: Row) -> str:
    ratios = row["ratios"]
    return (
        f"**{statistics.median(ratios):.1f} times** as long as we do, median of {row['turns'] - 1} turns, "
        f"{min(ratios):.1f} to {max(ratios):.1f} turn by turn"
    )


def _anatomy(row: Row) -> str:
    unit = "s" if _is_gpu(row["machine"]) else "of our step"
    head = (
        f"| | Step, {unit} | Generate | Rest | Completion tok | All tok | Peak MiB above rest | Padding |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    one = 1.0 if _is_gpu(row["machine"]) else row[OURS]["step_s"]
    return "\n".join([head, *(_anatomy_line(name, row[who], one) for name, who in (("TRL", "trl"), (OURS, OURS)))])


def _anatomy_line(name: str, side: Row, one: float) -> str:
    return (
        f"| {name} | {side['step_s'] / one:.2f} | {side['generate_s'] / one:.2f} "
        f"| {(side['step_s'] - side['generate_s']) / one:.2f} "
        f"| {side['completion_tok']:.0f} | {side['all_tok']:.0f} | {side['peak_mib']:.0f} "
        f"| {100 * side['padding_share']:.0f} % |"
    )


def _updates(rows: list[Row]) -> list[str]:
    latest = {(row["machine"], row["dtype"]): row for row in rows if row["who"] == "ratio"}
    return [
        f"One update, the prompt of a group computed once, beside it repeated for each response ({row['dtype']}; "
        f"{row['machine']}; torch {row['torch']}; {row['date']}): **{row['speed']:.1f} times** as fast in "
        f"{row['memory']:.1f} times less memory above what is at rest. `{row['command']}`"
        for row in latest.values()
    ]


def _decoding(rows: list[Row]) -> list[str]:
    latest: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        latest.setdefault((row["machine"], row["dtype"], row["seqs"]), {})[row["provider"]] = row
    return [_decoding_of(by) for by in latest.values()]


def _decoding_of(by: dict[str, Row]) -> str:
    ours = by[OURS]
    beside = [f"**{_decoding_ratio(row)}** {name}" for name, row in by.items() if name != OURS]
    return (
        f"Decoding {ours['seqs']} sequences with the built-in sampler ({ours['dtype']}; {ours['machine']}; "
        f"{ours['time'][:10]}), tokens a second over those of: {', '.join(beside)}. `{ours['command']}`"
    )


def _decoding_ratio(row: Row) -> str:
    return f"{row['ours_over_this']:.2f}" if row["status"] == "ok" else f"absent ({row['reason']})"


def _publishing(rows: list[Row]) -> list[str]:
    latest = {(row["machine"], row["mode"], row["dtype"]): row for row in rows}
    return [
        f"Publishing {row['parameters'] / 1e6:.0f} M parameters to vLLM, mode {row['mode']} ({row['dtype']}; "
        f"{row['machine']}; {row['time'][:10]}), of the time of drawing {row['seqs']} sequences of {row['new_tok']} "
        f"tokens: {_share(row, 'move_s')} for {row['publish_bytes'] / 1e6:.0f} MB, "
        f"{_share(row, 'fingerprint_s', 'check_s')} for both fingerprints, {_share(row, 'probe_s')} for the probe that "
        "is drawn at the start and before an exam."
        for row in latest.values()
    ]


def _share(row: Row, *parts: str) -> str:
    return f"{100 * sum(row[part] for part in parts) / row['generate_s']:.2g} %"


# -- ops
def _title(machine: str, rows: list[Row]) -> str:
    last = rows[-1]
    return f"{machine}; {last['threads']} threads; torch {last['torch']}; {last['date']}. `isomorph bench kernels`"


def _short(machine: str, rows: list[Row]) -> str:
    lines = [_short_line(case, by) for case, by in _cases(rows).items()]
    note = (
        "Eager, compiled, best peer: how many times as long as ours; p20 to p80: our rounds over their median. "
        "[Every provider, with spread and memory](benchmarks/RESULTS.md)."
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


def _sentences(machine: str, rows: list[Row]) -> str:
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
        ours = [f"{1e3 * by[OURS]['median_s']:.2f} ms"] if _is_gpu(machine) else []
        parts.append(f"{size}, {dtype}: {', '.join([*ours, *than])}")
    return f"Measured ({machine}): {'; '.join(parts)}. [All](../benchmarks/RESULTS.md)"


def _short_line(case: tuple[str, ...], by: dict[str, Row]) -> str:
    ours, eager = by[OURS], by.get(EAGER, {"status": "absent"})
    best = _best_peer(by)
    cells = [
        *case,
        f"{1e3 * ours['median_s']:.2f} ms, {_spread(ours)}" if _is_gpu(ours["machine"]) else _spread(ours),
        _percent(ours),
        _times(eager),
        _times(by.get(COMPILED, {"status": "absent"})),
        f"{best['provider']}: {_times(best)}" if best else "",
        f"{_memory(ours)} ({_memory(eager)})",
        f"{ours['error']:.0e} ({eager['error']:.0e})" if "error" in eager else f"{ours['error']:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def _full(machine: str, rows: list[Row]) -> str:
    parts = [f"## {_title(machine, rows)}"]
    columns = (*FULL_COLUMNS, *GPU_COLUMNS) if _is_gpu(machine) else FULL_COLUMNS
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
        if _is_gpu(row["machine"]):
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


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), section()))
    page = ROOT / "kernels" / "README.md"
    page.write_text(with_rows(page.read_text()))
    (ROOT / "benchmarks/RESULTS.md").write_text(full())
