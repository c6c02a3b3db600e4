"""FSDP2: which part of each tensor lies on this rank."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from isomorph.engine.model.policy import Policy


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
