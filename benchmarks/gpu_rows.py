"""Results of the GPU suite: one file of JSON Lines that several processes append to, each line on disk at once."""

import json
import os
from pathlib import Path
from typing import Any


class Absent(Exception):
    """What a part needs and this machine lacks."""


def append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
