"""What the tests of the rewards share: answers, and accepted intervals as the paper's files write them."""

import importlib.util

import pytest

HAVE_MATH = all(importlib.util.find_spec(name) for name in ("sympy", "pint"))
needs_math = pytest.mark.skipif(not HAVE_MATH, reason="needs the extra [math]")
MIN = 60
HOUR = 3600
DAY = 86_400


def interval(low_s: int, high_s: int | None = None) -> str:
    ends = (low_s, low_s if high_s is None else high_s)
    return f"[{', '.join(f'datetime.timedelta(days={s // DAY}, seconds={s % DAY})' for s in ends)}]"


def answer(text: str) -> str:
    return f"so it is <answer>{text}</answer>"
