"""Text -> reward -> advantage."""

from collections.abc import Callable, Sequence

import torch

from isomorph.engine.config import ObjectiveConfig
from isomorph.engine.types import Group, Judge, Prompt, Rollout, RunFailed
from isomorph.kernels.advantage import group_advantage


def score(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    judge: Judge,
    decode: Callable[[Sequence[int]], str],
    objective: ObjectiveConfig,
) -> tuple[list[Group], list[str]]:
    """The rollouts grouped by prompt, judged, with advantages; and the texts that were judged, in their order.

    ``rollouts`` hold the same number of responses for each prompt, in the order of the prompts. Raises RunFailed for
    a judge that does not return one finite reward a response.
    """
    size, rest = divmod(len(rollouts), len(prompts))
    if rest or size == 0:
        raise ValueError(
            f"every prompt must have the same number of rollouts, got {len(rollouts)} for {len(prompts)} prompts"
        )
    repeated = [prompt for prompt in prompts for _ in range(size)]
    if any(r.prompt_id != prompt.prompt_id for prompt, r in zip(repeated, rollouts, strict=True)):
        raise ValueError("rollouts must stand in the order of their prompts, all of a prompt side by side")
    texts = [decode(r.token_ids.tolist()) for r in rollouts]
    rewards = judged(judge, repeated, texts)
    offsets = torch.arange(0, len(rollouts) + 1, size)
    advantages = group_advantage(
        torch.tensor(rewards, dtype=torch.float32),
        offsets,
        baseline=objective.baseline,
        scale=objective.scale,
    ).tolist()
    groups = [
        Group(
            prompt=prompt,
            rollouts=tuple(rollouts[i * size : (i + 1) * size]),
            rewards=tuple(rewards[i * size : (i + 1) * size]),
            advantages=tuple(advantages[i * size : (i + 1) * size]),
        )
        for i, prompt in enumerate(prompts)
    ]
    return groups, texts


def judged(judge: Judge, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """One reward for each (prompt, text) pair. Raises RunFailed where the judge returns anything else."""
    rewards = judge(prompts, texts)
    if len(rewards) != len(texts):
        raise RunFailed(f"the judge must return one reward a response: got {len(rewards)} for {len(texts)}")
    bad = (~torch.tensor(rewards, dtype=torch.float32).isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise RunFailed(f"rewards must be finite in float32: the judge gave {rewards[first]} for {texts[first]!r}")
    return rewards
