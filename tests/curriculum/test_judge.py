"""What an answer is worth, and that nothing a model writes can crash or hang the judge."""

import importlib.util
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.curriculum.judge import judge
from isomorph.curriculum.rewards import pool as pool_module
from isomorph.curriculum.rewards.answer import last_answer, last_boxed
from isomorph.curriculum.rewards.duration import UNIT_SECONDS, parse_duration, parse_timedeltas
from isomorph.curriculum.rewards.pool import RewardPool, answer_found
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.types import Prompt, Rollout
from isomorph.engine.update.score import RewardThread

HAVE_MATH = all(importlib.util.find_spec(name) for name in ("sympy", "pint"))
needs_math = pytest.mark.skipif(not HAVE_MATH, reason="needs the extra [math]")

MIN = 60
HOUR = 3600
DAY = 86_400


def _interval(low_s: int, high_s: int | None = None) -> str:
    ends = (low_s, low_s if high_s is None else high_s)
    return f"[{', '.join(f'datetime.timedelta(days={s // DAY}, seconds={s % DAY})' for s in ends)}]"


def _answer(text: str) -> str:
    return f"so it is <answer>{text}</answer>"


# (what the answer says, its seconds)
DURATIONS = [
    ("80 min", 80 * MIN),
    ("It takes 80 min in total", 80 * MIN),
    ("80 min.", 80 * MIN),
    ("80min", 80 * MIN),
    ("80 Minutes", 80 * MIN),
    ("  80\n minutes ", 80 * MIN),
    ("80-minute", 80 * MIN),
    ("1 hour 20 min", 80 * MIN),
    ("1 hr 20 min", 80 * MIN),
    ("1 hr. 20 mins.", 80 * MIN),
    ("1h20min", 80 * MIN),
    ("1 hour and 20 minutes", 80 * MIN),
    ("1 hour, 20 minutes", 80 * MIN),
    ("1.5 hours", 90 * MIN),
    (".5 h", 30 * MIN),
    ("an hour", HOUR),
    ("an hour and a half", 90 * MIN),
    ("1 hour and a half", 90 * MIN),
    ("one and a half hours", 90 * MIN),
    ("2 and a half hours", 150 * MIN),
    ("two and three quarters hours", 165 * MIN),
    ("1 1/2 hours", 90 * MIN),
    ("1½ hours", 90 * MIN),
    ("half an hour", 30 * MIN),
    ("half a day", 12 * HOUR),
    ("a half hour", 30 * MIN),
    ("one half hour", 30 * MIN),
    ("a quarter of an hour", 15 * MIN),
    ("three quarters of an hour", 45 * MIN),
    ("an hour and a quarter", 75 * MIN),
    ("2 hours and half a minute", 2 * HOUR + 30),
    ("half a day and an hour", 13 * HOUR),
    ("1 hour plus 20 min", 80 * MIN),
    ("20 min + 60 min", 80 * MIN),
    ("1 hour 20 min = 80 min", 80 * MIN),
    ("eighty minutes", 80 * MIN),
    ("twenty-five minutes", 25 * MIN),
    ("one hundred and twenty minutes", 120 * MIN),
    ("a hundred minutes", 100 * MIN),
    ("two thousand three hundred and five seconds", 2305),
    ("2 thousand seconds", 2000),
    ("an hour and thirty minutes", 90 * MIN),
    ("1,080 min", 1080 * MIN),
    ("1,234,567 s", 1_234_567),
    ("8 days 8 hours", 200 * HOUR),
    ("1 week", 7 * DAY),
    ("2 wks 1 d", 15 * DAY),
    ("45 s", 45),
    ("45 sec", 45),
    ("45 secs", 45),
    ("2 d", 2 * DAY),
    ("2 w", 14 * DAY),
    ("3 hrs", 3 * HOUR),
    ("60 + 20 = 80 min", 80 * MIN),
    ("5 min = 300 s", 300),
    ("80 min or 1 hour 20 min", 80 * MIN),
    ("80 min (1 hour 20 min)", 80 * MIN),
    ("80 min (1 hour or so)", 80 * MIN),
    ("step 5 takes 20 min, so the total = 80 min", 80 * MIN),
    ("80 min (5 to 6 steps)", 80 * MIN),
    ("5 to 6 steps = 80 min", 80 * MIN),
    ("step3 ends after 80 min", 80 * MIN),
    ("5 steps: 80 min", 80 * MIN),
    ("a total of 80 min", 80 * MIN),
    ("**80 min**", 80 * MIN),
    ("$80$ min", 80 * MIN),
    (r"\boxed{80 \text{ min}}", 80 * MIN),
]

