"""Parses durations as people and models write them into intervals of seconds.

A month has 28 to 31 days and a year 365 or 366, so a duration is an interval, in most cases of length 0. Text that is
ambiguous (a range, a hedge, "about", two numbers in a row) is no duration.
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
# a lone m means months, as in the reward of arXiv 2602.03542
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

    def holds(self, other: "Interval") -> bool:
        return self.low <= other.low and other.high <= self.high


class Duration(NamedTuple):
    """A stated duration: seconds, plus months and years, whose lengths vary."""

    seconds: Fraction
    months: Fraction
    years: Fraction

    @property
    def interval(self) -> Interval:
        low, high = (self.seconds + self.months * _MONTH[end] + self.years * _YEAR[end] for end in (0, 1))
        return Interval(low, high)

    @property
    def narrowest(self) -> Interval:
        """``interval``, narrowed because twelve months are a year."""
        years, months = divmod(self.months + 12 * self.years, 12)
        by_years = Duration(self.seconds, months, Fraction(years)).interval
        return Interval(max(by_years.low, self.interval.low), min(by_years.high, self.interval.high))

    def is_same(self, other: "Duration") -> bool:
        return self.seconds == other.seconds and self.months + 12 * self.years == other.months + 12 * other.years


_MONTH, _YEAR = UNIT_SECONDS["month"], UNIT_SECONDS["year"]


def same_duration(stated: str, gold: Duration | Interval) -> bool:
    """Whether all lengths that ``stated`` may have are within ``gold``; a ``gold`` in seconds is a single length."""
    duration = parse_calendar(stated)
    if duration is None:
        return False
    if isinstance(gold, Interval):
        return gold.holds(duration.narrowest)
    return duration.is_same(gold) or gold.narrowest.holds(duration.narrowest)


def parse_duration(text: str) -> Interval | None:
    """``parse_calendar``'s duration as an interval of seconds."""
    duration = parse_calendar(text)
    return duration and duration.interval


def parse_calendar(text: str) -> Duration | None:
    """The duration that ``text`` states; None where it states none, a range, or anything ambiguous.

    Other words around it are ignored. Parts are added: the largest unit first, or with a plus between them. The sides
    of "=" and " or " must agree; text from "(" on is ignored; " to " is a range. Never raises; bounded time: texts of
    more than MAX_CHARS give None.
    """
    if len(text) > MAX_CHARS:
        return None
    return _remembered(text) if len(text) <= MAX_REMEMBERED_CHARS else _parse(text)


def _parse(text: str) -> Duration | None:
    *before, last = _plain(text.lower()).split("=")
    try:
        found = [_stated(part) for part in f" {last.partition('(')[0]} ".split(" or ")]
        found += [duration for side in before if (duration := _stated_alone(side))]
    except _Ambiguous:
        return None
    return found[0] if all(duration.is_same(found[0]) for duration in found) else None


def _stated_alone(side: str) -> Duration | None:
    """The duration of one side of an equality; None where it has other words, as it may then be about a part."""
    try:
        numbers = _Numbers(side.partition("(")[0].strip())
        return _sum(numbers) if _PARTS.fullmatch(numbers.text) else None
    except _Ambiguous:
        return None


def _stated(text: str) -> Duration:
    if " to " in text:
        raise _Ambiguous
    numbers = _Numbers(text.strip())
    if any(pattern.search(numbers.text) for pattern in _REFUSED):
        raise _Ambiguous
    return _sum(numbers)


def _sum(numbers: "_Numbers") -> Duration:
    parts = list(_PART.finditer(numbers.text))
    if not parts:
        raise _Ambiguous
    totals = dict.fromkeys(UNIT_SECONDS, Fraction(0))
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        unit = UNIT_OF_WORD[part[2]]
        totals[unit] += numbers.values[int(part[1])]
        if following is None or _PLUS.search(numbers.text, part.end(), following.start()):
            continue
        if UNIT_SECONDS[UNIT_OF_WORD[following[2]]] >= UNIT_SECONDS[unit]:  # "20 min, 60 min": a list
            raise _Ambiguous
    months, years = totals.pop("month"), totals.pop("year")
    seconds = sum((n * UNIT_SECONDS[unit][0] for unit, n in totals.items()), Fraction(0))
    return Duration(seconds, months, years)


