"""``judge``: one response's verifiable reward, 1.0 or 0.0. What the model wrote never makes it raise or hang."""

import atexit
import functools

from isomorph.curriculum.rewards.pool import RewardPool


def judge(family: str, response: str, answer: str | float, *, reward: str = "strict") -> float:
    """1.0 if the last ``<answer>...</answer>`` of ``response`` gives ``answer``, else 0.0.

    In mathematics a response without these tags is scored by its last ``\\boxed{...}``.

    family: "async_plan" (the answer is a duration, ``[datetime.timedelta(..), datetime.timedelta(..)]``, or a
    number), "math" (LaTeX, SymPy's notation or text) or "physics" (a value with a unit). Mathematics and physics
    run in one worker process that this module keeps, and kills after ``rewards.pool.DEADLINE_S`` seconds;
    ``RewardPool`` has several. No response makes it raise.

    reward: "strict" accepts what a careful reader would; "paper" is the reward of arXiv 2602.03542 with its quirks
    (``rewards/paper.py``), for figures that are to be compared with it: plans and mathematics only, no
    ``\\boxed{...}``.

    Raises:
        ValueError: an unknown family or reward, an accepted answer that cannot be read, "paper" in physics.
        ImportError: mathematics or physics without the extra [math]; "paper" needs no extra.
    """
    return _shared_pool().judge(family, response, answer, reward=reward)


@functools.cache
def _shared_pool() -> RewardPool:
    pool = RewardPool(max_workers=1)
    atexit.register(pool.close)
    return pool
