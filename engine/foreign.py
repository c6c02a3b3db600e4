"""What comes from outside: the errors of other libraries, and text that a model or a user wrote."""

import contextlib
import re
from collections.abc import Iterator

from isomorph.engine.config import UserError

# A terminal obeys control characters (line feed and tab may stay) and the marks that turn the direction of a line;
# half a surrogate pair cannot be encoded at all.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@contextlib.contextmanager
def foreign(failure: str) -> Iterator[None]:
    """Around calls of another library: what they raise becomes ``UserError("<failure>: <the whole cause>")``.

    ``failure`` says what could not be done, and on which file or row.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each library raises types of its own
        raise UserError(f"{failure}: {cause_of(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; PyO3 derives it from BaseException
            raise
        raise UserError(f"{failure}: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """Type and message of ``error`` and of the errors that it was raised from, whole, on one line."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        message = one_line(str(link))
        if not any(message in part for part in parts):
            parts.append(f"{type(link).__name__}: {message}" if message else type(link).__name__)
        link = link.__cause__
    return "; from ".join(parts)


def printable(text: str) -> str:
    """``text`` with everything that a terminal would obey written as an escape: ESC as ``\\x1b``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Printable, and without line breaks."""
    return " ".join(printable(text).split())


def shortened(text: str, max_chars: int = 200) -> str:
    """On one line, and cut: the start and the end of a long text stay, an answer is at its end."""
    line = one_line(text)
    half = max_chars // 2
    return line if len(line) <= max_chars else f"{line[:half]} ... {line[-half:]}"
