"""Reward functions. A user's own take an ``Answer``: ``from isomorph.curriculum.rewards import Answer``."""

from isomorph.curriculum.rewards.answer import Answer as Answer
