"""Do a stage's early ends come when they should? Simulated rewards, of which the truth is known.

    python studies/stage_ends.py [--runs 1000]

Each step samples 8 responses to each of 16 prompts. A prompt's chance of a right response has a beta distribution
around the step's true pass rate, with ``SPREAD`` (0: all prompts are alike), so that responses to one prompt resemble
each other. Printed: the share of runs that the test ended, and at which step (median, 5th and 95th percentile).
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from isomorph.curriculum.exits import Moments, StepOutcome, has_levelled_off, has_mastered
from isomorph.curriculum.stage_spec import Mastery, Plateau

PROMPTS, SAMPLES, STEPS = 16, 8, 200
SPREAD = 0.5  # correlation of two responses to one prompt

Curve = Callable[[int], float]  # step, 0 to STEPS - 1 -> true pass rate

RISING: Curve = lambda step: 0.2 + 0.6 * step / STEPS  # noqa: E731
CURVES: dict[str, Curve] = {
    "rises 0.2 to 0.8": RISING,
    "flat at 0.5": lambda step: 0.5,
    "rises 0.2 to 0.8 by step 60, then flat": lambda step: 0.2 + 0.6 * min(step / 60, 1),
    "0 throughout": lambda step: 0.0,
    "0 to step 80, then rises to 0.6": lambda step: 0.6 * max(0, step - 80) / (STEPS - 80),
}


def step_outcome(rng: np.random.Generator, rate: float, spread: float = SPREAD) -> StepOutcome:
    """One step's groups, with pass rate ``rate``."""
    rates = np.full(PROMPTS, rate)
    if spread and 0 < rate < 1:
        size = 1 / spread - 1  # a + b of the beta distribution with this correlation
        rates = rng.beta(rate * size, (1 - rate) * size, PROMPTS)
    moments = Moments.of((rng.binomial(SAMPLES, rates) / SAMPLES).tolist())
    return StepOutcome(rewards=moments, passed=moments)


def end_of(curve: Curve, seed: int, end: Plateau | Mastery, spread: float = SPREAD) -> int | None:
    """The step after which ``end`` ends a run along ``curve``; None where it runs through."""
    rng = np.random.default_rng(seed)
    steps: list[StepOutcome] = []
    for step in range(STEPS):
        steps.append(step_outcome(rng, curve(step), spread))
        is_over = (
            has_levelled_off(steps, step + 1, end) if isinstance(end, Plateau) else has_mastered(steps, step + 1, end)
        )
        if is_over:
            return step + 1
    return None


def ends_of(curve: Curve, end: Plateau | Mastery, runs: int, spread: float = SPREAD) -> list[int | None]:
    """``end_of`` with ``runs`` seeds."""
    return [end_of(curve, seed, end, spread) for seed in range(runs)]


def said(ends: Sequence[int | None]) -> str:
    known = [end for end in ends if end is not None]
    share = f"{len(known) / len(ends):6.1%} ended"
    if not known:
        return share
    low, middle, high = np.percentile(known, [5, 50, 95])
    return f"{share}, at step {middle:.0f} ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    for spread in (0.0, SPREAD):
        print(f"correlation within a prompt {spread}")
        for name, curve in CURVES.items():
            print(f"  plateau              {name:40} {said(ends_of(curve, Plateau(), runs, spread))}")
        for rate in (0.7, 0.75, 0.8, 0.85, 0.9):
            ends = ends_of(lambda step, rate=rate: rate, Mastery(pass_rate=0.8), runs, spread)  # type: ignore[misc]
            print(f"  mastery at 0.8       {f'flat at {rate}':40} {said(ends)}")
        print(f"  mastery at 0.8       {'rises 0.2 to 1.0':40} ", end="")
        print(said(ends_of(lambda step: 0.2 + 0.8 * step / STEPS, Mastery(pass_rate=0.8), runs, spread)))


if __name__ == "__main__":
    main()
