"""Scores answers to planning tasks: a duration, an interval of durations, or a bare number."""

import functools
from fractions import Fraction

from isomorph.curriculum.rewards import paper
from isomorph.curriculum.rewards.duration import (
    Duration,
    Interval,
    number_of,
    parse_calendar,
    parse_timedeltas,
    same_duration,
)


def same_plan(stated: str, accepted: str) -> bool:
    """Whether ``stated`` is the accepted duration or number. Bounded time.

    Raises:
        ValueError: ``accepted`` cannot be read.
    """
    gold = accepted_plan(accepted)
    return number_of(stated) == gold if isinstance(gold, Fraction) else same_duration(stated, gold)


def same_plan_by_paper(response: str, accepted: str) -> bool:
    """The same by the reward of arXiv 2602.03542, with its quirks.

    Raises:
        ValueError: ``accepted`` cannot be read.
    """
    text = accepted.strip()
    accepted_plan(text)
    return paper.same_plan(response, text, parse_timedeltas(text) if "timedelta" in text else None)


@functools.lru_cache(maxsize=65_536)
def accepted_plan(text: str) -> Interval | Duration | Fraction:
    """An accepted answer: an interval of seconds, a duration, or a bare number.

    Raises:
        ValueError: ``text`` is none of these.
    """
    if "timedelta" in text:
        return parse_timedeltas(text)
    number = number_of(text)
    if number is not None:
        return number
    duration = parse_calendar(text)
    if duration is None:
        raise ValueError(
            f"an accepted answer must be a finite number, a duration such as '20 min', or "
            f"'[datetime.timedelta(...), datetime.timedelta(...)]', got {text[:200]!r}"
        )
    return duration
