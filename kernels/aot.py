"""Compiles every Triton kernel in every configuration that we launch, without a GPU, and checks the machine code.

    python -m isomorph.kernels.aot [--arch 90] [--json]        the same as: isomorph kernels compile
    python -m isomorph.kernels.aot --save-bounds               after a change of a kernel: also saves the bounds

No driver is needed: Triton includes ptxas, cuobjdump and nvdisasm. The checks ("gates"):

    stack     0 bytes a thread, or what the variant allows, with a reason beside the number: more means register spills
    shared    within the shared memory of a block on that GPU; Triton compiles kernels beyond it without an error
    mma       matrix instructions for tl.dot: HGMMA on sm_90, UTCHMMA on sm_100, HMMA on sm_80 and sm_120 and for
              products of fewer than 64 rows
    atomics   none in the IR: sums would depend on the order in which programs run
    barriers  as many as the variant requires, where warps read memory that other warps overwrite
    bound     the highest rate that the inner loop allows (kernels/bound.py), at most 2 % below the one saved in
              kernels/gpu/bounds.jsonl; of the Triton version with which those were saved
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isomorph.kernels import sass
from isomorph.kernels.bound import ARCHS as MODELS
from isomorph.kernels.bound import Bound, Code, bound
from isomorph.kernels.gpu import advantage, attention, decode, layer, offset, rows, sample
from isomorph.kernels.gpu.variant import ARCHS, SHARED_LIMIT, Variant

FILES = (rows, offset, advantage, attention, decode, sample, layer)
MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "LDGSTS", "UTMALDG", "STL", "LDL")
# Triton 3.6 keeps a convergence barrier of some loops on the stack: 8 bytes a thread, one store and one load.
STACK_SLACK = 8 if triton.__version__.startswith("3.6.") else 0
BOUNDS = Path(__file__).parent / "gpu" / "bounds.jsonl"
BOUND_SLACK = 0.02
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """The result of compiling one variant for one GPU architecture."""

    kernel: str
    arch: int
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a block
    instructions: dict[str, int]  # count per instruction in COUNTED, if not 0
    bound: Bound
    compile_s: float
    failures: tuple[str, ...]  # failed gates; empty if all pass


def variants(arch: int) -> Iterator[Variant]:
    """Every launch configuration for GPUs of architecture ``arch`` (90 is sm_90)."""
    for file in FILES:
        yield from file.variants(arch)


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compiles for ``arch`` (90 is sm_90) and checks the machine code. Raises what Triton raises."""
    started = time.perf_counter()
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in variant.kernel.arg_names},
        constexprs={(_position(variant, name),): value for name, value in variant.constants.items()},
        attrs={(_position(variant, name),): [["tt.divisibility", 16]] for name in _aligned(variant)},
    )
    options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, enable_fp_fusion=True)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    compile_s = time.perf_counter() - started
    registers, stack, code = _inspect(made.asm["cubin"])
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}
    failures = []
    if stack > variant.stack_allowed + STACK_SLACK:
        failures.append(f"stack {stack} B > {variant.stack_allowed + STACK_SLACK}")
    if made.metadata.shared > SHARED_LIMIT[arch]:
        failures.append(f"shared {made.metadata.shared} B > {SHARED_LIMIT[arch]}")
    mma = MMA[arch] if variant.dot_rows >= 64 else "HMMA"
    if variant.uses_dot and not counts[mma]:
        failures.append(f"no {mma}")
    if (found := len(re.findall(r"\bbar(?:rier)?\.sync\b", made.asm["ptx"]))) < variant.barriers:
        failures.append(f"barriers {found} < {variant.barriers}")
    if re.search(r"\btt\.atomic", made.asm["ttir"]):
        failures.append("atomics")
    program = sass.parse(code)
    kind = Code(program, variant.num_warps, registers, made.metadata.shared, variant.peak, variant.inner_iterations)
    model = bound(kind, MODELS[arch])
    failures += fallen(variant.name, arch, model, saved_bounds())
    return Compiled(
        kernel=variant.name,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=made.metadata.shared,
        instructions={name: count for name, count in counts.items() if count},
        bound=model,
        compile_s=round(compile_s, 3),
        failures=tuple(failures),
    )


@functools.cache
def saved_bounds() -> dict[tuple[str, int], tuple[float, float | None]]:
    """Bound and schedule in percent, by kernel and architecture; empty where another Triton made them."""
    version, *rows = map(json.loads, BOUNDS.read_text(encoding="utf-8").splitlines())
    if version["triton"] != _minor_version():
        return {}
    return {(row["kernel"], row["arch"]): (row["percent"], row["schedule_percent"]) for row in rows}


