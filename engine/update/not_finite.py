"""Where NaN or infinity comes first: in which weight, which module's output, or which gradient."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from isomorph.engine.distributed.fsdp import local_shard
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import PackedBatch


def not_finite_weight(parameters: Mapping[str, Any]) -> str | None:
    """The name of the first weight that holds NaN or infinity, of this rank's shards; None if there is none."""
    return next((name for name, p in parameters.items() if not local_shard(p.detach()).isfinite().all()), None)


@torch.no_grad()
def origin_in_forward(policy: Policy, batch: PackedBatch) -> str:
    """A sentence on where log-probabilities of ``batch`` that are not finite come from; repeats its forward pass.

    With FSDP only the weights are looked at, because a forward pass takes all ranks.
    """
    parameters = policy.named_parameters()
    if broken := not_finite_weight(parameters):
        return f"the weight {broken} holds numbers that are not finite"
    if any(isinstance(p, DTensor) for p in parameters.values()):
        return "the weights of this rank are finite"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in policy.model.named_modules() if name]
    try:
        hidden = policy.hidden(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"all weights are finite, and the first output that is not is that of {found[0]}"
    if not hidden.isfinite().all():
        return "all weights are finite, and the decoder's last hidden rows are not"
    return "weights and hidden rows are finite, so that the unembedding's logits overflow"


def origin_in_gradient(masters: Mapping[str, Tensor]) -> str:
    """A sentence on which gradient is not finite, of this rank's shards. ``masters``: in the order of the forward."""
    known = {name: local_shard(m.grad) for name, m in masters.items() if m.grad is not None}
    broken = [name for name, gradient in reversed(known.items()) if not gradient.isfinite().all()]
    if broken:
        return f"the first in the order of the backward pass is that of {broken[0]} ({len(broken)} of {len(known)} are)"
    sizes = {name: gradient.abs().max().item() for name, gradient in known.items() if gradient.numel()}
    if not sizes:
        return "this rank has no gradient, another one's is not finite"
    name, largest = max(sizes.items(), key=lambda item: item[1])
    return f"all gradients of this rank are finite, the largest is {largest:.1e} in {name}"