# (what the answer says, why it is not a duration)
NOT_DURATIONS = [
    ("", "empty"),
    ("80", "no unit"),
    ("min", "no number"),
    ("soon", "no number"),
    ("5-10 min", "range"),
    ("5 - 10 min", "range"),
    ("5–10 min", "range"),
    ("5~10 min", "range"),
    ("five-ten minutes", "range"),
    ("5 min - 10 min", "range"),
    ("5 to 10 min", "range"),
    ("up to 10 min", "range"),
    ("between 5 and 10 min", "range"),
    ("5 and 10 min", "range"),
    ("five and ten minutes", "range"),
    ("5, 10 min", "range"),
    ("3 4 min", "two numbers"),
    ("8. 5 min", "two numbers"),
    ("step 3, 80 min", "two numbers"),
    ("20 min, 60 min", "a list"),
    ("20 min and 60 min", "a list"),
    ("20 min 1 hour", "a list"),
    ("an hour and a half day", "a list"),
    ("1 1 1/2 hours", "two numbers"),
    ("1 11/2 hours", "a mixed number of two wholes"),
    ("50 min or 80 min", "two answers"),
    ("5 or 80 min", "two answers"),
    ("80 min or more", "two answers"),
    ("80 min = 75 min", "a contradiction"),
    ("75 min (no) = 80 min", "a contradiction"),
    ("20 min + 60", "a part without a unit"),
    ("20 min x 4", "a product"),
    ("20 min/step", "a rate"),
    ("20 min per step", "a rate"),
    ("20 min each", "a rate"),
    ("100 min minus 20 min", "a difference"),
    ("less than 80 min", "a bound"),
    ("at least 80 min", "a bound"),
    ("> 80 min", "a bound"),
    ("≥80 min", "a bound"),
    ("about 80 min", "a tolerance of its own"),
    ("~80 min", "a tolerance of its own"),
    ("not 80 min", "a denial"),
    ("- 80 min", "negative"),
    ("-80 min", "negative"),
    ("−80 min", "negative"),
    ("1:20 hours", "clock"),
    ("2 * 40 min", "sum left to the reader"),
    ("20 + 60 min", "sum left to the reader"),
    ("2h30", "a part without a unit"),
    ("2 hours 30", "a part without a unit"),
    ("1,08 min", "wrong separator"),
    ("1.2.3 min", "not a number"),
    ("8e1 min", "not a duration as written"),
    ("1/0 min", "division by zero"),
    ("8" * 50 + " min", "absurd"),
    ("８0 min", "digits of another script"),
    (r"\frac{3}{2} hours", "a formula"),
    ("80 min =", "nothing after the sign"),
    ("(80 min)", "the bracket ends it"),
    ("80 (min)", "the bracket ends it"),
]


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert judge("async_plan", _answer(text), _interval(seconds)) == 1.0
    assert judge("async_plan", _answer(text), _interval(seconds + 1)) == 0.0
    assert judge("async_plan", _answer(text), _interval(max(0, seconds - 1), max(0, seconds - 1))) == 0.0


@pytest.mark.parametrize(("text", "why"), NOT_DURATIONS)
def test_what_states_no_single_duration_is_wrong(text: str, why: str) -> None:
    assert parse_duration(text) is None, why
    assert judge("async_plan", _answer(text), _interval(0, 10**9)) == 0.0


@pytest.mark.parametrize("unit", UNIT_SECONDS)
def test_every_unit_in_full_and_plural(unit: str) -> None:
    low, high = UNIT_SECONDS[unit]
    for text, factor in ((f"1 {unit}", 1), (f"3 {unit}s", 3), (f"three {unit}s", 3), (f"a {unit}", 1)):
        assert parse_duration(text) == (factor * low, factor * high)


