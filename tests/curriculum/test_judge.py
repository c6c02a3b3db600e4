"""What an answer is worth in each family, and that nothing a model writes can crash or hang the judge."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import MIN, answer, interval, needs_math

from isomorph.curriculum.judge import judge
from isomorph.curriculum.rewards.answer import last_answer, last_boxed
from isomorph.curriculum.rewards.pool import RewardPool, answer_found


@pytest.mark.parametrize(
    ("response", "inside"),
    [
        ("<answer>1</answer>", "1"),
        ("<answer>1</answer> no: <answer> 2 </answer> done", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1</answer></answer>", "1"),
        ("write <answer> first: <answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("</answer>1<answer>", None),
        ("1", None),
        ("", None),
        ("<Answer>1</Answer>", None),
    ],
)
def test_the_last_answer_counts(response: str, inside: str | None) -> None:
    assert last_answer(response) == inside


@pytest.mark.parametrize(
    ("response", "inside"),
    [
        (r"so \boxed{15}.", "15"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} no: \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"{ \boxed{1}", "1"),
        (r"} \boxed{1}", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        ("15", None),
    ],
)
def test_the_last_closed_box_counts_in_mathematics_where_there_are_no_tags(response: str, inside: str | None) -> None:
    assert last_boxed(response) == inside
    assert answer_found("math", response) == bool(inside)
    assert not answer_found("async_plan", response)
    assert not answer_found("physics", response)
    assert answer_found("math", f"{response} <answer>3</answer>")
    assert not answer_found("math", f"{response} <answer> </answer>")


@pytest.mark.parametrize("text", ["\\boxed{" * 125_000, "{" * 1_000_000, "}" * 1_000_000, "\\" * 1_000_000])
def test_boxes_are_found_in_linear_time(text: str) -> None:
    start = time.process_time()
    assert last_boxed(text) is None
    assert last_boxed(rf"{text} \boxed{{5}}") == "5"
    assert time.process_time() - start < 5.0  # a quadratic search takes minutes


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("518400", "518400.0", 1.0),
        ("518400.0", "518400.0", 1.0),
        (" 518400 ", 518400.0, 1.0),
        ("5.184e5", 518400.0, 1.0),
        ("85", 85, 1.0),
        ("0.1", "0.1", 1.0),
        ("4.66", "4.66", 1.0),
        ("4.67", "4.66", 0.0),
        ("85 min", "85.0", 0.0),
        ("it is 85", "85.0", 0.0),
        ("518,400", "518400.0", 1.0),
        ("51,8400", "518400.0", 0.0),
        ("5 18400", "518400.0", 0.0),
        ("-518400", "518400.0", 0.0),
        ("- 518400", "518400.0", 0.0),
        ("**518400**", "518400.0", 1.0),
        ("518400.00000000001", "518400.0", 0.0),  # the same float
        ("5_18400", "518400.0", 0.0),
        ("\uff1518400", "518400.0", 0.0),
        ("nan", "85.0", 0.0),
        ("inf", "85.0", 0.0),
        ("1e400", "85.0", 0.0),
        ("9" * 1000, "85.0", 0.0),
        ("", "85.0", 0.0),
    ],
)
def test_bare_numbers_are_equal_exactly(text: str, gold: str | float, reward: float) -> None:
    assert judge("async_plan", answer(text), gold) == reward


@pytest.mark.parametrize("gold", ["20 min", "1200 s", "1/3 hours", interval(20 * MIN)])
def test_an_accepted_answer_may_be_any_duration(gold: str) -> None:
    assert judge("async_plan", answer("20 minutes"), gold) == 1.0
    assert judge("async_plan", answer("21 minutes"), gold) == 0.0


@pytest.mark.parametrize("gold", ["", "soon", "nan", "inf", "1e999", "5-10 min", "timedelta(1)", True, None])
def test_an_unreadable_accepted_answer_raises(gold: object) -> None:
    with pytest.raises(ValueError, match=r"accepted answer|must be"):
        judge("async_plan", answer("20 min"), gold)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["chess", "", "natural"])
def test_an_unknown_family_raises(family: str) -> None:
    with pytest.raises(ValueError, match="family"):
        judge(family, answer("1"), "1")


HOSTILE = {
    "nul": "\0" * 1000 + " min",
    "huge_number": "9" * 1_000_000 + " min",
    "many_numbers": "1 " * 500_000,
    "braces": "{" * 1_000_000,
    "brackets": "(" * 1_000_000,
    "nested_tags": "<answer>" * 200_000,
    "closing_tags": "</answer>" * 200_000,
    "spaces": " " * 1_000_000 + "min",
    "words": "one hundred and " * 100_000,
    "halves": "and a half " * 100_000,
    "commas": "1,000" + ",000" * 200_000,
    "dots": "1." * 300_000,
    "slashes": "1/" * 300_000,
    "surrogate": "\ud800 5 min",
    "thai_digits": "๑๒ min",
    "superscripts": "5² min",
    "infinite": "1e400 min or inf",
    "hashes": "#0 min #1 min #99999 min",
    "mixed": "5 min and a half and a half of a half hour and #3",
}


@pytest.mark.parametrize("limit", [300, 4000, 2_000_000])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_at_once(name: str, limit: int) -> None:
    text = HOSTILE[name][:limit]
    start = time.process_time()
    for gold in (interval(1234), "7.0"):
        assert judge("async_plan", answer(text), gold) == 0.0
        assert judge("async_plan", text, gold) == 0.0
    assert time.process_time() - start < 2.0  # milliseconds; what is quadratic in the length takes minutes


MATHEMATICS = [
    (r"\frac{50}{3}", r"\frac{50}{3}", 1.0),
    ("50/3", r"\frac{50}{3}", 1.0),
    (r"$\dfrac{50}{3}$", r"\frac{50}{3}", 1.0),
    ("16.67", r"\frac{50}{3}", 0.0),
    ("21 points", "21", 1.0),
    ("x = 5", "5", 1.0),
    (r"\boxed{5}", "5", 1.0),
    ("12", "13", 0.0),
    ("b", "B", 1.0),
    ("1103_{6}", "1103_6", 1.0),
    ("1103_7", "1103_6", 0.0),
    ("1103", "1103_6", 0.0),
    ("-8x^2+13x+20", "-8*x**2 + 13*x + 20", 1.0),
    ("-8x^2+13x+21", "-8*x**2 + 13*x + 20", 0.0),
    ("y = 1-2x", "Eq(y, 1 - 2*x)", 1.0),
    ("1+3i", "1 + 3*I", 1.0),
    (r"[-1,\infty)", "Interval(-1, oo)", 1.0),
    (r"(-1,\infty)", "Interval(-1, oo)", 0.0),
    (r"\begin{pmatrix}7\\5\end{pmatrix}", "Matrix([[7], [5]])", 1.0),
    (r"2-\sqrt{2}, 2+\sqrt{2}", "[2 - sqrt(2), sqrt(2) + 2]", 1.0),
    ("64,328", r"64,\!328", 1.0),
    ("64328", r"64,\!328", 1.0),
    ("$1,657", r"\$1,\!657", 1.0),
    ("1657", r"\$1,\!657", 1.0),
    ("c + b + a", "a + b + c", 1.0),
    ("c + b + d", "a + b + c", 0.0),
    ("", "5", 0.0),
    ("__import__('os').system('true')", "5", 0.0),
]
PHYSICS = [
    ("5.7e13 C", "5.7e+13 C", 1.0),
    ("5.7×10^13 C", "5.7e+13 C", 1.0),
    (r"5.72 \times 10^{13}\ \mathrm{C}", "5.7e+13 C", 1.0),
    ("57 TC", "5.7e+13 C", 1.0),
    ("6.5e13 C", "5.7e+13 C", 0.0),
    ("5.7e13", "5.7e+13 C", 0.0),
    ("5.7e13 N", "5.7e+13 C", 0.0),
    ("-4.5e-5 C", r"-45 $\mu \mathrm{C}$", 1.0),
    ("4.5e-5 C", r"-45 $\mu \mathrm{C}$", 0.0),
    ("4400", "4.4 10^3", 1.0),
    ("1.8e-5", "1.8 1e-5", 1.0),
    ("109°", r"109 $^{\circ}$", 1.0),
    ("60 deg", "pi/3 rads", 1.0),
    ("0.785", "pi/4 ", 1.0),
    ("1.49 m", "2*sqrt(5)/3 m", 1.0),
    ("9.8 m/s", "22 mi/h", 1.0),
    ("20 °C", "293 K", 1.0),
    ("12%", "0.12 unitless", 1.0),
    ("88 J·mol⁻¹·K⁻¹", "88 J/(mol*K)", 1.0),
    ("15 states", "15 states", 1.0),
    ("F = 34.5 N", "34.5 N", 1.0),
    ("26 s", "25 s", 1.0),  # the stated digits tell 25 from 26 only just
    ("27 s", "25 s", 0.0),
    ("0.0 J", "0 J", 1.0),
    ("3 J", "0 J", 0.0),
    (r"2\pi R\sqrt{1-v^2/c^2}/v", "2*pi*R*sqrt(1 - v**2/c**2)/v ", 1.0),
    ("0.005 J", "0 J", 0.0),  # near zero is not zero
    ("1 1/2 m", "1.5 m", 1.0),
    ("1.5 m", "1 1/2 m", 1.0),
    ("11/2 m", "1 1/2 m", 0.0),
    ("1 5 m", "15 m", 0.0),
    ("0.5 kJ = 500 J", "500 J", 1.0),
    ("3 J = 5 J", "5 J", 0.0),
    ("W = 5*3 = 15 J", "15 J", 1.0),
    ("5 m and 6 m", "5 m", 0.0),
    ("5 m or 6 m", "5 m", 0.0),
    ("5-6 m", "5 m", 0.0),
    ("5 m s", "5 m/s", 0.0),
    ("5 s/m", "5 m/s", 0.0),
    ("- 5 m", "5 m", 0.0),
    ("m**99999999999", "5 m", 0.0),
    ("1 degree.5**9**9**9", "5 m", 0.0),
    ("5 (m**99)**99", "5 m", 0.0),
    ("5 kg*m**2/s**2", "5 J", 1.0),
    ("5 (m/s)**2", "5 m**2/s**2", 1.0),
    ("", "5 m", 0.0),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(max_workers=1, deadline_s=20.0) as judges:  # a loaded machine: none of these needs a second
        yield judges


@needs_math
@pytest.mark.parametrize(("text", "gold", "reward"), MATHEMATICS)
def test_mathematics(pool: RewardPool, text: str, gold: str, reward: float) -> None:
    assert pool.judge("math", answer(text), gold) == reward


@needs_math
@pytest.mark.parametrize(("text", "gold", "reward"), PHYSICS)
def test_physics(pool: RewardPool, text: str, gold: str, reward: float) -> None:
    assert pool.judge("physics", answer(text), gold) == reward


@needs_math
def test_none_of_those_was_cut_off(pool: RewardPool) -> None:
    assert (pool.num_timeouts, pool.num_crashes, pool.num_errors) == (0, 0, 0)


@needs_math
@pytest.mark.parametrize(("family", "gold"), [("math", ""), ("physics", ""), ("physics", "green ideas sleep")])
def test_an_unreadable_accepted_answer_raises_from_a_worker_too(pool: RewardPool, family: str, gold: str) -> None:
    with pytest.raises(ValueError, match="accepted answer"):
        pool.judge(family, answer("5"), gold)


@needs_math
def test_hostile_formulas_are_wrong_and_nothing_is_evaluated(pool: RewardPool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attacks = [
        f"__import__('pathlib').Path({str(canary)!r}).touch()",
        f"$\\text{{}}$ open({str(canary)!r}, 'w')",
        *("\0", "\ud800", "1e400", "nan", "١٢", "9**9**9"),
        *("{" * 1_000_000, "(" * 1999, "[" * 1999, "-" * 300, "\\frac{" * 300),
    ]
    for attack in attacks:
        assert pool.judge("math", answer(attack), "5") == 0.0
        assert pool.judge("physics", answer(attack), "5 m") == 0.0
    assert not canary.exists()
    assert (pool.num_timeouts, pool.num_crashes) == (0, 0)
