"""Decoder layers with fused kernels (C++, and Triton interpreted) beside transformers in float64, for every family."""

import copy
from typing import Any

import pytest
import torch
import transformers
from small_world import one_thread  # noqa: F401
from torch import Tensor
from truth import exact_norms

from isomorph.engine.model.attention import registered_attention
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.types import PackedBatch
from isomorph.kernels import backend, layer_native
from isomorph.kernels.packed_layout import PackedLayout

needs_triton = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())
BODIES = [pytest.param("triton", marks=needs_triton), pytest.param("native", marks=needs_native)]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=None, head_dim=8),
    "olmo2": dict(attention_bias=True),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=6),
}


def fused(body: str) -> str:
    return f"rms_norm={body},swiglu={body},rotary={body}"


def policies(family: str, **changes: Any) -> tuple[Policy, Policy]:
    """The same random weights in float32, and in float64 with norms that are float64 throughout."""
    config = transformers.AutoConfig.for_model(
        family,
        **{
            **dict(vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4),
            **dict(num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2, tie_word_embeddings=False),
            **FAMILIES[family],
            **changes,
        },
    )
    exact = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=registered_attention(), dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in exact.parameters():
        with torch.no_grad():
            parameter.copy_((0.3 * torch.randn(parameter.shape, generator=generator)).float())
    text = TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[2])
    single = copy.deepcopy(exact).float()
    return Policy(single, text), Policy(exact_norms(exact), text)


def batch_of(prompts: list[int], responses: list[list[int]]) -> PackedBatch:
    layout = PackedLayout.from_groups(prompts, responses)
    generator = torch.Generator().manual_seed(1)
    nothing = torch.tensor([])
    return PackedBatch(
        token_ids=torch.randint(3, 40, (layout.num_tok,), generator=generator),
        positions=layout.positions,
        layout=layout,
        row_index=nothing,
        target_ids=nothing,
        seq_id=nothing,
        sampler_logprob=None,
        advantage=nothing,
    )


def hidden_and_gradients(policy: Policy, batch: PackedBatch) -> dict[str, Tensor]:
    hidden_TD = policy.hidden(batch)
    hidden_TD.square().sum().backward()
    found = {name: p.grad for name, p in policy.named_parameters().items() if p.grad is not None}
    return {"hidden": hidden_TD.detach(), **found}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_are_transformers_layers(family: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = layer_native
    if body == "triton":
        from isomorph.kernels.gpu import layer
    calls: list[str] = []
    for name in ("rms_norm", "rms_norm_gradient", "swiglu", "swiglu_gradient", "rotary"):
        run = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, run=run, name=name, **k: calls.append(name) or run(*a, **k))
    single, exact = policies(family)
    batch = batch_of([6, 1], [[4, 9], [3]])
    truth = hidden_and_gradients(exact, batch)
    with backend.using(fused(body)):
        found = hidden_and_gradients(single, batch)
    norms = 2 + 1 + (2 if family in ("qwen3", "olmo2") else 0)  # of the layer, the last one, of queries and keys
    assert calls.count("rms_norm") == calls.count("rms_norm_gradient") == norms
    assert calls.count("swiglu") == calls.count("swiglu_gradient") == 1
    assert calls.count("rotary") == 2
    assert found.keys() == truth.keys()
    for name, want in truth.items():
        assert (found[name] - want).norm() <= 1e-5 * want.norm(), name


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_take_the_dtypes_of_transformers_models(family: str) -> None:
    """In bfloat16 OLMo-2 rotates by angles in float32, the others by angles in bfloat16."""
    single, exact = policies(family)
    half = Policy(copy.deepcopy(single.model).bfloat16(), single.text)
    batch = batch_of([6, 1], [[4, 9], [3]])
    errors = {}
    with torch.no_grad():
        truth = exact.hidden(batch)
        for body in ("native", "reference"):
            with backend.using(fused(body)):
                errors[body] = (half.hidden(batch) - truth).norm() / truth.norm()
    assert errors["native"] <= 1.5 * errors["reference"] < 0.05


@pytest.mark.parametrize("body", BODIES)
def test_another_activation_than_silu_is_computed_by_transformers_forward(body: str) -> None:
    single, exact = policies("llama", hidden_act="gelu")
    batch = batch_of([6], [[4]])
    with torch.no_grad():
        truth = exact.hidden(batch)
        with backend.using(fused(body)):
            found = single.hidden(batch)
    assert (found - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("body", BODIES)
def test_decoding_several_rows_at_their_own_positions_is_the_same(body: str) -> None:
    """The sampler passes a batch of rows of one token, each at a position of its own."""
    single, exact = policies("llama")
    token_ids, positions = torch.tensor([[5], [9], [7]]), torch.tensor([[0], [3], [17]])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Every row sees itself alone; the rotated queries and keys are what is compared."""
        seen.append(torch.cat([q.flatten(), k.flatten()]).double())
        return v.repeat_interleave(2, 1).transpose(1, 2)

    found = []
    for policy, wanted in ((exact, "reference"), (single, fused(body))):
        seen: list[Tensor] = []
        with torch.no_grad(), backend.using(wanted):
            hidden_BTD = policy.backbone(token_ids, positions, attend)
        found.append(torch.cat([hidden_BTD.double().flatten(), *seen]))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_without_fused_kernels_transformers_own_forward_runs_bit_for_bit() -> None:
    single, _ = policies("qwen3")
    own = copy.deepcopy(single.model)
    for module in (*own.model.layers, own.model.norm):
        module.__class__ = type(module).__mro__[1]
    batch = batch_of([6], [[4, 2]])
    with torch.no_grad(), backend.using("reference"):
        before = single.hidden(batch)
        single.model.model.layers, single.model.model.norm = own.model.layers, own.model.norm
        assert torch.equal(single.hidden(batch), before)
