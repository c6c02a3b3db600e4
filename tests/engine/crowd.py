"""Gloo ranks on this machine, each a process of its own, that run given functions."""

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from apart import apart, home_of, load_home

from isomorph.engine.distributed.launch import open_ranks


class Crowd:
    """``ask(function, *arguments)`` runs ``function(ranks, *arguments)`` on every rank."""

    def __init__(self, num_ranks: int, num_nodes: int = 1) -> None:
        context = apart()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, num_ranks, num_nodes, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((home_of(function), function.__qualname__, arguments))
        assert all(pipe.poll(300) for pipe in self.pipes)
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0


def serve(rank: int, num_ranks: int, num_nodes: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    per_node = num_ranks // num_nodes
    started_by_torchrun = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(rank // per_node),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(started_by_torchrun)
    with open_ranks() as ranks:
        while (asked := pipe.recv()) is not None:
            home, function, arguments = asked
            pipe.send(getattr(load_home(*home), function)(ranks, *arguments))
