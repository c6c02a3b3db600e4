"""The README's section "Measured", the rows in kernels/README.md and benchmarks/RESULTS.md, from benchmarks/results/.

python benchmarks/table.py writes all three; tests/test_benchmarks.py fails where they say something else. Of each op,
size, dtype, provider and machine the latest row counts. The README has a line a case: ours, PyTorch, the best peer.
Times of a processor are given as multiples of ours, with their spread: seconds and rates stand here of a GPU only, and
of every machine in benchmarks/results/.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

import table_runs
from table_ops import by_machine, full_of_machine, sentences, short_of_machine
from table_rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
OP_MARKERS = r"(<!-- bench:(\w+) -->)\n.*?(<!-- /bench -->)"


def section(results: Path = RESULTS) -> str:
    """What belongs between the README's markers."""
    parts = [
        *table_runs.steps(read_rows(results / "step.jsonl")),
        *table_runs.updates(read_rows(results / "update.jsonl")),
        *table_runs.adapted(read_rows(results / "trl_adapter.jsonl")),
        *table_runs.decoding(read_rows(results / "sampler.jsonl")),
        *table_runs.publishing(read_rows(results / "publish.jsonl")),
    ]
    machines = by_machine(read_rows(results / "kernels.jsonl"))
    ops = [short_of_machine(name, rows) for name, rows in machines.items()]
    return "\n\n".join([*parts, "### Every op beside its peers", *ops])


def full(results: Path = RESULTS) -> str:
    """benchmarks/RESULTS.md: every provider, also those that are absent or wrong."""
    machines = by_machine(read_rows(results / "kernels.jsonl"))
    head = (
        "# Every op beside its peers\n\nWritten by `python benchmarks/table.py`, measured by `isomorph bench kernels`."
    )
    return "\n\n".join([head, *(full_of_machine(name, rows) for name, rows in machines.items())]) + "\n"


def with_rows(page: str, results: Path = RESULTS) -> str:
    """kernels/README.md with each op's cases between its markers."""
    machines = by_machine(read_rows(results / "kernels.jsonl"))

    def rows(op: str) -> str:
        found = [sentences(name, [r for r in rows if r["op"] == op]) for name, rows in machines.items()]
        return "".join(f"{text}\n" for text in found if text)

    return re.sub(OP_MARKERS, lambda m: f"{m[1]}\n{rows(m[2])}{m[3]}", page, flags=re.DOTALL)


def replaced(readme: str, text: str) -> str:
    """The README with ``text`` between its markers."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md needs the lines {START} and {END}, in this order")
    return f"{before}{START}\n{text}\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), section()))
    page = ROOT / "kernels" / "README.md"
    page.write_text(with_rows(page.read_text()))
    (ROOT / "benchmarks/RESULTS.md").write_text(full())
