"""Ends a run within seconds if one of its ranks is lost, so that the others do not wait for it.

A process that dies loses its connections, and collectives on them fail: ``lost_ranks_explained`` turns that into a
RunFailed that names it. For ranks that hang, and machines that are cut off, a thread in every rank watches the
heartbeats of all others, its own launcher, and the store that they are written to, which is on node 0.
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
NOTICE_S = 4.0  # after a failed collective: a rank without a heartbeat for so long is what was lost
SILENCE_S = 20.0  # without a heartbeat for so long a rank is lost; torchrun would kill the others after 30 s
FINISHED, FAILED = b"finished", b"failed"  # a rank's last heartbeat


@contextlib.contextmanager
def lost_ranks_explained(ranks: Ranks) -> Iterator[None]:
    """Context: raises RunFailed in place of a failed collective."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no type of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunFailed(
            f"a collective failed because {ranks.lost()}; resume from the last checkpoint: isomorph train --resume DIR"
        ) from error


class Heartbeat:
    """A thread that sends this rank's heartbeat and ends the process when another rank's stops for SILENCE_S.

    It ends the process itself, because the main thread may be blocked in a collective that never returns.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.has_lost = False  # a collective has failed: this rank ends because of another
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=SILENCE_S))
        self._store = dist.PrefixStore("isomorph/heartbeat", store)
        self._keys = [str(rank) for rank in range(ranks.size)]
        self._store.set(self._keys[ranks.rank], "0")
        self._launcher = os.getppid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="heartbeat")
        ranks.wait()  # every rank has sent its first heartbeat
        ranks.lost = self.lost
        self._thread.start()

    def finish(self, last: bytes = FINISHED) -> None:
        """Stops, and tells the others that this rank has ended: as planned, or ``FAILED``."""
        self.stop()
        self._store.set(self._keys[self.ranks.rank], last.decode())

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()

    def lost(self) -> str:
        """Why a collective has failed, as a clause: which ranks have ended with an error or send no heartbeat."""
        self.has_lost = True
        try:
            before, end = self._store.multi_get(self._keys), time.monotonic() + NOTICE_S
            while FAILED not in (beats := self._store.multi_get(self._keys)) and time.monotonic() < end:
                time.sleep(BEAT_S / 4)
        except RuntimeError:
            return f"{self._launcher_of(0)} has exited or cannot be reached"
        failed = [rank for rank, beat in enumerate(beats) if beat == FAILED]
        if failed:
            return (
                f"{self.ranks.named(failed)} ended with an error, see {'its' if len(failed) == 1 else 'their'} output"
            )
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank and beats[rank] != FINISHED]
        silent = [rank for rank in others if beats[rank] == before[rank]]
        if silent:
            return f"{self.ranks.named(silent)} exited or cannot be reached"
        return "a connection between ranks broke, all of which send heartbeats"

    def _launcher_of(self, node: int) -> str:
        place = next(place for place in self.ranks.places if place.node == node)
        return f"the launcher (torchrun) of this run on {place}"

    def _listen(self) -> None:
        beat, last_new = 0, [(b"", time.monotonic())] * self.ranks.size
        while not self._stopped.wait(BEAT_S):
            beat += 1
            if os.getppid() != self._launcher:
                _end(f"{self._launcher_of(self.ranks.places[self.ranks.rank].node)} has exited")
            try:
                self._store.set(self._keys[self.ranks.rank], str(beat))
                beats = self._store.multi_get(self._keys)
            except RuntimeError as error:
                if not self._stopped.is_set():
                    why = str(error).splitlines()[0]
                    _end(f"{self._launcher_of(0)} has exited or cannot be reached ({why})")
                return
            now = time.monotonic()
            # of each rank its latest heartbeat, and when that was first read
            last_new = [last if last[0] == new else (new, now) for last, new in zip(last_new, beats, strict=True)]
            silent = [r for r, (last, since) in enumerate(last_new) if now - since > SILENCE_S and last != FINISHED]
            if silent:
                _end(f"{self.ranks.named(silent)} of this run sent no heartbeat for {SILENCE_S:.0f} s")


def _end(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}; resume from the last checkpoint: isomorph train --resume DIR\n")
    sys.stderr.flush()
    os._exit(1)