# responses repeat: 128 a step state only a few hundred different short answers
_remembered = functools.lru_cache(maxsize=16_384)(_parse)


_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,400})?(?:\.\d{0,400})?(?:e[-+]?\d{1,2})?", re.ASCII)


def number_of(text: str) -> Fraction | None:
    """``text`` as an exact decimal number; None where it is anything else. Bold and dollar signs are ignored."""
    text = _plain(text.lower()) if len(text) <= MAX_CHARS else ""
    if not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in text.partition("e")[0]):
        return None
    return Fraction(text.replace(",", "").removesuffix("."))


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
    """The accepted interval of ``[datetime.timedelta(days=28), datetime.timedelta(days=31)]``, in seconds.

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


def _plain(text: str) -> str:
    for sign, fraction in _SIGNS.items():
        text = text.replace(sign, f" {fraction}")
    return " ".join(_DECORATION.sub(" ", text).split())


class _Ambiguous(Exception):
    """The text states no single duration."""


# patterns over texts in which each number is #k, an index into the numbers' values, and spaces are single
_UNIT_WORD = "(" + "|".join(sorted(UNIT_OF_WORD, key=len, reverse=True)) + ")"
_U = _UNIT_WORD + "(?![a-z_])"
_SHARE = "(half|quarters?)"
_MANY = r"(?:(an?|#\d+) )"
_DASH = "[-–—−~]"

_PART = re.compile(rf"#(\d+)[ -]?{_U}")
_PARTS = re.compile(rf"{_PART.pattern}(?:,? (?:and |plus |\+ )?{_PART.pattern})*")
_PLUS = re.compile(r"\+|\bplus\b")
_REFUSED = (
    re.compile(rf"#\d+ ?(?:{_DASH}|[:*x×/^+<>]) ?#"),  # 5-10 min, 1:20 hours, 2 x 40 min
    re.compile(rf"#\d+[ -]?{_U} ?{_DASH} ?#"),  # 5 min - 10 min
    re.compile(rf"#\d+(?: and|[,.;])? ?#\d+[ -]?{_U}"),  # 5 and 10 min, 5, 10 min, 3 4 min
    re.compile(rf"#\d+[ -]?{_U}(?: \+|,| plus)? ?(?:and )?#\d+(?!\d|[ -]?{_U})"),  # 2 hours 30
    re.compile(rf"#\d+[ -]?{_U} ?(?:[*x×/:^²³]|{_U})"),  # 20 min x 4, 20 min/step, 1 hour min
    re.compile(r"^[-−–—] ?#|(?<!\w)[-−]#"),  # -5 min
    re.compile(r"[~≈∼±<>≤≥] ?#|\b(?:under|over|above|below) #"),
    re.compile(
        r"\b(?:between|than|not|least|most|more|less|about|around|approx(?:imately)?|roughly|almost|nearly|circa|minus|"
        r"negative|without|per|each|every|times|twice|double|triple)\b|n't\b|\\"
    ),
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
    """``text``: the input with each number, in digits or words, replaced by #k. ``values``: the numbers."""

    def __init__(self, text: str) -> None:
        if any(c.isdigit() and not c.isascii() for c in text):
            raise _Ambiguous
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
            return "_"  # part of a name, such as step3
        if len(digits) > MAX_DIGITS:
            raise _Ambiguous
        whole, _, fraction = digits.rpartition(" ")
        if "/" in fraction:
            above, below = map(int, fraction.split("/"))
            if below == 0 or (whole and above >= below):  # 1/0, 1 11/2
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
