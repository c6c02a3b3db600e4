"""Durations as people and models write them, as intervals of seconds.

A month has 28 to 31 days and a year 365 or 366, so a duration is an interval; most are a single point.
"""

import functools
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

_DAY = 86_400
UNIT_SECONDS: dict[str, tuple[int, int]] = {
    "second": (1, 1),
    "minute": (60, 60),
    "hour": (3_600, 3_600),
    "day": (_DAY, _DAY),
    "week": (7 * _DAY, 7 * _DAY),
    "month": (28 * _DAY, 31 * _DAY),
    "year": (365 * _DAY, 366 * _DAY),
}
# A lone m means months: so counts the reward of the paper that the numbers are compared with.
_SPELLINGS = {
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "d day days",
    "week": "w wk wks week weeks",
    "month": "m mo mos month months",
    "year": "y yr yrs year years",
}
UNIT_OF_WORD = {word: unit for unit, words in _SPELLINGS.items() for word in words.split()}

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: n for n, word in enumerate(_ONES.split())}
NUMBER_WORDS |= {word: 20 + 10 * n for n, word in enumerate(_TENS.split())}
SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000}
_SHARES = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "quarters": Fraction(1, 4)}
_SIGNS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}

MAX_CHARS = 4_000
MAX_REMEMBERED_CHARS = 64
MAX_DIGITS = 24


class Interval(NamedTuple):
    """Seconds, both ends included."""

    low: Fraction
    high: Fraction

    def meets(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high


def parse_duration(text: str) -> Interval | None:
    """The duration that ``text`` states, or None where it states none, or a range, or anything ambiguous.

    Words around it are fine, parts add up, after "=" or " or " the last part counts, "(" ends it, " to " is a
    range. Never raises; bounded time: texts of more than MAX_CHARS are refused.
    """
    if len(text) > MAX_CHARS:
        return None
    return _remembered(text) if len(text) <= MAX_REMEMBERED_CHARS else _parse(text)


def _parse(text: str) -> Interval | None:
    try:
        numbers = _Numbers(_stated_part(text.lower()))
    except _Ambiguous:
        return None
    if any(pattern.search(numbers.text) for pattern in _REFUSED):
        return None
    parts = [_interval(numbers.values[int(k)], unit) for k, unit in _PART.findall(numbers.text)]
    zero = Fraction(0)
    return Interval(sum((p.low for p in parts), zero), sum((p.high for p in parts), zero)) if parts else None


# A policy repeats itself: 128 responses a step over a few hundred different short answers.
_remembered = functools.lru_cache(maxsize=16_384)(_parse)


_DELTA = re.compile(r"(?:datetime\.)?timedelta\(([a-z0-9=, -]{0,80})\)", re.ASCII)
_DELTAS = re.compile(rf"\[{_DELTA.pattern}, ?{_DELTA.pattern}\]", re.ASCII)
_FIELD_SECONDS = {
    "weeks": Fraction(7 * _DAY),
    "days": Fraction(_DAY),
    "hours": Fraction(3_600),
    "minutes": Fraction(60),
    "seconds": Fraction(1),
    "milliseconds": Fraction(1, 1_000),
    "microseconds": Fraction(1, 1_000_000),
}


def parse_timedeltas(text: str) -> Interval:
    """Lowest and highest accepted, from ``[datetime.timedelta(days=28), datetime.timedelta(days=31)]``.

    Raises:
        ValueError: the text is not of that form.
    """
    match = _DELTAS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"must be [datetime.timedelta(...), datetime.timedelta(...)], got {text[:200]!r}")
    low, high = (_delta_seconds(arguments) for arguments in match.groups())
    if not 0 <= low <= high:
        raise ValueError(f"must be an interval of durations, lowest first, got {text[:200]!r}")
    return Interval(low, high)


def _delta_seconds(arguments: str) -> Fraction:
    if arguments in ("", "0"):
        return Fraction(0)
    total = Fraction(0)
    for argument in arguments.split(","):
        name, _, value = argument.strip().partition("=")
        if name not in _FIELD_SECONDS or not re.fullmatch(r"-?\d{1,15}", value, re.ASCII):
            raise ValueError(f"must be a timedelta of whole {sorted(_FIELD_SECONDS)}, got {arguments[:80]!r}")
        total += int(value) * _FIELD_SECONDS[name]
    return total


