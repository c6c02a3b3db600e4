"""Durations as text: which are read, as how many seconds, and what states none or more than one."""

import itertools
import re
from fractions import Fraction

import pytest
from answers import DAY, HOUR, MIN, answer, interval
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.curriculum.judge import judge
from isomorph.curriculum.rewards.duration import UNIT_SECONDS, parse_duration, parse_timedeltas

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
    assert judge("async_plan", answer(text), interval(seconds)) == 1.0
    assert judge("async_plan", answer(text), interval(seconds + 1)) == 0.0
    assert judge("async_plan", answer(text), interval(max(0, seconds - 1), max(0, seconds - 1))) == 0.0


@pytest.mark.parametrize(("text", "why"), NOT_DURATIONS)
def test_what_states_no_single_duration_is_wrong(text: str, why: str) -> None:
    assert parse_duration(text) is None, why
    assert judge("async_plan", answer(text), interval(0, 10**9)) == 0.0


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
    assert judge("async_plan", answer(text), interval(low_day * DAY, high_day * DAY)) == reward


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
    assert judge("async_plan", answer(text), gold) == reward


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("[datetime.timedelta(days=28), datetime.timedelta(days=31)]", 28 * DAY, 31 * DAY),
        ("[datetime.timedelta(days=1, seconds=3600), datetime.timedelta(days=1, seconds=3600)]", 25 * HOUR, 25 * HOUR),
        ("[timedelta(hours=2), timedelta(minutes=120)]", 2 * HOUR, 2 * HOUR),
        ("[datetime.timedelta(0), datetime.timedelta(weeks=1)]", 0, 7 * DAY),
        ("  [datetime.timedelta(days=1), datetime.timedelta(days=1)] ", DAY, DAY),
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
        "timedelta",
    ],
)
def test_other_texts_are_not_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_timedeltas(text)


_WORDS = (
    "1 20 1,000 .5 1/2 half a an quarter quarters of and or to = ( - min hour hours m months one two hundred thousand"
)
_FRAGMENTS = st.sampled_from([*_WORDS.split(), " ", "", "\n", "#", "<answer>", "</answer>", "½", "\\text{", "٣", "-"])


@settings(max_examples=120, deadline=None)
@given(
    st.one_of(st.text(max_size=200), st.lists(_FRAGMENTS, max_size=30).map(" ".join), st.lists(_FRAGMENTS).map("".join))
)
def test_no_response_raises(text: str) -> None:
    for response in (text, answer(text)):
        for gold in (interval(HOUR), "20 min", 7.0):
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
    assert judge("async_plan", answer(text), f"{gold} s") == 1.0
    characters = list(text)
    taken = characters.pop(data.draw(st.integers(0, len(characters) - 1)))
    put = data.draw(st.sampled_from([taken, taken, " ", "-", ".", "1", "0", "h", ""]))
    characters.insert(data.draw(st.integers(0, len(characters))), put)
    moved = "".join(characters)
    if _plain_sum(moved) != gold:
        assert judge("async_plan", answer(moved), f"{gold} s") == 0.0, moved


_ORDERS = [("hours", "min", "s"), ("days", "h", "min"), ("min", "sec"), ("hour", "mins", "sec"), ("min",), ("s",)]
