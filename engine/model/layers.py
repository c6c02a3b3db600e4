"""Decoder layers of transformers' models with fused kernels where the device has them: norms, SwiGLU, rotary embedding.

The modules, their parameters and names stay transformers' own. ``fuse_layers`` replaces their classes, in place, by
subclasses whose ``forward`` calls the kernels; where those are not selected (in float64, inside torch.compile, which
fuses by itself) the class's own ``forward`` runs.

On an H200 the kernels of an update that were neither products nor attention took 35 % of its time, and for 13 % the
device had nothing to run (benchmarks/results/gpu/2026-11-27-h200-2.jsonl).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from isomorph.engine.model.attention import Attend
from isomorph.kernels.rms_norm import add_rms_norm, fused_body, rms_norm
from isomorph.kernels.rotary import rotary
from isomorph.kernels.swiglu import swiglu

Rotary = tuple[Tensor, Tensor]  # cosines and sines [B, T, d]


def fuse_layers(model: Any) -> None:
    """Replaces the classes of the decoder layers and of the last norm of transformers' ``model``, in place.

    Layers with another activation than SiLU keep theirs: the fused MLP is SwiGLU.
    """
    if model.config.hidden_act in ("silu", "swish"):
        for layer in model.model.layers:
            layer.__class__ = _fused_layer(_own_class(layer))
    model.model.norm.__class__ = _fused_norm(_own_class(model.model.norm))


def _own_class(module: Any) -> type:
    """transformers' class, also of a module that is fused already."""
    kind = type(module)
    return kind.__mro__[1] if getattr(kind, "runs_fused", False) else kind


@functools.cache
def _fused_layer(own: type) -> type:
    def forward(
        self: Any,
        hidden_states: Tensor,
        *,
        position_embeddings: Rotary | None = None,
        attend: Attend | None = None,
        **others: Any,
    ) -> Tensor:
        norm = self.post_attention_layernorm  # the one that every family has
        fits = attend is not None and not others and _runs_fused(hidden_states, norm.weight)
        if fits and attend is not None and position_embeddings is not None:
            decoded = _decoded if hasattr(self, "input_layernorm") else _decoded_norms_last
            return decoded(self, hidden_states, position_embeddings, attend)
        if attend is not None:
            others["attend"] = attend
        result: Tensor = own.forward(self, hidden_states, position_embeddings=position_embeddings, **others)  # type: ignore[attr-defined]
        return result

    return type(own.__name__, (own,), {"forward": forward, "runs_fused": True})


@functools.cache
def _fused_norm(own: type) -> type:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _runs_fused(hidden_states, self.weight):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        result: Tensor = own.forward(self, hidden_states)  # type: ignore[attr-defined]
        return result

    return type(own.__name__, (own,), {"forward": forward, "runs_fused": True})


def _runs_fused(hidden: Tensor, weight_D: Tensor) -> bool:
    return not torch.compiler.is_compiling() and fused_body(hidden, weight_D) is not None


def _decoded(layer: Any, hidden_BTD: Tensor, cos_sin: Rotary, attend: Attend) -> Tensor:
    """The layer's output [B, T, D]: llama, mistral, qwen2, and qwen3, which also normalises queries and keys."""
    norm = layer.input_layernorm
    out_BTD = _attended(layer.self_attn, rms_norm(hidden_BTD, norm.weight, norm.variance_epsilon), cos_sin, attend)
    norm = layer.post_attention_layernorm
    normal_BTD, hidden_BTD = add_rms_norm(out_BTD, hidden_BTD, norm.weight, norm.variance_epsilon)
    return hidden_BTD + _gated(layer.mlp, normal_BTD)


def _decoded_norms_last(layer: Any, hidden_BTD: Tensor, cos_sin: Rotary, attend: Attend) -> Tensor:
    """The layer's output [B, T, D]: olmo2, whose norms follow attention and MLP."""
    out_BTD, norm = _attended(layer.self_attn, hidden_BTD, cos_sin, attend), layer.post_attention_layernorm
    hidden_BTD = hidden_BTD + rms_norm(out_BTD, norm.weight, norm.variance_epsilon)
    out_BTD, norm = _gated(layer.mlp, hidden_BTD), layer.post_feedforward_layernorm
    return hidden_BTD + rms_norm(out_BTD, norm.weight, norm.variance_epsilon)


def _attended(attention: Any, x_BTD: Tensor, cos_sin: Rotary, attend: Attend) -> Tensor:
    """The attention module's output [B, T, D] for its input."""
    num_batch, num_tok = x_BTD.shape[:2]
    q, k, v = (
        project(x_BTD).view(num_batch * num_tok, -1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = _normal_heads(q, attention, "q_norm"), _normal_heads(k, attention, "k_norm")
    # [1, T, d] where all rows of a batch have the same positions
    cos, sin = (x.expand(num_batch, -1, -1).reshape(num_batch * num_tok, -1) for x in cos_sin)
    q, k = rotary(q, k, cos, sin)
    v = v.view(num_batch * num_tok, -1, attention.head_dim)
    q_BHTd, k_BKTd, v_BKTd = (x.view(num_batch, num_tok, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out_BTHd = attend(attention.layer_idx, q_BHTd, k_BKTd, v_BKTd, attention.scaling)
    out_BTD: Tensor = attention.o_proj(out_BTHd.reshape(num_batch, num_tok, -1))
    return out_BTD


def _gated(mlp: Any, x_BTD: Tensor) -> Tensor:
    out_BTD: Tensor = mlp.down_proj(swiglu(mlp.gate_proj(x_BTD), mlp.up_proj(x_BTD)))
    return out_BTD


def _normal_heads(x_NE: Tensor, attention: Any, name: str) -> Tensor:
    """x as heads [N, H, d], normalised where the family does so: each head (qwen3), or all as one row (olmo2)."""
    norm = getattr(attention, name, None)
    if norm is not None:
        x_NE = rms_norm(x_NE.view(len(x_NE), -1, len(norm.weight)), norm.weight, norm.variance_epsilon)
    return x_NE.view(len(x_NE), -1, attention.head_dim)
