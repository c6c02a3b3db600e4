"""Rows as training data: seconds until the first draw, memory, and time of drawing a step's prompts.

    python benchmarks/bench_rows.py [--rows 1000000] [--kinds jsonl parquet csv]

Each kind of file is read in a process of its own, so that its memory is its own. Prints one JSON object a line.
"""

import argparse
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


def measure(kind: str, file: Path, out: Any) -> None:
    from isomorph.curriculum.rows.source import RowsSource
    from isomorph.curriculum.rows.spec import RowsData
    from isomorph.engine.model.text import TextCodec, byte_tokenizer

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
    out.put(
        {
            "kind": kind,
            "rows": len(source.dataset.side.rows),
            "file_mib": round(file.stat().st_size / 2**20, 1),
            "start_s": round(start_s, 2),
            "peak_mib": round(after - before, 1),
            "draw_ms": round(1000 * statistics.median(draws), 1),
            "prompts": PROMPTS,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "parquet", "csv"])
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            file = write(kind, args.rows, Path(folder))
            out = spawn.Queue()
            process = spawn.Process(target=measure, args=(kind, file, out))
            process.start()
            print(json.dumps(out.get()), flush=True)
            process.join()
            file.unlink()


if __name__ == "__main__":
    main()
