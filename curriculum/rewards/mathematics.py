"""Whether two mathematical answers are the same object, decided exactly: only a proven equality counts.

Texts are parsed by ``notation.py`` and the objects compared, never strings with braces or spaces removed. Relations are
compared as a whole, tuples in order, sets in any order; an interval equals a pair only where both are written alike.
Numbers are exact rationals or algebraic: no tolerance.
"""

import itertools
import re
from typing import Any

import sympy

from isomorph.curriculum.rewards.notation import read
from isomorph.curriculum.rewards.objects import Thing
from isomorph.curriculum.rewards.tokens import NotRead, Token, tokens_of

MAX_ITEMS = 12  # of a set: they are matched with one another
DIGITS = 30

_PROSE = re.compile(r"^(?:the |my |so |thus )*(?:final )?answer(?: is)?:? |^(?:it )?is ", re.IGNORECASE)
_BOLD = re.compile(r"^(\*\*|__|`)(.*)\1$", re.DOTALL)
_WORD = re.compile(r"\(?([a-zA-Z]+)\)?\.?")


def same_expression(stated: str, gold: str, *, imaginary: bool = True) -> bool:
    """Whether both are the same mathematical object. ``imaginary``: whether i and I are the imaginary unit."""
    expected, got = tokens_of(_bare(gold)), tokens_of(_bare(stated))
    if not expected or not got:
        return False
    if expected == got or _same_words(expected, got):
        return True
    try:
        gold_object, object_stated = (read(_both_signs(side), imaginary=imaginary) for side in (expected, got))
        return _same(gold_object, object_stated)
    except NotRead:
        return False


def _both_signs(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    r"""``2 \pm x`` -> ``2 + x, 2 - x``."""
    at = [k for k, token in enumerate(tokens) if token.text == r"\pm"]
    if len(at) != 1 or any(token.text in (",", ";") for token in tokens):
        return tokens
    signed = [(*tokens[: at[0]], Token("sign", sign), *tokens[at[0] + 1 :]) for sign in "+-"]
    return (*signed[0], Token("sign", ","), *signed[1])


def _bare(text: str) -> str:
    """``text`` without bold, a full stop at the end, and words such as "the answer is"."""
    text = text.strip()
    while (bare := _BOLD.sub(r"\2", text.removesuffix(".").strip())) != text:
        text = bare
    return _PROSE.sub("", text).strip()


def _same_words(expected: tuple[Token, ...], got: tuple[Token, ...]) -> bool:
    """Whether both are the same word, such as B or (b) or a weekday, in any case, with or without ``\\text{..}``."""
    words = [_WORD.fullmatch("".join(t.text for t in side if t.text not in _WORD_WRAPPERS)) for side in (expected, got)]
    found = {match[1].lower() for match in words if match}
    return all(words) and len(found) == 1 and len(found.pop()) != 2 and all(map(_one_word, (expected, got)))


_WORD_WRAPPERS = {r"\textbf", r"\mathbf", r"\boxed", r"\text", "{", "}", "."}


def _one_word(tokens: tuple[Token, ...]) -> bool:
    return sum(token.kind in ("name", "text") and token.text not in _WORD_WRAPPERS for token in tokens) == 1


def _same(gold: Any, answer: Any) -> bool:
    label_of_gold = _without_label(gold, answer)
    if not _symbols(label_of_gold):  # y = 2x + 1 is a relation of its own
        gold = label_of_gold
    answer = _without_label(answer, gold)
    match gold, answer:
        case sympy.Expr(), sympy.Expr():
            return equal(gold, answer)
        case Thing("relation"), Thing("relation"):
            return _same_relation(gold, answer)
        case _, Thing("relation", how=operators) if set(operators) == {"="} and not _is_relation(gold):
            return all(_same(gold, side) for side in answer.parts)  # 6/2 = 3: every side must be it
        case Thing("measured"), _:
            unit = answer.how if isinstance(answer, Thing) and answer.kind == "measured" else gold.how
            return unit == gold.how and _same(gold.parts[0], _value(answer))
        case _, Thing("measured"):
            return answer.how != ("percent",) and _same(gold, answer.parts[0])
        case Thing(), Thing():
            return _same_thing(gold, answer)
    return False


def _value(answer: Any) -> Any:
    return answer.parts[0] if isinstance(answer, Thing) and answer.kind == "measured" else answer


def _is_relation(value: Any) -> bool:
    return isinstance(value, Thing) and value.kind == "relation"


def _without_label(value: Any, other: Any) -> Any:
    """``x = 5`` -> ``5`` where the other side has no relation and x occurs nowhere else."""
    if not _is_relation(value) or _is_relation(other) or set(value.how) not in ({"="}, {"in"}):
        return value
    label, *sides = value.parts
    if not isinstance(label, sympy.Symbol) or any(label in _symbols(side) for side in (*sides, other)):
        return value
    return sides[0] if len(sides) == 1 else Thing("relation", tuple(sides), value.how[1:])


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, Thing):
        return set().union(*map(_symbols, value.parts))
    if isinstance(value, tuple):
        return set().union(*map(_symbols, value))
    return value.free_symbols if isinstance(value, sympy.Basic) else set()


