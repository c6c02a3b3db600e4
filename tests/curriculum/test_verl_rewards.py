"""verl 0.9.1's own reward for GSM8K (verl.utils.reward_score.gsm8k) beside our built-in ``numeric`` and ``math``.

Its values in CASES were printed by it; where verl is installed they are compared with what it gives now.
"""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from isomorph.curriculum.rewards import Answer
from isomorph.curriculum.rewards.builtin import math_verify, numeric

# response, gold; verl strict, verl flexible, numeric, math
CASES = [
    ("#### 72", "72", 1, 1, 1, 1),
    ("#### 71\nno, #### 72", "72", 1, 1, 1, 1),
    ("#### 72\nno, #### 71", "72", 0, 0, 0, 0),
    ("#### -5", "-5", 1, 1, 1, 1),
    ("#### 5", "-5", 0, 0, 0, 0),
    ("#### 72 apples", "72", 1, 1, 1, 1),
    ("#### 72%", "72", 1, 1, 1, 1),
    ("#### seventy-two", "72", 0, 0, 0, 0),
    ("", "72", 0, 0, 0, 0),
    # equal numbers, written otherwise: verl compares texts
    ("#### 1,072", "1072", 1, 0, 1, 1),
    ("so 72\n#### 72.", "72", 0, 0, 1, 1),
    ("#### 72.0", "72", 0, 0, 1, 1),
    ("#### 007", "7", 0, 0, 1, 1),
    ("#### 7.50", "7.5", 0, 0, 1, 1),
    ("#### 1/2", "0.5", 0, 0, 1, 1),
    ("#### 1.072e3", "1072", 0, 0, 1, 0),
    # the mark: verl's strict wants "#### " and the number right behind it
    ("####72", "72", 0, 1, 1, 0),
    ("#### $72", "72", 0, 1, 1, 1),
    ("#### **72**", "72", 0, 1, 1, 1),
    ("#### 72" + " x" * 200, "72", 0, 0, 1, 1),  # verl reads the last 300 characters
    ("The answer is 72", "72", 0, 1, 1, 1),
    ("<answer>72</answer>", "72", 0, 1, 1, 1),
    (r"\boxed{72}", "72", 0, 1, 1, 1),
    # several numbers: ours reads the last one of the stated answer
    ("#### 72 of 100", "72", 1, 0, 0, 0),
    ("#### 72 <answer>71</answer>", "72", 1, 0, 0, 0),
]


def verls() -> Any:
    """verl's module, by its file: its package imports ray and more, this module nothing. Skips without verl."""
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1")
    file = Path(found.submodule_search_locations[0]) / "utils" / "reward_score" / "gsm8k.py"
    spec = importlib.util.spec_from_file_location("gsm8k_of_verl", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(text: str, gold: str) -> tuple[float | None, float | None]:
    answer = Answer(prompt="", text=text, gold=gold)
    return numeric(answer), math_verify(answer)


def test_ours_beside_the_values_that_verl_printed() -> None:
    pytest.importorskip("math_verify")
    assert [(text, *ours(text, gold)) for text, gold, *_ in CASES] == [(text, *own) for text, _, _, _, *own in CASES]


def test_verl_still_prints_these_values() -> None:
    score = verls().compute_score
    for text, gold, strict, flexible, *_ in CASES:
        assert (score(text, gold), score(text, gold, method="flexible")) == (strict, flexible), text


def test_answers_in_gsm8ks_form_are_worth_the_same_to_verl_and_to_us() -> None:
    """Generated: some lines of work, and "#### " with a right or wrong number, with commas or without."""
    pytest.importorskip("math_verify")
    score, rng = verls().compute_score, random.Random(0)
    agreed = {1.0: 0, 0.0: 0}
    for _ in range(500):
        gold = rng.choice((1, -1)) * rng.randrange(10 ** rng.randrange(1, 7))
        said = gold if rng.random() < 0.5 else gold + rng.choice((-1, 1, 10, 100))
        sums = [(rng.randrange(99), rng.randrange(99)) for _ in range(rng.randrange(4))]
        work = "".join(f"{a} + {b} = {a + b}\n" for a, b in sums)
        text = f"{work}#### {said:,}" if rng.random() < 0.5 else f"{work}#### {said}"
        wanted = float(score(text, str(gold)))
        assert ours(text, f"work = {gold}\n#### {gold}") == (wanted, wanted), text
        agreed[wanted] += 1
    assert min(agreed.values()) > 200
