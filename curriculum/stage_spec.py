"""Schema of ``[[stage]]``: its mixture and how that changes, rounds of its own answers, and its early ends."""

import math
from typing import Literal

from pydantic import Field, model_validator

from isomorph.engine.config import Section, Stage
from isomorph.engine.effect import KeyPath

LEAST_PLATEAU = 5  # steps: a slope with its standard error needs at least three, and a few more to be worth reading


class Ingredient(Section):
    """One part of a stage's mixture."""

    renamed = {"naive_rate": "sequential_rate"}

    data: str
    representation: str = "natural"
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    weight_end: float | None = Field(None, ge=0, allow_inf_nan=False)  # with stage.fade: at the last step; None: weight
    sequential_rate: float = Field(0.0, ge=0, le=1)  # share of demonstrations that give the sequential answer

    @model_validator(mode="after")
    def _is_ever_drawn(self) -> "Ingredient":
        if not self.weight and not self.weight_end:
            raise ValueError(
                "weight must be above 0, or grow to a weight_end above 0: else leave the part out, got "
                f"weight = {self.weight}"
            )
        return self


class Mastery(Section):
    """Ends a stage early once its pass rate lies above ``pass_rate``: a test over the last ``window`` steps.

    The pass rate is the share of sampled responses that are right. Its lower confidence bound (one-sided, Wilson's,
    with standard errors over groups) must be at least ``pass_rate``, after ``min_steps`` steps of the stage.
    """

    pass_rate: float = Field(gt=0, lt=1)
    window: int = Field(10, ge=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    min_steps: int = Field(10, ge=1)


class Plateau(Section):
    """Ends a stage early once its mean reward has stopped rising: a test on the slope over the last ``window`` steps.

    The upper confidence bound (one-sided, Student's t) of the gain per window, which is slope times ``window``, must
    be at most ``min_gain``, for each of the windows that end at the last ``patience`` steps, after ``min_steps``.
    Smaller windows find less: the bound lies about 6 s / sqrt(window) above a gain of 0, with s the standard deviation
    of a step's mean reward.
    """

    window: int = Field(40, ge=LEAST_PLATEAU)
    min_gain: float = Field(0.05, ge=0, le=1)
    patience: int = Field(5, ge=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    min_steps: int = Field(50, ge=1)
    # whether a stage may end whose mean reward was 0 in the window's first half: not above 0 by its lower bound
    at_zero: bool = False


class Adaptive(Section):
    """Symbols first, words when symbols teach no more: see curriculum/mixing.py for the rule."""

    target: str = "natural"  # the representation that the stage is for: words; all other parts are symbols
    least_share: float = Field(0.1, gt=0, lt=0.5)  # of each step's prompts, of every part at any time, rounded up
    window: int = Field(20, ge=2)  # steps
    patience: int = Field(5, ge=1)  # successive steps after which symbols' progress must be the smaller one
    min_steps: int = Field(1, ge=1)  # before which symbols are not left; never before 2 * window + patience - 1
    most_replay: float = Field(0.5, gt=0, lt=1)  # largest share of symbols after they were left
    confidence: float = Field(0.95, gt=0.5, lt=1)  # of the test that symbols are being forgotten

    def least_of(self, num_prompts: int) -> int:
        """Prompts of every part, of ``num_prompts`` in a step."""
        return math.ceil(self.least_share * num_prompts - 1e-9)  # 0.1 of 30 is 3, although 0.1 * 30 > 3

    @model_validator(mode="after")
    def _replay_is_a_range(self) -> "Adaptive":
        if self.most_replay < self.least_share:
            raise ValueError(f"most_replay must be at least least_share, got {self.most_replay} and {self.least_share}")
        return self


class Star(Section):
    """An sft stage in rounds, on the model's own right answers: see curriculum/star.py."""

    rounds: int = Field(1, ge=1)
    samples: int = Field(4, ge=1)  # answers to each question of a round
    prompts: int = Field(256, ge=1)  # questions of a round, drawn from the mixture
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)  # of these answers
    keep: Literal["one", "all"] = "one"  # of a question's right answers: one at random, or all
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False)  # passes over the kept answers; sets the steps of a round
    # the weights that a round trains: those that its answers were sampled from, or those at the stage's start, of which
    # a copy is kept in host memory and in checkpoints
    start_from: Literal["previous", "start"] = "previous"


