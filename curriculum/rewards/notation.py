"""Parses mathematical answers in LaTeX, plain text and SymPy's notation into exact SymPy objects.

One grammar for all three, with fixed lists of names: nothing is evaluated as code, and text outside the grammar is
refused. Braces and spaces separate: ``3 4`` is no number, ``1 1/2`` and ``1\\frac{1}{2}`` are 3/2.
"""

from typing import Any

import sympy

from isomorph.curriculum.rewards.objects import (
    CALLS,
    OBJECTS,
    Thing,
    binomial,
    expression,
    factorial,
    interval,
    power,
    quotient,
)
from isomorph.curriculum.rewards.tokens import Cursor, NotRead, Token
from isomorph.curriculum.rewards.unit_names import JOINTS, read_unit

MAX_TOKENS = 400
MAX_DEPTH = 40

REAL: dict[str, bool] = {"real": True}


def read(tokens: tuple[Token, ...], *, imaginary: bool = True) -> Any:
    """Parses ``tokens`` into a SymPy expression or a ``Thing``. ``imaginary``: whether i and I are the imaginary unit.

    Raises:
        NotRead: the tokens are outside the grammar, too many, or too deeply nested.
    """
    if len(tokens) > MAX_TOKENS:
        raise NotRead("too long")
    reader = _Reader(tokens, imaginary)
    try:
        found = reader.top()
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise NotRead(str(error)) from error
    if reader.left():
        raise NotRead(f"not understood from {reader.left()[0].text!r} on")
    return found


def _words(text: str) -> set[str]:
    return set(text.split())


_RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!="}
_RELATIONS |= {r"\le": "<=", r"\leq": "<=", r"\ge": ">=", r"\geq": ">=", r"\ne": "!=", r"\neq": "!="}
_RELATIONS |= {r"\lt": "<", r"\gt": ">", r"\in": "in"}
_CONSTANTS = {"pi": sympy.pi, "oo": sympy.oo, "infty": sympy.oo, "infinity": sympy.oo, "e": sympy.E, "E": sympy.E}
_FUNCTIONS: dict[str, Any] = {
    **{f.__name__: f for f in (sympy.sin, sympy.cos, sympy.tan, sympy.cot, sympy.sec, sympy.csc, sympy.exp)},
    **{f.__name__: f for f in (sympy.asin, sympy.acos, sympy.atan, sympy.sinh, sympy.cosh, sympy.tanh)},
    **{"arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "ln": sympy.log, "log": sympy.log},
    **{"Abs": sympy.Abs},
}
_GREEK = _words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
_WRAPPERS = {r"\boxed", r"\textbf", r"\mathbf", r"\boldsymbol", r"\bf", r"\mathbb", r"\emph", r"\underline"}
_SHORT_UNITS = _words("cm mm km dm ft in yd mi kg mg lb lbs oz ml hr hrs min sec mph")


class _Reader(Cursor):
    """Recursive descent: a method consumes the tokens of its rule and leaves the rest."""

    def __init__(self, tokens: tuple[Token, ...], imaginary: bool) -> None:
        super().__init__(tokens)
        self.imaginary, self.depth = imaginary, 0

    # rules, from the whole answer to its parts

    def top(self) -> Any:
        items = [self.statement()]
        while self._joint():
            items.append(self.statement())
        return items[0] if len(items) == 1 else Thing("bare", tuple(items))

    def _joint(self) -> bool:
        found = self.accept(",", ";")
        token = self.token()
        if token is not None and token.kind in ("name", "text") and token.text.lower() in JOINTS:
            self.position += 1
            found = True
        return found

    def statement(self) -> Any:
        sides, operators = [self.union()], []
        while self.peek() in _RELATIONS:
            operators.append(_RELATIONS[self.take().text])
            sides.append(self.union())
        return Thing("relation", tuple(sides), tuple(operators)) if operators else sides[0]

    def union(self) -> Any:
        parts = [self.measured()]
        while self.peek() == r"\cup" or (self.peek() == "U" and isinstance(parts[-1], Thing)):
            self.position += 1
            parts.append(self.measured())
        return parts[0] if len(parts) == 1 else Thing("union", tuple(parts))

    def measured(self) -> Any:
        """An expression, with a unit where one follows."""
        dollars = self.accept(r"\$")
        value = self.sum()
        if isinstance(value, Thing) and not dollars:
            return value
        unit = ["dollar"] if dollars else read_unit(self)
        return Thing("measured", (expression(value),), (" ".join(unit),)) if unit else value

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotRead("too deep")
        total = self._signed()
        while self.peek() in ("+", "-"):
            sign = self.take().text
            term = expression(self.product())
            total = expression(total) + (term if sign == "+" else -term)
        self.depth -= 1
        return total

    def _signed(self) -> Any:
        negative = False
        signed = False
        while self.peek() in ("+", "-"):
            if signed:
                raise NotRead("two signs")
            negative, signed = self.take().text == "-", True
        term = self.product()
        if not signed:
            return term
        if isinstance(term, Thing) and term.kind == "based" and negative:
            return Thing("based", (f"-{term.parts[0]}", term.parts[1]))
        return -expression(term) if negative else expression(term)

    def product(self) -> Any:
        mixed = self._mixed()
        value, divided = self.power() if mixed is None else mixed, False
        while True:
            if self.accept("*"):
                value, divided = expression(value) * expression(self._unary()), False
            elif self.accept("/"):
                plain = self.kind(-2) == self.kind() == "number"
                value, divided = quotient(value, self._unary()), not plain
            elif self._begins_factor():
                if divided:
                    raise NotRead("a/bc may be either of two")
                value = expression(value) * expression(self.power())
            else:
                return value

    def _unary(self) -> Any:
        return -expression(self.power()) if self.accept("-") else self.power()

    def _begins_factor(self) -> bool:
        """Whether a factor follows without an operator: never a number, so that "3 4" and "x 2" are no products."""
        text, kind = self.peek(), self.kind()
        if kind == "name":
            plain = text.removeprefix("\\")
            if text.startswith("\\"):
                return plain in ("frac", "sqrt", "pi", "binom") or plain in _FUNCTIONS or plain in _GREEK
            if text in _SHORT_UNITS and self.kind(-1) == "number":
                return False
            known = plain in _FUNCTIONS or plain in ("pi", "sqrt")
            return known or (len(text) <= 2 and text not in JOINTS and text != "U")
        return text == "(" and self.kind(-1) != "text"

    def _mixed(self) -> Any:
        """``1 1/2`` and ``1\\frac{1}{2}``: a whole number and a proper fraction."""
        if self.kind() != "number" or not self.peek().isdigit():
            return None
        if self.kind(1) == "number" and self.peek(2) == "/" and self.kind(3) == "number":
            whole, above, below = (sympy.Rational(self.peek(k)) for k in (0, 1, 3))
            self.position += 4
        elif self.peek(1) == r"\frac":
            whole = sympy.Integer(self.take().text)
            above, below = self._fraction_parts()
            if not (above.is_Integer and below.is_Integer):
                return whole * quotient(above, below)
        else:
            return None
        if not (above.is_Integer and below.is_Integer and 0 < above < below):
            raise NotRead("a mixed number has a proper fraction")
        if self.peek() in ("^", "**", "/", "!", "_"):
            raise NotRead("no mixed number")
        return whole + above / below

    def _fraction_parts(self) -> tuple[Any, Any]:
        self.expect(r"\frac")
        token = self.token()
        if token is not None and token.kind == "number" and self.peek(1) != "{":
            digits = token.text
            if digits.isdigit() and len(digits) == 2:  # \frac12
                self.position += 1
                return sympy.Integer(digits[0]), sympy.Integer(digits[1])
        return expression(self._argument()), expression(self._argument())

    def _argument(self) -> Any:
        """The argument of a command such as ``\\sqrt``: in braces, or one character."""
        if self.accept("{"):
            value = self.sum()
            self.expect("}")
            return value
        if self.kind() == "number" and len(self.peek()) != 1:
            raise NotRead("braces are missing")
        return self.atom()

    def power(self) -> Any:
        value = self.atom()
        while True:
            if self.peek() == "^" and self.peek(1) != r"\circ" and (self.peek(1), self.peek(2)) != ("{", r"\circ"):
                self.position += 1
                value = power(value, self._exponent())
            elif self.accept("**"):
                value = power(value, self._unary())
            elif self.peek() == "!" and self.peek(1) != "=":
                self.position += 1
                value = factorial(value)
            else:
                return value

    def _exponent(self) -> Any:
        if self.accept("{"):
            value = self.sum()
            self.expect("}")
            return value
        return -expression(self.atom()) if self.accept("-") else self.atom()

    # atoms

    def atom(self) -> Any:
        token = self.take()
        if token.kind == "number":
            return self._based(token.text) if self.peek() == "_" else sympy.Rational(token.text)
        if token.kind == "name":
            return self._named(token.text)
        if token.kind == "sign" and token.text in ("(", "["):
            return self._bracketed(token.text)
        if token.kind == "sign" and token.text in ("{", r"\{"):
            return self._braced(token.text)
        raise NotRead(f"{token.text[:20]!r} begins nothing")

    def _based(self, digits: str) -> Thing:
        self.expect("_")
        braces = self.accept("{")
        base = self.take().text
        if braces:
            self.expect("}")
        if not (digits.isdigit() and base.isdigit() and all(int(d) < int(base) for d in digits)):
            raise NotRead("no number of that base")
        return Thing("based", (digits.lstrip("0") or "0", int(base)))

    def _items(self, *ends: str) -> tuple[list[Any], str]:
        items = [self.statement()]
        while self.accept(",", ";"):
            items.append(self.statement())
        end = self.take().text
        if end not in ends:
            raise NotRead(f"must end with one of {ends}, got {end!r}")
        return items, end

    def _bracketed(self, opened: str) -> Any:
        items, closed = self._items(")", "]")
        if len(items) == 1 and opened == "(" and closed == ")":
            return items[0]
        if opened + closed in ("(]", "[)"):
            if len(items) != 2:
                raise NotRead("an interval has two ends")
            return interval(opened, closed)(*items)
        rows = [item for item in items if isinstance(item, Thing) and item.kind == "list"]
        if opened == "[" and len(rows) == len(items) and len({len(row.parts) for row in rows}) == 1:
            return Thing("matrix", tuple(row.parts for row in rows))
        return Thing("tuple" if opened == "(" else "list", tuple(items))

    def _braced(self, opened: str) -> Any:
        items, _ = self._items("}" if opened == "{" else r"\}")
        return items[0] if len(items) == 1 and opened == "{" else Thing("set", tuple(items))

    def _named(self, text: str) -> Any:
        name = text.removeprefix("\\")
        if text in _WRAPPERS:
            self.expect("{")
            value = self.top()
            self.expect("}")
            return value
        if text == r"\begin":
            return self._matrix()
        if text == r"\frac":
            self.position -= 1
            return quotient(*self._fraction_parts())
        if name == "sqrt":
            return self._root()
        if text == r"\binom":
            return binomial(self._argument(), self._argument())
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if self.imaginary and text in ("i", "I"):
            return sympy.I
        if f"{text}{self.peek()}" in CALLS:
            return self._called(text)
        return self._symbol(text, name)

    def _symbol(self, text: str, name: str) -> Any:
        if text.startswith("\\") and name not in _GREEK:
            raise NotRead(f"{text[:20]} is not known")
        if len(name) > 2 and name not in _GREEK:
            raise NotRead(f"{name[:20]!r} is a word")
        if self.peek() == "_":
            return sympy.Symbol(f"{name}_{self._subscript()}", **REAL)
        if len(name) == 2 and name.islower() and name not in _GREEK:
            return sympy.Mul(*(sympy.I if c == "i" and self.imaginary else sympy.Symbol(c, **REAL) for c in name))
        return sympy.Symbol(name, **REAL)

    def _subscript(self) -> str:
        self.expect("_")
        if not self.accept("{"):
            return self.take().text
        texts = []
        while not self.accept("}"):
            texts.append(self.take().text)
        return " ".join(texts)

    def _root(self) -> Any:
        degree = sympy.Integer(2)
        if self.accept("["):
            degree = expression(self.sum())
            self.expect("]")
        value = expression(self._argument() if self.peek() != "(" else self.atom())
        if not (degree.is_Integer and 2 <= degree <= 100):
            raise NotRead("no such root")
        return sympy.root(value, degree)

    def _function(self, name: str) -> Any:
        base = exponent = None
        if name == "log" and self.accept("_"):
            base = expression(self._argument())
        if self.accept("^"):
            exponent = expression(self._exponent())
            if exponent.is_negative:
                raise NotRead("an inverse function or a reciprocal")
        if self.peek() == "(":
            value = expression(self.atom())
        elif self.peek() == "{":
            value = expression(self._argument())
        else:
            value = expression(self.power())
            while self._begins_factor() and self.peek().removeprefix("\\") not in _FUNCTIONS and self.peek() != "(":
                value *= expression(self.power())
        found = _FUNCTIONS[name](value) if base is None else sympy.log(value, base)
        return found if exponent is None else power(found, exponent)

    def _called(self, name: str) -> Any:
        """A call in SymPy's notation, such as ``Interval(0, 1)``."""
        if self.accept("."):
            name = f"{name}.{self.take().text}"
        if name not in OBJECTS:
            raise NotRead(f"{name[:40]!r} is not known")
        self.expect("(")
        items, _ = self._items(")")
        found = OBJECTS[name](*items)
        if name == "Interval.open" and self.accept("."):
            self.expect("closure")
            return OBJECTS["Interval"](*items)
        return found

    def _matrix(self) -> Thing:
        kind = self._environment()
        if kind not in ("pmatrix", "bmatrix", "matrix"):
            raise NotRead("no matrix")
        rows: list[list[Any]] = [[]]
        while self.peek() != r"\end":
            rows[-1].append(expression(self.sum()))
            if self.accept("\\\\"):
                if self.peek() != r"\end":
                    rows.append([])
            elif not self.accept("&") and self.peek() != r"\end":
                raise NotRead("no matrix")
        self.take()
        if self._environment() != kind or len({len(row) for row in rows}) != 1:
            raise NotRead("no matrix")
        return Thing("matrix", tuple(map(tuple, rows)))

    def _environment(self) -> str:
        self.expect("{")
        name = self.take().text
        self.expect("}")
        return name
