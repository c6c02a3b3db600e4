"""Machine code of a kernel as ``nvdisasm -c`` prints it: instructions, and the natural loops of their control flow."""

import re
from collections.abc import Sequence
from typing import NamedTuple

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# a constant in a register: UMOV UR4, 0x10; MOV R4, 0x10; IMAD.MOV.U32 R4, RZ, RZ, 0x10; HFMA2 writes two halves
CONSTANT = re.compile(r"^(U?R\d+), (?:RZ, RZ, )?(0x[0-9a-f]+)\s*$")
BRANCHES = ("BRA", "JMP", "BRX")
ENDS = ("EXIT", "RET", "BRA", "JMP", "BRX")  # nothing follows, unless there is a predicate


class Instruction(NamedTuple):
    """One instruction. ``constants``: what its registers hold, where a constant was written to one just before."""

    name: str  # with modifiers, HGMMA.64x64x16.F32.BF16
    operands: str
    is_conditional: bool
    constants: dict[str, int]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]


class Loop(NamedTuple):
    """A natural loop: the instructions between its head and its back edge, those of loops inside it included."""

    places: frozenset[int]  # positions in the program
    body: tuple[Instruction, ...]


class Program(NamedTuple):
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]


def parse(code: str) -> Program:
    """The instructions of ``nvdisasm -c`` output and their natural loops, in the order of their heads."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    constants: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            _, predicate, name, operands = found.groups()
            held = {x: constants[x] for x in set(re.findall(r"U?R\d+", operands)) if x in constants}
            is_conditional = bool(predicate) or bool(re.match(r"!?UP\d", operands))
            instructions.append(Instruction(name, operands.strip(), is_conditional, held))
            _remember(constants, operands)
    return Program(tuple(instructions), _loops(instructions, labels))


def _remember(constants: dict[str, int], operands: str) -> None:
    if found := CONSTANT.match(operands):
        constants[found[1]] = int(found[2], 16)
    elif written := re.match(r"(U?R\d+)", operands):
        constants.pop(written[1], None)


def _loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> tuple[Loop, ...]:
    edges = [_successors(instructions, labels, i) for i in range(len(instructions))]
    starts = sorted({0, *(j for i, out in enumerate(edges) if out != [i + 1] for j in (*out, i + 1))})
    starts = [start for start in starts if start < len(instructions)]
    block_of = {start: n for n, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    after = [[block_of[j] for j in edges[end - 1]] for end in ends]
    dominators = _dominators(after)
    loops: dict[int, set[int]] = {}
    for source, heads in enumerate(after):
        for head in heads:
            if source in dominators and head in dominators[source]:
                loops.setdefault(head, {head}).update(_reaching(after, source, head, set(dominators)))
    found = []
    for _, blocks in sorted(loops.items()):
        places = [i for block in sorted(blocks) for i in range(starts[block], ends[block])]
        found.append(Loop(frozenset(places), tuple(instructions[i] for i in places)))
    return tuple(found)


def _successors(instructions: Sequence[Instruction], labels: dict[str, int], i: int) -> list[int]:
    opcode = instructions[i].opcode
    out = []
    if opcode in BRANCHES and (target := TARGET.search(instructions[i].operands)):
        out.append(labels[target[1]])
    if (opcode not in ENDS or instructions[i].is_conditional) and i + 1 < len(instructions):
        out.append(i + 1)
    return [place for place in out if place < len(instructions)]


def _dominators(after: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """For every block that is reached from the first: the blocks on all ways to it."""
    reached, todo = {0}, [0]
    while todo:
        for block in after[todo.pop()]:
            if block not in reached:
                reached.add(block)
                todo.append(block)
    before: dict[int, list[int]] = {block: [] for block in reached}
    for block in sorted(reached):
        for target in after[block]:
            before[target].append(block)
    found = {block: {0} if block == 0 else set(reached) for block in reached}
    is_changing = True
    while is_changing:
        is_changing = False
        for block in sorted(reached - {0}):
            new = set.intersection(*(found[source] for source in before[block])) | {block}
            is_changing |= new != found[block]
            found[block] = new
    return found


def _reaching(after: Sequence[Sequence[int]], source: int, head: int, reached: set[int]) -> set[int]:
    """The blocks from which ``source`` is reached without passing ``head``."""
    found, todo = {head, source}, [source]
    while todo:
        block = todo.pop()
        if block == head:
            continue
        for previous in reached:
            if block in after[previous] and previous not in found:
                found.add(previous)
                todo.append(previous)
    return found