def fallen(
    kernel: str, arch: int, new: Bound, saved: Mapping[tuple[str, int], tuple[float, float | None]]
) -> list[str]:
    """What of a bound is more than 2 % below the saved one; also that none is saved, but others of the architecture."""
    if not any(saved_arch == arch for _, saved_arch in saved):
        return []
    if (kernel, arch) not in saved:
        return ["no bound is saved"]
    pairs = zip(("bound", "schedule"), saved[kernel, arch], (new.percent, new.schedule_percent), strict=True)
    return [
        f"{name} {now} % < {before} %"
        for name, before, now in pairs
        if before is not None and (now or 0.0) < (1 - BOUND_SLACK) * before
    ]


def save_bounds(found: Iterable[Compiled]) -> None:
    """Replaces the saved bounds of the kernels in ``found``; those of kernels that exist no more go."""
    rows = {key: pair for key, pair in saved_bounds().items() if key[0] in {v.name for v in variants(key[1])}}
    rows |= {(one.kernel, one.arch): (one.bound.percent, one.bound.schedule_percent) for one in found}
    lines: list[dict[str, Any]] = [{"triton": _minor_version()}]
    for (kernel, arch), (percent, schedule) in sorted(rows.items()):
        lines.append({"kernel": kernel, "arch": arch, "percent": percent, "schedule_percent": schedule})
    BOUNDS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _minor_version() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def _position(variant: Variant, name: str) -> int:
    return variant.kernel.arg_names.index(name)


def _aligned(variant: Variant) -> list[str]:
    """Names of pointers and sizes that are multiples of 16 in real models: Triton's launcher specialises on that."""
    return [name for name, kind in variant.signature.items() if kind[0] in "*i" and name not in variant.unaligned]


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers and bytes of stack per thread, and the machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(file))
        code = _tool("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(found[1]), int(found[2]), code


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_all(
    archs: Iterable[int] = ARCHS, only: str = "", *, num_processes: int | None = None
) -> Iterator[Compiled]:
    """Compiles every variant for every architecture, in order, in ``num_processes`` (default: one per core).

    ``only``: what the names of variants must contain.

    Raises RuntimeError if TRITON_INTERPRET=1.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1; unset it before Python starts")
    jobs = [(arch, i) for arch in archs for i, variant in enumerate(variants(arch)) if only in variant.name]
    # spawn, because a forked child of a process with OpenMP threads can hang
    with ProcessPoolExecutor(num_processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_job, jobs)


def _compile_job(job: tuple[int, int]) -> Compiled:
    arch, index = job
    return compile_variant(list(variants(arch))[index], arch)


def describe(compiled: Compiled) -> str:
    """One line: the kernel, its resources, and its failed gates or ok."""
    instructions = " ".join(f"{name} {count}" for name, count in compiled.instructions.items())
    verdict = "; ".join(compiled.failures) or "ok"
    return (
        f"sm_{compiled.arch:<4}{compiled.kernel:<58} {compiled.registers:>4} {compiled.stack:>6} "
        f"{compiled.shared:>8}  {_percent(compiled.bound):<28} {verdict:<6} {instructions}"
    )


def _percent(model: Bound) -> str:
    """For a line: 58 of 88 % matrix, shared: in order and overlapped, of which peak, and what binds."""
    in_order = "" if model.schedule_percent is None else f"{model.schedule_percent:.0f} of "
    return f"{in_order}{model.percent:.0f} % {model.peak}, {model.unit}"


def as_row(compiled: Compiled) -> dict[str, Any]:
    """For JSON."""
    return {**dataclasses.asdict(compiled), "bound": compiled.bound._asdict()}


HEADER = f"{'arch':<7}{'kernel':<58} {'regs':>4} {'stack':>6} {'shared':>8}  {'bound':<28} gate   instructions"


def report(archs: Iterable[int], only: str = "", *, as_json: bool, save: bool = False) -> int:
    """Prints one line per kernel and architecture; returns 0 if every gate passes, else 1. ``save``: bounds, too."""
    num_bad = num_all = 0
    found = []
    if not as_json:
        print(f"Triton {triton.__version__}\n{HEADER}")
    for compiled in compile_all(archs, only):
        found.append(compiled)
        print(json.dumps(as_row(compiled)) if as_json else describe(compiled), flush=True)
        num_all += 1
        num_bad += bool(compiled.failures)
    if save:
        save_bounds(found)
    print(f"{num_all - num_bad} of {num_all} pass", file=sys.stderr)
    return 1 if num_bad or not num_all else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel without a GPU and check its machine code."
    )
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=ARCHS,
        help="GPU architecture, 90 for sm_90; repeatable; default: all",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--save-bounds", action="store_true", help="replace the saved bounds by the new ones")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains TEXT")
    args = parser.parse_args()
    return report(args.arch or ARCHS, args.only, as_json=args.json, save=args.save_bounds)


if __name__ == "__main__":
    sys.exit(main())
