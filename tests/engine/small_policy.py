"""A tiny policy over a vocabulary of cooking, for the tests of the model, its files and its text."""

from typing import Any

import torch
from torch import Tensor

from isomorph.engine.config import TinyModel
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import PackedBatch
from isomorph.kernels.packed_layout import PackedLayout

CPU = torch.device("cpu")
VOCABULARY = ["<answer>", "</answer>", "stir", "take", "minutes", "in", "total", ":", ",", ".", *map(str, range(31))]
TINY = TinyModel(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=64)


def tiny_policy(dtype: torch.dtype = torch.float32) -> Policy:
    return build_tiny(TINY, VOCABULARY, seed=0, dtype=dtype, device=CPU)


def packed(groups: list[tuple[list[int], list[list[int]]]]) -> PackedBatch:
    layout = PackedLayout.from_groups([len(p) for p, _ in groups], [[len(r) for r in rs] for _, rs in groups])
    none = torch.tensor([])
    return PackedBatch(
        token_ids=torch.tensor([i for p, rs in groups for part in (p, *rs) for i in part]),
        positions=layout.positions,
        layout=layout,
        row_index=none,
        target_ids=none,
        seq_id=none,
        sampler_logprob=None,
        advantage=none,
    )


def logits(model: Any, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits[0]