def test_a_lone_m_means_months() -> None:
    assert parse_duration("2 m") == (56 * DAY, 62 * DAY)
    assert parse_duration("1h 20m") != parse_duration("80 min")


@pytest.mark.parametrize(
    ("text", "low_day", "high_day", "reward"),
    [
        ("1 month", 28, 31, 1.0),
        ("1 month", 27, 32, 1.0),
        ("1 month", 31, 40, 0.0),  # overlaps
        ("1 month", 29, 31, 0.0),
        ("1 month", 30, 30, 0.0),
        ("1.05 months", 28, 31, 0.0),
        ("0.95 months", 28, 31, 0.0),
        ("4 weeks", 28, 31, 1.0),
        ("30 days", 28, 31, 1.0),
        ("32 days", 28, 31, 0.0),
        ("1 year", 365, 365, 0.0),
        ("1 year", 365, 366, 1.0),
        ("12 months", 365, 366, 1.0),  # any twelve months are a year
        ("11 months", 365, 366, 0.0),
        ("1 year", 336, 372, 1.0),  # accepted of 12 months
        ("27 months", 2 * 365 + 84, 2 * 366 + 93, 1.0),
        ("2 years 3 months", 2 * 365 + 84, 2 * 366 + 93, 1.0),
        ("28 months", 2 * 365 + 84, 2 * 366 + 93, 0.0),
        ("54 weeks", 370, 380, 1.0),
        ("2 months and 3 days", 59, 65, 1.0),
        ("2 months and 3 days", 59, 59, 0.0),
    ],
)
def test_an_answer_has_no_tolerance_but_the_accepted_one(text: str, low_day: int, high_day: int, reward: float) -> None:
    assert judge("async_plan", _answer(text), _interval(low_day * DAY, high_day * DAY)) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("6 months", "0.5 years", 1.0),
        ("0.5 years", "6 months", 1.0),
        ("5 months", "0.5 years", 0.0),
        ("2 years", "24 months", 1.0),
        ("800 days", "27 months", 0.0),
        ("0.0019 months", "80 min", 0.0),
        ("0.0019 months", "77 min", 0.0),
        ("1 month", "30 days", 0.0),
        ("30 days", "1 month", 1.0),
    ],
)
def test_a_gold_in_words_of_the_calendar(text: str, gold: str, reward: float) -> None:
    assert judge("async_plan", _answer(text), gold) == reward


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
    assert judge("async_plan", _answer(text), gold) == reward


@pytest.mark.parametrize("gold", ["20 min", "1200 s", "1/3 hours", _interval(20 * MIN)])
def test_an_accepted_answer_may_be_any_duration(gold: str) -> None:
    assert judge("async_plan", _answer("20 minutes"), gold) == 1.0
    assert judge("async_plan", _answer("21 minutes"), gold) == 0.0


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("[datetime.timedelta(days=28), datetime.timedelta(days=31)]", 28 * DAY, 31 * DAY),
        ("[datetime.timedelta(days=1, seconds=3600), datetime.timedelta(days=1, seconds=3600)]", 25 * HOUR, 25 * HOUR),
        ("[timedelta(hours=2), timedelta(minutes=120)]", 2 * HOUR, 2 * HOUR),
        ("[datetime.timedelta(0), datetime.timedelta(weeks=1)]", 0, 7 * DAY),
    ],
)
def test_timedelta_intervals_are_read(text: str, low: int, high: int) -> None:
    assert parse_timedeltas(text) == (low, high)


@pytest.mark.parametrize(
    "text",
    [
        "[datetime.timedelta(days=1)]",
        "datetime.timedelta(days=1), datetime.timedelta(days=1)",
        "[datetime.timedelta(days=2), datetime.timedelta(days=1)]",
        "[datetime.timedelta(days=-1), datetime.timedelta(days=1)]",
        "[datetime.timedelta(moons=1), datetime.timedelta(days=1)]",
        "[datetime.timedelta(days=x), datetime.timedelta(days=1)]",
        "[datetime.timedelta(days=__import__('os')), datetime.timedelta(days=1)]",
        "[datetime.timedelta(days=1), datetime.timedelta(days=1)] ",
        "timedelta",
    ],
)
def test_other_texts_are_not_evaluated(text: str) -> None:
    if text.endswith(" "):
        parse_timedeltas(text)  # spaces around it are nothing
        return
    with pytest.raises(ValueError, match="must be"):
        parse_timedeltas(text)


