"""Whether two mathematical answers are the same: as text, in SymPy's notation, or in LaTeX."""

import re
from typing import Any

import math_verify
import sympy

from isomorph.curriculum.tasks.formula import MAX_DEPTH, NotAFormula, nesting, parse_formula

_SPACING = re.compile(r"\\[,;! ]|\\(?:left|right)(?![a-z])|[\s${}]")
_PYTHON = re.compile(r"\*|\b(?:sqrt|oo|pi|I|Interval|Union|Matrix|FiniteSet|Eq|Ne|sin|cos|tan|log|exp)\b")
_BASE = re.compile(r"_\{?\d")  # 1103_6: digits in base six, which LaTeX parsers read as 1103
_NAMED = re.compile(r"\\[a-zA-Z]+\{[a-zA-Z ]{0,40}\}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_SIGNS = str.maketrans({"∞": r"\infty ", "∪": r"\cup ", "π": r"\pi ", "−": "-", "×": r"\times ", "·": r"\cdot "})


def same_expression(stated: str, gold: str) -> bool:
    """Whether both are the same mathematical object, or the same text but for spacing and case."""
    if _plain(stated) == _plain(gold):
        return True
    if nesting(stated) > MAX_DEPTH or _BASE.search(stated) or _BASE.search(gold):
        return False
    expected, got = _expressions(gold), _expressions(stated)
    imaginary = any(isinstance(e, sympy.Basic | sympy.MatrixBase) and e.has(sympy.I) for e in expected)
    expected, got = ([_neutral(e, imaginary) for e in side] for side in (expected, got))
    return math_verify.verify(expected, got, timeout_seconds=None)


def _neutral(expression: Any, imaginary: bool) -> Any:
    """Symbols with one set of assumptions, in the lower case that math-verify gives them."""
    if not isinstance(expression, sympy.Basic | sympy.MatrixBase):
        return expression
    neutral = {s: sympy.Symbol(s.name.lower(), real=True) for s in expression.atoms(sympy.Symbol)}
    if imaginary:
        neutral |= {s: sympy.I for s in neutral if s.name == "i"}
    return expression.xreplace(neutral)


def _plain(text: str) -> str:
    return _SPACING.sub("", text).replace("dfrac", "frac").replace("tfrac", "frac").lower()


def _expressions(text: str) -> list[Any]:
    """What the text can be read as: one object in SymPy's notation, else what math-verify makes of it."""
    text = text.strip()
    if _PYTHON.search(text) and "\\" not in text:
        try:
            return [parse_formula(text)]
        except NotAFormula:
            pass
    text = text.translate(_SIGNS)
    marked = any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed"))
    if not marked and not _WORD.search(_NAMED.sub("", text)):
        text = f"${text}$"
    return math_verify.parse(text, parsing_timeout=None)
