"""What a reward function should not do."""

import asyncio
import contextlib
import os
import random
import sys
import time


def text(answer):
    return "good"


def nan(answer):
    return float("nan")


def raises(answer):
    if answer.text.endswith("7"):
        raise ValueError("no sevens")
    return 1.0


def too_few(completions, **kwargs):
    return [1.0]


def hangs(answer):
    while answer.text.endswith("3"):
        time.sleep(1)
    return 1.0


def hangs_and_catches_all(answer):
    while answer.text.endswith("3"):
        with contextlib.suppress(BaseException):
            time.sleep(1)
    return 1.0


async def waits(answer):
    await asyncio.sleep(60 if answer.text.endswith("3") else 0)
    return 1.0


def exits(answer):
    if answer.text.endswith("5"):
        os._exit(3)
    return 1.0


def leaves(answer):
    sys.exit("I have had enough")


def forks(answer):
    if os.fork() == 0:
        return 5.0
    return 1.0


def prints(answer):
    print("x" * (1 << 20))
    return 1.0


def draws(answer):
    return random.random()


def fits_nothing(left, right):
    return 0.0


def needs_a_column(completions, solution):
    return [0.0 for _ in completions]


SEVEN = 7
