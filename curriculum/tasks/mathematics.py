"""Whether two mathematical answers are the same: as text, in SymPy's notation, or in LaTeX."""

import re
from typing import Any

import math_verify
import sympy

from isomorph.curriculum.tasks.formula import MAX_DEPTH, NotAFormula, nesting, parse_formula

_SPACING = re.compile(r"\\[,;! $]|\\(?:left|right)(?![a-z])|[\s${}]")
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
    """What the text can be read as: an object in SymPy's notation, or what math-verify makes of it."""
    text = text.replace(r"\$", "").replace(r"\!", "").strip()
    if _PYTHON.search(text) and (formula := _formula(text)):
        return formula
    read = math_verify.parse(_as_latex(text.translate(_SIGNS)), parsing_timeout=None)
    return read if any(isinstance(e, sympy.Basic | sympy.MatrixBase) for e in read) else _formula(text) or read


def _formula(text: str) -> list[Any]:
    try:
        return [parse_formula(text)]
    except NotAFormula:
        return []


def _as_latex(text: str) -> str:
    """Marked as mathematics, unless it is so already or has words, among which math-verify finds the expression."""
    marked = any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed"))
    return text if marked or _WORD.search(_NAMED.sub("", text)) else f"${text}$"
