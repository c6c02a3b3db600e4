"""Signs of life of a run whose console is silent, and the time that is left."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

LINE_S = 10.0  # longest silence: of a console line while steps end, of a sign of life while none does
MOST_S = 320.0  # between two signs of life of one silence; each is twice as long after the one before
PACE_STEPS = 20  # last steps whose pace tells how long the rest takes
WORDS = {  # of phases, in the middle of a sentence
    "load": "loading model and data",
    "publish": "weight sync",
    "generate": "sampling",
    "judge": "rewards",
    "update": "optimizer steps",
    "exam": "evaluation",
    "checkpoint": "writing a checkpoint",
}


@contextlib.contextmanager
def signs_of_life(silence_s: Callable[[], float], say: Callable[[float], None], *, first_s: float) -> Iterator[None]:
    """Context in which ``say(seconds)`` is called from a thread after ``first_s`` of silence, then ever more rarely.

    ``silence_s()``: seconds since the console last said something; what ``say`` prints must not count.
    """
    ended = threading.Event()

    def watch() -> None:
        due_s = first_s
        while not ended.wait(first_s / 4):
            silent_s = silence_s()
            if silent_s < first_s:
                due_s = first_s
            elif silent_s >= due_s:
                say(silent_s)
                due_s = silent_s + min(silent_s, MOST_S)

    thread = threading.Thread(target=watch, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Pace:
    """How long the steps that are left take, at the pace of the last ``PACE_STEPS``."""

    def __init__(self) -> None:
        self.total: int | None = None  # steps of the run; None: not known
        self._ends: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)

    def begin(self, done: int, total: int) -> None:
        """Starts the clock of step ``done`` + 1."""
        self.total = total
        self._ends.append((done, time.perf_counter()))

    def observe(self, step: int) -> None:
        """The end of ``step``."""
        self._ends.append((step, time.perf_counter()))

    def left(self) -> str:
        """Such as "12 min left"; "" at the end, and where nothing is known yet."""
        if self.total is None or len(self._ends) < 2:
            return ""
        (first, since), (last, until) = self._ends[0], self._ends[-1]
        if last >= self.total or last <= first:
            return ""
        return f"{in_words((self.total - last) * (until - since) / (last - first))} left"


def in_words(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
