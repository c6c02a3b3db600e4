"""How a command ends where its input is wrong or its run failed."""

import sys
from typing import NoReturn

from isomorph.engine.foreign import one_line


def fail(message: str, code: int) -> NoReturn:
    """Prints one ``error:`` line and ends the process with ``code``: 2 for wrong input, 1 for a run that failed."""
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.exit(code)
