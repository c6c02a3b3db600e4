"""Renders an expression in its representations, and works it out: a story, a graph, a program, an expression, a table.

Operations have the same names in story, graph, table and the first form of programs; the written expression and the
second form of programs, which nests calls, have none.
"""

import random
from collections.abc import Callable
from itertools import accumulate

from isomorph.curriculum.tasks.arithmetic import wording
from isomorph.curriculum.tasks.arithmetic.expression import ArithmeticDifficulty, Expression, reference
from isomorph.curriculum.tasks.sieve import chosen
from isomorph.curriculum.tasks.wording import CODE_INTRO, CODE_QUESTION, INSTRUCTION

# All tokens of the terse graph, code, expression and table forms besides names and numbers.
TERSE_SYNTAX = "graph = {Ann: (+, 5, 3)} ops = edges = [(5, Ann)]? def Ann(): return print(Ann()) add(sub(mul( - * = ?"
TABLE_SYNTAX = "who, how, first, second"
TRACE_SYNTAX = "<think>Ann: Bob 5 > 5 + 3 = 8;</think> <answer></answer>"

_CALLS = {"+": "add", "-": "sub", "*": "mul"}
_RANK = {"+": 0, "-": 0, "*": 1}

Form = Callable[[Expression], str]


def render(
    instance: Expression, representation: str, rng: random.Random, difficulty: ArithmeticDifficulty, *, is_kept: bool
) -> tuple[str, bool]:
    """The whole question, and whether its operations have names. ``rng`` chooses wordings and forms."""
    if representation == "natural":
        return _natural(instance, rng, difficulty, is_kept=is_kept), True
    forms = _FORMS[representation, instance.is_terse]
    form = rng.choice(forms[: difficulty.templates])
    return form(instance), form not in _NAMELESS


def worked(instance: Expression, *, has_names: bool, sequential: bool) -> str:
    """A response: each operation after its operands, then the answer.

    ``Ann: 5 + 3 = 8; Bob: Ann 8 > 8 * 4 = 32``, without names ``5 + 3 = 8; 8 * 4 = 32``. ``sequential``: the numbers
    are added up as they are listed.
    """
    tree = instance.tree
    if sequential:
        totals = list(accumulate(tree.numbers))
        lines = [f"{total - n} + {n} = {total}" for total, n in zip(totals[1:], tree.numbers[1:], strict=True)]
        return _response(lines, totals[-1])
    lines = []
    for j in tree.order:
        sign, left, right = tree.nodes[j]
        known = " ".join(
            f"{instance.names[ref]} {tree.values[ref]}"
            for ref in (reference(left), reference(right))
            if ref is not None
        )
        before = f"{instance.names[j]}: {known} > " if known else f"{instance.names[j]}: "
        a, b = tree.value(left, tree.values), tree.value(right, tree.values)
        lines.append(f"{before if has_names else ''}{a} {sign} {b} = {tree.values[j]}")
    return _response(lines, tree.total)


def _response(lines: list[str], total: int) -> str:
    return f"<think>{'; '.join(lines)}</think> <answer>{total}</answer>"


def _operand(instance: Expression, operand: int, quote: str = "") -> str:
    ref = reference(operand)
    return str(operand) if ref is None else f"{quote}{instance.names[ref]}{quote}"


def _natural(instance: Expression, rng: random.Random, difficulty: ArithmeticDifficulty, *, is_kept: bool) -> str:
    is_terse, things = instance.is_terse, instance.things

    def frame(kind: tuple[str, ...]) -> str:
        return chosen(rng, kind, difficulty.templates, is_kept=is_kept)

    intro = frame(wording.TERSE_INTROS if is_terse else wording.INTROS).format(things=things)
    facts = []
    for name, (sign, left, right) in zip(instance.names, instance.tree.nodes, strict=True):
        kinds = " ".join("n" if operand >= 0 else "who" for operand in (left, right))
        fact = frame((wording.TERSE_FACTS if is_terse else wording.FACTS)[sign, kinds])
        a, b = _operand(instance, left), _operand(instance, right)
        facts.append(fact.format(x=name, a=a, b=b, things=things))
    question = frame(wording.TERSE_QUESTIONS if is_terse else wording.QUESTIONS).format(
        x=_asked(instance), things=things
    )
    if is_terse:
        return " ".join([intro, *facts, question])
    return "\n\n".join([intro, " ".join(facts), f"{question}\n{_instruction()}"])


def _asked(instance: Expression) -> str:
    return instance.names[instance.tree.root]


def _instruction() -> str:
    return INSTRUCTION.format(example=wording.INSTRUCTION_EXAMPLE)


def _triples(instance: Expression, quote: str) -> list[str]:
    return [
        f"{quote}{name}{quote}: ({quote}{sign}{quote}, {_operand(instance, a, quote)}, {_operand(instance, b, quote)})"
        for name, (sign, a, b) in zip(instance.names, instance.tree.nodes, strict=True)
    ]


def _graph_terse(instance: Expression) -> str:
    return f"graph = {{{', '.join(_triples(instance, ''))}}} {_asked(instance)}?"


def _edges_terse(instance: Expression) -> str:
    pairs = list(zip(instance.names, instance.tree.nodes, strict=True))
    edges = ", ".join(f"({_operand(instance, o)}, {name})" for name, (_, *own) in pairs for o in own)
    signs = ", ".join(f"{name}: {sign}" for name, (sign, _, _) in pairs)
    return f"edges = [{edges}] ops = {{{signs}}} {_asked(instance)}?"


