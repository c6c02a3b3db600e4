"""What several files of these tests measure against."""

from types import MethodType
from typing import Any

from torch import Tensor


def exact_norms(model: Any) -> Any:
    """transformers computes RMSNorm in float32 whatever the dtype; the truth needs float64 all the way."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)
    return model
