"""The hook by which the attention layers of transformers' models call a function of ours.

    attend(layer, q_BHTd, k_BKTd, v_BKTd, scale) -> [B, T, H, d]

``layer`` is the layer's index; q and k are rotated already. transformers looks an attention function up by the name
that a model was loaded with. Two names are registered, when a model first needs one: "isomorph" always calls
``attend``; "isomorph_or_sdpa" calls it where the caller of the model passes one, and transformers' own sdpa otherwise.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isomorph.engine.config import UserError
from isomorph.engine.model.families import refuse_unsupported, sliding_window
from isomorph.kernels.packed_attention import packed_attention
from isomorph.kernels.packed_layout import PackedLayout

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@torch.compiler.disable  # reads module.layer_idx, which would force one compilation for each layer
def _attend_from_outside(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, attend: Attend, **_: Any
) -> tuple[Tensor, None]:
    """What a layer calls; ``attend`` is a keyword argument that transformers passes through from the model's call."""
    return attend(module.layer_idx, q, k, v, scaling), None


def _attend_from_outside_or_sdpa(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, attend: Attend | None = None, **options: Any
) -> tuple[Tensor, None]:
    if attend is not None:
        return _attend_from_outside(module, q, k, v, None, attend=attend, **options)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **options)


@functools.cache
def registered_attention() -> str:
    """The ``attn_implementation`` of models that always call ``attend``; registered at the first call."""
    ALL_ATTENTION_FUNCTIONS.register("isomorph", _attend_from_outside)
    ALL_ATTENTION_FUNCTIONS.register("isomorph_or_sdpa", _attend_from_outside_or_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register("isomorph_or_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "isomorph"


def attend_packed(layout: PackedLayout) -> Attend:
    """The ``attend`` for one packed batch of this layout: B = 1, causal within each sequence and its prompt."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q_THd, k_TKd, v_TKd = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed_attention(q_THd, k_TKd, v_TKd, layout, scale=scale)[None]

    return attend


def let_attend(model: Any) -> None:
    """Makes another trainer's model accept ``model(..., attend=...)``; without that argument it runs as before.

    Raises UserError where the model's type, attention, rotary embedding or dropout is not supported, where a sliding
    window is shorter than its positions, or where it was not loaded with attn_implementation="sdpa".
    """
    refuse_unsupported(model.config)
    if (window := sliding_window(model.config)) and window < model.config.max_position_embeddings:
        raise UserError(
            f"sliding-window attention over {window} tokens is not supported with TRL's trainers, whose sequences may "
            "be longer than the window: use a model without one"
        )
    if (loaded := model.config._attn_implementation) not in ("sdpa", "isomorph_or_sdpa"):
        raise UserError(f"the model must be loaded with attn_implementation='sdpa', got {loaded!r}")
    registered_attention()
    model.config._attn_implementation = "isomorph_or_sdpa"
