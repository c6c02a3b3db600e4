"""How fast a kernel can be at most, from its machine code: a static model of its inner loop.

The instructions of the loop are counted by the unit that executes them. A unit's time is their number over its
throughput; the unit with the longest time binds. The bound is the time of what the kernel is for, over that time:

    matrix    matrix instructions, at the throughput of the tensor cores     attention, products in 16 bits
    fp32      multiplications and additions, at that of the float32 lanes    the same in float32
    copy      bytes of global memory, at the bandwidth of the memory         everything else

100 % means that nothing but that unit limits the loop. Latencies, waits between warps, tails of a grid and the
program's first and last instructions come on top, so a measured rate is below the bound. ``schedule_percent`` also
counts what warps wait for in the order of their instructions: a matrix product and the instructions that need its
result run one after the other, unless other warps of the multiprocessor fill the time. It is known on sm_90 alone: on
sm_100 a product runs on its own and is waited for at a barrier in shared memory, on sm_80 and sm_120 the scoreboard
orders products, and the text of the machine code names neither.

Bytes of global memory count as often as they are loaded: where programs share what they load (the bias of a row kernel)
the memory moves less, and the bound of a copy is too high.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from isomorph.kernels.sass import Instruction, Program

Peak = Literal["matrix", "fp32", "copy"]
WARP = 32
SHARED_RESERVED = 1024  # bytes a program, which the driver takes


class Arch(NamedTuple):
    """Throughput of one multiprocessor a clock, and what it holds. Of the GPU with the most tensor cores of its kind.

    Lanes and results a clock: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions". Tensor
    FLOP: the data sheet's dense bfloat16 rate over multiprocessors and boost clock. Shared memory: 32 banks of 4 bytes.
    L2: 5120 bytes a clock for the whole GPU (NVIDIA A100 whitepaper), taken for its successors, which publish none.
    """

    gpu: str
    multiprocessors: int
    clock_ghz: float  # boost
    matrix: int  # FLOP, 16-bit operands, float32 sums
    fp32: int  # lanes
    fp64: int
    alu: int  # comparisons, minima, integers, selections, conversions
    mufu: int  # exponentials, logarithms, reciprocals
    memory_gb_s: float
    registers: int
    shared: int  # bytes
    max_warps: int

    @property
    def l2(self) -> float:
        return 5120 / self.multiprocessors

    @property
    def memory(self) -> float:
        """Bytes a clock and multiprocessor."""
        return self.memory_gb_s / self.clock_ghz / self.multiprocessors


ISSUED = 4  # instructions a clock and multiprocessor, one a scheduler
SHARED_BYTES = 128
ARCHS = {
    80: Arch("A100 80 GB SXM", 108, 1.41, 2048, 64, 32, 64, 16, 2039, 65536, 167_936, 64),
    90: Arch("H200 SXM", 132, 1.83, 4096, 128, 64, 64, 16, 4800, 65536, 233_472, 64),
    100: Arch("B200 SXM", 148, 1.86, 8192, 128, 64, 64, 16, 8000, 65536, 233_472, 64),
    120: Arch("RTX 5090", 170, 2.41, 512, 128, 2, 64, 16, 1792, 65536, 102_400, 48),
}

FP32 = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "IMAD", "FFMA32I", "FMUL32I", "FADD32I"}
FP64 = {"DFMA", "DMUL", "DADD", "DSETP", "DMNMX"}
NO_LANES = {"NOP", "BRA", "BAR", "EXIT", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC", "MEMBAR"}
LDS, LDG = {"LDS", "LDSM"}, {"LDG", "LD"}
STS, STG = {"STS", "STSM"}, {"STG", "ST"}


class Bound(NamedTuple):
    """The result of the model for one kernel."""

    peak: Peak
    percent: float  # of the peak, all units overlapped
    unit: str  # which binds
    schedule_percent: float | None  # of the matrix peak, waits included; where the model knows them (sm_90)
    programs: int  # that a multiprocessor holds at once
    clocks: dict[str, float]  # of one multiprocessor, for one iteration of one program, by unit
    counts: dict[str, int]  # instructions of a warp in that iteration, by opcode; matrix instructions by shape


class Code(NamedTuple):
    """What of a kernel the model needs."""

    program: Program
    num_warps: int
    registers: int  # a thread
    shared: int  # bytes a program
    peak: Peak
    inner_iterations: int = 1  # of the inner loop for one of the loop around it, whose other instructions then count


def bound(code: Code, arch: Arch) -> Bound:
    """The bound of a kernel on ``arch``. Raises ValueError where its peak has no instruction in the loop."""
    parts = _hot(code)
    clocks: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for body, times in parts:
        for unit, value in _clocks(body, code.num_warps, arch).items():
            clocks[unit] += times * value
        counts.update({name: times * count for name, count in Counter(map(_counted, body)).items()})
    useful = {
        "matrix": clocks["matrix"],
        "fp32": sum(counts[name] for name in ("FFMA", "FFMA2")) * code.num_warps * WARP / arch.fp32,
        "copy": clocks["global"] / arch.memory,
    }[code.peak]
    if not useful:
        raise ValueError(f"the loop has no instruction for its peak, {code.peak}: {dict(counts)}")
    clocks["matrix"] = clocks.pop("operands", 0.0)  # with the wait for operands in shared memory
    clocks["shared"] /= SHARED_BYTES
    level = "memory" if code.peak == "copy" else "l2"  # the blocks of a product are read again and again
    clocks[level] = clocks.pop("global", 0.0) / getattr(arch, level)
    unit, longest = max(clocks.items(), key=lambda item: item[1])
    programs = occupancy(code, arch)
    body = parts[0][0]
    is_known = code.peak == "matrix" and any(one.opcode == "HGMMA" for one in body) and len(parts) == 1
    return Bound(
        code.peak,
        round(100 * useful / longest, 1),
        unit,
        round(schedule_percent(body, code.num_warps, programs, arch), 1) if is_known else None,
        programs,
        {name: round(value, 1) for name, value in clocks.items() if value},
        dict(counts),
    )


def occupancy(code: Code, arch: Arch) -> int:
    """Programs that a multiprocessor holds at once; at least 1, also where the kernel does not fit."""
    registers = -(-code.registers // 8) * 8 * WARP * code.num_warps
    limits = (
        arch.registers // registers,
        arch.shared // (code.shared + SHARED_RESERVED),
        arch.max_warps // code.num_warps,
        32,
    )
    return max(1, min(limits))


# -- which instructions
def _hot(code: Code) -> list[tuple[Sequence[Instruction], int]]:
    """Bodies and how often each runs: the inner loop, once; or one iteration of the loop around it, in its parts."""
    program = code.program
    loops = [loop for loop in program.loops if _work(loop.body, code.peak)]
    inner = [loop for loop in loops if not any(other.places < loop.places for other in loops)]
    if not inner:
        return [(program.instructions, 1)]
    # a masked copy of the loop does the same work with more instructions
    most = max(_work(loop.body, code.peak) for loop in inner)
    usual = [loop for loop in inner if _work(loop.body, code.peak) >= most / 2]
    hot = min(usual, key=lambda loop: len(loop.body) / _work(loop.body, code.peak))
    if code.inner_iterations == 1:
        return [(hot.body, 1)]
    around = [loop.places for loop in program.loops if loop.places > hot.places]
    places = min(around, key=len, default=frozenset(range(len(program.instructions))))
    rest = tuple(program.instructions[i] for i in sorted(places - hot.places))
    return [(hot.body, code.inner_iterations), (rest, 1)]


def _work(body: Iterable[Instruction], peak: Peak) -> float:
    if peak == "matrix":
        return sum(_matrix(one)[0] for one in body)
    if peak == "fp32":
        return sum(one.opcode in ("FFMA", "FFMA2") for one in body)
    return sum(_global_bytes(one) for one in body)


def _counted(one: Instruction) -> str:
    if one.opcode == "UTCHMMA":
        m, n = _descriptor(one)
        return f"UTCHMMA.{m}x{n}x16"
    return one.name if one.opcode in ("HGMMA", "HMMA", "MUFU") else one.opcode


# -- what they cost
def _clocks(body: Iterable[Instruction], num_warps: int, arch: Arch) -> dict[str, float]:
    """Clocks of one multiprocessor by unit; shared and global memory in bytes."""
    clocks: defaultdict[str, float] = defaultdict(float)
    for one in body:
        flop, operand_bytes = _matrix(one)
        warps = 1 if one.opcode.startswith("UT") else num_warps  # one thread issues for the program
        groups = {"HGMMA": num_warps / 4, "HMMA": num_warps}.get(one.opcode, 1)
        clocks["issue"] += warps / ISSUED
        if flop:
            clocks["matrix"] += groups * flop / arch.matrix
            clocks["operands"] += groups * max(flop / arch.matrix, operand_bytes / SHARED_BYTES)
            clocks["shared"] += groups * operand_bytes
        elif (unit := _lanes(one)) and warps > 1:
            clocks[unit] += num_warps * WARP / getattr(arch, unit)
        clocks["shared"] += num_warps * WARP * _shared_bytes(one)
        clocks["global"] += _global_bytes(one) if one.opcode.startswith("SYNCS") else warps * WARP * _global_bytes(one)
    return clocks


def _lanes(one: Instruction) -> str:
    """The unit whose lanes an instruction uses besides its slot; empty: none that could bind."""
    if one.opcode in FP32:
        return "fp32"
    if one.opcode == "MUFU":
        return "mufu"
    if one.opcode in FP64:
        return "fp64"
    is_alu = one.opcode[0] not in "U" and not one.opcode.startswith(("LD", "ST", "SYNC", "S2", "R2", "CS2", "MOV"))
    return "alu" if is_alu and one.opcode not in NO_LANES else ""


def _matrix(one: Instruction) -> tuple[float, float]:
    """FLOP, as if of 16-bit operands, and the bytes of its operands in shared memory: of a warp or of its group."""
    if one.opcode == "UTCHMMA":
        m, n = _descriptor(one)
        return 2.0 * m * n * 16, 2.0 * 16 * (n + (m if one.operands.startswith("gdesc") else 0))
    if one.opcode == "HGMMA" and (shape := re.search(r"\.(\d+)x(\d+)x(\d+)\.", one.name)):
        m, n, k = map(int, shape.groups())
        in_shared = n + (m if "gdesc" in one.operands and not re.search(r", R\d+, gdesc", one.operands) else 0)
        return 2.0 * m * n * k * (2 if "TF32" in one.name else 1), 32.0 * in_shared
    if one.opcode == "HMMA" and (short := re.search(r"\.(\d+)\.", one.name)):
        m, n, k = 16, 8, int(short[1][3:])
        return 2.0 * m * n * k * (2 if "TF32" in one.name else 1), 0.0
    return 0.0, 0.0


def _descriptor(one: Instruction) -> tuple[int, int]:
    """Rows and columns of a tcgen05 product, from its instruction descriptor (PTX ISA, bits 17 to 22 and 24 to 28)."""
    register = re.search(r"idesc\[(UR\d+)\]", one.operands)
    value = one.constants.get(register[1]) if register else None
    if value is None:
        raise ValueError(f"no constant was written to the descriptor of {one.name} {one.operands}")
    return (value >> 24 & 31) * 16, (value >> 17 & 63) * 8


def _width(one: Instruction) -> int:
    """Bytes a lane."""
    found = re.search(r"\.(?:[US]?(8|16)|(64|128))(?=\.|$)", one.name)
    return int(found[1] or found[2]) // 8 if found else 4


def _shared_bytes(one: Instruction) -> int:
    """Bytes a lane that pass through shared memory; shuffles use its crossbar."""
    if one.opcode in ("LDSM", "STSM"):
        matrices = re.search(r"\.M88\.(\d)|\.(\d)(?=\.|$)", one.name)
        return 4 * int(matrices[1] or matrices[2]) if matrices else 4
    if one.opcode in ("SHFL", "REDUX"):
        return 4
    return _width(one) if one.opcode in LDS | STS or one.opcode == "LDGSTS" else 0


def _global_bytes(one: Instruction) -> int:
    """Bytes a lane to or from global memory; of a program, where a barrier counts the bytes of copies by descriptor."""
    if one.name.startswith("SYNCS.ARRIVE.TRANS64"):
        return max((value for value in one.constants.values()), default=0)
    return _width(one) if one.opcode in LDG | STG or one.opcode == "LDGSTS" else 0


# -- in the order of the instructions
def schedule_percent(body: Sequence[Instruction], num_warps: int, programs: int, arch: Arch) -> float:
    """Percent of the matrix peak, where warps execute ``body`` again and again and wait as it says.

    One of the four schedulers of a multiprocessor: it issues an instruction a clock, from the warp that has waited
    longest. Matrix instructions run one after the other beside all others, ``WARPGROUP.DEPBAR`` waits for them, and
    ``BAR`` for all warps of a program. Latencies of other instructions are not counted.
    """
    rounds = 4
    steps = [_step(one, arch) for one in body]
    warps = [_Warp(program) for program in range(programs) for _ in range(num_warps // 4)]
    end = _Scheduler(steps * rounds, warps).run()
    flop = rounds * sum(_matrix(one)[0] for one in body) / 4  # a warp's share
    return 100 * flop * len(warps) / (arch.matrix / 4) / end


def _step(one: Instruction, arch: Arch) -> tuple[str, float]:
    """What a warp does there, and the clocks that it takes the unit; for a wait, the products that may be left."""
    flop, operand_bytes = _matrix(one)
    if flop:
        return ("last" if "gsb" in one.operands else "matrix"), max(flop / arch.matrix, operand_bytes / SHARED_BYTES)
    if one.name.startswith("WARPGROUP.DEPBAR"):
        return "wait", float(int(one.operands.split(",")[-1], 16))
    if one.opcode == "BAR":
        return "barrier", 0.0
    unit = _lanes(one)
    return (unit, 4 * WARP / getattr(arch, unit)) if unit else ("", 0.0)


@dataclass(slots=True)
class _Warp:
    program: int
    free: float = 0.0  # when it may issue again; infinite at a barrier
    at: int = 0  # its next step
    products: list[float] = field(default_factory=list)  # when its groups of products end


class _Scheduler:
    def __init__(self, steps: Sequence[tuple[str, float]], warps: Sequence[_Warp]) -> None:
        self.steps = steps
        self.warps = warps
        self.free: defaultdict[str, float] = defaultdict(float)  # when a unit takes the next instruction
        self.arrived: dict[tuple[int, int], list[_Warp]] = {}

    def run(self) -> float:
        """The clock at which all warps are done."""
        clock = end = 0.0
        while running := [warp for warp in self.warps if warp.at < len(self.steps) and warp.free < math.inf]:
            begin, _, n = min((max(clock, warp.free, self._unit(warp)), warp.free, n) for n, warp in enumerate(running))
            end = max(end, self._issue(running[n], begin))
            clock = begin + 1
        return end

    def _unit(self, warp: _Warp) -> float:
        """When the unit of a warp's next instruction is free; matrix instructions queue."""
        unit = self.steps[warp.at][0]
        return 0.0 if unit in ("matrix", "last", "wait", "barrier", "") else self.free[unit]

    def _issue(self, warp: _Warp, clock: float) -> float:
        """Issues the next instruction; returns when it is done."""
        kind, cost = self.steps[warp.at]
        warp.at += 1
        warp.free = done = clock + 1
        if kind in ("matrix", "last"):
            done = self.free["matrix"] = max(self.free["matrix"], clock) + cost
            if kind == "last":
                warp.products.append(done)
        elif kind == "wait":
            warp.free = max([done, *warp.products[: len(warp.products) - int(cost)]])
        elif kind == "barrier":
            self._meet(warp, done)
        elif kind:
            self.free[kind] = clock + cost
        return done

    def _meet(self, warp: _Warp, done: float) -> None:
        met = self.arrived.setdefault((warp.program, warp.at), [])
        met.append(warp)
        warp.free = math.inf
        if len(met) == sum(other.program == warp.program for other in self.warps):
            for other in met:
                other.free = done
