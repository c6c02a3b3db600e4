"""benchmarks/RESULTS.md's table of static bounds (kernels/bound.py) beside what an H200 measured (results/gpu/)."""

import json
from pathlib import Path

from table_rows import Row, markdown_table

TITLE = "## Static bound beside measurement: NVIDIA H200"
TFLOPS, GB_S = 989.4, 4800.0  # data sheet, dense bfloat16 and memory; the peaks of kernels/bound.py
HEAD = ("Op", "Size", "Static bound, %", "In order, %", "Measured, %", "Measured / bound", "Binds")
ATTENTION = {"forward": 2, "grad_q": 3, "grad_kv": 4}  # products of each kernel
COUNTED = 7  # of which the benchmark's FLOP count: 2 forward and 5 backward; dQ and dK/dV recompute two


def sections(results: Path, gpu_rows: list[Row]) -> list[str]:
    """The section; none where no bounds are saved."""
    if not (results / "static.jsonl").exists():
        return []
    bounds = {row["kernel"]: row for row in map(json.loads, (results / "static.jsonl").read_text().splitlines())}
    (version,) = {row["triton"] for row in bounds.values()}
    lines: list[tuple[str, ...]] = []
    for row in gpu_rows:
        if row["provider"] == "isomorph" and row["machine"].startswith("NVIDIA H200") and (found := _line(row, bounds)):
            lines.append((row["op"], row["size"], *found))
    head = (
        f"Percent of {TFLOPS:.0f} TFLOP/s or of {GB_S:.0f} GB/s, the data sheet's peaks; a product of 8192 x 8192 "
        f"matrices reached 81 % and a copy 88 %. Bounds are of the tiles that were measured, compiled with Triton "
        f"{version} (`python benchmarks/static_tiles.py --as-measured`). In order: with the waits that the order of "
        "instructions forces. Attention: forward and backward by the benchmark's FLOP, of which the kernels compute "
        "9/7 because dQ and dK/dV recompute two products. Row kernels: bytes that must move."
    )
    return ["\n\n".join([TITLE, head, markdown_table(HEAD, lines), WHY])]


WHY = """Where the two differ, and why:

- `token_logprob`: not memory binds but slots: about 500 instructions for 16 logits of a thread (two exponentials,
  guards for -inf and NaN). The measured rate is four fifths of what they allow. The kernel was changed since: 12
  instructions a logit instead of 31, and memory binds (`isomorph kernels compile`); that was not measured.
- `sample_token`: likewise, for the noise of every token.
- `packed_attention`: dK/dV binds first, on shared memory: its blocks of 32 queries read 3 KB of operands for 16 clocks
  of the tensor cores. Then the order: one program a multiprocessor, whose warps wait for a product before the softmax.
  At P = 2048, G = 8 pieces of 4096 queries left 31 % of the multiprocessors idle in dK/dV (benchmarks/grid.py); the
  rate at G = 16, where they left none, is 1.2 times as high. The rest is not modelled: latency of loads and of
  dependent instructions, and the clock under load (a product of matrices reached 81 % of the peak).
- `decode_attention`: 84 MB take 18 us at the peak, and 55 us were measured. Not modelled: three launches, the 56 of 64
  programs of the prompt's grid that return at once, and that few waves of programs do not fill the memory's queues. A
  copy of the same tensors reaches two thirds of the peak.
- Norms, SwiGLU and rotary embedding were not measured one by one."""


def _line(row: Row, bounds: dict[str, Row]) -> list[str] | None:
    """Static bound, bound in order, measured, ratio to the tighter one, unit; None: no model of this op."""
    if row["op"] == "packed_attention":
        made = {name: bounds[f"{name}_kernel [bf16, D 128]"] for name in ATTENTION}
        static, in_order = (
            COUNTED / sum(count / made[name][key] for name, count in ATTENTION.items())
            for key in ("percent", "schedule_percent")
        )
        units = ", ".join(f"{name} {made[name]['unit']}" for name in ATTENTION)
        return _cells(static, in_order, 100 * row["gflop_s"] / 1e3 / TFLOPS, units)
    if row["op"] == "decode_attention":
        found = bounds["partial_kernel [prompt, bf16, D 128, 6 heads per KV head]"]
        byte = 2 * 2 * 2 * 128 * (8 * 2048 + 64 * 1024)  # keys and values, 2 bytes, 2 KV heads
        return _cells(found["percent"], None, 100 * byte / row["median_s"] / 1e9 / GB_S, found["unit"])
    measured = 100 * row["gb_s"] / GB_S if "gb_s" in row else 0.0
    if row["op"] == "token_logprob":
        stats, gradient = bounds["stats_kernel [bf16]"], bounds["gradient_kernel [bf16 -> bf16, dlogprob]"]
        if row["size"].startswith("forward and backward"):  # one pass of the first, two of the second
            both = 3 / (1 / stats["percent"] + 2 / gradient["percent"])
            return _cells(both, None, measured, f"stats {stats['unit']}, gradient {gradient['unit']}")
        return _cells(stats["percent"], None, measured, stats["unit"])
    if row["op"] == "sample_token":
        return _cells(bounds["draw_kernel [fp32]"]["percent"], None, measured, bounds["draw_kernel [fp32]"]["unit"])
    return None


def _cells(static: float, in_order: float | None, measured: float, unit: str) -> list[str]:
    least = min(static, in_order or static)
    order = "" if in_order is None else f"{in_order:.0f}"
    return [f"{static:.0f}", order, f"{measured:.0f}", f"{measured / least:.2f}", unit]
