"""Rows as training data: seconds until the first draw, memory, and time of drawing a step's prompts.

    python benchmarks/bench_rows.py [--rows 1000000] [--kinds jsonl parquet csv] [--starts 3]

Each start is in a process of its own, so that its memory is its own; the file was just written, so that it comes from
the page cache. Imports are not counted. A draw renders a row and measures its length with a tokenizer of bytes; in a
run the model's tokenizer takes longer: bench_rewards.py has that, as a share of a step. Median, lowest and highest of
the starts, and of all steps' draws. Prints one JSON object a line.
"""

import argparse
import importlib
import json
import multiprocessing
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = 512  # of a step
STEPS = 20


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of the form of GSM8K's, of about 250 bytes each; all questions differ."""
    rng = random.Random(0)
    for i in range(count):
        a, b = rng.randrange(2, 100), rng.randrange(2, 10)
        yield {
            "question": f"Farmer {i} has {a} fields with {b} trees each. Each tree bears {b + 3} apples a year. "
            "How many apples does the farm bear in a year?",
            "answer": f"There are {a} * {b} = <<{a}*{b}={a * b}>>{a * b} trees.\n#### {a * b * (b + 3)}",
        }


def write(kind: str, count: int, folder: Path) -> Path:
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        with file.open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows(count))
        return file
    import pyarrow
    from pyarrow import csv, parquet

    table = pyarrow.Table.from_pylist(list(rows(count)))
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        csv.write_csv(table, file)
    return file


def peak_mib() -> float:
    """The most memory that this process has had; ru_maxrss would be that of the process that started it, too."""
    (found,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


def measure(file: Path, count: int, out: Any) -> None:
    from isomorph.curriculum.rows.source import RowsSource
    from isomorph.curriculum.rows.spec import RowsData
    from isomorph.engine.model.text import TextCodec, byte_tokenizer

    if file.suffix != ".jsonl":
        importlib.import_module("pyarrow.parquet")
        importlib.import_module("pyarrow.csv")
    text = TextCodec(byte_tokenizer(), chat_template=False, stop_ids=[1])
    before = peak_mib()
    started = time.perf_counter()
    data = RowsData(kind="rows", path=str(file), prompt="{question}\nEnd with ####.", answer="answer", eval_share=0.01)
    source = RowsSource(data, text, "rows")
    _, position = source.draw("natural", 0, 0)
    start_s = time.perf_counter() - started
    after = peak_mib()
    draws = []
    for _ in range(STEPS):
        started = time.perf_counter()
        for _ in range(PROMPTS):
            _, position = source.draw("natural", position, 0)
        draws.append(time.perf_counter() - started)
    assert len(source.dataset.side.rows) == count
    out.put({"start_s": start_s, "peak_mib": after - before, "draws_ms": [1000 * seconds for seconds in draws]})


def spread(values: list[float], digits: int) -> list[float]:
    return [round(f(values), digits) for f in (statistics.median, min, max)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "parquet", "csv"])
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            file = write(kind, args.rows, Path(folder))
            found = []
            for _ in range(args.starts):
                out = spawn.Queue()
                process = spawn.Process(target=measure, args=(file, args.rows, out))
                process.start()
                found.append(out.get())
                process.join()
            row = {
                "kind": kind,
                "rows": args.rows,
                "file_mib": round(file.stat().st_size / 2**20, 1),
                "start_s": spread([one["start_s"] for one in found], 2),
                "peak_mib": spread([one["peak_mib"] for one in found], 1),
                "draw_ms": spread([ms for one in found for ms in one["draws_ms"]], 1),
                "prompts": PROMPTS,
            }
            print(json.dumps(row), flush=True)
            file.unlink()


if __name__ == "__main__":
    main()
