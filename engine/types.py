"""The values that the training loop passes on, all frozen, and the Protocols of what is handed to it.

    PromptSource.take -> list[Prompt]            Judge -> list[float], one reward a response
    Sampler.generate  -> list[Rollout]           score -> list[Group]
    pack              -> list[Update] of PackedBatch      Learner -> StepStats

Letters: P prompts, G responses per prompt, S = P * G sequences, T packed tokens, N predicted tokens, V vocabulary.
Log-probabilities are natural logarithms (nats).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

from torch import Tensor

from isomorph.engine.config import Stage, Truncation
from isomorph.kernels.kept_tokens import KeptTokens
from isomorph.kernels.packed_layout import PackedLayout

Finish = Literal["stop", "length"]
# why an environment did not end a rollout by itself: it raised, did not answer in time, ended its process; or the limit
# of turns was reached
EnvironmentFailure = Literal["errors", "timeouts", "crashes", "out_of_turns"]


class RunFailed(RuntimeError):
    """The run cannot go on: a consistency check failed, or a device or the disk was lost. Exit code 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One tokenised prompt. The engine reads ``prompt_id`` and ``token_ids``; the rest belongs to the prompt source.

    ``task`` and ``representation`` are copied into completion files and error messages. ``payload`` is handed back
    unread, to the source and to the reward function.

    Example: ``Prompt(prompt_id=7, token_ids=(1, 42, 9), task="async_plan", representation="graph", payload=task)``
    """

    prompt_id: int
    token_ids: tuple[int, ...]
    task: str
    representation: str
    payload: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters. A sampler that obeys ``truncation`` tells in ``Rollout.kept`` what it kept."""

    temperature: float  # 0: greedy decoding, for evaluation; such rollouts have no log-probabilities
    max_new_tok: int
    samples_per_prompt: int
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()  # strings that end a response, with the token that completes one
    seed: int  # the same seed, weights and prompts give the same rollouts
    truncation: Truncation = Truncation()  # top-k, top-p and min-p; without effect on greedy decoding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One response. It includes its stop token, which is trained on; a response cut off by its length has none.

    A response of several turns holds the model's turns, each with its stop token, and between them what the environment
    added. It begins and ends with a token of the model.
    With stop strings a turn may end with the token that completes one instead, whatever text that token holds after it.
    """

    prompt_id: int
    sample: int  # 0 .. G-1
    token_ids: Tensor  # [n] int64, on the CPU, n >= 1
    # [n] float32, at the sampling temperature and over the kept tokens, NaN for a token of the environment; None for a
    # demonstration or a greedy response
    sampler_logprob: Tensor | None
    finish: Finish
    policy_version: int  # of the weights that it was sampled from
    context_mask: Tensor | None = None  # [n] bool, on the CPU; True: of the environment, never a target; None: no such
    environment_reward: float | None = None  # None: no environment gave one
    num_turns: int = 1  # of the model
    environment_failure: EnvironmentFailure | None = None
    kept: KeptTokens | None = None  # n sets; of a token of the environment: all; None: nothing was truncated

    @property
    def num_model_tok(self) -> int:
        """Number of tokens that the model wrote."""
        return len(self.token_ids) - (0 if self.context_mask is None else int(self.context_mask.sum()))

    @property
    def num_loss_tok(self) -> int:
        """Number of tokens that enter the loss: the model's, but for those without a finite sampler log-probability."""
        is_target = self.is_target
        return len(self.token_ids) if is_target is None else int(is_target.sum())

    @property
    def is_target(self) -> Tensor | None:
        """[n] bool: which tokens enter the loss; None: all of them."""
        own = None if self.context_mask is None else ~self.context_mask
        if self.sampler_logprob is None:
            return own
        is_finite = self.sampler_logprob.isfinite()
        return is_finite if own is None else is_finite & own

    @property
    def turns(self) -> list[Tensor]:
        """The model's tokens, one tensor int64 for each of its turns."""
        if self.context_mask is None:
            return [self.token_ids]
        is_first = self.context_mask.diff(prepend=self.context_mask[:1]).nonzero().flatten().tolist()
        pieces = self.token_ids.tensor_split(is_first)
        return list(pieces[::2])


