"""FSDP2: every rank holds one shard of each tensor. Conversions between shards and full tensors.

With hybrid sharding (arXiv 2304.11277, section 3.2.2) the ranks are a mesh of copies x shards: consecutive ranks hold
one copy together. Gradients are summed among its ranks in every micro-batch, and once an optimizer step among the ranks
of all copies that have the same shard.

Without FSDP a tensor is no DTensor, and each function here returns it as it is.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, Parameter

from isomorph.engine.model.policy import Policy
from isomorph.engine.record.telemetry import give_back_freed_memory


def shard(policy: Policy, num_shards: int | None = None) -> None:
    """Applies FSDP2 to the policy's model, in place: one unit for each decoder layer, one for all else.

    Each rank keeps its shard of the weights in float32 (the optimizer's masters). A layer's full weights are gathered,
    in the policy's dtype, while the layer computes; gradients are reduced by summation during the backward. Call it
    before the optimizer is built, and after everything that needs the weights as they were loaded.
    ``num_shards``: ranks that hold one copy together; must divide their number. None: all of them.

    One unit after the other is widened and cut, so that a rank holds at most one full unit in float32. Weights of a
    model on the meta device are allocated unit by unit, too, and hold no values afterwards: read them into the shards.
    """
    model, wide = policy.model, torch.promote_types(policy.dtype, torch.float32)
    mesh = _mesh(policy.device.type, dist.get_world_size(), num_shards)
    precision = MixedPrecisionPolicy(param_dtype=policy.dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for layer in model.model.layers:
        _widen(layer, wide, policy.device)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    outside = (model.model.embed_tokens, model.model.norm, model.lm_head)
    _widen(torch.nn.ModuleList(outside), wide, policy.device)
    # the loss reads the unembedding after the pass through the layers
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for module in (*model.model.layers, model):
        module.set_gradient_divide_factor(1.0)  # a sum: the denominator counts the tokens of all ranks
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "run")
    policy.unsharded = partial(_unsharded, model)


def _mesh(device_type: str, num_ranks: int, num_shards: int | None) -> DeviceMesh:
    if num_shards is None or num_shards == num_ranks:
        return init_device_mesh(device_type, (num_ranks,))
    return init_device_mesh(device_type, (num_ranks // num_shards, num_shards), mesh_dim_names=("copies", "shards"))


def sum_between_copies(model: Module, is_on: bool) -> None:
    """Whether the next backward sums gradients between copies, too; those of the ones before are then included."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_on)


def discard_gradients(model: Module) -> None:
    """Drops what FSDP2 has summed within a copy, where a pass ended before the copies were summed.

    PyTorch before 2.13 keeps it: there a run must end after such a pass.
    """
    if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


def _widen(unit: Module, wide: torch.dtype, device: torch.device) -> None:
    """Makes the parameters of ``unit`` ``wide``, in place, and allocates those on the meta device. Ties stay."""
    made: dict[Parameter, Parameter] = {}
    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                is_empty = parameter.is_meta
                data = torch.empty_like(parameter, dtype=wide, device=device) if is_empty else parameter.to(wide)
                made[parameter] = Parameter(data.detach(), requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])


@contextlib.contextmanager
def _unsharded(model: Any) -> Iterator[None]:
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
        if not torch.cuda.is_available():  # else whole weights stay in the allocator's heap while the learner runs
            give_back_freed_memory()


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a plain tensor that shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, without gradient. A collective: all ranks must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """``full``, which every rank holds, as a DTensor sharded as ``like`` is; no communication. A DTensor stays."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):
        return full
    return distribute_tensor(full.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def from_shard(own: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which this rank's shard is ``own``, sharded as ``like`` is; no communication."""
    if not isinstance(like, DTensor):
        return own
    return DTensor.from_local(
        own.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
