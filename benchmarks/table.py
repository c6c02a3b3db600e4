"""The README's section "Measured", the rows in kernels/README.md and benchmarks/RESULTS.md, from benchmarks/results/.

python benchmarks/table.py writes all three; tests/test_benchmarks.py fails where they say something else. Of each op,
size, dtype, provider and machine the latest row counts. The README has a line a case: ours, PyTorch, the best peer.
Times of a processor are given as multiples of ours, with their spread: seconds and rates stand here of a GPU only, and
of every machine in benchmarks/results/.
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
OP_MARKERS = r"(<!-- bench:(\w+) -->)\n.*?(<!-- /bench -->)"
KEY = ("machine", "op", "size", "dtype", "provider")
STEP_KEY = ("machine", "model", "sampler", "kl", "prompts", "group", "max_new_tok", "trl_generation")
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
        *_adapted(_read(results / "trl_adapter.jsonl")),
        *_decoding(_read(results / "sampler.jsonl")),
        *_publishing(_read(results / "publish.jsonl")),
    ]
    machines = _by_machine(_read(results / "kernels.jsonl"))
    ops = [_short(name, rows) for name, rows in machines.items()]
    return "\n\n".join([*parts, "### Every op beside its peers", *ops])


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
def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = (head, ("---",) * len(head), *lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _part(title: str, says: str, table: str, rows: Iterable[Row]) -> str:
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    return f"### {title}\n\n{says}\n\n{table}\n\n```\n{commands}\n```"


def _grouped(rows: Iterable[Row], *names: str) -> Iterable[list[Row]]:
    """Rows that agree in these keys, together, in the order of the first of each."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found.values()


def _latest(rows: Iterable[Row], *names: str) -> list[Row]:
    return [alike[-1] for alike in _grouped(rows, *names)]


def _ratio(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _steps(rows: list[Row]) -> list[str]:
    latest = _latest((row for row in rows if row["who"] == "ratio"), "dtype", *STEP_KEY)
    return [_step(alike) for alike in _grouped(latest, *STEP_KEY)]


def _step(rows: list[Row]) -> str:
    row = rows[0]
    on_gpu = _is_gpu(row["machine"])
    says = (
        f"{row['model']}, sampler {row['sampler']}, KL {row['kl']:g}, {row['prompts']} prompts of {row['group']} "
        f"completions, at most {row['max_new_tok']} tokens each; {row['machine']}; torch {row['torch']}; "
        f"{row['date']}. Both sides in turns of one run; {'seconds' if on_gpu else 'times in multiples of our step'}, "
        f"medians of {row['turns'] - 1} turns."
    )
    head = (
        *("Dtype", "", "TRL's step over ours, turn by turn", "Step", "Generate", "Rest"),
        *("Completion tok", "All tok", "Peak MiB above rest", "Padding"),
    )
    lines = [line for row in rows for line in _step_lines(row, 1.0 if on_gpu else row[OURS]["step_s"])]
    return _part("One GRPO step beside TRL", says, _table(head, lines), rows)


def _step_lines(row: Row, one: float) -> list[tuple[str, ...]]:
    ratios = row["ratios"]
    beside = f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})"
    return [
        (row["dtype"], "TRL", beside, *_anatomy(row["trl"], one)),
        (row["dtype"], OURS, "", *_anatomy(row[OURS], one)),
    ]


def _anatomy(side: Row, one: float) -> tuple[str, ...]:
    step, generate = side["step_s"], side["generate_s"]
    return (
        *(f"{seconds / one:.2f}" for seconds in (step, generate, step - generate)),
        *(f"{side[name]:.0f}" for name in ("completion_tok", "all_tok", "peak_mib")),
        f"{100 * side['padding_share']:.0f} %",
    )


def _updates(rows: list[Row]) -> list[str]:
    latest = _latest((row for row in rows if row["who"] == "ratio"), "machine", "dtype")
    return [_update(alike) for alike in _grouped(latest, "machine")]