@pytest.mark.parametrize("gold", ["", "soon", "nan", "inf", "1e999", "5-10 min", "timedelta(1)", True, None])
def test_an_unreadable_accepted_answer_raises(gold: object) -> None:
    with pytest.raises(ValueError, match=r"accepted answer|must be"):
        judge("async_plan", _answer("20 min"), gold)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["chess", "", "natural"])
def test_an_unknown_family_raises(family: str) -> None:
    with pytest.raises(ValueError, match="family"):
        judge(family, _answer("1"), "1")


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
    for gold in (_interval(1234), "7.0"):
        assert judge("async_plan", _answer(text), gold) == 0.0
        assert judge("async_plan", text, gold) == 0.0
    assert time.process_time() - start < 2.0  # milliseconds; what is quadratic in the length takes minutes


_WORDS = (
    "1 20 1,000 .5 1/2 half a an quarter quarters of and or to = ( - min hour hours m months one two hundred thousand"
)
_FRAGMENTS = st.sampled_from([*_WORDS.split(), " ", "", "\n", "#", "<answer>", "</answer>", "½", "\\text{", "٣", "-"])


@settings(max_examples=120, deadline=None)
@given(
    st.one_of(st.text(max_size=200), st.lists(_FRAGMENTS, max_size=30).map(" ".join), st.lists(_FRAGMENTS).map("".join))
)
def test_no_response_raises(text: str) -> None:
    for response in (text, _answer(text)):
        for gold in (_interval(HOUR), "20 min", 7.0):
            assert judge("async_plan", response, gold) in (0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9999), st.sampled_from(["s", "min", "hours", "d", "weeks"])), min_size=1, max_size=5
    )
)
def test_parts_add_up(parts: list[tuple[int, str]]) -> None:
    seconds = {"s": 1, "min": MIN, "hours": HOUR, "d": DAY, "weeks": 7 * DAY}
    total = sum(n * seconds[unit] for n, unit in parts)
    texts = [f"{n} {unit}" for n, unit in parts]
    assert parse_duration(" + ".join(texts)) == (total, total)
    sizes = [seconds[unit] for _, unit in parts]
    largest_first = all(later < earlier for earlier, later in itertools.pairwise(sizes))
    for joint in (" ", ", ", " and "):
        assert parse_duration(joint.join(texts)) == ((total, total) if largest_first else None)


_SECONDS = {"s": 1, "sec": 1, "min": MIN, "mins": MIN, "h": HOUR, "hour": HOUR, "hours": HOUR, "d": DAY}
_SECONDS |= {"day": DAY, "days": DAY, "secs": 1}
_TOKENS = re.compile(r"([0-9]+(?:\.[0-9]+)?)[ -]*([a-z]+)(?![a-z])\.?|[a-z]+(?![0-9])|[.-](?! ?[0-9])|(\S)")


def _plain_sum(text: str) -> Fraction | None:
    """Seconds of a text such as "1 hour 20.5 min", by another way than the judge's; None for any other text."""
    total, last = Fraction(0), 10 * DAY
    for number, unit, rest in _TOKENS.findall(text):
        if not number and not rest:  # a word, a dash or a full stop beside numbers and units
            continue
        if rest or unit not in _SECONDS or _SECONDS[unit] >= last:
            return None
        last = _SECONDS[unit]
        total += Fraction(number) * last
    return total


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=3), st.data())
def test_no_moved_character_leaves_a_duration_right_that_is_wrong(numbers: list[int], data: st.DataObject) -> None:
    text = " ".join(f"{n} {unit}" for n, unit in zip(numbers, data.draw(st.sampled_from(_ORDERS)), strict=False))
    gold = _plain_sum(text)
    assert gold is not None
    assert judge("async_plan", _answer(text), f"{gold} s") == 1.0
    characters = list(text)
    taken = characters.pop(data.draw(st.integers(0, len(characters) - 1)))
    put = data.draw(st.sampled_from([taken, taken, " ", "-", ".", "1", "0", "h", ""]))
    characters.insert(data.draw(st.integers(0, len(characters))), put)
    moved = "".join(characters)
    if _plain_sum(moved) != gold:
        assert judge("async_plan", _answer(moved), f"{gold} s") == 0.0, moved


