"""Does the adaptive mixture leave symbols when it should? Simulated learners, of which the truth is known.

    python studies/adaptive_switch.py [--runs 300]

A learner's pass rate in symbols and in words depends on how many prompts of either it has seen. Each step asks what
``AdaptiveMixture`` says, 16 prompts with 8 responses each; a prompt's own chance is spread as in stage_ends.py.
Printed: the share of runs that left symbols, at which step (median, 5th and 95th percentile), how often the shares
changed in a run (mean and most), and the mean share of symbols after the switch.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from isomorph.curriculum.mixing import AdaptiveMixture
from isomorph.curriculum.stage_spec import Adaptive, StageRecipe
from isomorph.engine.types import Group, Prompt, Rollout

PROMPTS, SAMPLES, STEPS = 16, 8, 200
SPREAD = 0.5  # correlation of two responses to one prompt

# steps' worth of symbols seen, of words seen, share of symbols in the last 20 steps -> pass rates in symbols, in words
Learner = Callable[[float, float, float], tuple[float, float]]


def _grown(seen: float, rate: float, low: float = 0.1, high: float = 0.8) -> float:
    return low + (high - low) * min(seen / rate, 1.0)


LEARNERS: dict[str, Learner] = {
    "symbols rise to step 50, words by their own practice": lambda s, w, r: (_grown(s, 45), _grown(w, 80)),
    "symbols rise to step 50 and carry into words": lambda s, w, r: (_grown(s, 45), _grown(w + 0.5 * s, 80)),
    "symbols teach nothing, words rise": lambda s, w, r: (0.3, _grown(w, 10)),
    "symbols rise throughout, words stay at 0": lambda s, w, r: (_grown(s, 170), 0.0),
    "both stay at 0": lambda s, w, r: (0.0, 0.0),
    "both flat": lambda s, w, r: (0.4, 0.4),
    "symbols are forgotten without practice": lambda s, w, r: (_grown(s, 45) * min(1.0, 0.4 + 2 * r), _grown(w, 80)),
}
_ONE = torch.tensor([0])


@dataclass
class Outcome:
    """One run: when symbols were left, how often the shares changed, the share of symbols at each step."""

    left_after: int | None
    changes: int
    shares: list[float]


def mixture(adaptive: Adaptive) -> AdaptiveMixture:
    parts = [{"data": "plans", "representation": form} for form in ("graph", "natural")]
    stage = {"name": "adaptive", "steps": STEPS, "batch": {"prompts": PROMPTS}, "mixture": parts}
    return AdaptiveMixture(StageRecipe.model_validate({**stage, "adaptive": adaptive.model_dump()}), adaptive, 0)


def group(form: str, rewards: tuple[float, ...]) -> Group:
    prompt = Prompt(prompt_id=0, token_ids=(1,), task="async_plan", representation=form, payload=None)
    rollout = Rollout(prompt_id=0, sample=0, token_ids=_ONE, sampler_logprob=None, finish="stop", policy_version=0)
    return Group(prompt=prompt, rollouts=(rollout,) * len(rewards), rewards=rewards, advantages=rewards)


def _answers(rng: np.random.Generator, rate: float) -> tuple[float, ...]:
    size = 1 / SPREAD - 1
    own = rng.beta(rate * size, (1 - rate) * size) if 0 < rate < 1 else rate
    return tuple((rng.random(SAMPLES) < own).astype(float).tolist())


def run(learner: Learner, seed: int, adaptive: Adaptive) -> Outcome:
    rng, mixed = np.random.default_rng(seed), mixture(adaptive)
    seen = {"graph": 0.0, "natural": 0.0}
    shares: list[float] = []
    for _ in range(STEPS):
        recent = float(np.mean(shares[-20:])) if shares else 1.0
        rates = dict(zip(seen, learner(seen["graph"], seen["natural"], recent), strict=True))
        asked = [("graph", "natural")[part] for part in mixed.order()]
        mixed.observe([group(form, _answers(rng, rates[form])) for form in asked])
        for form in asked:
            seen[form] += 1 / PROMPTS
        shares.append(asked.count("graph") / PROMPTS)
    changes = sum(a != b for a, b in zip(shares, shares[1:], strict=False))
    return Outcome(left_after=mixed.left_after, changes=changes, shares=shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--window", type=int, default=Adaptive().window, help="steps")
    args = parser.parse_args()
    for name, learner in LEARNERS.items():
        found = [run(learner, seed, Adaptive(window=args.window)) for seed in range(args.runs)]
        left = [one.left_after for one in found if one.left_after is not None]
        line = f"{name:54} {len(left) / len(found):6.1%} left"
        if left:
            low, middle, high = np.percentile(left, [5, 50, 95])
            after = np.mean(
                [np.mean(one.shares[one.left_after :]) for one in found if (one.left_after or STEPS) < STEPS]
            )
            line += f" at step {middle:.0f} ({low:.0f} to {high:.0f}), symbols after it {after:.1%}"
        changes = [one.changes for one in found]
        least = min(min(*one.shares, *(1 - share for share in one.shares)) for one in found)
        print(f"{line}; changes {np.mean(changes):.1f}, at most {max(changes)}; least share {least:.1%}", flush=True)


if __name__ == "__main__":
    main()
