"""Parses formulas in Python's notation, such as ``2*sqrt(5)/3`` or ``Interval(-1, oo)``, into SymPy objects.

From the syntax tree, with a fixed list of names: nothing is evaluated as code.
"""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy

MAX_CHARS = 500
MAX_DEPTH = 40
MAX_EXPONENT = 1_000
MAX_DIGITS = 100

_CONSTANTS = {"pi": sympy.pi, "oo": sympy.oo, "I": sympy.I, "E": sympy.E}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": sympy.sqrt,
    "exp": sympy.exp,
    "log": sympy.log,
    "ln": sympy.log,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "asin": sympy.asin,
    "acos": sympy.acos,
    "atan": sympy.atan,
    "Abs": sympy.Abs,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
    "Interval": sympy.Interval,
    "Interval.open": sympy.Interval.open,
    "Interval.Lopen": sympy.Interval.Lopen,
    "Interval.Ropen": sympy.Interval.Ropen,
    "Union": sympy.Union,
    "FiniteSet": sympy.FiniteSet,
    "Matrix": sympy.Matrix,
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class NotAFormula(ValueError):
    """The text is not a formula of this notation."""


def parse_formula(text: str) -> Any:
    """The SymPy object that ``text`` describes.

    Raises:
        NotAFormula: anything else, among them formulas that are too long, too deep or have huge powers.
    """
    if len(text) > MAX_CHARS or nesting(text) > MAX_DEPTH:
        raise NotAFormula(f"a formula has at most {MAX_CHARS} characters and {MAX_DEPTH} brackets in each other")
    try:
        return _read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise NotAFormula(f"{text[:80]!r}: {error}") from error


def nesting(text: str) -> int:
    """How many brackets are open at once at most."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _read(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _number(number)
        case ast.Name(id=name):
            return _CONSTANTS.get(name, sympy.Symbol(name))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _read(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_read(left), _read(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_read(left), _read(right))
        case ast.Tuple(elts=items):
            return sympy.Tuple(*map(_read, items))
        case ast.List(elts=items):  # a list of solutions: in any order
            return sympy.FiniteSet(*map(_read, items))
        case ast.Call(func=func, args=arguments, keywords=[]):
            return _call(ast.unparse(func), arguments)
    raise NotAFormula(f"{type(node).__name__} is not part of a formula")


def _number(number: int | float) -> Any:
    if isinstance(number, float) and not math.isfinite(number):
        raise NotAFormula("numbers must be finite")
    if isinstance(number, int) and abs(number) >= 10**MAX_DIGITS:
        raise NotAFormula(f"numbers must have at most {MAX_DIGITS} digits")
    return sympy.Integer(number) if isinstance(number, int) else sympy.Rational(repr(number))


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_number and not abs(exponent) <= MAX_EXPONENT:
        raise NotAFormula(f"exponents must be at most {MAX_EXPONENT}")
    return base**exponent


def _call(name: str, arguments: list[ast.expr]) -> Any:
    if name not in _FUNCTIONS:
        raise NotAFormula(f"{name[:40]} is not a known function")
    if name == "Matrix":
        return sympy.Matrix([[_read(item) for item in row] for row in _rows(arguments)])
    return _FUNCTIONS[name](*map(_read, arguments))


def _rows(arguments: list[ast.expr]) -> list[list[ast.expr]]:
    match arguments:
        case [ast.List(elts=rows)] if all(isinstance(row, ast.List) for row in rows):
            return [row.elts for row in rows if isinstance(row, ast.List)]
    raise NotAFormula("a matrix is one list of rows")
