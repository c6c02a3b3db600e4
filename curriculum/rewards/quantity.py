"""Scores physics answers: parses a value, an optional power of ten and a unit, and compares with a tolerance.

Values are compared in the unit of the accepted answer. The tolerance is one unit in the last digit of the accepted
answer, at least 1 % and at most 10 % of its value, 0 where that is 0; it does not depend on the stated answer.
"""

import functools
import re
import tokenize
from typing import Any, NamedTuple

import pint
import sympy

from isomorph.curriculum.rewards.answer import AnswerUnreadable
from isomorph.curriculum.rewards.formula import NotAFormula, parse_formula
from isomorph.curriculum.rewards.mathematics import same_expression

MAX_CHARS = 300
MIN_TOLERANCE, MAX_TOLERANCE = 0.01, 0.1
MAX_UNIT_CHARS = 60

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# in this order: spaces and wrappers first, so that the later patterns see their content
_LATEX = (
    (re.compile(r"\\(?:mathrm|text|rm|boxed|left|right)(?![a-z])|\\[,; !]|[$~]"), " "),
    (re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"), lambda m: f"^{m.group().translate(_SUPERSCRIPTS)}"),
    (re.compile(r"\\d?frac ?\{([^{}]{0,80})\} ?\{([^{}]{0,80})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\sqrt ?\{([^{}]{0,80})\}"), r"sqrt(\1)"),
    (re.compile(r"(?:\^? ?\{? ?\\circ ?\}?|°) ?(?=[CF]\b)"), " deg"),
    (re.compile(r"\^? ?\{? ?\\circ ?\}?|°"), " degree"),
    (re.compile(r"\\mu(?![a-z]) ?|μ"), "µ"),
    (re.compile(r"\\(?:Omega|ohm)(?![a-z])|Ω"), "ohm"),
    (re.compile(r"\\(?:cdot|times)(?![a-z])|[×·]"), "*"),
    (re.compile(r"\\(?=pi(?![a-z])|%)"), ""),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"[{}]"), " "),
    (re.compile(r"\^ ?"), "**"),
    (re.compile(r"µ +"), "µ"),
)
_DECIMAL = r"(?P<sign>[-+]?) ?(?P<digits>\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE](?P<exponent>[-+]?\d{1,3}))?"
_POWER = r"(?: ?[*x]? ?10 ?\*\* ?\(? ?(?P<power>[-+]?\d{1,3}) ?\)?| 1[eE](?P<factor>[-+]?\d{1,3}))?"
_HEAD = re.compile(rf"{_DECIMAL}{_POWER}(?![\d.])", re.ASCII)

_UNIT_NAMES = {
    "unitless": "",
    "dimensionless": "",
    "none": "",
    "rads": "radian",
    "light-years": "light_year",
    "light-year": "light_year",
    "light years": "light_year",
}
# small powers only, and no power of a power: pint expands s**9**9**9
_HARMLESS_UNIT = re.compile(
    r"(?!.*\*\* ?[-+(]? ?\d{3})(?!.*\*\*[^*/]*(?:\d|\)) ?\*\*)(?!.*\*\*.*\*\*.*\*\*.*\*\*.*\*\*)[^\[\]\\]*"
)


class Quantity(NamedTuple):
    value: Any  # a SymPy number or formula
    unit: str  # "" where there is none
    tolerance: float  # relative


_NO_QUANTITY = "an accepted answer in physics must be a value with a unit, got {!r}"


def same_physics(stated: str, accepted: str) -> bool:
    """Whether ``stated`` is the accepted quantity, or the accepted formula where that has symbols.

    Raises:
        AnswerUnreadable: ``accepted`` is no value with a unit.
    """
    expected = parse_quantity(accepted)
    if expected is None:
        raise AnswerUnreadable(_NO_QUANTITY.format(accepted[:200]))
    if expected.value.free_symbols:
        return same_expression(stated, accepted, imaginary=False)
    return same_answer(stated, expected)


