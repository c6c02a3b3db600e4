"""Text -> reward -> group-relative advantage. Rewards are computed while other responses are still being sampled.

combine = "normalized"    A = sum over rewards k of w[k] * (r[k] - mean of its group) / (std of its group + EPS),
                          divided by the standard deviation of all A of the step (GDPO, arXiv 2601.05242)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch
from torch import Tensor

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.foreign import shortened
from isomorph.engine.types import Group, Judge, PartsJudge, Prompt, Rollout, RunFailed, Scores
from isomorph.engine.update.advantage import compared, whitened
from isomorph.kernels.advantage import group_advantage
from isomorph.kernels.types import EPS

Decode = Callable[[Sequence[int]], str]
# whether an answer can be found in a response, right or wrong; None: its task does not say what an answer is
FindsAnswer = Callable[[Prompt, str], bool | None]
POLL_S = 0.2  # while waiting for rewards, interval of looking whether a stop was requested


class RewardThread:
    """Computes rewards in a thread of its own while the sampler goes on; groups are handed in by ``add``.

    This overlaps with sampling where the reward function waits for other processes or releases the GIL. Each call of
    it takes all groups that have been added since the call before, as one batch.
    """

    def __init__(
        self, judge: Judge, decode: Decode, prompts: Sequence[Prompt], on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """``on_wait`` is called several times a second while ``results`` waits; what it raises ends the wait."""
        self.judge, self.decode, self.prompts, self.on_wait = judge, decode, prompts, on_wait
        self._queue: SimpleQueue[tuple[int, Sequence[Rollout]]] = SimpleQueue()
        self._done: dict[int, tuple[list[str], Scores]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._calls: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._thread.shutdown(wait=kind is None, cancel_futures=True)  # on an exception, do not wait for rewards

    def add(self, index: int, rollouts: Sequence[Rollout]) -> None:
        """Queues all rollouts of prompt ``index``. Raises what the reward function has raised on earlier ones."""
        for call in self._calls:
            if call.done():
                call.result()
        self._queue.put((index, rollouts))
        self._calls.append(self._thread.submit(self._reward_queued))

    def results(self) -> tuple[list[str], Scores]:
        """Waits for all rewards; returns the text of every response and the scores, in the order of the prompts.

        Raises what the reward function or ``on_wait`` raises.
        """
        for call in self._calls:
            while not wait([call], timeout=POLL_S).done:
                self.on_wait()
            call.result()
        done = [self._done[i] for i in range(len(self.prompts))]
        return [text for texts, _ in done for text in texts], Scores.joined([scores for _, scores in done])

    def _reward_queued(self) -> None:
        batch: list[tuple[int, Sequence[Rollout], list[str]]] = []
        while True:
            try:
                index, rollouts = self._queue.get_nowait()
            except Empty:
                break
            batch.append((index, rollouts, [response_text(self.decode, r) for r in rollouts]))
        if not batch:  # the call before this one took its group, too
            return
        prompts = [self.prompts[index] for index, rollouts, _ in batch for _ in rollouts]
        texts_of_all = [text for _, _, texts in batch for text in texts]
        scores = checked_scores(self.judge, prompts, texts_of_all, [r for _, rollouts, _ in batch for r in rollouts])
        start = 0
        for index, _, texts in batch:
            self._done[index] = (texts, scores.slice(start, start + len(texts)))
            start += len(texts)


def response_text(decode: Decode, rollout: Rollout) -> str:
    """What the model wrote: the text of its turns, one after the other, without what an environment added."""
    return "\n".join(decode(turn.tolist()) for turn in rollout.turns)


def score(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], scores: Scores, objective: ObjectiveConfig
) -> list[Group]:
    """Returns one Group for each prompt, with rewards and advantages.

    ``rollouts`` and ``scores``: the same number for each prompt, in the order of the prompts. The KL penalty of
    ``objective.reward_kl_coef`` is subtracted later, by ``advantage.penalised``, when log-probabilities are known.
    A response to which no reward applies has no part in the others' advantages; its own is 0.
    Raises ValueError if the rollouts do not match the prompts.
    """
    size, rest = divmod(len(rollouts), len(prompts))
    if rest or size == 0:
        raise ValueError(
            f"every prompt must have the same number of rollouts, got {len(rollouts)} for {len(prompts)} prompts"
        )
    repeated = [prompt for prompt in prompts for _ in range(size)]
    if any(r.prompt_id != prompt.prompt_id for prompt, r in zip(repeated, rollouts, strict=True)):
        raise ValueError("rollouts must be in the order of their prompts, all rollouts of a prompt next to each other")
    advantages = _advantages(rollouts, scores, size, objective).tolist()
    return [
        Group(
            prompt=prompt,
            rollouts=tuple(rollouts[i * size : (i + 1) * size]),
            rewards=scores.rewards[i * size : (i + 1) * size],
            advantages=tuple(advantages[i * size : (i + 1) * size]),
            scores=scores.slice(i * size, (i + 1) * size),
        )
        for i, prompt in enumerate(prompts)
    ]


def _advantages(rollouts: Sequence[Rollout], scores: Scores, size: int, objective: ObjectiveConfig) -> Tensor:
    """[S] float32, for groups of ``size``; without the responses to which no reward applies."""
    reward_S = torch.tensor(scores.rewards, dtype=torch.float32)
    relative_S = torch.tensor(scores.relative or [math.nan] * len(reward_S), dtype=torch.float32)
    advantage_S = torch.zeros_like(reward_S)
    normalised_S = relative_S.isfinite()
    if normalised_S.any():
        # each group's sum of normalised rewards has the mean 0, and so has the step's
        spread = relative_S[normalised_S].std() if normalised_S.sum() > 1 else torch.zeros(())
        advantage_S[normalised_S] = relative_S[normalised_S] / (spread + EPS)
    size_P = torch.full((len(reward_S) // size,), size)
    plain_S, offsets = compared(reward_S.masked_fill(normalised_S, math.nan), size_P, objective)
    if plain_S.any():
        scale = "none" if objective.scale == "batch" else objective.scale
        found_S = group_advantage(reward_S[plain_S], offsets, baseline=objective.baseline, scale=scale)
        if objective.scale == "batch":  # whitened over the tokens in the loss, as in REINFORCE++
            masked = scores.masked or (False,) * len(rollouts)
            known = zip(rollouts, masked, plain_S.tolist(), strict=True)
            num_tok = [0 if is_masked else r.num_loss_tok for r, is_masked, is_plain in known if is_plain]
            (found_S,) = whitened([found_S], [torch.tensor(num_tok)])
        advantage_S[plain_S] = found_S
    return advantage_S


def normalised_sum(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Returns the weighted sum [G] of a group's rewards [G], each normalised within the group (GDPO).

    NaN: that reward does not apply to the response, which has no part in its mean and standard deviation (n - 1). A
    reward that is equal for all, or applies to one response only, adds 0. NaN where no reward applies.
    """
    part_KG = torch.tensor([list(part) for part in parts.values()], dtype=torch.float64)
    known_KG = ~part_KG.isnan()
    total_G = torch.zeros(part_KG.shape[1], dtype=torch.float64)
    for name, part_G, known_G in zip(parts, part_KG, known_KG, strict=True):
        values = part_G[known_G]
        if len(values) > 1 and not bool((values == values[0]).all()):
            total_G[known_G] += weights[name] * (values - values.mean()) / (values.std() + EPS)
    total_G[~known_KG.any(0)] = math.nan
    return [float(value) for value in total_G]


