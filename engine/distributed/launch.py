"""The group of processes that torchrun started."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from isomorph.engine.config import UserError
from isomorph.engine.distributed.heartbeat import Heartbeat, lost_ranks_explained
from isomorph.engine.distributed.ranks import ALONE, Ranks

PATIENCE = datetime.timedelta(minutes=30)  # of a collective: ranks wait for each other's longest response


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started, this process among them; without torchrun, one alone.

    On a GPU each rank of a machine takes a device of its own.
    """
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        yield ALONE
        return
    _take_device()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), size)
    heartbeat = Heartbeat(ranks)
    try:
        with lost_ranks_explained():
            yield ranks
        heartbeat.bid_farewell()
    finally:
        heartbeat.stop()
        if dist.is_initialized():  # vLLM ends the group with itself
            dist.destroy_process_group()


def _take_device() -> None:
    if not torch.cuda.is_available():
        return
    local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= found:
        raise UserError(f"every rank needs a GPU of its own: this machine has {found}, give --nproc-per-node {found}")
    torch.cuda.set_device(local)