def why_unreadable(accepted: str) -> str:
    """Why the accepted answer is no value with a unit, in a sentence; "" where it is one."""
    reason = _NO_QUANTITY.format(accepted[:200])
    try:
        return reason if parse_quantity(accepted) is None else ""
    except Exception as error:  # SymPy and pint raise nearly anything on text that is no formula
        return f"{reason}: {type(error).__name__}: {error}"


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that ``text`` states; None where it states none."""
    if len(text) > MAX_CHARS or _SEVERAL.search(text):
        return None
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(_mixed_number, " ".join(text.split()).rpartition("=")[2].strip())
    for read in (_read_formula, _read_decimal, _read_formula_with_unit):
        quantity = read(text)
        if quantity is not None and len(quantity.unit) <= MAX_UNIT_CHARS:
            return quantity
    return None


_SEVERAL = re.compile(r"\s(?:and|or|to)\s")  # 5 m and 6 m
_MIXED = re.compile(r"(?<![\w.] )(?<![\w./*])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\w./*])", re.ASCII)


def _mixed_number(match: re.Match[str]) -> str:
    """``1 1/2`` -> ``(1+1/2)``; an improper fraction is unchanged, and not parsed later."""
    whole, above, below = match.groups()
    return f"({whole}+{above}/{below})" if 0 < int(above) < int(below) else match.group()


def same_answer(stated: str, gold: Quantity) -> bool:
    """Whether ``stated`` is ``gold``; of "0.5 kJ = 500 J" every side with a unit must be equal to it."""
    sides = [parse_quantity(side) for side in stated.split("=")]
    if sides[-1] is None or not same_quantity(gold, sides[-1]):
        return False
    return all(same_quantity(gold, side) for side in sides if side is not None and side.unit)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether ``answer`` is ``gold``, a number, within its tolerance, units converted."""
    if not (gold.value.is_real and answer.value.is_real):
        return False
    expected, got = float(gold.value), float(answer.value)
    if gold.unit != answer.unit:
        converted = _convert(got, answer.unit, gold.unit)
        if converted is None:
            return False
        got = converted
    return abs(got - expected) <= gold.tolerance * abs(expected)


def _read_formula(text: str) -> Quantity | None:
    try:
        value = parse_formula(text)
    except NotAFormula:
        return None
    if not isinstance(value, sympy.Expr):
        return None
    decimal = _HEAD.fullmatch(text)
    return _from_head(decimal, "") if decimal else Quantity(value, "", MIN_TOLERANCE)


def _read_decimal(text: str) -> Quantity | None:
    match = _HEAD.match(text)
    if match is None or text[match.end() :].lstrip()[:1] in ("*", "/", "+", "(", ","):
        return None
    return _from_head(match, text[match.end() :])


def _read_formula_with_unit(text: str) -> Quantity | None:
    formula, _, unit = text.rpartition(" ")
    quantity = _read_formula(formula)
    return quantity and quantity._replace(unit=_unit_name(unit))


def _from_head(match: re.Match[str], unit: str) -> Quantity:
    digits = match["digits"]
    exponent = sum(int(match[name] or 0) for name in ("exponent", "power", "factor"))
    mantissa = sympy.Rational(digits)
    value = mantissa * sympy.Integer(10) ** exponent * (-1 if match["sign"] == "-" else 1)
    last_digit = 10.0 ** -len(digits.partition(".")[2])
    relative = last_digit / float(mantissa) if mantissa else 0.0
    return Quantity(value, _unit_name(unit), min(max(relative, MIN_TOLERANCE), MAX_TOLERANCE))


def _unit_name(text: str) -> str:
    text = text.strip().rstrip(".,")
    return _UNIT_NAMES.get(text.lower(), text)


_OF_PINT = (pint.PintError, tokenize.TokenError, RecursionError)  # its parser raises what Python's tokenizer does


@functools.cache
def _registry() -> pint.UnitRegistry:
    return pint.UnitRegistry()


def _convert(value: float, unit: str, wanted: str) -> float | None:
    if not (_HARMLESS_UNIT.fullmatch(unit) and _HARMLESS_UNIT.fullmatch(wanted)):
        return None
    try:
        quantity = _registry().Quantity(value, _parse_unit(unit))
        return float(quantity.to(_parse_unit(wanted)).magnitude)
    except (*_OF_PINT, ArithmeticError, AttributeError, TypeError, ValueError, AssertionError):
        return None  # a unit unknown to pint, or of another dimension


def _parse_unit(text: str) -> Any:
    registry = _registry()
    try:
        return registry.parse_units(text)
    except pint.UndefinedUnitError:
        return registry.parse_units(text.lower())
