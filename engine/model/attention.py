"""How the layers of transformers' models attend: by a function that comes from outside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isomorph.engine.config import UserError
from isomorph.engine.model.families import refuse_unsupported, sliding_window
from isomorph.kernels.packed_attention import PackedLayout, packed_attention

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@torch.compiler.disable  # it knows its layer by number: compiled, each layer would be compiled by itself
def _attend_from_outside(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, attend: Attend, **_: Any
) -> tuple[Tensor, None]:
    """The attention function that the layers call; ``attend`` comes down from ``Policy.backbone``."""
    return attend(module.layer_idx, q, k, v, scaling), None


def _attend_from_outside_or_sdpa(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, attend: Attend | None = None, **options: Any
) -> tuple[Tensor, None]:
    if attend is not None:
        return _attend_from_outside(module, q, k, v, None, attend=attend, **options)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **options)


ALL_ATTENTION_FUNCTIONS.register("isomorph", _attend_from_outside)
ALL_ATTENTION_FUNCTIONS.register("isomorph_or_sdpa", _attend_from_outside_or_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register("isomorph_or_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attend_packed(layout: PackedLayout) -> Attend:
    """For one packed batch, B = 1, of this layout."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q_THd, k_TKd, v_TKd = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed_attention(q_THd, k_TKd, v_TKd, layout, scale=scale)[None]

    return attend


def let_attend(model: Any) -> None:
    """Another trainer's model: ``model(..., attend=...)`` attends by ``attend`` from now on, and as before without it.

    Raises UserError for a model whose attention, positions or dropout ours does not know.
    """
    refuse_unsupported(model.config)
    if (window := sliding_window(model.config)) and window < model.config.max_position_embeddings:
        raise UserError(
            f"sliding-window attention over {window} tokens is not supported here: packed attention sees the whole "
            "prompt, and this trainer's sequences may be longer"
        )
    if (loaded := model.config._attn_implementation) not in ("sdpa", "isomorph_or_sdpa"):
        raise UserError(f"the model must have been loaded with attn_implementation='sdpa', got {loaded!r}")
    model.config._attn_implementation = "isomorph_or_sdpa"
