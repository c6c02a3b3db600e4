"""Shares of a stage's mixture at each step: fixed, fading, or adaptive.

Fading over a stage of T steps, at step t = 0 .. T - 1 with u = t / (T - 1), for a part that goes from w to e:

    linear   w + (e - w) u
    cosine   e + (w - e) (1 + cos(pi u)) / 2

Adaptive: "words" are the parts of the representation ``target``, "symbols" all others. The learning progress of a
side, measured against its own noise, compares its groups' mean rewards in the last ``window`` steps with those in the
``window`` steps before (Welch's statistic; the two windows of Matiisen et al., arXiv 1707.00183, over their error):

    progress = (mean of the last - mean of the ones before) / sqrt(error of the last^2 + error of the ones before^2)

The stage leaves symbols, once and for all, when their progress has been below that of words after each of ``patience``
successive steps. From then on words get all prompts but a replay of symbols. Every ``window`` steps it is doubled
where symbols are being forgotten, up to ``most_replay``, else halved, down to ``least_share``:

    forgotten   (mean at the switch - mean of the last) / sqrt(error at the switch^2 + error of the last^2)
                > the normal quantile of ``confidence``; means over ``window`` steps

Of every part, each step asks at least ``least_share`` of its prompts, so that both sides stay measured.
"""

import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from isomorph.curriculum.exits import Moments, summed
from isomorph.curriculum.stage_spec import Adaptive, Ingredient, StageRecipe
from isomorph.engine.types import Group

SYMBOLS, WORDS = "symbols", "words"


def part_labels(mixture: Sequence[Ingredient]) -> tuple[str, ...]:
    """The representation of each part; with its data where two parts share one, and a number where those do, too."""
    found = [part.representation for part in mixture]
    full = [f"{part.data}:{part.representation}" for part in mixture]
    found = [full[i] if found.count(label) > 1 else label for i, label in enumerate(found)]
    return tuple(f"{label}:{i}" if found.count(label) > 1 else label for i, label in enumerate(found))


def weights_at(stage: StageRecipe, step: int) -> list[float]:
    """The weights of the mixture's parts after ``step`` completed steps of the stage, fixed or fading."""
    if stage.fade is None:
        return [part.weight for part in stage.mixture]
    done = min(1.0, step / (stage.steps - 1)) if stage.steps > 1 else 0.0
    if stage.fade == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return [p.weight if p.weight_end is None else p.weight + (p.weight_end - p.weight) * done for p in stage.mixture]


def progress(steps: Sequence[Moments], window: int) -> float:
    """Learning progress over its standard error, of the last 2 ``window`` steps; infinite where there is no noise.

    0 where nothing has changed at all; NaN where a window has fewer than two groups.
    """
    before, last = summed(steps[-2 * window : -window]), summed(steps[-window:])
    return difference(last, before)


def difference(one: Moments, other: Moments) -> float:
    """Welch's statistic: difference of the means over its standard error."""
    if one.num < 2 or other.num < 2:
        return math.nan
    gain, error = one.mean - other.mean, math.hypot(one.error, other.error)
    return gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0