_DECORATION = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)(?![a-z])|\\[,; !]|[#${}]|\*\*")


def _stated_part(text: str) -> str:
    for sign, fraction in _SIGNS.items():
        text = text.replace(sign, f" {fraction}")
    text = " ".join(_DECORATION.sub(" ", text).split())
    text = f" {text.rpartition('=')[2]} ".rpartition(" or ")[2]
    text = text.partition("(")[0]
    if " to " in f" {text} " or any(c.isdigit() and not c.isascii() for c in text):
        raise _Ambiguous
    return text.strip()


class _Ambiguous(Exception):
    """The text states no single duration."""


# Patterns over texts in which every number is #k, an index into the numbers' values, and spaces are single.
_UNIT_WORD = "(" + "|".join(sorted(UNIT_OF_WORD, key=len, reverse=True)) + ")"
_U = _UNIT_WORD + "(?![a-z])"
_SHARE = "(half|quarters?)"
_MANY = r"(?:(an?|#\d+) )"
_DASH = "[-–—−~]"

_PART = re.compile(rf"#(\d+)[ -]?{_U}")
_REFUSED = (
    re.compile(rf"#\d+ ?(?:{_DASH}|[:*x×/^+<>]) ?#"),  # 5-10 min, 1:20 hours, 2 x 40 min
    re.compile(rf"#\d+[ -]?{_U} ?{_DASH} ?#"),  # 5 min - 10 min
    re.compile(rf"#\d+ and #\d+[ -]?{_U}"),  # 5 and 10 min
    re.compile(rf"#\d+[ -]?{_U},? (?:and )?#\d+(?!\d|[ -]?{_U})"),  # 2 hours 30
    re.compile(r"(?<!\w)[-−]#"),  # -5 min
    re.compile(r"\bbetween\b|\\"),
)

_GLUED = re.compile(rf"(?<=\d){_UNIT_WORD}(?=\d)")  # 1h20min
_DIGITS = re.compile(r"(?:\d+ )?\d+/\d+|[\d.,]*\d", re.ASCII)
_DECIMAL = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", re.ASCII)


def _either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_BELOW_100 = rf"(?:{_either(_TENS.split())}(?:[ -]{_either(_ONES.split()[1:10])})?|{_either(_ONES.split())})"
_BELOW_1000 = rf"(?:(?:(?:an?|{_BELOW_100}) )?hundred(?:(?: and)? {_BELOW_100})?|{_BELOW_100})"
_LARGE = rf"(?:(?:an?|{_BELOW_1000}) )?(?:thousand|million)(?:(?: and)? {_BELOW_1000})?"
_SPELLED = re.compile(rf"(?<![a-z])(?:{_LARGE}|{_BELOW_1000})(?![a-z])")


class _Numbers:
    """A text with every number, in digits or words, replaced by #k, and the numbers' values."""

    def __init__(self, text: str) -> None:
        self.values: list[Fraction] = []
        text = _GLUED.sub(r"\1 ", text)
        text = _DIGITS.sub(self._from_digits, text)
        text = re.sub(r"#(\d+) (hundred|thousand|million)\b", self._scaled, text)
        text = _SPELLED.sub(self._from_words, text)
        text = re.sub(rf"#(\d+) and {_MANY}{_SHARE}(?= {_U})", self._mixed, text)  # two and a half hours
        text = re.sub(rf"{_MANY}?\b{_SHARE} (?:of )?(?:an? )?(?={_U})", self._share, text)  # half an hour
        text = re.sub(rf"(?<![a-z])an? (?={_U})", lambda m: f"{self._put(Fraction(1))} ", text)
        # an hour and a half
        self.text = re.sub(rf"#(\d+)([ -]?{_U}) and {_MANY}{_SHARE}", self._mixed_after_unit, text)

    def _put(self, value: Fraction) -> str:
        self.values.append(value)
        return f"#{len(self.values) - 1}"

    def _from_digits(self, match: re.Match[str]) -> str:
        digits = match.group()
        if match.string[match.start() - 1 : match.start()].isalpha():
            return ""  # part of a name, such as step3
        if len(digits) > MAX_DIGITS:
            raise _Ambiguous
        whole, _, fraction = digits.rpartition(" ")
        if "/" in fraction:
            above, below = map(int, fraction.split("/"))
            if below == 0:
                raise _Ambiguous
            return self._put(int(whole or 0) + Fraction(above, below))
        if not _DECIMAL.fullmatch(digits):
            raise _Ambiguous
        return self._put(Fraction(digits.replace(",", "")))

    def _from_words(self, match: re.Match[str]) -> str:
        total = current = 0
        for word in re.findall("[a-z]+", match.group()):
            if word in NUMBER_WORDS:
                current += NUMBER_WORDS[word]
            elif word == "hundred":
                current = 100 * max(current, 1)
            elif word in SCALES:
                total, current = total + SCALES[word] * max(current, 1), 0
        return self._put(Fraction(total + current))

    def _many(self, text: str | None) -> Fraction:
        return self.values[int(text[1:])] if text and text.startswith("#") else Fraction(1)

    def _scaled(self, match: re.Match[str]) -> str:
        return self._put(self.values[int(match[1])] * SCALES[match[2]])

    def _share(self, match: re.Match[str]) -> str:
        return f"{self._put(self._many(match[1]) * _SHARES[match[2]])} "

    def _mixed(self, match: re.Match[str]) -> str:
        return self._put(self.values[int(match[1])] + self._many(match[2]) * _SHARES[match[3]])

    def _mixed_after_unit(self, match: re.Match[str]) -> str:
        share = self._many(match[4]) * _SHARES[match[5]]
        return f"{self._put(self.values[int(match[1])] + share)}{match[2]}"


def _interval(value: Fraction, unit_word: str) -> Interval:
    low, high = UNIT_SECONDS[UNIT_OF_WORD[unit_word]]
    return Interval(value * low, value * high)