def _update(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        "The prompt of a group computed once, beside the same update with the prompt repeated for each response; "
        f"{row['machine']}; torch {row['torch']}; {row['date']}."
    )
    head = ("Dtype", "Times as fast", "Times less memory above what is at rest")
    lines = [(row["dtype"], f"**{row['speed']:.1f}**", _ratio(row["memory"])) for row in rows]
    return _part("One update with shared prompts", says, _table(head, lines), rows)


def _adapted(rows: list[Row]) -> list[str]:
    sizes = ("machine", "model", "groups", "group", "prompt_tok", "response_tok")
    latest = _latest((row for row in rows if row["who"] == "ratio"), "dtype", *sizes)
    return [_packed_trl(alike) for alike in _grouped(latest, *sizes)]


def _packed_trl(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        f"`pack_groups(trainer)` beside TRL as it comes: forward and backward of a micro-batch of {row['model']}, "
        f"{row['groups']} prompts of {row['prompt_tok']} tokens with {row['group']} responses of at most "
        f"{row['response_tok']}; {row['machine']}; torch {row['torch']}; {row['date']}."
        f"{'' if _is_gpu(row['machine']) else ' Without a GPU TRL scores every position, those of prompts included.'}"
    )
    head = ("Dtype", "Times as fast", "p20 to p80", "Times less memory above what is at rest")
    lines = [
        (r["dtype"], f"**{r['ratio']:.1f}**", f"{r['low']:.1f} to {r['high']:.1f}", _ratio(r["memory"])) for r in rows
    ]
    return _part("TRL's own trainer, packed", says, _table(head, lines), rows)


def _decoding(rows: list[Row]) -> list[str]:
    latest = _latest(rows, "machine", "seqs", "dtype", "provider")
    return [_decoded(alike) for alike in _grouped(latest, "machine", "seqs")]


def _decoded(rows: list[Row]) -> str:
    row = rows[0]
    peers = tuple(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    ours_over = {(row["dtype"], row["provider"]): _decoding_ratio(row) for row in rows}
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    lines = [(dtype, *(ours_over.get((dtype, peer), "not measured") for peer in peers)) for dtype in dtypes]
    says = (
        f"{row['seqs']} sequences, tokens a second of the built-in sampler over those of others; {row['machine']}; "
        f"{row['time'][:10]}. Bare products: the decoder's matrix products by PyTorch and nothing else."
    )
    return _part("Decoding", says, _table(("Dtype", *peers), lines), rows)


def _decoding_ratio(row: Row) -> str:
    return f"{row['ours_over_this']:.2f}" if row["status"] == "ok" else f"absent ({row['reason']})"


def _publishing(rows: list[Row]) -> list[str]:
    latest = _latest(rows, "machine", "mode", "dtype")
    return [_published(alike) for alike in _grouped(latest, "machine", "parameters", "seqs", "new_tok")]


def _published(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        f"{row['parameters'] / 1e6:.0f} M parameters to vLLM, in percent of the time of drawing {row['seqs']} "
        f"sequences of {row['new_tok']} tokens; {row['machine']}; {row['time'][:10]}. The probe is drawn at the start "
        "and before an exam, the rest at every step."
    )
    lines = [
        (
            *(row["mode"], row["dtype"], f"{row['publish_bytes'] / 1e6:.0f}", _share(row, "move_s")),
            *(_share(row, "fingerprint_s", "check_s"), _share(row, "probe_s")),
        )
        for row in rows
    ]
    head = ("Mode", "Dtype", "MB moved", "Moving", "Both fingerprints", "Probe")
    return _part("Publishing weights", says, _table(head, lines), rows)


def _share(row: Row, *parts: str) -> str:
    return f"{100 * sum(row[part] for part in parts) / row['generate_s']:.2g} %"


# -- ops
def _title(machine: str, rows: list[Row]) -> str:
    last = rows[-1]
    return f"{machine}; {last['threads']} threads; torch {last['torch']}; {last['date']}. `isomorph bench kernels`"


def _short(machine: str, rows: list[Row]) -> str:
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