_ORDERS = [("hours", "min", "s"), ("days", "h", "min"), ("min", "sec"), ("hour", "mins", "sec"), ("min",), ("s",)]


# Mathematics and physics.

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
    assert pool.judge("math", _answer(text), gold) == reward


@needs_math
@pytest.mark.parametrize(("text", "gold", "reward"), PHYSICS)
def test_physics(pool: RewardPool, text: str, gold: str, reward: float) -> None:
    assert pool.judge("physics", _answer(text), gold) == reward


@needs_math
def test_none_of_those_was_cut_off(pool: RewardPool) -> None:
    assert (pool.num_timeouts, pool.num_crashes, pool.num_errors) == (0, 0, 0)


@needs_math
@pytest.mark.parametrize(("family", "gold"), [("math", ""), ("physics", ""), ("physics", "green ideas sleep")])
def test_an_unreadable_accepted_answer_raises_from_a_worker_too(pool: RewardPool, family: str, gold: str) -> None:
    with pytest.raises(ValueError, match="accepted answer"):
        pool.judge(family, _answer("5"), gold)


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
        assert pool.judge("math", _answer(attack), "5") == 0.0
        assert pool.judge("physics", _answer(attack), "5 m") == 0.0
    assert not canary.exists()
    assert (pool.num_timeouts, pool.num_crashes) == (0, 0)


@dataclass(frozen=True)
class Asked:
    payload: object


def _task(family: str, answer: str) -> Task:
    return Task(family=family, representation="natural", question="?", answer=answer, key="0")


# Is 5, and SymPy would multiply it out for longer than anybody waits to prove it.
HANG = _answer("5 + (2a+2b+2c+2d+2f)^{100} - 2^{100}(a+b+c+d+f)^{100}")


@needs_math
def test_a_hang_ends_at_its_deadline_and_is_counted() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool(max_workers=2, deadline_s=2.0) as pool:
        pool.judge("math", _answer("5"), "5")  # starts the workers
        prompts = [Asked(_task("math", "5")), Asked(_task("async_plan", "20 min")), Asked(_task("math", "5"))]
        start = time.perf_counter()
        rewards = pool(prompts, [HANG, _answer("20 min"), _answer("5")])
        assert rewards == [0.0, 1.0, 1.0]
        assert time.perf_counter() - start < 30  # two seconds, and a new worker on a loaded machine
        assert pool.num_timeouts == 1
        assert pool.judge("math", _answer("5"), "5") == 1.0  # goes on with a new worker
    assert set(multiprocessing.active_children()) <= others


@needs_math
def test_mathematics_is_judged_while_further_responses_are_drawn() -> None:
    is_judged = threading.Event()
    texts = {4: _answer("4"), 5: HANG, 6: _answer("5")}
    prompts = [
        Prompt(prompt_id=i, token_ids=(1,), task="math", representation="natural", payload=_task("math", "5"))
        for i in range(2)
    ]

    def drawn(prompt_id: int, token: int) -> Rollout:
        return Rollout(
            prompt_id=prompt_id,
            sample=0,
            token_ids=torch.tensor([token]),
            sampler_logprob=None,
            finish="stop",
            policy_version=0,
        )

    with RewardPool(max_workers=1, deadline_s=2.0) as pool:

        def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
            rewards = pool(prompts, texts)
            is_judged.set()
            return rewards

        with RewardThread(judge, lambda token_ids: texts[token_ids[0]], prompts) as rewarding:
            rewarding.add(1, [drawn(1, 4), drawn(1, 6)])
            assert is_judged.wait(60)  # by workers that the judge's thread has started
            rewarding.add(0, [drawn(0, 6), drawn(0, 5)])
            assert rewarding.results()[1].rewards == (1.0, 0.0, 0.0, 1.0)
        assert pool.num_timeouts == 1


