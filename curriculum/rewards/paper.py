"""The reward of arXiv 2602.03542, with all its quirks, for comparisons with the paper's figures.

Implemented from the behaviour of the authors' functions for AsyncHow and mathematics (repository
fangru-lin/procedure_generalization_llm at f7adbe5). For new work use the strict reward: this one accepts wrong answers
("-80 min" for 80 min, "5 hippos" for 5 hours) and refuses right ones ("1 hr 20 min", "80min", "4800 s").

The reward of one response and one accepted answer is equal to theirs. Their training call also cuts *all* texts at the
length of its *first* prompt; that is part of the call, not of the function, and is not done here.

There is no such reward for physics: theirs evaluates the response as Python code, depends on the installed version of a
LaTeX parser, and its tolerance of 100 % accepts every number of the right sign.
"""

import re
from datetime import timedelta

from isomorph.curriculum.rewards.duration import NUMBER_WORDS, SCALES, Interval

MAX_CHARS = 50_000  # of an answer; longer ones are wrong. The longest response of the paper has 6,000 tokens

_OPEN, _CLOSE = "<answer>", "</answer>"


def paper_answer(response: str) -> str:
    """The last ``<answer>...</answer>`` in lower case, "" without one: tags are paired from the left."""
    inside, end = "", 0
    while (start := response.find(_OPEN, end)) >= 0 and (stop := response.find(_CLOSE, start)) >= 0:
        inside, end = response[start + len(_OPEN) : stop], stop + len(_CLOSE)
    return inside.strip().lower()


def same_plan(response: str, gold: str, interval: Interval | None) -> bool:
    """Whether a response to a planning question is right. ``interval``: of an accepted answer of two timedeltas."""
    stated = paper_answer(response)
    if not stated or len(stated) > MAX_CHARS:
        return False
    if interval is None:
        return _same_text_or_float(stated, gold.replace(_OPEN, "").replace(_CLOSE, "").strip())
    accepted = [timedelta(microseconds=round(end * 1_000_000)) for end in interval]
    totals = _total(_stated_part(_without_half(stated)))
    return totals is not None and any(accepted[0] <= total <= accepted[1] for total in totals)


def _same_text_or_float(stated: str, gold: str) -> bool:
    if stated == gold:
        return True
    try:
        return float(gold) == float(stated)
    except ValueError:
        return False


# numbers in words count only in answers that contain "... and a half", and there everywhere
_COUNTS = {word: number for word, number in NUMBER_WORDS.items() if number} | {"a": 1, "an": 1}
_AND_A_HALF = re.compile(r"\b(\w+) and a half")
_NAME = re.compile(r"\b[a-zA-Z]+(?:-[a-zA-Z]+)*-?\b")


def _without_half(text: str) -> str:
    """``2 hours and a half`` -> ``2.5 hour``; texts without such a half as they are.

    ``two and a half hours`` becomes ``2 1nd a half hours``: the first "a" to be found is that of "and".
    """
    found = _AND_A_HALF.search(text)
    if found is None:
        return text
    if found[1] not in _COUNTS and found[1] not in SCALES and found[1] != "half":  # a unit: the half goes before it
        text = text.replace(found[0], f"and half {found[1]}")
    text = text.replace("half a ", "0.5")
    for name in _NAME.findall(text):
        if number := _number_of(name):
            text = text.replace(name, str(number), 1)  # its first occurrence, were it inside another word
    return text.replace(" and half", ".5")


def _number_of(name: str) -> int:
    """``forty-five`` is 45; 0 for what is no number, and for a scale without a number before it."""
    if name in SCALES:
        return 0
    return sum(_COUNTS.get(part, 0) + SCALES.get(part, 0) for part in name.split("-"))


def _stated_part(text: str) -> str:
    text = text.rpartition("=")[2]
    text = text.split(" or ")[-1]  # not rpartition: in "x or or y" the left one is taken
    return text.partition("(")[0]


_DIGITS = re.compile(r"\b\d+(,\d{3})*(\.\d+)?")
# A unit is recognised by how it begins: "mo" is m, a month; "hippos" is h, an hour; "hr" and "s" are no units.
_UNIT = re.compile(r"(\s*)(min|hr|hour|sec|week|day|month|year|s|h|m|d|w)")
_ARGUMENT = {
    "hour": "hours",
    "h": "hours",
    "min": "minutes",
    "sec": "seconds",
    "day": "days",
    "d": "days",
    "week": "weeks",
    "w": "weeks",
}
_DAYS = {"year": (365, 366), "month": (28, 31), "m": (28, 31)}


def _total(text: str) -> tuple[timedelta, timedelta] | None:
    """The sum of all ``number unit`` in the text, lowest and highest; None where one of them cannot be read."""
    if " to " in text:
        return None
    low = high = timedelta()
    position = 0
    while digits := _DIGITS.search(text, position):
        unit = _UNIT.match(text, digits.end())
        if unit is None:  # continue within the number: "1.5,000 min" is 5,000 min, "1,0000 min" is 0000 min
            position = digits.start(2) if digits[2] else digits.start(1) + 1 if digits[1] else digits.end()
            continue
        position = unit.end()
        span = _span(digits.group(), unit)
        if span is None:
            return None
        try:
            low, high = low + span[0], high + span[1]
        except OverflowError:
            return None
    return low, high


def _span(digits: str, unit: re.Match[str]) -> tuple[timedelta, timedelta] | None:
    space, name = unit.groups()
    if not space or name in ("hr", "s"):  # "80min" has no space before the unit
        return None
    number = float(digits.replace(",", ""))
    try:
        if name in _DAYS:
            low, high = _DAYS[name]
            return timedelta(days=number * low), timedelta(days=number * high)
        delta = timedelta(**{_ARGUMENT[name]: number})
    except OverflowError:  # beyond what a timedelta holds
        return None
    return delta, delta


def same_mathematics(response: str, gold: str) -> bool:
    """Whether a response in mathematics is right: its answer, in lower case, has the accepted one's normal form."""
    stated = paper_answer(response)
    if len(stated) > MAX_CHARS:
        return False
    first, last = stated.find("$"), stated.rfind("$")
    if first != last:
        stated = stated[first + 1 : last]
    try:
        return _normal_form(stated) == _normal_form(gold)
    except (ValueError, IndexError):  # one of them has no normal form
        return stated == gold


_DELETED = ("\n", r"\!")
_REPLACED = ((r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_DECORATION = (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")


def _normal_form(text: str) -> str:
    """A formula without spaces, units and other marks.

    Raises:
        ValueError or IndexError: it has none; the texts are then compared as they are.
    """
    for mark in _DELETED:
        text = text.replace(mark, "")
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for mark in _DECORATION:
        text = text.replace(mark, "")
    formula, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    text = formula.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # x = 5
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _fraction_of_slash(r"\frac{1}{2}" if text == "0.5" else text)


def _braced_roots(text: str) -> str:
    before, *rest = text.split(r"\sqrt")
    return before + "".join(rf"\sqrt{r}" if r[0] == "{" else rf"\sqrt{{{r[0]}}}{r[1:]}" for r in rest)


def _braced_fractions(text: str) -> str:
    before, *rest = text.split(r"\frac")
    if any(r[0] != "{" and len(r) < 2 for r in rest):
        return text
    return before + "".join(rf"\frac{_braced_pair(r)}" for r in rest)


def _braced_pair(text: str) -> str:
    if text[0] == "{":
        return text
    below = text[1:] if text[1] == "{" else f"{{{text[1]}}}{text[2:]}"
    return f"{{{text[0]}}}{below}"


def _fraction_of_slash(text: str) -> str:
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
