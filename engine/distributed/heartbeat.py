"""A rank that dies must not leave the others waiting.

The kernel closes its connections, which ends the collective that waits for it, and a thread in every rank listens for
the heartbeat of all others, and of the launcher.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist

from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.types import RunFailed

BEAT_S = 1.0
SILENCE_S = 20.0  # a rank not heard of for so long is lost; torchrun kills the others after 30 s
FAREWELL = b"farewell"  # instead of a beat


@contextlib.contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """A collective that failed inside becomes a RunFailed that says what happened."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunFailed(
            "another rank of this run is gone: it was killed, or it failed and said why; go on with the last "
            "checkpoint: isomorph train --resume"
        ) from error


class Heartbeat:
    """A thread that beats for this rank, listens for the others, and ends the process when one is not heard of.

    It ends the process from outside the main thread, which may be waiting, in C, for the rank that is gone.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=SILENCE_S))
        self._store = dist.PrefixStore("isomorph/heartbeat", store)
        self._keys = [str(rank) for rank in range(ranks.size)]
        self._store.set(self._keys[ranks.rank], "0")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="heartbeat")
        ranks.wait()  # every rank has beaten once
        self._thread.start()

    def bid_farewell(self) -> None:
        """The others must not miss this rank: it is done."""
        self.stop()
        self._store.set(self._keys[self.ranks.rank], FAREWELL.decode())

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        beat, heard = 0, [(b"", time.monotonic())] * self.ranks.size
        while not self._stopped.wait(BEAT_S):
            beat += 1
            try:
                self._store.set(self._keys[self.ranks.rank], str(beat))
                beats = self._store.multi_get(self._keys)
            except RuntimeError as error:
                if not self._stopped.is_set():
                    _end(f"the launcher of this run is gone ({str(error).splitlines()[0]})")
                return
            now = time.monotonic()
            heard = [last if last[0] == new else (new, now) for last, new in zip(heard, beats, strict=True)]
            silent = [r for r, (said, since) in enumerate(heard) if now - since > SILENCE_S and said != FAREWELL]
            if silent:
                _end(f"rank {silent[0]} of this run has not been heard of for {SILENCE_S:.0f} s")


def _end(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}; go on with the last checkpoint: isomorph train --resume\n")
    sys.stderr.flush()
    os._exit(1)
