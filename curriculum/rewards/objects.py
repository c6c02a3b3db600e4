"""The mathematical objects that answers are read into: SymPy expressions, and ``Thing`` for all others.

What SymPy would compute at any cost, such as a huge power, is refused before it is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from isomorph.curriculum.rewards.tokens import NotRead

MAX_EXPONENT = 10_000
MAX_BITS = 100_000  # of a power of two numbers


@dataclass(frozen=True, slots=True)
class Thing:
    """An object that is no expression.

    ``kind``: relation, tuple, list, set, bare (items without brackets), interval, union, matrix, based (a number in
    another base) or measured (with a unit).
    """

    kind: str
    parts: tuple[Any, ...]
    how: tuple[str, ...] = ()  # operators of a relation, brackets of an interval, the unit


def expression(value: Any) -> Any:
    if not isinstance(value, sympy.Expr):
        raise NotRead("must be an expression")
    return value


def quotient(above: Any, below: Any) -> Any:
    below = expression(below)
    if below.is_zero:
        raise NotRead("division by zero")
    return expression(above) / below


def power(base: Any, exponent: Any) -> Any:
    base, exponent = expression(base), expression(exponent)
    if exponent.is_number:
        if exponent.is_infinite or not exponent.is_real or abs(exponent) > MAX_EXPONENT:
            raise NotRead("too large a power")
        bits = max((max(abs(r.p), r.q).bit_length() for r in base.atoms(sympy.Rational)), default=1)
        terms = len(base.args) if base.is_Add else 1
        if bits * abs(exponent) > MAX_BITS or (terms > 1 and abs(exponent) > 100):
            raise NotRead("too large a power")
    return base**exponent


def factorial(value: Any) -> Any:
    if not (expression(value).is_Integer and 0 <= value <= 1_000):
        raise NotRead("no such factorial")
    return sympy.factorial(value)


def binomial(above: Any, below: Any) -> Any:
    if not (expression(above).is_Integer and expression(below).is_Integer and 0 <= below <= above <= 1_000):
        raise NotRead("no such binomial")
    return sympy.binomial(above, below)


def interval(opened: str, closed: str) -> Callable[[Any, Any], Thing]:
    def between(low: Any, high: Any) -> Thing:
        how = "(" if low == -sympy.oo else opened, ")" if high == sympy.oo else closed
        return Thing("interval", (expression(low), expression(high)), how)

    return between


def _called_matrix(rows: Any) -> Thing:
    if not isinstance(rows, Thing) or rows.kind != "matrix":
        raise NotRead("a matrix is one list of rows")
    return rows


OBJECTS: dict[str, Any] = {
    "Interval": interval("[", "]"),
    "Interval.open": interval("(", ")"),
    "Interval.Lopen": interval("(", "]"),
    "Interval.Ropen": interval("[", ")"),
    "Union": lambda *parts: Thing("union", parts),
    "FiniteSet": lambda *parts: Thing("set", parts),
    "Matrix": _called_matrix,
    "Eq": lambda left, right: Thing("relation", (left, right), ("=",)),
    "Ne": lambda left, right: Thing("relation", (left, right), ("!=",)),
    "Point2D": lambda *parts: Thing("tuple", parts),
    "Point3D": lambda *parts: Thing("tuple", parts),
}
CALLS = {f"{name}(" for name in OBJECTS if "." not in name} | {"Interval."}