_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!=", "in": "in"}


def _same_relation(gold: Thing, answer: Thing) -> bool:
    """The same sides in the same or the reverse order; relations of two expressions also up to a factor."""
    if len(gold.how) != len(answer.how):
        return False
    turned = Thing("relation", answer.parts[::-1], tuple(_TURNED[o] for o in answer.how[::-1]))
    for candidate in (answer, turned):
        if candidate.how != gold.how:
            continue
        if all(map(_same, gold.parts, candidate.parts)):
            return True
        sides = (*gold.parts, *candidate.parts)
        if len(sides) == 4 and all(isinstance(side, sympy.Expr) for side in sides):
            factor = _factor(sides[0] - sides[1], sides[2] - sides[3])
            if factor is not None and (gold.how[0] in ("=", "!=") or factor.is_positive):
                return True
    return False


def _factor(one: Any, other: Any) -> Any:
    """The rational number other than 0 that is the ratio of the two; None where there is none."""
    one, other = sympy.expand(one), sympy.expand(other)
    if not one.free_symbols or one.free_symbols != other.free_symbols:
        return None
    factor = sympy.cancel(one / other)
    return factor if factor.is_Rational and factor != 0 else None


def _same_thing(gold: Thing, answer: Thing) -> bool:
    kinds = gold.kind, answer.kind
    if kinds == ("matrix", "matrix"):
        shapes = [(len(side.parts), len(side.parts[0])) for side in (gold, answer)]
        rows = [[cell for row in side.parts for cell in row] for side in (gold, answer)]
        return shapes[0] == shapes[1] and all(map(_same, *rows))
    if kinds == ("based", "based"):
        return gold.parts == answer.parts
    if kinds == ("interval", "interval"):
        return gold.how == answer.how and all(map(_same, gold.parts, answer.parts))
    for one, other in ((gold, answer), (answer, gold)):  # (0, 1) may be a pair or an interval
        if one.kind == "interval" and other.kind in _BRACKETS and len(other.parts) == 2:
            return one.how == _BRACKETS[other.kind] and all(map(_same, one.parts, other.parts))
    if kinds == ("union", "union"):
        return _same_set(*(tuple(map(_as_interval, side.parts)) for side in (gold, answer)))
    if gold.kind == answer.kind in ("tuple", "list"):
        in_order = len(gold.parts) == len(answer.parts) and all(map(_same, gold.parts, answer.parts))
        return in_order or (gold.kind == "list" and _are_solutions(gold) and _same_set(gold.parts, answer.parts))
    if all(side.kind in ("set", "bare") or (side.kind == "list" and _are_solutions(side)) for side in (gold, answer)):
        return _same_set(gold.parts, answer.parts)
    return False


_BRACKETS = {"tuple": ("(", ")"), "list": ("[", "]")}


def _as_interval(part: Any) -> Any:
    if isinstance(part, Thing) and part.kind in _BRACKETS and len(part.parts) == 2:
        return Thing("interval", part.parts, _BRACKETS[part.kind])
    return part


def _are_solutions(value: Thing) -> bool:
    """Whether the list may be in any order; two rational numbers may also be a closed interval."""
    low_high = value.parts
    if len(low_high) != 2 or not all(isinstance(end, sympy.Expr) for end in low_high):
        return True
    return not all(end.is_Rational for end in low_high)


def _same_set(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    """Whether the items can be paired one to one."""
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return False
    if any(map(_is_relation, gold)) and not all(map(_is_relation, answer)):  # which value belongs to which name?
        return False
    left = list(answer)
    for item in gold:
        found = next((k for k, other in enumerate(left) if _same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def equal(one: Any, other: Any) -> bool:
    """Whether two SymPy expressions are equal; False also where that cannot be proven."""
    if one == other:
        return True
    if one.is_Rational and other.is_Rational:
        return False
    if any(side.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for side in (one, other)):
        return False
    difference = one - other
    if difference == 0:
        return True
    if _differs(one, other):
        return False
    for prove in (sympy.expand, sympy.radsimp, sympy.simplify):
        if prove(difference) == 0:
            return True
    return difference.equals(0) is True


_POINTS = tuple(sympy.Rational(p, 17) for p in (19, 23, 31, 37, 43, 53, 61, 71))


def _differs(one: Any, other: Any) -> bool:
    """Whether the two clearly differ at some point: cheap, and decides nearly all wrong answers."""
    for shift in range(2):
        points = itertools.islice(itertools.cycle(_POINTS), shift, None)
        at = dict(zip(sorted(one.free_symbols | other.free_symbols, key=str), points, strict=False))
        values = [_value_of(side.subs(at)) for side in (one, other)]
        if None not in values and abs(values[0] - values[1]) > abs(values[0]) * sympy.Float("1e-20"):
            return True
    return False


def _value_of(value: Any) -> Any:
    """The value to DIGITS digits; None where there is none."""
    found = sympy.N(value, DIGITS)
    return found if found.is_number and found.is_finite else None