# of one reward function on one response: a number; "does not apply" (None); or what it is worth 0 for; "absent": the
# response's data has no reward of that name
Outcome = Literal["value", "none", "nan", "error", "deadline", "absent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The rewards of S responses, with the parts that they are made of.

    Example: ``Scores(rewards=(1.2, 0.0), parts={"right": (1.0, 0.0), "short": (0.2, 0.0)})``
    """

    rewards: tuple[float, ...]  # [S]; NaN: no reward applies to the response, which then leaves loss and baseline
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # [S] by name; NaN: it does not apply
    correct: tuple[bool, ...] | None = None  # [S]; None: the prompt source decides by the reward
    masked: tuple[bool, ...] | None = None  # [S] True: not in the loss, but in the group's baseline; None: no response
    outcomes: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)  # [S] by name, for each of ``parts``
    # [S] sum of rewards that were each normalised within their group (GDPO), which takes the place of baseline and
    # scale of the objective; NaN where these apply; None: everywhere
    relative: tuple[float, ...] | None = None

    def slice(self, start: int, stop: int) -> Self:
        """The scores of responses ``start`` to ``stop`` - 1."""
        return type(self)(**{name: _cut(value, start, stop) for name, value in self.columns().items()})

    def outcome(self, name: str) -> tuple[Outcome, ...]:
        """[S] of the part ``name``; numbers, where the reward function does not say."""
        return self.outcomes[name] if name in self.outcomes else tuple("value" for _ in self.rewards)

    def columns(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """The scores of several lists of responses as those of one; a part that one of them lacks is absent there."""
        names = list(dict.fromkeys(name for scores in parts for name in scores.parts))

        def column(values: Sequence[tuple[Any, ...] | None], missing: Any) -> tuple[Any, ...]:
            sizes = [len(scores.rewards) for scores in parts]
            filled = ((missing,) * n if value is None else value for n, value in zip(sizes, values, strict=True))
            return tuple(v for value in filled for v in value)

        def optional(values: Sequence[tuple[Any, ...] | None], missing: Any) -> tuple[Any, ...] | None:
            return None if all(value is None for value in values) else column(values, missing)

        if any(scores.correct is None for scores in parts) and any(scores.correct is not None for scores in parts):
            raise ValueError("either all responses must be known to be correct or not, or none")
        return cls(
            rewards=column([s.rewards for s in parts], math.nan),
            parts={name: column([s.parts.get(name) for s in parts], math.nan) for name in names},
            correct=optional([s.correct for s in parts], False),
            masked=optional([s.masked for s in parts], False),
            outcomes={
                name: column([s.outcome(name) if name in s.parts else None for s in parts], "absent") for name in names
            },
            relative=optional([s.relative for s in parts], math.nan),
        )


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Mapping):
        return {name: column[start:stop] for name, column in value.items()}
    return None if value is None else value[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """A prompt with its G rollouts, a reward and a group-relative advantage for each of them."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    scores: Scores | None = None  # of its responses; None: rewards only

    @property
    def has_zero_variance(self) -> bool:
        """All rewards are equal (rewards normalised one by one: each of them), so that advantages are 0."""
        relative = self.scores and self.scores.relative
        if relative and not any(math.isnan(value) for value in relative):
            return not any(relative)
        return len(set(self.known_rewards)) <= 1

    @property
    def known_rewards(self) -> list[float]:
        """The rewards without those of responses to which no reward applies."""
        return [reward for reward in self.rewards if not math.isnan(reward)]

    def correct(self, is_correct: Callable[[Prompt, float], bool]) -> tuple[bool, ...]:
        """For each response whether it solves the prompt; ``is_correct`` decides where the scores do not say."""
        if self.scores and self.scores.correct is not None:
            return self.scores.correct
        return tuple(is_correct(self.prompt, reward) for reward in self.rewards)

    @property
    def is_trained(self) -> tuple[bool, ...]:
        """For each response whether it may enter the loss: a reward applies to it, and it is not masked."""
        masked = self.scores and self.scores.masked
        return tuple(not (math.isnan(r) or (masked and masked[i])) for i, r in enumerate(self.rewards))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """Groups of one micro-batch, concatenated without padding, the prompt of a group once: [P][R1]..[RG] [P][R1]..

    Tensors of shape [N] are aligned to targets: element i belongs to ``target_ids[i]``, which is predicted from hidden
    row ``row_index[i]``. The hidden row of the last prompt token predicts the first token of all G responses.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64; every response starts at its prompt's length
    layout: PackedLayout
    row_index: Tensor  # [N] int64 into T
    target_ids: Tensor  # [N] int64
    seq_id: Tensor  # [N] int64 in 0..S-1, ascending
    sampler_logprob: Tensor | None  # [N] float32; None for demonstrations
    advantage: Tensor  # [S] float32
    kept: KeptTokens | None = None  # N sets, in host memory: what each target was drawn from; None: all tokens

    @property
    def num_seqs(self) -> int:
        return self.advantage.shape[0]

    @property
    def num_loss_tok(self) -> int:
        return self.target_ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Result of one weight sync from the trainer to the sampler."""

    version: int
    num_bytes: int  # copied from the trainer's storage to the sampler's; 0 if they share one
    # hash of the sampler's weights; of their addresses if storage is shared; "": the sampler has no weights of its own
    fingerprint: str
    move_s: float = 0.0  # seconds spent copying weights
    fingerprint_s: float = 0.0  # seconds spent hashing both sides' weights
    probe_s: float | None = None  # seconds spent comparing log-probabilities of a probe; None: no probe was run


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDrift:
    """Mismatch d = trainer - sampler log-probability of a step's sampled tokens, before its first optimizer step.

    Fields ending in ``_error`` are standard errors. engine/drift.py defines the statistics and their limits.
    """

    num_tok: int = 0
    mean: float = math.nan  # of |d|, nats
    square: float = math.nan  # mean of d^2
    p999: float = math.nan  # 99.9 % of the tokens have no larger |d|
    largest: float = math.nan
    histogram: tuple[int, ...] = ()  # of |d|
    mass: float = math.nan  # mean of exp(d) - 1
    mass_error: float = math.nan
    slope: float = math.nan  # regression slope of d on (log-probability - its expectation)
    slope_error: float = math.nan
    rounding_slope: float = math.nan  # largest |slope| that rounding explains
    surprise: float = 0.0  # sum of -log q - entropy, nats
    variance: float = 0.0  # sum of (-log q - entropy)^2
    slack: float = 0.0  # largest |surprise| that rounding and the selection of responses explain


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Metrics of one step. Means are over the predicted tokens of all its updates; NaN: not measured."""

    loss: float
    grad_norm: float
    lr: float
    clip_frac: float
    entropy: float  # nats
    kl: float  # nats, to the reference policy, by the objective's estimator
    drift: StepDrift
    num_updates: int  # optimizer steps
    num_loss_tok: int
    num_forward_tok: int  # tokens through the decoder in the passes with gradient; a group's prompt counts once
    num_dropped_tok: int  # tokens left out because their sampler log-probability was not finite


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredRollouts:
    """The rollouts of all ranks for one list of prompts, in the prompts' order, with decoded texts and rewards."""

    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    scores: Scores
    # against the weights that they were drawn from, where those are gone when they are learned from; None: the learner
    # measures it
    drift: StepDrift | None = None

    @property
    def rewards(self) -> tuple[float, ...]:
        return self.scores.rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a checkpoint holds besides weights and optimizer: ``state.json``, and ``draws`` in draws.safetensors."""

    step: int = 0  # completed steps; a step is one set of rollouts and all optimizer steps on it
    num_updates: int = 0  # completed optimizer steps
    policy_version: int = 0
    stage: str = ""
    base: str = ""  # fingerprint of the frozen weights under adapters; "" where every weight is trained
    num_ranks: int = 1  # of the run that wrote it; with another number, sums differ in their last bits
    source: dict[str, Any] = field(default_factory=dict)  # PromptSource.state_dict()
    totals: dict[str, float] = field(default_factory=dict)  # running sums: wall seconds, tokens, drift.Surprise
    # rollouts of an interrupted step, in the order of its calls; then those of the step after, which were drawn ahead
    draws: tuple[ScoredRollouts, ...] = ()
    num_ahead: int = 0  # how many of ``draws``, the last ones, are of the step after
    # what best.json would tell of these weights, from their evaluation until it is settled whether they are the best
    best: dict[str, Any] | None = None


# arguments: index of the prompt in the list given to ``generate``, and its rollouts, by ``sample`` ascending
OnGroup = Callable[[int, Sequence[Rollout]], None]
OnStep = Callable[[], None]  # called after every few decoded tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an environment says to one turn of the model. Without ``token_ids`` the rollout ends there."""

    # what follows the turn's last token, a stop token or the end of a stop string, up to where its next turn begins
    token_ids: tuple[int, ...] = ()
    reward: float | None = None  # of the rollout, where this ends it
    failure: EnvironmentFailure | None = None  # where this ends it


class Dialogue(Protocol):
    """The environments of rollouts of several turns. The sampler calls it; every call must return at once."""

    def begin(self, prompt: Prompt, sample: int) -> None:
        """A rollout has been admitted: its environment may start."""
        ...

    def turn(self, prompt: Prompt, sample: int, token_ids: Sequence[int], start: int) -> Future[Reply]:
        """Returns the reply to the turn that the rollout has just ended, by stop token or string, once it is known.

        ``token_ids``: of the rollout so far, its environment's included; the turn is ``token_ids[start:]``. What the
        future raises ends ``generate``.
        """
        ...

    def end(self, prompt: Prompt, sample: int) -> None:
        """The rollout is over, by the reply, by a limit or because sampling stopped; it has no further turn."""
        ...


class Sampler(Protocol):
    """Generates rollouts from the policy: the built-in decoder, vLLM, or demonstrations."""

    policy_version: int  # of the weights that it samples from

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        on_step: OnStep | None = None,
        dialogue: Dialogue | None = None,
    ) -> list[Rollout]:
        """Returns ``samples_per_prompt`` rollouts for each prompt, in the order of the prompts, samples ascending.

        With ``dialogue`` a response that ends with a stop token or string goes on with what its environment replies,
        until that is nothing or leaves no room for a further token: ``max_new_tok`` counts the tokens of both sides.

        ``on_group`` is called once for each prompt, as soon as all of its rollouts are finished, while others may still
        be decoding. ``on_step`` is called every few tokens. Both must return at once; an exception in either of them
        ends ``generate``.
        """
        ...

    def asleep(self) -> AbstractContextManager[None]:
        """Context in which the sampler's KV cache and buffers (not its weights) are released for the learner."""
        ...

    def publish(self, version: int) -> Publication:
        """Weight sync: from now on samples from the policy's present weights, which become ``policy_version``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationRequest:
    """Prompts of an evaluation that is to run now: one greedy response to each, and ``samples`` further ones."""

    label: str  # name of the stage that it follows; "start" before the first stage; else of the step
    prompts: tuple[Prompt, ...]
    max_new_tok: int
    samples: int = 0
    temperature: float = 1.0  # of these
    seed: int = 0  # of these
    stop: tuple[str, ...] = ()  # stop strings
    validation: tuple[Prompt, ...] = ()  # prompts of whose demonstrations the loss is wanted
    validation_batch_tok: int = 0  # packed tokens of a micro-batch of them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleRequest:
    """Prompts to which the source wants rewarded responses before its next step, to make demonstrations of them."""

    label: str  # name of the file that the responses are written to
    prompts: tuple[Prompt, ...]
    samples: int  # responses to each prompt
    temperature: float
    max_new_tok: int
    seed: int
    stop: tuple[str, ...]  # stop strings
    # the weights that the following steps begin with: the present ones, or those at the start of the stage
    start_from: Literal["previous", "start"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """Responses to the prompts of an evaluation, in the prompts' order, the same number to each."""

    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    correct: tuple[bool, ...]  # whether it solves its prompt; partial credit does not
    found: tuple[bool | None, ...] | None  # whether an answer was found in it; None: not measured
    environment_failures: Mapping[EnvironmentFailure, int] = field(default_factory=dict)
    # of the greedy ones: loss of the demonstrations of ``EvaluationRequest.validation``, by Prompt.representation
    validation_loss: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """What an evaluation is told as."""

    line: str  # for the console
    values: dict[str, float | None]  # for the row of its step, and for the sinks; None: not measured
    best_by: str = ""  # what ``score`` is of; "": no best model is kept
    score: float = math.nan  # a higher one than all before makes this model the best so far
    items: tuple[dict[str, Any], ...] = ()  # JSON-able: a row for each question's greedy response


