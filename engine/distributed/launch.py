"""Joins the process group of torchrun, and takes a device for this rank."""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist

from isomorph.engine.config import UserError
from isomorph.engine.distributed.heartbeat import FAILED, FINISHED, Heartbeat, lost_ranks_explained
from isomorph.engine.distributed.ranks import ALONE, Place, Ranks
from isomorph.engine.types import RunFailed

TIMEOUT = datetime.timedelta(minutes=30)  # of a collective, in which ranks wait for each other's longest response
JOIN_S = 180.0  # torchrun starts the ranks of all nodes together; one that has not joined by then has ended


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Context: the ranks of this run as torchrun started them; ``ALONE`` without torchrun.

    On GPUs, each rank of a machine takes the device of its LOCAL_RANK. Raises UserError where there are fewer GPUs than
    ranks, RunFailed where a rank does not join and in place of a collective that fails inside.
    """
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        yield ALONE
        return
    _take_device()
    ranks = _joined(int(os.environ["RANK"]), size)
    heartbeat = Heartbeat(ranks)
    try:
        with lost_ranks_explained(ranks):
            yield ranks
        heartbeat.finish()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the store may have gone with its node
            heartbeat.finish(FINISHED if heartbeat.has_lost else FAILED)
        raise
    finally:
        heartbeat.stop()
        if dist.is_initialized():  # vLLM's clean-up may have destroyed the group
            dist.destroy_process_group()


def _joined(rank: int, size: int) -> Ranks:
    """The ranks, when every one is there and connected to all others. Raises RunFailed."""
    address, port, node = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ.get("GROUP_RANK", "0")
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience, keys = datetime.timedelta(seconds=JOIN_S), [str(r) for r in range(size)]
    try:
        store = dist.TCPStore(
            address, port, is_master=is_server, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
        places = dist.PrefixStore("isomorph/place", store)
        places.set(str(rank), f"{node} {socket.gethostname()}")
    except RuntimeError as error:
        raise RunFailed(
            f"rank {rank} cannot reach the run's store on {address}, port {port} ({str(error).splitlines()[0]}): "
            "the address must be reachable from every node"
        ) from error
    try:
        places.wait(keys, patience)
    except RuntimeError as error:
        missing = ", ".join(key for key in keys if not places.check([key]))
        raise RunFailed(
            f"of {size} ranks these have not joined within {JOIN_S:.0f} s: {missing}; see the output of their node"
        ) from error
    told = (found.decode().split(" ", 1) for found in places.multi_get(keys))
    ranks = Ranks(rank, size, [Place(int(number), host) for number, host in told])
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("isomorph/group", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
    except RuntimeError as error:
        raise RunFailed(
            f"rank {rank} cannot connect to the other ranks ({str(error).splitlines()[0]}): GLOO_SOCKET_IFNAME, and on "
            "GPUs NCCL_SOCKET_IFNAME, name the network interface that all nodes reach"
        ) from error
    return ranks


def _take_device() -> None:
    if not torch.cuda.is_available():
        return
    local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= found:
        raise UserError(f"each rank needs a GPU of its own, this machine has {found}: use --nproc-per-node {found}")
    torch.cuda.set_device(local)
