"""The README's table, the rows in kernels/README.md and benchmarks/RESULTS.md, from benchmarks/results/.

python benchmarks/table.py writes all three; tests/test_benchmarks.py fails where they say something else. The latest
row of each op, size, dtype, provider and machine counts. The README has a line for each of six comparisons,
benchmarks/RESULTS.md everything. Times on a CPU are given as ratios, with their spread; seconds and rates are given for
a GPU only, and for every machine in benchmarks/results/.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

import table_gpu
import table_ops
import table_runs
import table_static
from markers import between
from table_rows import NOT_MEASURED, Headline, Row, markdown_table, read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("float32", "bfloat16")
OP_MARKERS = r"(<!-- bench:(\w+) -->)\n.*?(<!-- /bench -->)"


def section(results: Path = RESULTS) -> str:
    """What belongs between the README's markers: a table for each machine."""
    step, update, adapter, sampler, _ = _runs(results)
    rows = [
        *table_runs.headlines(step, update, adapter, sampler),
        *table_ops.headlines(_ops(results)),
    ]
    machines: dict[tuple[str, ...], list[Headline]] = {}
    for row in rows:  # the benchmarks name a machine's parts in different orders
        machines.setdefault(tuple(sorted(row.machine.split(", "))), []).append(row)
    return "\n\n".join(_headlines(rows) for rows in machines.values())


def _headlines(rows: list[Headline]) -> str:
    head = (
        *("What", "Beside", *(f"Speed, {dtype}" for dtype in DTYPES)),
        *(*(f"Memory, {dtype}" for dtype in DTYPES), "Date, command"),
    )
    lines = [
        (
            *(row.what, row.other, *(row.speed.get(dtype, NOT_MEASURED) for dtype in DTYPES)),
            *(row.memory.get(dtype, "-") for dtype in DTYPES),
            f"[{row.dates}](benchmarks/RESULTS.md#{anchor(row.section)})",
        )
        for row in rows
    ]
    says = (
        f"{rows[0].machine}. Speed and memory: the other's time or peak memory divided by isomorph's; in brackets the "
        "spread; **bold**: below 1, the other is better."
    )
    return f"{says}\n\n{markdown_table(head, lines)}"


def anchor(title: str) -> str:
    """As GitHub makes one of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _runs(results: Path) -> tuple[list[Row], ...]:
    names = ("step", "update", "trl_adapter", "sampler", "publish")
    step, *others = (read_rows(results / f"{name}.jsonl") for name in names)
    return (step + table_gpu.step_rows(results), *others)


def _ops(results: Path) -> list[Row]:
    return read_rows(results / "kernels.jsonl") + table_gpu.kernel_rows(results)


def full(results: Path = RESULTS) -> str:
    """benchmarks/RESULTS.md: every comparison and every provider, also those that are absent or wrong."""
    machines = table_ops.by_machine(_ops(results))
    head = (
        "# Results of the benchmarks\n\nWritten by `python benchmarks/table.py` from `benchmarks/results/`. "
        "What was tried and did not work: [benchmarks/LOG.md](../benchmarks/LOG.md)."
    )
    parts = [
        *(head, *table_runs.runs(*_runs(results)), *table_gpu.sections(results)),
        *table_static.sections(results, table_gpu.kernel_rows(results)),
        *(f"## {table_ops.SUMMARY}", *(table_ops.short_of_machine(name, rows) for name, rows in machines.items())),
        *(f"## {table_ops.ALL}", *(table_ops.full_of_machine(name, rows) for name, rows in machines.items())),
    ]
    return "\n\n".join(parts) + "\n"


def with_rows(page: str, results: Path = RESULTS) -> str:
    """kernels/README.md with each op's cases between its markers."""
    machines = table_ops.by_machine(_ops(results))

    def rows(op: str) -> str:
        found = [table_ops.sentences(name, [r for r in rows if r["op"] == op]) for name, rows in machines.items()]
        return "".join(f"{text}\n" for text in found if text)

    return re.sub(OP_MARKERS, lambda m: f"{m[1]}\n{rows(m[2])}{m[3]}", page, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(between(readme.read_text(), "benchmarks", section()))
    page = ROOT / "kernels" / "README.md"
    page.write_text(with_rows(page.read_text()))
    (ROOT / "benchmarks/RESULTS.md").write_text(full())
