"""Several devices: one process each, started by torchrun. A process is a rank.

Every rank asks the curriculum the same questions, draws and judges the responses to its share of them, and exchanges
both with the others. From there on all ranks know all groups, so statistics, denominators and the curriculum's state
are the same everywhere. Whole groups are then dealt out, evenly by their tokens; each rank makes the gradients of its
own, and the gradients are summed.

A rank that dies must not leave the others waiting: the kernel closes its connections, which ends the collective that
waits for it, and a thread in every rank listens for the heartbeat of all others, and of the launcher.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from isomorph.engine.config import UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import Finish, Rollout, RunFailed
from isomorph.kernels.packing import balanced_bins

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)  # of a collective: ranks wait for each other's longest response
BEAT_S = 1.0
SILENCE_S = 20.0  # a rank not heard of for so long is lost; torchrun kills the others after 30 s
FAREWELL = b"farewell"  # instead of a beat
BUCKET_BYTES = 64 * 2**20  # of gradients summed at once: beyond it a collective gains nothing, and it is held twice


class Ranks:
    """Which rank this process is, of how many, and what they tell each other. Alone, everything is at hand already."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """The one that writes: the log, checkpoints, the model."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks hold."""
        return list(items[self.rank :: self.size])

    def exchange(
        self, rollouts: Sequence[Rollout], texts: Sequence[str], rewards: Sequence[float], group: int
    ) -> tuple[list[Rollout], list[str], list[float]]:
        """What all ranks made of their shares of the prompts, ``group`` responses each, in the order of the prompts."""
        if self.size == 1:
            return list(rollouts), list(texts), list(rewards)
        parts = [wire.opened() for wire in self.gather(_Wire.of(rollouts, texts, rewards))]
        return (
            _woven([rollouts for rollouts, _, _ in parts], group),
            _woven([texts for _, texts, _ in parts], group),
            _woven([rewards for _, _, rewards in parts], group),
        )

    def deal(self, cost_tok: Sequence[int]) -> list[list[int]]:
        """For each rank the items that it takes, heaviest first to the rank that has least."""
        return balanced_bins(cost_tok, self.size)

    def any(self, flag: bool) -> bool:
        """True everywhere where it is anywhere."""
        return any(self.gather(flag))

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, or the UserError that it raises there; others do not call it."""
        told: list[tuple[Any, str | None]] = [(None, None)]
        if self.is_first:
            try:
                told = [(make(), None)]
            except UserError as error:
                told = [(None, str(error))]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0)
        made, refusal = told[0]
        if refusal is not None:
            raise UserError(refusal)
        return made

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes, in place, its sum over the ranks: the same bits everywhere. What FSDP has cut is one."""
        if self.size == 1:
            return
        for bucket in _buckets(t for t in tensors if not isinstance(t, DTensor)):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, own: T) -> list[T]:
        """What every rank says, in the order of the ranks."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found


ALONE = Ranks()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _woven(parts: Sequence[list[T]], run: int) -> list[T]:
    """One run of each part in turn: item i of ``share`` went to rank i modulo their number."""
    num_runs = max(len(part) for part in parts) // run
    return [thing for i in range(num_runs) for part in parts for thing in part[i * run : (i + 1) * run]]


class _Wire(NamedTuple):
    """Responses on their way: tokens as two arrays, because thousands of tensors would travel slowly."""

    about: list[tuple[int, int, Finish, int]]  # prompt_id, sample, finish, policy_version
    lens: list[int]
    token_ids: Any  # numpy's arrays are sent as they lie in memory
    sampler_logprob: Any  # None: demonstrations, or greedy responses
    texts: list[str]
    rewards: list[float]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], texts: Sequence[str], rewards: Sequence[float]) -> "_Wire":
        known = [r.sampler_logprob for r in rollouts if r.sampler_logprob is not None]
        return cls(
            about=[(r.prompt_id, r.sample, r.finish, r.policy_version) for r in rollouts],
            lens=[len(r.token_ids) for r in rollouts],
            token_ids=torch.cat([torch.empty(0, dtype=torch.int64), *(r.token_ids for r in rollouts)]).numpy(),
            sampler_logprob=torch.cat(known).numpy() if known else None,
            texts=list(texts),
            rewards=list(rewards),
        )

    def opened(self) -> tuple[list[Rollout], list[str], list[float]]:
        token_ids = torch.from_numpy(self.token_ids).split(self.lens)
        unknown = [None] * len(self.lens)
        known = self.sampler_logprob is not None and torch.from_numpy(self.sampler_logprob).split(self.lens)
        rollouts = [
            Rollout(
                prompt_id=prompt_id,
                sample=sample,
                token_ids=tokens,
                sampler_logprob=logprob,
                finish=finish,
                policy_version=version,
            )
            for (prompt_id, sample, finish, version), tokens, logprob in zip(
                self.about, token_ids, known or unknown, strict=True
            )
        ]
        return rollouts, self.texts, self.rewards


# -- FSDP2
def cut(policy: Policy) -> None:
    """Every rank keeps its part of each weight; a layer is gathered while it computes. Gradients are summed on the way.

    The parts are the float32 masters, and what is gathered is rounded to the policy's dtype: so this comes before the
    optimizer, and after whatever wants the weights as they are.
    """
    model, wide = policy.model, torch.promote_types(policy.dtype, torch.float32)
    mesh = init_device_mesh(policy.device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=policy.dtype, reduce_dtype=wide, cast_forward_inputs=False)
    model.to(wide)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # the unembedding is read after the pass through the layers
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for module in (*model.model.layers, model):
        module.set_gradient_divide_factor(1.0)  # a sum: the denominator is one for all ranks
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "run")
    policy.whole = partial(_whole, model)


@contextlib.contextmanager
def _whole(model: Any) -> Iterator[None]:
    units = [*model.model.layers, model]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor of which FSDP has left a part here. All ranks must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of ``whole``, cut as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """Undoes ``part_of`` for a local part. All ranks must ask."""
    if not isinstance(like, DTensor):
        return part
    cut_up = DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return cut_up.full_tensor()


# -- the group of processes
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
    heartbeat = _Heartbeat(ranks)
    try:
        with lost_ranks_explained():
            yield ranks
        heartbeat.bid_farewell()
    finally:
        heartbeat.stop()
        if dist.is_initialized():  # vLLM ends the group with itself
            dist.destroy_process_group()


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


def _take_device() -> None:
    if not torch.cuda.is_available():
        return
    local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= found:
        raise UserError(f"every rank needs a GPU of its own: this machine has {found}, give --nproc-per-node {found}")
    torch.cuda.set_device(local)


class _Heartbeat:
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
