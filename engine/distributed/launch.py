"""Joins the process group of torchrun, and takes a device for this rank."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from isomorph.engine.config import UserError
from isomorph.engine.distributed.heartbeat import Heartbeat, lost_ranks_explained
from isomorph.engine.distributed.ranks import ALONE, Ranks

TIMEOUT = datetime.timedelta(minutes=30)  # of a collective, in which ranks wait for each other's longest response


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Context: the ranks of this run as torchrun started them; ``ALONE`` without torchrun.

    On GPUs, each rank of a machine takes the device of its LOCAL_RANK. Raises UserError where there are fewer GPUs than
    ranks, RunFailed in place of a collective that fails inside.
    """
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        yield ALONE
        return
    _take_device()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), size)
    heartbeat = Heartbeat(ranks)
    try:
        with lost_ranks_explained():
            yield ranks
        heartbeat.finish()
    finally:
        heartbeat.stop()
        if dist.is_initialized():  # vLLM's clean-up may have destroyed the group
            dist.destroy_process_group()


def _take_device() -> None:
    if not torch.cuda.is_available():
        return
    local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= found:
        raise UserError(f"each rank needs a GPU of its own, this machine has {found}: use --nproc-per-node {found}")
    torch.cuda.set_device(local)
