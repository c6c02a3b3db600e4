"""The policy's forward pass against transformers' own, and how the learner and the samplers run it."""

import copy
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_policy import CPU, TINY, VOCABULARY, logits, packed, tiny_policy
from small_world import one_thread  # noqa: F401
from torch import Tensor
from truth import exact_norms

from isomorph.engine.config import ModelConfig, UserError
from isomorph.engine.model.attention import attend_packed, registered_attention
from isomorph.engine.model.load import build_tiny, load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.types import PackedBatch
from isomorph.kernels.linear import linear_prepacked
from isomorph.kernels.packed_layout import PackedLayout


# -- the decoder, against transformers' own forward
def config_of(model_type: str, **changes: Any) -> Any:
    common = dict(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.AutoConfig.for_model(model_type, **{**common, **changes})


FAMILIES: dict[str, Any] = {
    "llama": dict(),
    "llama tied": dict(tie_word_embeddings=True),
    "llama 3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "llama wide heads": dict(head_dim=8, attention_bias=True, mlp_bias=True),
    "llama one kv head": dict(num_key_value_heads=1),
    "mistral": dict(sliding_window=None),
    "mistral wide heads": dict(sliding_window=None, head_dim=8),
    "olmo2": dict(),
    "olmo2 tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2": dict(),
    "qwen2 tied": dict(tie_word_embeddings=True),
    "qwen2 yarn": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=500.0, factor=2.0, original_max_position_embeddings=32)
    ),
    "qwen3": dict(head_dim=8),
    "qwen3 tied": dict(head_dim=6, tie_word_embeddings=True),
}


def twins(config: Any) -> tuple[Policy, Any]:
    """A policy, and transformers' own model with its own attention and the same random weights, both float64."""
    both = [
        transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=name, dtype=torch.float64
        )
        for name in (registered_attention(), "sdpa")
    ]
    generator = torch.Generator().manual_seed(0)
    for parameter in both[1].parameters():
        with torch.no_grad():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    both[0].load_state_dict(both[1].state_dict())
    ours, theirs = (exact_norms(model) for model in both)
    text = TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[2])
    return Policy(ours, text), theirs


def random_groups() -> list[tuple[list[int], list[list[int]]]]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    return [(ids(7), [ids(4), ids(0), ids(9)]), (ids(1), [ids(3)]), (ids(20), [ids(15), ids(2)]), (ids(5), [])]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_rows_and_logits_of_packed_groups_are_those_of_each_sequence_alone(family: str) -> None:
    policy, model = twins(config_of(family.split()[0], **FAMILIES[family]))
    groups = random_groups()
    hidden_TD = policy.hidden(packed(groups)).detach()
    start = 0
    for prompt, responses in groups:
        prompt_rows = hidden_TD[start : start + len(prompt)]
        start += len(prompt)
        for response in responses or [[]]:
            rows = torch.cat([prompt_rows, hidden_TD[start : start + len(response)]])
            start += len(response)
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                truth, logits = model.model(input_ids=ids).last_hidden_state[0], model(input_ids=ids).logits[0]
            torch.testing.assert_close(rows, truth, rtol=0, atol=1e-10)
            torch.testing.assert_close(rows @ policy.unembedding.detach().T, logits, rtol=0, atol=1e-10)
    assert start == len(hidden_TD)
    torch.testing.assert_close(policy.unembedding, model.lm_head.weight, rtol=0, atol=0)


# -- how the learner runs the layers
def learners_policy(**choices: Any) -> Policy:
    tiny = TINY.model_copy(update=dict(num_layers=5))
    config = ModelConfig(tiny=tiny, **choices)
    return load_policy(config, vocabulary=VOCABULARY, seed=0, device=CPU)


def gradients(policy: Policy, groups: list[tuple[list[int], list[list[int]]]]) -> dict[str, Tensor]:
    policy.hidden(packed(groups)).square().sum().backward()
    return {name: p.grad for name, p in policy.named_parameters().items() if p.grad is not None}


