"""Reward functions as users of TRL write them."""

import asyncio
import re


def number_reward(completions, answer, **kwargs):
    """1 where the last number is that of the row; does not apply to a row without one."""
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        wanted = re.search(r"#### (-?[\d,]+)", gold)
        found = re.findall(r"-?\d+", text)
        rewards.append(None if wanted is None else float(bool(found) and found[-1] == wanted[1].replace(",", "")))
    return rewards


def short_reward(completion_ids, trainer_state, **kwargs):
    return [trainer_state.global_step - 0.1 * len(ids) for ids in completion_ids]


async def patient_reward(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(prompt)) for prompt in prompts]


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, completions, **kwargs):
        return [self.factor * len(completion) for completion in completions]
