"""Saves a checkpoint and dies before one of the calls that change its folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isomorph.engine.record.checkpoint import save_checkpoint
from isomorph.engine.types import RunState

CHANGING = ("fsync", "rename", "unlink", "rmdir", "mkdir")
CODE = 9


def save_and_die(root: Path, calls_left: int) -> None:
    """Saves twos as step 2; ends with ``CODE`` before the call ``calls_left`` of those in ``CHANGING``."""

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls_left
            if calls_left == 0:
                os._exit(CODE)
            calls_left -= 1
            return real(*args, **options)

        return call

    for name in CHANGING:
        setattr(os, name, dying(getattr(os, name)))
    save_checkpoint(root, RunState(step=2), {"w": torch.full((10,), 2.0)}, {}, keep=1)
