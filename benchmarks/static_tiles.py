"""The static bound of packed attention's three kernels at every tile that the GPU suite's part ``tune`` tries.

    python benchmarks/static_tiles.py [--arch 90] [--dim 128] [--out FILE]
    python benchmarks/static_tiles.py --as-measured --out benchmarks/results/static.jsonl

No GPU is needed. A row for each kernel, head dimension and tile: the bound of the machine code (kernels/bound.py), that
of its schedule, stack, programs a multiprocessor holds, and the share of its slots that a group of 2048 prompt tokens
and 8 responses of 1024 leaves idle (benchmarks/grid.py). "worth": percent of the peak, the smaller of the two bounds
times the busy share; 0 where a gate fails. Latency of loads is not in it, so that one stage looks too good.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_tune import FORWARD, GRAD_KV, GRAD_Q

HEADS = {64: (9, 3), 128: (12, 2)}
MEASURED = (
    *(f"{name}_kernel [bf16, D 128]" for name in ("forward", "grad_q", "grad_kv")),
    "partial_kernel [prompt, bf16, D 128, 6 heads per KV head]", "stats_kernel [bf16]",
    "gradient_kernel [bf16 -> bf16, dlogprob]", "draw_kernel [fp32]",
)  # fmt: skip
TRIED = {"forward": FORWARD, "grad_q": GRAD_Q, "grad_kv": GRAD_KV}


def row(job: tuple[int, int, str, tuple[Any, ...], bool]) -> dict[str, Any]:
    """One candidate, compiled."""
    from grid import idle_share

    from isomorph.kernels import aot
    from isomorph.kernels.gpu import attention
    from isomorph.kernels.gpu.attention_tiles import CONFIGS, Tile

    arch, dim, name, sizes, is_shipped = job
    tile = Tile(*sizes)
    kernel = getattr(attention, f"{name}_kernel")
    blocks = {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    if name == "forward":
        blocks["AHEAD"] = tile.ahead
    made = attention.variant(kernel, "bf16", dim, tile.num_warps, tile.num_stages, **blocks)
    found: dict[str, Any] = {"kernel": name, "arch": arch, "dim": dim, "tile": sizes, "shipped": is_shipped}
    try:
        compiled = aot.compile_variant(dataclasses.replace(made, uses_dot=True, peak="matrix"), arch)
    except Exception as failure:  # the compiler refuses some tiles
        return {**found, "failed": f"{type(failure).__name__}: {failure}"[:120]}
    model = compiled.bound
    config = CONFIGS[arch, dim, 2]._replace(**{name: tile})
    idle = idle_share(name, config, *HEADS[dim], prompt=2048, response=1024, group=8, slots=model.programs)
    percent = min(model.percent, model.schedule_percent or model.percent)
    gates = [failure for failure in compiled.failures if "bound" not in failure]
    return {
        **found, "percent": model.percent, "schedule_percent": model.schedule_percent, "unit": model.unit,
        "programs": model.programs, "registers": compiled.registers, "stack": compiled.stack, "failures": gates,
        "idle": round(idle, 3), "worth": round(percent * (1 - idle), 1) if not gates else 0.0,
    }  # fmt: skip


def as_measured() -> Iterator[dict[str, Any]]:
    """Bounds of the kernels that the H200's rows in results/gpu/ ran: their tiles, and the Triton that is installed."""
    import triton

    from isomorph.kernels import aot
    from isomorph.kernels.gpu.attention_tiles import CONFIGS, Tile

    CONFIGS[90, 128, 2] = CONFIGS[90, 128, 2]._replace(forward=Tile(128, 64, 8, 3))
    for variant in aot.variants(90):
        if variant.name in MEASURED:
            model = aot.compile_variant(variant, 90).bound
            yield {
                "kernel": variant.name, "triton": triton.__version__, "gpu": "NVIDIA H200", "peak": model.peak,
                "percent": model.percent, "schedule_percent": model.schedule_percent, "unit": model.unit,
            }  # fmt: skip


def jobs(archs: list[int], dims: list[int]) -> Iterator[tuple[int, int, str, tuple[Any, ...], bool]]:
    from isomorph.kernels.gpu.attention_tiles import CONFIGS, Tile

    for arch in archs:
        for dim in dims:
            for name, tried in TRIED.items():
                shipped = tuple(getattr(CONFIGS[arch, dim, 2], name))
                yield arch, dim, name, shipped, True
                for tile in tried:
                    if Tile(*tile) != Tile(*shipped):
                        yield arch, dim, name, tile, False


def main() -> int:
    parser = argparse.ArgumentParser(description="Static bounds of packed attention's tiles.")
    parser.add_argument("--arch", type=int, action="append")
    parser.add_argument("--dim", type=int, action="append", choices=HEADS)
    parser.add_argument("--out", type=Path, help="JSON Lines")
    parser.add_argument("--as-measured", action="store_true", help="the kernels of results/gpu/ instead")
    args = parser.parse_args()
    if args.as_measured:
        args.out.write_text("".join(json.dumps(found) + "\n" for found in as_measured()), encoding="utf-8")
        return 0
    todo = list(jobs(args.arch or [90], args.dim or list(HEADS)))
    lines = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for found in pool.map(row, todo):
            lines.append(json.dumps(found))
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