class Judge(Protocol):
    """The reward function. It must return 0 for a malformed response, and not raise.

    Called from a thread of the engine's, one call at a time, while further responses are being sampled.
    """

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Returns one finite reward for each (prompt, text) pair."""
        ...


@runtime_checkable
class PartsJudge(Protocol):
    """A Judge that also says what its rewards are made of; where a judge has ``score``, that is called instead."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Sequence[Rollout]) -> Scores:
        """Returns the scores of the responses, of which those to one prompt stand next to each other, all of them."""
        ...


class PromptSource(Protocol):
    """The curriculum, as the engine sees it: stages, their prompts, and evaluations."""

    def stage(self) -> Stage | None:
        """Returns the current stage; None after the last one."""
        ...

    def stage_step(self) -> int:
        """Returns the number of completed steps of the current stage."""
        ...

    def take(self, num_prompts: int) -> list[Prompt]:
        """Returns the next prompts of the current stage."""
        ...

    def demonstrate(self, prompt: Prompt) -> str | None:
        """Returns a worked response for supervised stages; None where there is none."""
        ...

    def is_correct(self, prompt: Prompt, reward: float) -> bool:
        """Returns whether a response with ``reward`` solves ``prompt``; partial credit does not."""
        ...

    def label(self, prompt: Prompt) -> str:
        """Returns what a prompt is counted under: the mean reward of a label is logged as ``reward/<label>``."""
        ...

    def step_values(self) -> Mapping[str, float | None]:
        """Returns what the source tells of the step under way, as keys of its row; called before ``observe``."""
        ...

    def observe(self, groups: Sequence[Group]) -> None:
        """Ends the step, and with it possibly the stage. ``groups``: all that were sampled, trained on or not."""
        ...

    def pending_evaluation(self) -> EvaluationRequest | None:
        """Returns the evaluation to run before the next step; None if there is none."""
        ...

    def record_evaluation(
        self, request: EvaluationRequest, greedy: Answers, sampled: Answers | None
    ) -> EvaluationRecord:
        """Stores the result of ``request`` and returns what is written of it. ``sampled``: None without samples."""
        ...

    def pending_samples(self) -> SampleRequest | None:
        """Returns the responses that are wanted before the next step; None if there are none to sample."""
        ...

    def record_samples(self, groups: Sequence[Group], texts: Sequence[str]) -> str:
        """Takes the responses to the pending request, a group a prompt; returns a line for the console."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the source's state as JSON-able values, random state included."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned: the same prompts follow as in an uninterrupted run."""
        ...
