"""Which model families are trained, and what of a family's configuration is not supported."""

from typing import Any

from isomorph.engine.config import UserError

# model_type -> seen with this interface in tests/engine/test_policy.py
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def refuse_unsupported(config: Any) -> None:
    if config.model_type not in SUPPORTED:
        raise UserError(f"model type {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := sorted(layer_types - {"full_attention", "sliding_attention"}):
        raise UserError(f"layers of type {unknown[0]!r} are not supported: packed attention sees the whole prompt")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise UserError(f"rope_type {rope_type!r} is not supported: its angles depend on the batch's longest sequence")
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(f"attention_dropout must be 0, got {config.attention_dropout}")


def sliding_window(config: Any) -> int | None:
    """How many tokens back a layer sees at most, itself included; None where every layer sees all of them.

    Up to this length a sequence is computed as if there were no window.
    """
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.sliding_window if slides or config.model_type == "mistral" else None
