"""Measures every op beside other implementations; ``isomorph bench kernels`` runs this, table.py makes tables of it.

python benchmarks/all_ops.py [--op linear_loss] [--out benchmarks/results/kernels.jsonl] [--quick]
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

from compare import DEVICE, measure

FILES = {
    "linear": "bench_linear",
    "layer": "bench_layer",
    "linear_loss": "bench_linear_loss",
    "linear_logprob": "bench_linear_logprob",
    "token_logprob": "bench_token_logprob",
    "packed_attention": "bench_packed_attention",
    "decode_attention": "bench_decode_attention",
    "sample_token": "bench_sample_token",
    "advantage": "bench_advantage",
    "packing": "bench_packing",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=FILES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    parser.add_argument("--quick", action="store_true", help="the smallest size of each op, three rounds")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = Table("op", "size", "dtype", "provider", "median ms", "p20..p80", "x ours", "% ceiling", "MiB", "error")
    rounds = 3 if args.quick else (30 if DEVICE.type == "cuda" else 10)
    for op in [args.op] if args.op else FILES:
        for case in importlib.import_module(FILES[op]).cases(args.quick):
            started = time.monotonic()
            with args.out.open("a") as file:
                for row in measure(case, max_rounds=rounds, budget_s=5.0):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    table.add_row(*_cells(row))
            print(f"{case.op}, {case.size}, {case.dtype}: {time.monotonic() - started:.0f} s", flush=True)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    name = [row["op"], row["size"], row["dtype"], row["provider"]]
    if row["status"] != "ok":
        return [*name, row["status"], row["reason"], "", "", "", ""]
    memory = row["memory_mib"]
    return [
        *name,
        f"{1e3 * row['median_s']:.2f}",
        f"{1e3 * row['p20_s']:.2f}..{1e3 * row['p80_s']:.2f}",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{row['ceiling_percent']:.0f}" if "ceiling_percent" in row else "",
        "" if memory is None else f"{memory:.0f}",
        f"{row['error']:.1e}",
    ]


if __name__ == "__main__":
    main()
