"""The values that travel through the loop. Everything here is frozen; nothing here computes.

    Prompt -> Sampler -> Rollout -> Judge -> Group -> pack -> PackedBatch -> learner -> StepStats

Letters: P prompts, G responses per prompt, S = P * G sequences, T packed tokens, N predicted tokens, V vocabulary.
Log-probabilities are natural logarithms (nats).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from isomorph.engine.config import Stage
from isomorph.kernels.packed_attention import PackedLayout

Finish = Literal["stop", "length"]


class RunFailed(RuntimeError):
    """The run cannot go on: a tripwire fired, a device or the disk was lost. Exit code 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenised. ``payload`` belongs to whoever made the prompt; the engine only hands it back.

    Example: ``Prompt(prompt_id=7, token_ids=(1, 42, 9), task="async_plan", representation="graph", payload=task)``
    """

    prompt_id: int
    token_ids: tuple[int, ...]
    task: str
    representation: str
    payload: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn. Temperature only: top-k or top-p would sample from another policy than is scored."""

    temperature: float  # 0 is greedy, for evaluation: such rollouts carry no log-probability
    max_new_tok: int
    samples_per_prompt: int
    stop_ids: tuple[int, ...]
    seed: int  # the same seed, weights and prompts give the same rollouts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One response. The stop token, where there is one, is its last token, and is trained."""

    prompt_id: int
    sample: int  # 0 .. G-1
    token_ids: Tensor  # [n] int64, on the CPU, n >= 1
    sampler_logprob: (
        Tensor | None
    )  # [n] float32, at the sampling temperature; None for a demonstration or a greedy response
    finish: Finish
    policy_version: int  # of the weights that drew it

    @property
    def num_loss_tok(self) -> int:
        """Tokens that can be learned from: one without a finite sampler log-probability cannot be corrected for."""
        return len(self.token_ids) if self.sampler_logprob is None else int(self.sampler_logprob.isfinite().sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """A prompt with its G rollouts, judged."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]

    @property
    def is_flat(self) -> bool:
        """Without variance: compared with each other its responses teach nothing."""
        return len(set(self.rewards)) == 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """Whole groups, one after the other, without padding; each prompt stands once: [P][R1]..[RG] [P][R1]..

    Everything per predicted token is aligned to targets: index i speaks of ``target_ids[i]``, which the hidden
    row ``row_index[i]`` predicts. The last prompt token's row predicts the first token of all G responses.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64; every response starts at its prompt's length
    layout: PackedLayout
    row_index: Tensor  # [N] int64 into T
    target_ids: Tensor  # [N] int64
    seq_id: Tensor  # [N] int64 in 0..S-1, ascending
    sampler_logprob: Tensor | None  # [N] float32; None for demonstrations
    advantage: Tensor  # [S] float32

    @property
    def num_seqs(self) -> int:
        return self.advantage.shape[0]

    @property
    def num_loss_tok(self) -> int:
        return self.target_ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What one publish did."""

    version: int
    num_bytes: int  # moved from the trainer's storage to the sampler's; 0 where they are one
    fingerprint: str  # of the sampler's weights; of where they lie, where num_bytes is 0; "": it has none of its own
    move_s: float = 0.0  # seconds that the weights took to get there
    fingerprint_s: float = 0.0  # of both sides
    probe_s: float | None = None  # None: no probe was drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDrift:
    """d = trainer's - sampler's log-probability of a step's sampled tokens, before its first update: engine/drift.py.

    An ``_error`` is a standard error.
    """

    num_tok: int = 0
    mean: float = math.nan  # of |d|, nats
    square: float = math.nan  # mean of d^2
    p999: float = math.nan  # 99.9 % of the tokens have no larger |d|
    largest: float = math.nan
    histogram: tuple[int, ...] = ()  # of |d|
    mass: float = math.nan  # mean of exp(d) - 1
    mass_error: float = math.nan
    slope: float = math.nan  # of d on what a token's log-probability lies above its mean
    slope_error: float = math.nan
    rounding_slope: float = math.nan  # of the slope, the most that rounding explains
    surprise: float = 0.0  # sum of -log q - entropy, nats
    variance: float = 0.0  # sum of its squares
    slack: float = 0.0  # of |surprise|, the most that rounding and the selection of responses explain


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Numbers of one step; means are over predicted tokens of all its updates. NaN: there was nothing to measure."""

    loss: float
    grad_norm: float
    lr: float
    clip_frac: float
    entropy: float  # nats
    kl: float  # to the reference policy, by the estimator of the objective
    drift: StepDrift
    num_updates: int  # optimizer steps
    num_loss_tok: int
    num_forward_tok: int  # tokens that went through the decoder in the update passes
    num_dropped_tok: int  # their sampler log-probability was not finite


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """The responses of all ranks to one lot of prompts, in their order, and what the judge said."""

    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All that resuming needs beside weights and optimizer."""

    step: int = 0  # completed steps; a step is one round of rollouts and all updates on it
    num_updates: int = 0  # completed optimizer steps
    policy_version: int = 0
    stage: str = ""
    base: str = ""  # fingerprint of the weights that a checkpoint of adapters belongs to
    num_ranks: int = 1  # of the run that wrote it: sums over other ranks differ in their last bits
    source: dict[str, Any] = field(default_factory=dict)  # the prompt source's own state, its random numbers included
    totals: dict[str, float] = field(default_factory=dict)  # running sums: wall seconds, tokens
    draws: tuple[Draw, ...] = ()  # of the step that was interrupted, in the order in which it asked; else none


# takes a prompt's place among those asked, and its rollouts, samples ascending
OnGroup = Callable[[int, Sequence[Rollout]], None]
OnStep = Callable[[], None]  # a few more tokens have been drawn


class Sampler(Protocol):
    """Who draws responses."""

    policy_version: int

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        on_step: OnStep | None = None,
    ) -> list[Rollout]:
        """``samples_per_prompt`` rollouts for each prompt, in the order of the prompts, samples ascending.

        ``on_group`` is called once for each prompt, as soon as all of its rollouts are finished, while others may still
        be drawn. ``on_step`` is called every few tokens. Both must return at once; what they raise ends ``generate``.
        """
        ...

    def asleep(self) -> AbstractContextManager[None]:
        """While open, the sampler's working memory (not the weights) belongs to the learner."""
        ...

    def publish(self, version: int) -> Publication:
        """From now on sample from the policy's present weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exam:
    """Questions that are due now, to be answered greedily."""

    label: str  # the stage it follows; "start" before the first
    prompts: tuple[Prompt, ...]
    max_new_tok: int


class Judge(Protocol):
    """Who says what a response is worth. A response's defects cost it its reward; they never raise.

    Called from a thread of the engine's, one call at a time, while further responses are being drawn.
    """

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """One reward for each (prompt, text) pair."""
        ...


class PromptSource(Protocol):
    """The curriculum, as the engine sees it: what is asked next, and by which rules it is learned."""

    def stage(self) -> Stage | None:
        """The present stage; None when all are done."""
        ...

    def stage_step(self) -> int:
        """Completed steps of the present stage."""
        ...

    def take(self, num_prompts: int) -> list[Prompt]:
        """The next prompts of the present stage."""
        ...

    def demonstrate(self, prompt: Prompt) -> str | None:
        """A worked response, for supervised stages; None where there is none."""
        ...

    def is_correct(self, prompt: Prompt, reward: float) -> bool:
        """Whether a response worth ``reward`` solves ``prompt``: its task says so, and partial credit does not."""
        ...

    def observe(self, groups: Sequence[Group]) -> None:
        """The step is over, and with it maybe the stage. ``groups``: all that were drawn, learned from or not."""
        ...

    def exam(self) -> Exam | None:
        """The evaluation that is due, if one is."""
        ...

    def grade(self, exam: Exam, rewards: Sequence[float], found: Sequence[bool] | None) -> str:
        """Takes the result down; returns it as a line to read.

        ``found``: whether each response states an answer at all; None where nobody can say.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: all that ``load_state_dict`` needs to go on as if nothing had happened."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
