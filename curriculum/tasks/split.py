"""Which split a generated instance belongs to: training, the development exam or the test exam, by its key."""

import hashlib
from typing import Literal

from isomorph.curriculum.tasks.task import Split

Part = Literal["train", "dev", "test"]
SplitBy = Literal["procedure", "structure"]
EXAM_SHARE = 8  # of so many keys one belongs to the development exam, another to the test exam


def part_of(split: Split) -> Part:
    """``split``, with "dev" for its other name "eval". Raises ValueError for an unknown one."""
    if split == "eval":
        return "dev"
    if split not in ("train", "dev", "test"):
        raise ValueError(f'split must be "train", "dev" or "test" ("eval" is "dev"), got {split!r}')
    return split


def part_of_key(key: str, salt: int | None = None) -> Part:
    """``key``: hexadecimal digits. ``salt``: another one divides the same keys in another way."""
    digits = key if salt is None else hashlib.sha256(f"{salt}:{key}".encode()).hexdigest()
    chosen = int(digits, 16) % EXAM_SHARE
    return "dev" if chosen == 0 else "test" if chosen == 1 else "train"
