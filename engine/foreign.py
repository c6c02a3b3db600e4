"""Errors of other libraries as UserError, and text of models and users made safe to print."""

import contextlib
import re
from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from isomorph.engine.config import UserError

# Terminals interpret control characters (line feed and tab are harmless) and marks that change the direction of text;
# half a surrogate pair cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class PrintableConsole(Console):
    """A console that prints no control character of a text: what models, data and recipes wrote is shown, not obeyed.

    Names come from recipes, run folders and rows, and pass through many sentences and tables on their way here.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of ``renderable`` with ``printable`` texts; those that move rich's own cursor stay."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


@contextlib.contextmanager
def foreign(failure: str) -> Iterator[None]:
    """Context for calls of another library: turns what they raise into ``UserError("<failure>: <cause>")``.

    ``failure`` says what could not be done, and on which file or row. UserError and MemoryError pass unchanged.
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
    """Returns types and messages of ``error`` and of the exceptions that caused it, in full, on one line."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        message = one_line(str(link))
        if not any(message in part for part in parts):
            parts.append(f"{type(link).__name__}: {message}" if message else type(link).__name__)
        link = link.__cause__
    return "; from ".join(parts)


def printable(text: str) -> str:
    """Returns ``text`` with every terminal control character written as an escape: ESC as ``\\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Returns ``text`` printable and without line breaks."""
    return " ".join(printable(text).split())


def shortened(text: str, max_chars: int = 200) -> str:
    """Returns ``text`` on one line; of a longer one its start and its end, where an answer is."""
    line = one_line(text)
    half = max_chars // 2
    return line if len(line) <= max_chars else f"{line[:half]} ... {line[-half:]}"