def _graph(instance: Expression) -> str:
    rows = ",\n".join(f" {row}" for row in _triples(instance, "'"))
    return "\n\n".join([f"{wording.GRAPH_INTRO}\n{{\n{rows}\n}}", _graph_question(instance)])


def _edges(instance: Expression) -> str:
    pairs = list(zip(instance.names, instance.tree.nodes, strict=True))
    edges = [f"{_operand(instance, operand)} -> {name}" for name, (_, *own) in pairs for operand in own]
    signs = [f"{name}: {sign}" for name, (sign, _, _) in pairs]
    return "\n\n".join(
        [
            "\n".join([wording.EDGES_INTRO, *edges]),
            "\n".join([wording.GRAPH_SIGNS, *signs]),
            _graph_question(instance),
        ]
    )


def _graph_question(instance: Expression) -> str:
    return f"{wording.GRAPH_QUESTION.format(x=_asked(instance))}\n{_instruction()}"


def _definitions(instance: Expression) -> list[tuple[str, str]]:
    """Name and body of a function for each operation."""

    def called(operand: int) -> str:
        return str(operand) if operand >= 0 else f"{_operand(instance, operand)}()"

    return [
        (name, f"return {called(a)} {sign} {called(b)}")
        for name, (sign, a, b) in zip(instance.names, instance.tree.nodes, strict=True)
    ]


def _functions_terse(instance: Expression) -> str:
    functions = " ".join(f"def {name}(): {body}" for name, body in _definitions(instance))
    return f"{functions} print({_asked(instance)}())"


def _functions(instance: Expression) -> str:
    functions = "\n\n\n".join(f"def {name}():\n    {body}" for name, body in _definitions(instance))
    return _program(f"{functions}\n\n\nprint({_asked(instance)}())")


def _nested(instance: Expression, operand: int) -> str:
    if operand >= 0:
        return str(operand)
    sign, a, b = instance.tree.nodes[-1 - operand]
    return f"{_CALLS[sign]}({_nested(instance, a)}, {_nested(instance, b)})"


def _calls_terse(instance: Expression) -> str:
    return f"print({_nested(instance, -1 - instance.tree.root)})"


def _calls(instance: Expression) -> str:
    used = sorted({_CALLS[sign] for sign, _, _ in instance.tree.nodes})
    return _program(f"from operator import {', '.join(used)}\n\n{_calls_terse(instance)}")


def _program(program: str) -> str:
    return "\n\n".join([CODE_INTRO, f"```python\n{program}\n```", f"{CODE_QUESTION}\n{_instruction()}"])


def _parenthesised(instance: Expression, operand: int, *, is_inner: bool = False) -> str:
    """All parentheses but the outermost."""
    if operand >= 0:
        return str(operand)
    sign, a, b = instance.tree.nodes[-1 - operand]
    text = f"{_parenthesised(instance, a, is_inner=True)} {sign} {_parenthesised(instance, b, is_inner=True)}"
    return f"({text})" if is_inner else text


def _by_precedence(instance: Expression, operand: int, least: int = 0) -> str:
    """Only the parentheses that are needed; ``least``: of the rank of a sign without them."""
    if operand >= 0:
        return str(operand)
    sign, a, b = instance.tree.nodes[-1 - operand]
    rank = _RANK[sign]
    text = f"{_by_precedence(instance, a, rank)} {sign} {_by_precedence(instance, b, rank + 1)}"
    return f"({text})" if rank < least else text


def _written_terse(instance: Expression) -> str:
    return f"{_parenthesised(instance, -1 - instance.tree.root)} = ?"


def _short_terse(instance: Expression) -> str:
    return f"{_by_precedence(instance, -1 - instance.tree.root)} = ?"


def _written(instance: Expression) -> str:
    return _asked_for(_parenthesised(instance, -1 - instance.tree.root))


def _short(instance: Expression) -> str:
    return _asked_for(_by_precedence(instance, -1 - instance.tree.root))


def _asked_for(expression: str) -> str:
    return "\n\n".join([f"{wording.EXPRESSION_INTRO}\n{expression}", _instruction()])


def _table_terse(instance: Expression) -> str:
    rows = [
        f"{name}, {sign}, {_operand(instance, a)}, {_operand(instance, b)}"
        for name, (sign, a, b) in zip(instance.names, instance.tree.nodes, strict=True)
    ]
    return "\n".join([TABLE_SYNTAX, *rows, f"{_asked(instance)}?"])


def _table(instance: Expression) -> str:
    rows = [
        f"| {name} | {sign} | {_operand(instance, a)} | {_operand(instance, b)} |"
        for name, (sign, a, b) in zip(instance.names, instance.tree.nodes, strict=True)
    ]
    head = ["| row | operation | first | second |", "| --- | --- | --- | --- |"]
    return "\n\n".join([wording.TABLE_INTRO, "\n".join([*head, *rows]), _graph_question(instance)])


_NAMELESS = (_calls_terse, _calls, _written_terse, _short_terse, _written, _short)
_FORMS: dict[tuple[str, bool], tuple[Form, ...]] = {
    ("graph", True): (_graph_terse, _edges_terse),
    ("graph", False): (_graph, _edges),
    ("code", True): (_functions_terse, _calls_terse),
    ("code", False): (_functions, _calls),
    ("expression", True): (_written_terse, _short_terse),
    ("expression", False): (_written, _short),
    ("table", True): (_table_terse,),
    ("table", False): (_table,),
}
