"""Ends a run within seconds if one of its ranks is lost, so that the others do not wait for it.

A process that dies loses its connections, and collectives on them fail: ``lost_ranks_explained`` turns that into a
RunFailed. For ranks that hang, a thread in every rank watches the heartbeats of all others and the launcher's store.
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
SILENCE_S = 20.0  # without a heartbeat for so long a rank is lost; torchrun would kill the others after 30 s
FINISHED = b"finished"  # a rank's last heartbeat


@contextlib.contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Context: raises RunFailed in place of a failed collective."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no type of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunFailed(
            "a collective failed because another rank exited, see its output; resume from the last checkpoint: "
            "isomorph train --resume DIR"
        ) from error


class Heartbeat:
    """A thread that sends this rank's heartbeat and ends the process when another rank's stops for SILENCE_S.

    It ends the process itself, because the main thread may be blocked in a collective that never returns.
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
        ranks.wait()  # every rank has sent its first heartbeat
        self._thread.start()

    def finish(self) -> None:
        """Stops, and tells the others that this rank has ended as planned."""
        self.stop()
        self._store.set(self._keys[self.ranks.rank], FINISHED.decode())

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        beat, last_new = 0, [(b"", time.monotonic())] * self.ranks.size
        while not self._stopped.wait(BEAT_S):
            beat += 1
            try:
                self._store.set(self._keys[self.ranks.rank], str(beat))
                beats = self._store.multi_get(self._keys)
            except RuntimeError as error:
                if not self._stopped.is_set():
                    _end(f"the launcher (torchrun) of this run has exited ({str(error).splitlines()[0]})")
                return
            now = time.monotonic()
            # of each rank its latest heartbeat, and when that was first read
            last_new = [last if last[0] == new else (new, now) for last, new in zip(last_new, beats, strict=True)]
            silent = [r for r, (last, since) in enumerate(last_new) if now - since > SILENCE_S and last != FINISHED]
            if silent:
                _end(f"rank {silent[0]} of this run has sent no heartbeat for {SILENCE_S:.0f} s")


def _end(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}; resume from the last checkpoint: isomorph train --resume DIR\n")
    sys.stderr.flush()
    os._exit(1)
