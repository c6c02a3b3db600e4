"""An environment of the tests: replies with random tokens that depend on all before."""

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from isomorph.engine.types import Prompt, Reply

STOP = 1  # of the tests' tiny tokenizers


class Echo:
    """Replies after every turn but the ``turns``-th with tokens that depend on all before, from threads, some late."""

    def __init__(self, turns: int = 3, delay_s: float = 0.0, num_tok: int = 4) -> None:
        self.turns, self.delay_s, self.num_tok = turns, delay_s, num_tok
        self.threads = ThreadPoolExecutor(8)
        self.heard: dict[tuple[int, int], list[list[int]]] = {}
        self.open: set[tuple[int, int]] = set()
        self.lock = threading.Lock()

    def begin(self, prompt: Prompt, sample: int) -> None:
        self.open.add((prompt.prompt_id, sample))
        self.heard[prompt.prompt_id, sample] = []

    def turn(self, prompt: Prompt, sample: int, token_ids: Sequence[int], start: int) -> Future[Reply]:
        turns = self.heard[prompt.prompt_id, sample]
        turns.append(list(token_ids[start:]))
        return self.threads.submit(self._reply, tuple(token_ids), len(turns))

    def _reply(self, token_ids: tuple[int, ...], turn: int) -> Reply:
        rng = random.Random(str(token_ids))
        time.sleep(self.delay_s * random.random())
        if turn == self.turns:
            return Reply(reward=rng.random())
        return Reply(token_ids=tuple(rng.choices([STOP, *range(4, 20)], k=self.num_tok)))

    def end(self, prompt: Prompt, sample: int) -> None:
        self.open.remove((prompt.prompt_id, sample))
