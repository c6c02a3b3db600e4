"""A reward that knows nothing of the task."""

from hashlib import sha256

from isomorph.curriculum.rewards import Answer


def coin(answer: Answer) -> float:
    """0 or 1 with equal chances, by a hash of prompt and response."""
    return float(sha256(f"{answer.prompt}\n{answer.text}".encode()).digest()[0] & 1)