@needs_math
def test_a_worker_that_dies_costs_its_response_alone() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool(max_workers=1, deadline_s=60.0) as pool:
        pool.judge("math", _answer("5"), "5")
        (worker,) = set(multiprocessing.active_children()) - others
        assert worker.pid is not None
        killer = threading.Timer(1.0, os.kill, (worker.pid, signal.SIGKILL))
        killer.start()
        assert pool.judge("math", HANG, "5") == 0.0
        killer.join()
        assert (pool.num_crashes, pool.num_timeouts) == (1, 0)
        assert pool.judge("math", _answer("5"), "5") == 1.0


@needs_math
def test_workers_import_neither_torch_nor_an_unguarded_main_module(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, pathlib, sys\n"
        "sys.modules['torch'] = None  # importing torch would raise, here and in whatever runs this script\n"
        "print('main', flush=True)\n"
        "from isomorph.curriculum.judge import judge\n"
        "print(judge('math', '<answer>1/2</answer>', '0.5'))\n"
        "workers = multiprocessing.active_children()\n"
        "print(['libtorch' in pathlib.Path(f'/proc/{w.pid}/maps').read_text() for w in workers])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["main", "1.0", "[False]", ""], done.stderr
    assert done.returncode == 0


@needs_math
def test_workers_may_not_allocate_without_bound(pool: RewardPool) -> None:
    pool.judge("math", _answer("5"), "5")
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        limits = Path(f"/proc/{worker.pid}/limits").read_text().splitlines()
        (line,) = (line for line in limits if line.startswith("Max address space"))
        assert line.split()[3] == str(pool_module.MAX_WORKER_BYTES)


@needs_math
def test_a_hanging_worker_does_not_outlive_a_killed_trainer(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, signal, threading\n"
        "from isomorph.curriculum.rewards.pool import RewardPool\n"
        "pool = RewardPool(max_workers=1, deadline_s=2.0)\n"
        "pool.judge('math', '<answer>5</answer>', '5')\n"
        "print(*(w.pid for w in multiprocessing.active_children()), flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        f"pool.judge('math', {HANG!r}, '5')\n"
    )
    printed = tmp_path / "printed"
    with printed.open("w") as file:  # not a pipe: the worker holds its other end, too
        done = subprocess.run([sys.executable, str(script)], stdout=file, stderr=file, timeout=120)
    assert done.returncode == -signal.SIGKILL
    stat = Path(f"/proc/{int(printed.read_text().split()[0])}/stat")
    assert _is_running(stat)
    waited = time.monotonic() + 30
    while _is_running(stat) and time.monotonic() < waited:
        time.sleep(0.2)
    assert not _is_running(stat)


def _is_running(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_plans_need_no_worker() -> None:
    others = set(multiprocessing.active_children())
    with RewardPool() as pool:
        asked = [Asked(_task("async_plan", "20 min")), Asked(_task("async_plan", "7.0"))]
        assert pool(asked, [_answer("20 minutes"), _answer("8")]) == [1.0, 0.0]
        assert set(multiprocessing.active_children()) <= others


def test_callers_mistakes_raise() -> None:
    with RewardPool() as pool:
        with pytest.raises(TypeError, match="Task"):
            pool([Asked("text")], ["x"])
        with pytest.raises(ValueError, match="zip"):
            pool([Asked(_task("async_plan", "20 min"))], [])
        with pytest.raises(ValueError, match="family"):
            pool([Asked(_task("chess", "e4"))], ["x"])
        with pytest.raises(ValueError, match="accepted answer"):
            pool([Asked(_task("async_plan", "soon"))], ["x"])
    with pytest.raises(ValueError, match="deadline_s"):
        RewardPool(deadline_s=0)
    with pytest.raises(ValueError, match="max_workers"):
        RewardPool(max_workers=0)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with RewardPool() as pool, pytest.raises(ImportError, match=r"isomorph\[math\]"):
        pool.judge("math", _answer("5"), "5")