@pytest.mark.parametrize(("every", "again"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(every: int, again: list[int]) -> None:
    groups = [
        ([i % 9 for i in prompt], [[i % 9 for i in r] for r in responses]) for prompt, responses in random_groups()
    ]
    kept, policy = learners_policy(), learners_policy(gradient_checkpointing_every=every)
    runs: list[int] = []
    for i, layer in enumerate(policy.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    ours, truth = gradients(policy, groups), gradients(kept, groups)
    assert runs == [0, 1, 2, 3, 4, *reversed(again)]
    assert all(torch.equal(ours[name], grad) for name, grad in truth.items())
    with torch.no_grad():
        policy.hidden(packed(groups))
    assert runs[5 + len(again) :] == [0, 1, 2, 3, 4]


def saved_bytes(policy: Policy, batch: PackedBatch) -> int:
    """Of the tensors that the forward pass keeps for backward, the parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.named_parameters().values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden_TD = policy.hidden(batch)
    assert hidden_TD.requires_grad
    return sum(kept.values())


def test_recomputed_layers_keep_less_than_a_third() -> None:
    groups = [([1 + i % 8 for i in range(40)], [[1 + i % 8 for i in range(30)]] * 3)]
    kept = saved_bytes(learners_policy(), packed(groups))
    assert saved_bytes(learners_policy(gradient_checkpointing_every=1), packed(groups)) < kept / 3


@pytest.mark.slow  # compiles C++
def test_compiled_layers_agree_and_are_compiled_once_for_all_lengths() -> None:
    torch.compiler.reset()
    plain, compiled, exact = learners_policy(), learners_policy(compile=True), learners_policy()
    exact_norms(exact.model.double())

    def off(policy: Policy, truth: dict[str, Tensor], groups: list[tuple[list[int], list[list[int]]]]) -> float:
        """Distance of the whole gradient."""
        ours = gradients(policy, groups)
        return float(torch.cat([(ours[name] - grad).flatten() for name, grad in truth.items()]).norm())

    for length in (20, 33, 47):
        groups = [([1 + i % 8 for i in range(length)], [[1 + i % 8 for i in range(n)] for n in (5, length)])]
        for policy in (plain, compiled, exact):
            policy.model.zero_grad()
        truth = gradients(exact, groups)
        # other exponentials and another order of sums, in the same dtype; a missing term would be off by thousands
        assert off(compiled, truth, groups) <= 4 * off(plain, truth, groups)
        if length == 20:
            num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_heads_head_size_and_length_are_the_models(family: str) -> None:
    policy, _ = twins(config_of(family.split()[0], **FAMILIES[family]))
    k_proj = policy.named_parameters()["model.layers.0.self_attn.k_proj.weight"]
    assert policy.num_kv_heads * policy.head_dim == k_proj.shape[0]
    assert (policy.max_model_len, policy.dtype, policy.device) == (64, torch.float64, CPU)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_unembedding_is_one_parameter(is_tied: bool) -> None:
    policy, _ = twins(config_of("qwen2", tie_word_embeddings=is_tied))
    names = policy.named_parameters()
    assert ("lm_head.weight" in names) != is_tied
    assert (policy.unembedding is names["model.embed_tokens.weight"]) == is_tied
    assert all(p.requires_grad for p in names.values())


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("gemma2", dict(head_dim=4), "'gemma2'"),
        ("gpt2", dict(), "'gpt2'"),
        ("qwen2_moe", dict(), "'qwen2_moe'"),
        ("qwen2", dict(layer_types=["full_attention", "chunked_attention"]), "'chunked_attention'"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "'dynamic'"),
        ("llama", dict(attention_dropout=0.1), "attention_dropout"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    model_type: str, changes: dict[str, Any], named: str
) -> None:
    config = config_of(model_type, **changes)
    model = torch.nn.Module()
    model.config = config  # type: ignore[assignment]
    with pytest.raises(UserError, match=named):
        Policy(model, TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[2]))


def test_a_model_with_another_attention_than_ours_is_refused() -> None:
    _, model = twins(config_of("qwen2"))
    with pytest.raises(ValueError, match="sdpa"):
        Policy(model, TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[2]))


# -- weights
def test_a_configuration_that_another_model_wrote_into_is_refused_by_name() -> None:
    """Packed responses would silently see each other: transformers reads the attention at each call."""
    policy = tiny_policy()
    layout = PackedLayout.from_groups([2], [[1, 1]])
    ids = torch.tensor([[4, 5, 6, 7]])
    policy.backbone(ids, layout.positions[None], attend_packed(layout))
    transformers.AutoModelForCausalLM.from_config(policy.config, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"got 'sdpa'; where another model .* copy\.deepcopy\(policy\.config\)"):
        policy.backbone(ids, layout.positions[None], attend_packed(layout))


def test_a_seed_makes_a_tiny_model_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = tiny_policy().snapshot(), tiny_policy().snapshot()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = build_tiny(TINY, VOCABULARY, seed=1, dtype=torch.float32, device=CPU).snapshot()
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borrowed_weights_are_used_and_given_back_bit_for_bit_in_place(dtype: torch.dtype) -> None:
    policy = tiny_policy(dtype)
    batch = packed([([4, 5, 6], [[7, 8]])])
    own = policy.snapshot()
    places = [p.data_ptr() for p in policy.named_parameters().values()]
    foreign = [w + 0.5 for w in own]
    with torch.no_grad():
        before = policy.hidden(batch)
        with policy.borrowed_weights(foreign):
            borrowed = policy.hidden(batch)
            assert all(torch.equal(a, b) for a, b in zip(policy.snapshot(), foreign, strict=True))
        assert torch.equal(policy.hidden(batch), before)
    assert not torch.equal(borrowed, before)
    assert all(torch.equal(a, b) for a, b in zip(policy.snapshot(), own, strict=True))
    assert places == [p.data_ptr() for p in policy.named_parameters().values()]


def test_borrowed_weights_are_given_back_after_an_error() -> None:
    policy = tiny_policy()
    own = policy.snapshot()
    with pytest.raises(ZeroDivisionError), policy.borrowed_weights([w + 1 for w in own]):
        1 / 0  # noqa: B018
    assert all(torch.equal(a, b) for a, b in zip(policy.snapshot(), own, strict=True))


# -- a real model
@pytest.mark.model
@pytest.mark.slow
def test_the_real_135m_model_gives_transformers_logits_over_packed_groups(smollm2_folder: Path) -> None:
    policy = load_policy(ModelConfig(path=str(smollm2_folder)), vocabulary=[], seed=0, device=CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    prompt = list(policy.text.encode_prompt("How long does it take to boil an egg and toast bread at once?"))
    responses = [list(policy.text.encode_response(text)) for text in ("It takes 6 minutes.", "Ten.")]
    with torch.no_grad():
        hidden_TD = policy.hidden(packed([(prompt, responses)]))
    start = len(prompt)
    for response in responses:
        rows = torch.cat([hidden_TD[: len(prompt)], hidden_TD[start : start + len(response)]])
        start += len(response)
        ours = (rows @ policy.unembedding.T).log_softmax(-1).detach()
        truth = logits(model, prompt + response).log_softmax(-1)
        assert (ours - truth).abs().max() < 1e-3  # nats, float32


# -- memory
SHAPES = """
import ctypes, torch
from isomorph.engine.config import TinyModel
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.model.attention import attend_packed
from isomorph.engine.model.load import build_tiny
from isomorph.engine.types import Prompt
from isomorph.kernels.linear_logprob import linear_loss
weight = torch.randn(512, 256, requires_grad=True)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f in_use g h".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
torch.set_num_threads(1)
shape = TinyModel(hidden_size=256, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=512, max_model_len=2048)
policy = build_tiny(shape, ["a"], seed=0, dtype=torch.float32, device=torch.device("cpu"))
in_use = []
for num_tok in range(577, 641):
    prompt = Prompt(prompt_id=0, token_ids=(1,) * num_tok, task="", representation="", payload=None)
    batch = pack_parts([Part(prompt, (rollout,), (0.0,))], policy.device)
    hidden = policy.hidden(batch)
    assert len(hidden) == num_tok
    loss = linear_loss(hidden, weight, torch.zeros(num_tok, dtype=torch.int64), lambda stats, rows: stats.logprob.sum())
    loss.backward()
    with torch.no_grad():
        policy.backbone(batch.token_ids[None], batch.layout.positions[None], attend_packed(batch.layout))
    del hidden, batch, loss
    in_use.append(libc.mallinfo2().in_use / 2**20)
print(in_use[-1] - in_use[1])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C allocator is not glibc's")
def test_micro_batches_of_many_lengths_leave_no_memory_in_use() -> None:
    one_token = (
        "from isomorph.engine.types import Rollout\n"
        "rollout = Rollout(prompt_id=0, sample=0, token_ids=__import__('torch').tensor([1]), sampler_logprob=None, "
        "finish='stop', policy_version=0)\n"
    )
    done = subprocess.run([sys.executable, "-c", one_token + SHAPES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5.0  # MiB; as they are, these lengths left 166


def test_prepacked_weights_are_multiplied_by_while_the_context_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        used.append(len(x))
        return linear_prepacked(x, weight, bias)

    monkeypatch.setattr("isomorph.kernels.linear.MIN_WEIGHT", 0)
    monkeypatch.setattr("isomorph.engine.model.policy.linear_prepacked", spy)
    policy = build_tiny(TINY, ["a", "b"], seed=0, dtype=torch.float32, device=CPU)
    layout = PackedLayout.from_groups([5], [[0]])
    ids = torch.zeros(1, 5, dtype=torch.int64)

    def hidden() -> Tensor:
        return policy.backbone(ids, layout.positions[None], attend_packed(layout))

    with torch.no_grad():
        plain = hidden()
        assert used == []
        with policy.prepacked():
            inside = hidden()
        assert len(used) == 7 * TINY.num_layers  # q, k, v, o, gate, up, down
        torch.testing.assert_close(inside, plain)
        assert torch.equal(hidden(), plain) and len(used) == 7 * TINY.num_layers
