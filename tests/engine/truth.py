"""What several files of these tests measure against."""

import copy
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor

from isomorph.engine.model.policy import Policy


def exact_norms(model: Any) -> Any:
    """transformers computes RMSNorm in float32 whatever the dtype; the truth needs float64 all the way."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)
    return model


def transformers_twin(policy: Policy) -> Any:
    """transformers' own model in float64, with the policy's weights and PyTorch's attention: nothing packed or shared.

    Their eager attention rounds to float32.
    """
    config = copy.deepcopy(policy.config)  # it would be written to
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(model.parameters(), policy.snapshot(), strict=True):
            p.copy_(value)
    return exact_norms(model)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's attention over one sequence, for ``let_attend``: q [1, H, T, d] -> [1, T, H, d]."""
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)
