"""Mathematical answers: what is the same object is worth 1, and nothing that is merely near, alike or unproven."""

import ast
import re
from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.curriculum.rewards.mathematics import same_expression

# (what the answer says, the accepted answer)
SAME = [
    ("3/2", "1 1/2"),
    (r"\dfrac{1}{2}", "0.5"),
    (r"1\frac{1}{2}", "3/2"),
    (r"1 \frac12", "1.5"),
    (r"\frac{3}{2}", "1 1/2"),
    ("-1 1/2", "-3/2"),
    ("3>x", "x<3"),
    ("y=-3x+30", "y = -3x + 30"),
    ("3x + y = 30", "y = -3x + 30"),
    ("6x+2y=60", "y = -3x + 30"),
    ("-2x>4", "x<-2"),
    ("{1,2}", "{2,1}"),
    (r"\{1,2\}", "1, 2"),
    ("(1,2)", "Interval.open(1,2)"),
    ("[1,2)", "Interval.Ropen(1, 2)"),
    ("(-oo,5)U(5,oo)", r"(-\infty,5)\cup(5,\infty)"),
    ("6/2=3", "3"),
    ("x=6/2=3", "3"),
    ("3 = 3", "3"),
    ("5 cm", "5"),
    ("5 cm", r"5 \text{ cm}"),
    ("5", r"5 \text{ cm}"),
    ("5", r"5\%"),
    ("60", r"60^\circ"),
    ("60°", r"60^\circ"),
    ("60 degrees", r"60^\circ"),
    ("21 points", "21"),
    ("2^{1000}", "2^{1000}"),
    ("4^{500}", "2^{1000}"),
    ("-2^{48}*2", "-2^{49}"),
    ("562949953421312", "2^{49}"),
    ("**B**", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("(b)", "B"),
    (r"\textbf{(B)}", "B"),
    (r"\text{B}", "B"),
    (r"\text{B.}", "B"),
    ("**12**", "12"),
    ("12.", "12"),
    ("$12$.", "12"),
    (r"\boxed{12}", "12"),
    (r"\mathbf{12}", "12"),
    ("**12.**", "12"),
    ("monday", r"\text{Monday}"),
    ("Monday.", r"\text{Monday}"),
    ("1,657", r"\$1,\!657"),
    ("$1657", r"\$1,\!657"),
    (r"\$1657", r"\$1,\!657"),
    ("1657 dollars", r"\$1,\!657"),
    ("1,657.00", r"\$1,\!657"),
    (r"2\pm\sqrt{3}", r"2+\sqrt{3}, 2-\sqrt{3}"),
    ("12^{1/7}", r"\sqrt[7]{12}"),
    ("9*pi/20", r"\frac{9\pi}{20}"),
    ("1-cos(2y)", r"2\sin^2 y"),
    (r"\frac{1-\cos 2y}{2}", "1/2 - cos(2*y)/2"),
    (r"\sqrt{6+4\sqrt2}", r"2+\sqrt2"),
    ("2*sqrt(3)", r"\sqrt{12}"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    ("(x+2)(x-2)", "x^2-4"),
    ("-i", "-I"),
    (r"x \in [2,5)", "[2,5)"),
    ("x=1", "1"),
    ("1", "x=1"),
    ("n=255", "n = 255"),
    ("255", "n = 255"),
    ("AB=9, CD=4", "CD=4, AB=9"),
    ("1/2x", "x/2"),
    ("1103_6", "1103_{6}"),
    ("the answer is 5", "5"),
    ("$x = 5$", "5"),
    ("120", "5!"),
    ("+5", "5"),
    ("5e0", "5"),
    ("1.0", "1"),
    ("01", "1"),
    ("[-330,90]", "[-330, 90]"),
    ("[10,8,6]", "[6, 8, 10]"),
    ("6,8,10", "[6, 8, 10]"),
    (r"\begin{pmatrix}7\\ 5\end{pmatrix}", "Matrix([[7], [5]])"),
    ("(0,-5)", "Point2D(0, -5)"),
    (r"x\ne 3", "Ne(x, 3)"),
    (r"\boxed{10^\circ, 50^\circ}", r"50^\circ, 10^\circ"),
]

DIFFERENT = [
    (r"\frac{12}{3}", r"\frac{1}{23}"),
    ("11/2", "1 1/2"),
    ("34", "3 4"),
    ("1 3/2", "5/2"),
    ("3 4", "34"),
    ("2 3", "6"),
    ("x 2", "2x"),
    ("x<3", "x>3"),
    (r"x \le 3", "x<3"),
    ("x=3", "x<3"),
    ("3", "x<3"),
    ("x<3", "3"),
    ("-3x+30", "y = -3x + 30"),
    ("y = -3x", "y = -3x + 30"),
    ("-2x>4", "x>-2"),
    ("{1,1,2}", "{1,2}"),
    ("(1,2)", "(2,1)"),
    ("1,2", "(1,2)"),
    ("(1,2)", "{1,2}"),
    ("[1,2]", "(1,2)"),
    ("(1,2]", "[1,2)"),
    ("1=2", "2"),
    ("x=2=3", "3"),
    ("1+1=3", "3"),
    ("3=4", "3"),
    ("5 m", r"5 \text{ cm}"),
    ("5 km", r"5\text{ cm}"),
    ("5%", "5"),
    (r"5\%", "5"),
    ("60'", r"60^\circ"),
    ("5 thousand", "5"),
    ("5 hundred", "5"),
    ("five", "5"),
    ("21 or 22", "21"),
    ("21 and a half", "21"),
    ("5 squared", "5"),
    ("2^{1000}", "2^{1001}"),
    ("2^{49}", "-2^{49}"),
    ("562949953421313", "2^{49}"),
    ("10^{-20}", "0"),
    ("0.0000000001", "0"),
    ("10^{-300}", "0"),
    (r"\sqrt{2}", "1.4142135623730951"),
    ("3.14159265358979", r"\pi"),
    ("22/7", r"\pi"),
    ("C", "B"),
    ("Tuesday", r"\text{Monday}"),
    ("1, 657", r"\$1,\!657"),
    ("16,57", "1657"),
    ("1 657", "1657"),
    ("20,100", "(20,100)"),
    ("a+b+c", "abc"),
    ("cab", "abc"),
    ("(x+2)(x-3)", "x^2-4"),
    ("i", "-I"),
    ("y=1", "x=1"),
    ("4, 9", "AB=9, CD=4"),
    ("1/(2x)", "x/2"),
    (r"\frac{1}{2x}", "x/2"),
    ("776", "776_8"),
    ("776_9", "776_8"),
    ("5 (approximately)", "5"),
    ("~5", "5"),
    (r"\approx 5", "5"),
    (r"5\dots", "5"),
    (r"\pm 5", "5"),
    ("5!", "5"),
    ("|5|", "5"),
    ("-5", "5"),
    ("--5", "5"),
    ("5_0", "5"),
    ("５", "5"),
    ("f(x)=x^2+1", "x^2+1"),
    (r"\frac{0}{0}", "0"),
    ("1/0", r"\infty"),
    (r"\infty", r"-\infty"),
    ("[90,-330]", "[-330, 90]"),
    ("-330, 90", "[-330, 90]"),
    (r"\begin{pmatrix}7&5\end{pmatrix}", "Matrix([[7], [5]])"),
    ("(7,5)", "Matrix([[7], [5]])"),
    ("7 2/3", r"7 \cdot 2/3"),
    (r"6\%", "6"),
    ("x=3", "Ne(x, 3)"),
    ("(0, 1)", "[0, 1]"),
    ("2^{10000}", "2^{10001}"),
    ("9^{9^{9^9}}", "5"),
]


@pytest.mark.parametrize(("stated", "gold"), SAME)
def test_the_same_object_in_other_words_is_right(stated: str, gold: str) -> None:
    assert same_expression(stated, gold)
    assert same_expression(stated, stated) and same_expression(gold, gold)


@pytest.mark.parametrize(("stated", "gold"), DIFFERENT)
def test_another_object_is_wrong(stated: str, gold: str) -> None:
    assert not same_expression(stated, gold)


# The value of a formula by another way than the judge's: rewritten into Python by regular expressions.


def _proper(whole: str, above: str, below: str) -> str:
    return f"({whole}+{above}/{below})" if int(above) < int(below) else "?"


_LATEX_MIXED = re.compile(r"(?<![\d.])(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_MIXED = re.compile(r"(?<![\d./])(\d+) +(\d+) */ *(\d+)(?![\d./])")


def _value(text: str) -> Fraction | None:
    """Exactly; None for what is no sum, product or quotient of numbers."""
    text = text.strip().rstrip(".").strip()
    text = _LATEX_MIXED.sub(lambda m: _proper(m[1], m[2] or m[3], m[4] or m[5]), text)
    text = _FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", text)
    text = _MIXED.sub(lambda m: _proper(*m.groups()), text)
    text = text.replace("{", "(").replace("}", ")").strip()
    if re.search(r"[\d.)]\s+[\d.(]|[^\d+\-*/(). ]", text):
        return None
    try:
        return _of(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, TypeError):
        return None


def _of(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            one, other = _of(left, text), _of(right, text)
            by_sign = {ast.Add: one.__add__, ast.Sub: one.__sub__, ast.Mult: one.__mul__, ast.Div: one.__truediv__}
            return by_sign[type(op)](other)
        case ast.UnaryOp(op=op, operand=operand):
            return -_of(operand, text) if isinstance(op, ast.USub) else _of(operand, text)
        case ast.Call(func=func, args=[argument]):  # (2)(3)
            return _of(func, text) * _of(argument, text)
        case ast.Constant():
            return Fraction(ast.get_source_segment(text, node) or "")
    raise ValueError(text)


_SMALL = st.integers(1, 40)
_FORMULAS = st.one_of(
    st.builds(r"\frac{{{}}}{{{}}}".format, _SMALL, _SMALL),
    st.builds("{}/{}".format, _SMALL, _SMALL),
    st.builds(lambda w, a, b: f"{w} {a}/{a + b}", _SMALL, _SMALL, _SMALL),
    st.builds(lambda w, a, b: rf"{w}\frac{{{a}}}{{{a + b}}}", _SMALL, _SMALL, _SMALL),
    st.builds(str, st.integers(1, 3000)),
    st.builds("{}.{}".format, _SMALL, st.integers(1, 999)),
    st.builds(lambda a, b, c: rf"\frac{{{a}+{b}}}{{{b}-{c + 41}}}", _SMALL, _SMALL, _SMALL),
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(["", "-"]), _FORMULAS, st.data())
def test_a_moved_brace_space_sign_or_digit_is_wrong_unless_the_value_is_the_same(
    sign: str, formula: str, data: st.DataObject
) -> None:
    gold = sign + formula
    assert _value(gold) is not None
    assert same_expression(gold, gold)
    characters = list(gold)
    taken = characters.pop(data.draw(st.integers(0, len(characters) - 1)))
    put = data.draw(st.sampled_from([taken, taken, " ", "-", "{", "}", "1", "0", ".", "/", r"\frac", ""]))
    characters.insert(data.draw(st.integers(0, len(characters))), put)
    moved = "".join(characters)
    if same_expression(moved, gold):
        as_written = " ".join(moved.split()) == gold or moved.replace(" ", "") == gold.replace(" ", "")
        assert _value(moved) == _value(gold) or (as_written and not re.search(r"\d \d", moved + gold)), moved


_X, _Y = sympy.symbols("x y")
_COEFFICIENTS = st.tuples(*[st.integers(-9, 9)] * 4)


@settings(max_examples=120, deadline=None)
@given(_COEFFICIENTS, st.integers(0, 3), st.integers(1, 3), st.sampled_from([sympy.sqrt(2), sympy.pi, _Y, 1]))
def test_a_changed_coefficient_is_wrong_and_another_form_is_right(
    numbers: tuple[int, ...], which: int, change: int, factor: sympy.Expr
) -> None:
    """Truth: SymPy's own polynomials; both notations of it are read."""

    def product(a: int, b: int, c: int, d: int) -> sympy.Expr:
        return (a * _X + b * factor) * (c * _X + d)

    changed = [n + change * (k == which) for k, n in enumerate(numbers)]
    gold, other = product(*numbers), product(*changed)
    is_same = sympy.expand(gold - other) == 0
    for text in (sympy.latex(gold), str(gold), sympy.latex(sympy.expand(gold)), str(sympy.expand(gold))):
        assert same_expression(text, str(gold))
        assert same_expression(str(other), text) == is_same
        assert same_expression(sympy.latex(sympy.expand(other)), text) == is_same


@pytest.mark.parametrize("unit", ["cm", "m", "km", "kg", r"\text{ cm}", r"\text{ m}", r"^\circ", r"\%"])
def test_another_unit_is_wrong(unit: str) -> None:
    for other in ("mm", r"\text{ ft}", r"\text{ square cm}", "thousand", "dozen", "/2", "^2"):
        assert not same_expression(f"5{other}", f"5{unit}")