class AdaptiveMixture:
    """The adaptive mixture of one stage: which parts a step asks, and when it leaves symbols."""

    def __init__(self, stage: StageRecipe, adaptive: Adaptive, seed: int) -> None:
        self.stage, self.adaptive, self.seed = stage, adaptive, seed
        self.sides = [WORDS if part.representation == adaptive.target else SYMBOLS for part in stage.mixture]
        self.steps: dict[str, list[Moments]] = {SYMBOLS: [], WORDS: []}  # of the last 2 * window steps
        self.num_steps = 0
        self.num_below = 0  # successive steps after which symbols' progress was below that of words
        self.left_after: int | None = None  # steps after which symbols were left
        self.reference = Moments()  # of symbols when they were left
        self.replay = adaptive.least_share
        self._limit = NormalDist().inv_cdf(adaptive.confidence)

    def counts(self) -> list[int]:
        """How many of the step's prompts are of each part."""
        total, least = self.stage.batch.prompts, self.adaptive.least_of(self.stage.batch.prompts)
        kept = WORDS if self.left_after is None else SYMBOLS  # the side that gets no more than it must
        parts = [i for i, side in enumerate(self.sides) if side == kept]
        wanted = least * len(parts)
        if self.left_after is not None:
            wanted = max(wanted, round(self.replay * total))
        others = [i for i in range(len(self.sides)) if i not in parts]
        wanted = min(wanted, total - least * len(others))
        found = [0] * len(self.sides)
        for own, num in ((parts, wanted), (others, total - wanted)):
            divided = _divided(num, [self.stage.mixture[i].weight for i in own], least)
            for i, count in zip(own, divided, strict=True):
                found[i] = count
        return found

    def order(self) -> list[int]:
        """The part of each of the step's prompts."""
        order = [i for i, count in enumerate(self.counts()) for _ in range(count)]
        random.Random(f"{self.seed}:{self.stage.name}:{self.num_steps}").shuffle(order)
        return order

    def observe(self, groups: Sequence[Group]) -> None:
        """Ends a step."""
        size = self.adaptive.window
        for side, steps in self.steps.items():
            own = [
                group for group in groups if (group.prompt.representation == self.adaptive.target) == (side == WORDS)
            ]
            known = [group.known_rewards for group in own]
            steps.append(Moments.of([math.fsum(rewards) / len(rewards) for rewards in known if rewards]))
            del steps[: -2 * size]
        self.num_steps += 1
        if self.left_after is None:
            self._leave_when_due()
        elif (self.num_steps - self.left_after) % size == 0:
            self._replay_what_is_needed()

    def values(self) -> dict[str, float | None]:
        """Progress of both sides after the last step, and how far symbols have been forgotten; for steps.jsonl."""
        found = {f"progress/{side}": progress(steps, self.adaptive.window) for side, steps in self.steps.items()}
        return {**found, "forgetting/symbols": self._forgetting()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": {side: [list(moments) for moments in steps] for side, steps in self.steps.items()},
            "num_steps": self.num_steps,
            "num_below": self.num_below,
            "left_after": self.left_after,
            "reference": list(self.reference),
            "replay": self.replay,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = {side: [Moments(*moments) for moments in steps] for side, steps in state["steps"].items()}
        self.reference = Moments(*state["reference"])
        for key in ("num_steps", "num_below", "left_after", "replay"):
            setattr(self, key, state[key])

    def _leave_when_due(self) -> None:
        size = self.adaptive.window
        if self.num_steps < 2 * size:
            return
        symbols, words = (progress(self.steps[side], size) for side in (SYMBOLS, WORDS))
        is_rewarded = summed(self.steps[SYMBOLS][-size:]).total > 0
        is_below = symbols < words or (symbols == words and is_rewarded)
        self.num_below = self.num_below + 1 if is_below else 0
        if self.num_steps >= self.adaptive.min_steps and self.num_below >= self.adaptive.patience:
            self.left_after = self.num_steps
            self.reference = summed(self.steps[SYMBOLS][-size:])

    def _forgetting(self) -> float:
        """NaN before the switch, and in the first ``window`` steps after it."""
        size = self.adaptive.window
        if self.left_after is None or self.num_steps < self.left_after + size:
            return math.nan
        return difference(self.reference, summed(self.steps[SYMBOLS][-size:]))

    def _replay_what_is_needed(self) -> None:
        least, most = self.adaptive.least_share, self.adaptive.most_replay
        is_forgotten = self._forgetting() > self._limit
        self.replay = min(most, 2 * self.replay) if is_forgotten else max(least, self.replay / 2)


def _divided(total: int, weights: Sequence[float], least: int) -> list[int]:
    """``total`` in proportion to ``weights``, each at least ``least``; the rest by largest remainder."""
    shares = [weight / math.fsum(weights) * (total - least * len(weights)) for weight in weights]
    found = [least + int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(shares[i]) - shares[i], i))
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found
