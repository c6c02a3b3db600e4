"""Models with random weights, prompts and batches for the parts of the GPU suite."""

import random
from typing import Any

import torch
from compare import DEVICE

from isomorph.kernels.packed_layout import PackedLayout

# hidden, layers, heads, KV heads, intermediate
QWEN_1_5B = (1536, 28, 12, 2, 8960)
SMOLLM2_135M = (576, 30, 9, 3, 1536)
TINY = (32, 2, 2, 1, 64)
VOCAB_QWEN, VOCAB_SMOLLM2, VOCAB_TINY = 151_900, 49_148, 100  # words; a few special tokens come on top


def make_policy(shape: tuple[int, ...], vocab: int, dtype: torch.dtype | None = None) -> Any:
    """A decoder of this shape on the device; bfloat16 on a GPU, float32 elsewhere, where nothing is said."""
    from isomorph.engine.config import TinyModel
    from isomorph.engine.model.load import build_tiny

    names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
    tiny = TinyModel(**dict(zip(names, shape, strict=True)), max_model_len=4096)
    dtype = dtype or (torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    with torch.device(DEVICE):  # a billion random numbers are made where they are wanted
        return build_tiny(tiny, [f"w{i}" for i in range(vocab)], seed=0, dtype=dtype, device=DEVICE)


def as_float32(policy: Any, shape: tuple[int, ...], vocab: int) -> Any:
    """A float32 model with the weights of ``policy``, which ``make_policy`` made of this shape."""
    wide = make_policy(shape, vocab, torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(wide.named_parameters().values(), policy.named_parameters().values(), strict=True):
            mine.copy_(theirs)
    return wide


def changed(policy: Any, *, recomputes: bool = False, compiles: bool = False) -> Any:
    """The same model; ``recomputes``: every layer runs again in the backward."""
    from isomorph.engine.model.policy import Policy

    return Policy(policy.model, policy.text, gradient_checkpointing_every=1 if recomputes else None, compiles=compiles)


def make_tokens(rng: random.Random, num: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(4, vocab) for _ in range(num))


def make_prompts(num: int, length: int, vocab: int) -> list[Any]:
    from isomorph.engine.types import Prompt

    rng = random.Random(0)
    rows = [make_tokens(rng, length, vocab) for _ in range(num)]
    return [Prompt(prompt_id=i, token_ids=row, task="", representation="", payload=None) for i, row in enumerate(rows)]


def make_batch(layout: PackedLayout) -> Any:
    """Random tokens in this layout, nothing to predict."""
    from isomorph.engine.types import PackedBatch

    layout = layout.to(DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    return PackedBatch(
        token_ids=torch.randint(4, 100, (layout.num_tok,), device=DEVICE),
        positions=layout.positions,
        layout=layout,
        row_index=nothing,
        target_ids=nothing,
        seq_id=nothing,
        sampler_logprob=None,
        advantage=torch.zeros(0, device=DEVICE),
    )


def body_flop(policy: Any, layouts: list[PackedLayout]) -> int:
    """Forward and backward of the layers, without the head: 6 a weight and token, 14 d H a visible pair and layer."""
    config = policy.config
    weights = sum(p.numel() for p in policy.model.model.layers.parameters())
    per_pair = 14 * policy.head_dim * config.num_attention_heads * config.num_hidden_layers
    return 6 * weights * sum(layout.num_tok for layout in layouts) + per_pair * sum(map(_visible_pairs, layouts))


def _visible_pairs(layout: PackedLayout) -> int:
    pairs = 0
    for prompt, responses in zip(layout.prompt_lens, layout.response_lens, strict=True):
        pairs += prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in responses)
    return pairs
