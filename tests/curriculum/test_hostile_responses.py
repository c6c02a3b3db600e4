"""Ten thousand responses that nobody should write: each is worth 0 or 1, none raises, hangs or takes a worker down."""

import random
from dataclasses import dataclass

import pytest

from isomorph.curriculum.rewards.pool import RewardPool, answer_found
from isomorph.curriculum.tasks.task import Task

NUM_RESPONSES = 10_000
FRAGMENTS = [
    *("1", "20", "1,000", ".5", "1/2", "min", "hour", "and a half", " or ", " to ", "=", "(", ")", "{", "}", "[", "]"),
    *(r"\frac", r"\sqrt", "^", "^{", "_", r"\text{", r"\left(", r"\begin{pmatrix}", "&", "\\\\", r"\cup", r"\pm"),
    *("9" * 300, "1e400", "e999", "\0", "\ud800", "\u202e", "٣", "\uff11", "½", "∞", "x", "i", "pi", "sin ", "log_"),
    *("!", "!!!!", "**", "**9**9**9", "$", r"\$", "%", "#0", "__import__('os')", "<answer>", "</answer>", r"\boxed{"),
    *("nan", "inf", "None", "m", "kg*m/s^2", r"\mu", "°", "µ", "5 m", "-", "--", "+", "/0", "||", "Matrix([[", "Eq("),
    *("Interval(", "; ", ", ", "\n", " " * 50, "a" * 200, "(a+b+c+d+f)^{100}", r"\sum_{k=1}^{10^9}", r"\int", "{" * 60),
    *("2^{2^{2^{2^{2}}}}", "10^{9999}", "(x+y)^{99}", "(" * 60, "0.0019 months"),
]
GOLDS = {
    "async_plan": ["80 min", "[datetime.timedelta(days=28), datetime.timedelta(days=31)]", "5.0"],
    "math": [r"\frac{1}{2}", "(1,2)", "x=1", "Matrix([[1],[2]])", "5"],
    "physics": ["5 m", r"-45 $\mu \mathrm{C}$", "2*pi*R", "5"],
}
KINDS = [
    ("async_plan", "strict"),
    ("async_plan", "paper"),
    ("math", "strict"),
    ("math", "paper"),
    ("physics", "strict"),
]


@dataclass(frozen=True)
class Asked:
    payload: Task


def _response(rng: random.Random) -> str:
    text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 14)))
    text = (text * rng.choice([1, 1, 1, 1, 3, 50, 2000]))[:1_000_000]
    return rng.choice([f"<answer>{text}</answer>", f"<answer>{text}</answer>", rf"\boxed{{{text}}}", text])


def _asked(rng: random.Random) -> Asked:
    family, reward = rng.choice(KINDS)
    gold = rng.choice(GOLDS[family])
    return Asked(Task(family=family, representation="r", question="?", answer=gold, key="0", reward=reward))


@pytest.mark.slow
def test_hostile_responses_are_worth_something_and_nothing_else() -> None:
    pytest.importorskip("pint")
    rng = random.Random(0)
    with RewardPool(max_workers=1, deadline_s=30.0) as pool:
        for _ in range(0, NUM_RESPONSES, 500):
            asked, texts = [_asked(rng) for _ in range(500)], [_response(rng) for _ in range(500)]
            found = [answer_found(one.payload.family, text) for one, text in zip(asked, texts, strict=True)]
            rewards = pool(asked, texts)
            assert set(rewards) <= {0.0, 1.0}
            judged = zip(asked, found, rewards, strict=True)
            assert not any(reward and not seen for one, seen, reward in judged if one.payload.reward == "strict")
        assert (pool.num_timeouts, pool.num_crashes) == (0, 0)
