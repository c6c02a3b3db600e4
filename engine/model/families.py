"""The supported model families, and the features of their configurations that are not supported.

``Policy`` drives transformers' decoder layers itself. It therefore requires of a family:

    model.model.embed_tokens, .layers, .norm, .rotary_emb and model.lm_head, which has no bias
    hidden = norm(layers(embed_tokens(ids))), logits = lm_head(hidden): no embedding scale, no residual multiplier, no
        logits scale, no softcap on attention scores or logits
    rotary positions by one rotary_emb for all layers, whose angles depend on the position alone
    causal attention through transformers' table of attention functions, in layers called as
        layer(hidden, position_embeddings=..., attend=...) and returning one tensor: no router loss (mixture of experts)
    no dropout

Where a layer's norms stand is the layer's own affair: before attention and MLP (llama, mistral, qwen2, qwen3), or after
them, with queries and keys normalised over all heads together (olmo2).

``tests/engine/test_policy.py`` compares hidden states and logits with transformers' own forward for each family.
"""

from typing import Any

from isomorph.engine.config import UserError

# model_type of transformers' configurations; each has a row in tests/engine/test_policy.py
SUPPORTED = ("llama", "mistral", "olmo2", "qwen2", "qwen3")


def refuse_unsupported(config: Any) -> None:
    """Raises UserError if a model with this configuration of transformers would not be computed exactly."""
    if config.model_type not in SUPPORTED:
        raise UserError(f"model type {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := sorted(layer_types - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"layers of type {unknown[0]!r} are not supported: use a model whose layers are all full_attention or "
            "sliding_attention"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise UserError(
            f"rope_type {rope_type!r} is not supported, because its angles depend on the longest sequence of a batch: "
            "use a model with another rope_type"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(f"attention_dropout must be 0 in the model's config.json, got {config.attention_dropout}")


def sliding_window(config: Any) -> int | None:
    """Length of the sliding attention window in tokens, the token itself included; None if no layer has one.

    A sequence of at most this length gives the same results with and without the window.
    """
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.sliding_window if slides or config.model_type == "mistral" else None


def normalises_heads(config: Any) -> bool:
    """Whether queries and keys pass an RMSNorm, of each head (Qwen3) or of all (OLMo-2); the planner counts it."""
    return config.model_type in ("qwen3", "olmo2")


def normalises_outputs(config: Any) -> bool:
    """Whether the norms of a layer follow attention and MLP (OLMo-2) instead of standing before them."""
    return config.model_type == "olmo2"