class StageRecipe(Stage):
    """Ends after ``steps``, or at the first of its other stop conditions."""

    mixture: tuple[Ingredient, ...] = Field(min_length=1)
    fade: Literal["linear", "cosine"] | None = None  # how weights go from weight to weight_end over ``steps``
    adaptive: Adaptive | None = None  # shares by learning progress
    star: Star | None = None  # demonstrations are the model's own right answers; ``steps`` is at most, over all rounds
    mastery: Mastery | None = None
    plateau: Plateau | None = None
    max_response_tok: int | None = Field(
        None, ge=1
    )  # summed over the stage's steps; the step that reaches it is the last

    def idle(self) -> dict[KeyPath, str]:
        keys = super().idle()
        if len(self.mixture) == 1:
            keys |= {("mixture", 0, key): "the mixture has one part" for key in ("weight", "weight_end")}
        if not self.has_demonstrations:
            why = "it applies to demonstrations, and this stage samples its responses"
            keys |= {("mixture", i, "sequential_rate"): why for i in range(len(self.mixture))}
        return keys

    @property
    def has_demonstrations(self) -> bool:
        """Whether it trains on demonstrations of its data, and not on what the model samples."""
        return self.objective.is_supervised and self.star is None

    @property
    def reward_window(self) -> int:
        """Number of last steps that the stop conditions read."""
        of_plateau = self.plateau.window + self.plateau.patience - 1 if self.plateau else 0
        return max(self.mastery.window if self.mastery else 1, of_plateau)

    @model_validator(mode="after")
    def _exits_have_rewards(self) -> "StageRecipe":
        for name, end in (("mastery", self.mastery), ("plateau", self.plateau)):
            if end is not None and self.objective.is_supervised:
                raise ValueError(
                    f"{name} is not supported with objective.name = {self.objective.name!r}, which trains on "
                    "demonstrations: remove it"
                )
            if end is not None and end.min_steps >= self.steps:
                raise ValueError(
                    f"{name}.min_steps must be below steps, or {name} never acts, got {end.min_steps} and {self.steps}"
                )
        if self.mastery and self.mastery.window >= self.steps:
            raise ValueError(
                f"mastery.window must be below steps, or mastery never acts, got {self.mastery.window} and {self.steps}"
            )
        if self.plateau and self.plateau.window + self.plateau.patience > self.steps:
            raise ValueError(
                f"plateau.window + patience must be at most steps, or plateau never acts, got {self.plateau.window} + "
                f"{self.plateau.patience} and {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _weights_fade_together(self) -> "StageRecipe":
        ends = [part.weight_end for part in self.mixture]
        if self.fade is None and any(end is not None for end in ends):
            raise ValueError('weight_end needs the form of the change: set fade = "cosine" or "linear" in the stage')
        if self.fade is not None and all(end is None for end in ends):
            raise ValueError("fade needs a weight_end in at least one part of the mixture")
        if self.fade is None and any(part.weight == 0 for part in self.mixture):
            raise ValueError("weight must be greater than 0 without fade")
        last = [part.weight if part.weight_end is None else part.weight_end for part in self.mixture]
        if not sum(part.weight for part in self.mixture) or not sum(last):
            raise ValueError("the weights of a mixture must not all be 0 at its first or last step")
        return self

    @model_validator(mode="after")
    def _adapts_between_two_sides(self) -> "StageRecipe":
        adaptive = self.adaptive
        if adaptive is None:
            return self
        if self.objective.is_supervised or self.fade is not None:
            other = 'objective.name = "sft", which earns no rewards' if self.objective.is_supervised else "fade"
            raise ValueError(f"adaptive is not supported with {other}: remove one of them")
        forms = [part.representation for part in self.mixture]
        if not 0 < forms.count(adaptive.target) < len(forms):
            raise ValueError(
                f"adaptive needs parts of the representation target and parts of others in the mixture, got target = "
                f"{adaptive.target!r} and {', '.join(forms)}"
            )
        if adaptive.least_of(self.batch.prompts) * len(forms) > self.batch.prompts:
            raise ValueError(
                f"adaptive.least_share = {adaptive.least_share} of {self.batch.prompts} prompts for each of "
                f"{len(forms)} parts is more than there are: lower it, or raise batch.prompts"
            )
        earliest = 2 * adaptive.window + adaptive.patience - 1
        if max(earliest, adaptive.min_steps) >= self.steps:
            raise ValueError(
                "adaptive must be able to leave symbols before the stage ends: 2 * window + patience - 1 and min_steps "
                f"must be below steps, got {earliest}, {adaptive.min_steps} and {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _star_is_supervised(self) -> "StageRecipe":
        if self.star is not None and not self.objective.is_supervised:
            raise ValueError(f'star needs objective.name = "sft", got {self.objective.name!r}')
        if self.star is not None and self.fade is not None:
            raise ValueError("star is not supported with fade, whose shares follow the steps: remove one of them")
        return self