def answers_found(
    finds_answer: FindsAnswer | None, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[bool | None] | None:
    """Returns for each text what ``finds_answer`` says of it; None without ``finds_answer``.

    ``texts``: the same number for each prompt, in the order of the prompts.
    """
    if finds_answer is None:
        return None
    size = len(texts) // len(prompts)
    return [finds_answer(prompts[i // size], text) for i, text in enumerate(texts)]


def share_without_answer(found: Sequence[bool | None] | None) -> float:
    """Share of responses in which no answer was found, 0 to 1, of those for which ``found`` tells; NaN: of none."""
    known = [is_found for is_found in found or () if is_found is not None]
    return 1 - sum(known) / len(known) if known else math.nan


def warning_of_no_answer(
    where: str, found: Sequence[bool | None] | None, texts: Sequence[str], cut_off: float | None
) -> str:
    """Returns a warning with an example if no answer was found in any of the texts for which ``found`` tells; else "".

    ``cut_off``: share of the responses that were ended by their length limit; None if that is not known.
    """
    asked = [text for text, is_found in zip(texts, found or [None] * len(texts), strict=True) if is_found is not None]
    if not asked or any(found or ()):
        return ""
    whose = "" if len(asked) == len(texts) else " whose task says what an answer is"
    cut = "" if not cut_off else f", {cut_off:.0%} of which were cut off at their length limit"
    return (
        f"warning: no answer was found in any of the {len(asked)} responses of {where}{whose}{cut}, so every reward "
        f'is 0. One of them: "{shortened(asked[0])}"'
    )


def checked_scores(
    judge: Judge, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Sequence[Rollout]
) -> Scores:
    """Calls the reward function: its ``score`` where it has one (``PartsJudge``).

    Raises RunFailed unless it returns one finite reward for each response; or NaN, where ``score`` says by its parts
    that no reward applies, as to a demonstration of data without rewards.
    """
    if isinstance(judge, PartsJudge):
        scores = judge.score(prompts, texts, rollouts)
    else:
        scores = Scores(rewards=tuple(judge(prompts, texts)))
    for name, column in _flat_columns(scores):
        if len(column) != len(texts):
            raise RunFailed(
                f"the reward function must return one {name} for each response, got {len(column)} for "
                f"{len(texts)} responses"
            )
    bad_S = ~torch.tensor(scores.rewards, dtype=torch.float32).isfinite()
    for i in bad_S.nonzero().flatten().tolist():
        has_parts = isinstance(judge, PartsJudge)
        applies = not has_parts or any(not math.isnan(part[i]) for part in scores.parts.values())
        if applies or not math.isnan(scores.rewards[i]):
            raise RunFailed(
                f"rewards must be finite in float32, got {scores.rewards[i]} for the response {shortened(texts[i])!r}"
            )
    return scores


def _flat_columns(scores: Scores) -> list[tuple[str, Sequence[Any]]]:
    found: list[tuple[str, Sequence[Any]]] = []
    for field, value in scores.columns().items():
        found += [(f"{field} of {name}", v) for name, v in value.items()] if isinstance(value, Mapping) else []
        found += [(field.removesuffix("s"), value)] if isinstance(value, tuple) else []
    return found
