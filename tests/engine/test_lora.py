"""Adapters against peft's own forward and backward, against the base, and against the merged model."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_world import CPU, TINY, WORDS, make_groups, one_thread, updates_of  # noqa: F401
from torch import Tensor
from transformers import AutoModelForCausalLM
from truth import exact_norms

from isomorph.engine.config import (
    BatchConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplerConfig,
    SamplingConfig,
    Stage,
    UserError,
)
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.fingerprint import fingerprint
from isomorph.engine.types import Group, PackedBatch, Prompt, Rollout, Sampling
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import Update, pack
from isomorph.kernels.linear_logprob import linear_logprob

LORA = LoraConfig(rank=3, alpha=5.0)
KL = ObjectiveConfig(name="grpo", kl_coef=0.1)


# -- a small world
def make_policy(dtype: str = "float32", lora: LoraConfig | None = LORA, **options: Any) -> Policy:
    config = ModelConfig(tiny=TINY, dtype=dtype, **options)  # type: ignore[arg-type]
    return load_policy(config, vocabulary=WORDS, seed=0, device=CPU, lora=lora)


def in_float64(policy: Policy, **options: Any) -> Policy:
    return Policy(exact_norms(policy.model.double()), policy.text, adapters=policy.adapters, **options)


def move(policy: Policy, scale: float = 0.3, seed: int = 1) -> Policy:
    """Random A and B, as after training."""
    generator = torch.Generator().manual_seed(seed)
    policy.overwrite([scale * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    return policy


def make_batch() -> PackedBatch:
    return pack_parts([Part(g.prompt, g.rollouts, g.advantages) for g in make_groups()], CPU)


def make_stage(objective: ObjectiveConfig = KL, **tables: Any) -> Stage:
    return Stage(
        name="s",
        steps=10,
        objective=objective,
        sampling=SamplingConfig(max_new_tok=9, samples_per_prompt=3),
        optim=OptimConfig(lr=1e-2),
        batch=BatchConfig(prompts=3, prompts_per_update=1),
        **tables,
    )


def packed(stage: Stage, seed: int = 3) -> list[Update]:
    return updates_of(make_groups(seed=seed), stage)


def entered(policy: Policy, stage: Stage) -> Learner:
    learner = Learner(policy)
    learner.enter(stage)
    return learner


def logprob(policy: Policy, batch: PackedBatch) -> Tensor:
    hidden_TD = policy.hidden(batch)
    return linear_logprob(hidden_TD, policy.unembedding, batch.target_ids, row_index_N=batch.row_index).logprob


def plain_model(policy: Policy) -> Any:
    """transformers' own, with the policy's base weights and PyTorch's attention (their eager one rounds to float32)."""
    config = copy.deepcopy(policy.config)  # it would be written to
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=policy.dtype)
    state = {name: w.detach() for name, w in policy.base().items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return exact_norms(model) if policy.dtype == torch.float64 else model


def padded_logprob(model: Any) -> Tensor:
    """[N] of all responses in the order of ``make_batch``: the prompt repeated, rows padded to one length."""
    pairs = [(g.prompt.token_ids, r.token_ids) for g in make_groups() for r in g.rollouts]
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    ids_SL = torch.zeros(len(pairs), longest, dtype=torch.int64)
    mask_SL = torch.zeros_like(ids_SL)
    for s, (prompt, response) in enumerate(pairs):
        row = torch.cat([torch.tensor(prompt), response])
        ids_SL[s, : len(row)], mask_SL[s, : len(row)] = row, 1
    logprob_SLV = model(input_ids=ids_SL, attention_mask=mask_SL).logits.log_softmax(-1)
    parts = [
        logprob_SLV[s, len(prompt) - 1 : len(prompt) + len(response) - 1].gather(-1, response[:, None])[:, 0]
        for s, (prompt, response) in enumerate(pairs)
    ]
    return torch.cat(parts)


# -- the function and its gradient
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing_every": 1}, pytest.param({"compiles": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_log_probabilities_and_gradients_are_pefts_own_on_padded_sequences(
    options: dict[str, Any], tmp_path: Path
) -> None:
    policy = move(in_float64(make_policy(), **options))
    assert policy.adapters is not None
    policy.adapters.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        plain_model(policy), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    )
    ours, truth = logprob(policy, make_batch()), padded_logprob(theirs)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    coefficient_N = torch.randn(len(truth), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (ours * coefficient_N).sum().backward()
    (truth * coefficient_N).sum().backward()
    expected = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in policy.named_parameters().items():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-4, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_the_policy_is_the_base_bit_for_bit(dtype: str) -> None:
    policy, base = make_policy(dtype), make_policy(dtype, lora=None)
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(policy.hidden(batch), base.hidden(batch))
        assert not torch.equal(move(policy).hidden(batch), base.hidden(batch))


def test_the_seed_determines_the_first_adapters() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = make_policy().snapshot(), make_policy().snapshot()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = load_policy(ModelConfig(tiny=TINY), vocabulary=WORDS, seed=1, device=CPU, lora=LORA).snapshot()
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.any())


def test_the_targets_are_the_configured_ones() -> None:
    policy = make_policy(lora=LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    adapted = {name.split(".")[-4] for name in policy.named_parameters()}
    assert adapted == {"q_proj", "down_proj"}
    assert {p.dtype for p in policy.named_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "norm", "query"])
def test_a_target_that_is_no_linear_layer_of_the_decoder_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=f"q_proj, k_proj, .*down_proj; got '{target}'"):
        make_policy(lora=LoraConfig(targets=("q_proj", target)))


def test_a_missing_peft_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(UserError, match=r'pip install "isomorph\[lora\]"'):
        make_policy()


# -- learning
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_change_every_adapter_and_nothing_else(dtype: str) -> None:
    policy = make_policy(dtype)
    stage = make_stage()
    learner = entered(policy, stage)
    base = {name: w.detach().clone() for name, w in policy.base().items()}
    before = policy.snapshot()
    for step in range(2):
        stats = learner.update(packed(stage, step), stage, step)
    assert stats.grad_norm > 0 and stats.kl > 0
    assert learner.optimizer is not None and set(learner.optimizer.masters) == set(policy.named_parameters())
    assert {master.dtype for master in learner.optimizer.masters.values()} == {torch.float32}
    for name, weight in policy.base().items():
        assert torch.equal(weight, base[name]) and weight.grad is None, name
    for old, (name, new) in zip(before, policy.named_parameters().items(), strict=True):
        assert not torch.equal(old, new), name


def test_the_first_reference_is_the_base_with_the_adapters_left_out() -> None:
    policy, base = make_policy(), make_policy(lora=None)
    stage = make_stage()
    learner = entered(policy, stage)
    learner.update(packed(stage), stage, 0)
    assert policy.adapters is not None
    num_calls = []
    for layer in policy.adapters.layers.values():
        layer.lora_A["default"].register_forward_hook(lambda *_: num_calls.append(1))
    batches = [update.batches for update in packed(stage)]
    reference = learner._reference_logprobs(batches, stage)
    assert reference is not None and not num_calls
    own = Learner(base)
    for references, update in zip(reference, batches, strict=True):
        for seen, batch in zip(references, update, strict=True):
            assert torch.equal(seen, own._logprob(batch, stage))
            assert not torch.equal(seen, learner._logprob(batch, stage))
    assert num_calls  # back at work, and trained on
    assert all(p.requires_grad for p in policy.named_parameters().values())


def test_a_later_snapshot_is_the_adapters_as_they_were() -> None:
    policy, stage = make_policy(), make_stage()
    learner = entered(policy, stage)
    learner.update(packed(stage), stage, 0)
    batches = [update.batches for update in packed(stage)]
    at_snapshot = [[learner._logprob(batch, stage) for batch in update] for update in batches]
    learner.enter(stage)
    assert learner.reference is not None
    assert sum(w.nbytes for w in learner.reference) == sum(p.nbytes for p in policy.named_parameters().values())
    learner.update(packed(stage, 1), stage, 1)
    again = learner._reference_logprobs(batches, stage)
    assert again is not None
    assert all(torch.equal(a, b) for x, y in zip(again, at_snapshot, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_learner_goes_on_bit_for_bit(dtype: str) -> None:
    policy, twin, stage = make_policy(dtype), make_policy(dtype), make_stage()
    learner, other = entered(policy, stage), Learner(twin)
    learner.update(packed(stage), stage, 0)
    tensors = {name: t.clone() for name, t in learner.state_tensors().items()}
    assert all(".lora_" in name for name in tensors)  # nothing of the base's size
    twin.overwrite(policy.snapshot())
    other.restore(stage, tensors)
    for step in (1, 2):
        updates = packed(stage, step)
        assert learner.update(updates, stage, step) == other.update(updates, stage, step)
    for name, value in learner.state_tensors().items():
        assert torch.equal(other.state_tensors()[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(policy.snapshot(), twin.snapshot(), strict=True))


# -- sampling and publishing
def test_the_builtin_sampler_draws_through_the_adapters() -> None:
    policy = move(make_policy())
    prompts = [g.prompt for g in make_groups()]
    sampling = Sampling(temperature=1.0, max_new_tok=8, samples_per_prompt=2, stop_ids=(1,), seed=0)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
    seen = [r.sampler_logprob for r in rollouts if r.sampler_logprob is not None]
    ours = torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=1.0))
    torch.testing.assert_close(torch.cat(seen), ours, rtol=0, atol=1e-5)
    assert policy.adapters is not None
    with policy.adapters.disabled():
        assert (torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=1.0)) - ours).abs().max() > 0.1


def test_the_merged_weights_compute_the_same_and_leave_the_base_alone() -> None:
    policy = move(in_float64(make_policy()))
    base = fingerprint(policy.base())
    merged = plain_model(policy)
    for name, parameter in merged.named_parameters():
        parameter.data.copy_(policy.weights()[name])
    torch.testing.assert_close(padded_logprob(merged), logprob(policy, make_batch()), rtol=0, atol=1e-12)
    assert fingerprint(policy.base()) == base != fingerprint(policy.weights())
    assert {name: w.shape for name, w in policy.weights().items()} == {n: w.shape for n, w in policy.base().items()}


def test_merging_in_bfloat16_rounds_once() -> None:
    policy = move(make_policy("bfloat16"))
    named = {name: p.detach().double() for name, p in policy.named_parameters().items()}
    above = "model.layers.1.mlp.up_proj"
    product = named[f"{above}.lora_B.default.weight"] @ named[f"{above}.lora_A.default.weight"]
    exact = policy.base()[f"{above}.weight"].detach().double() + 5.0 / 3 * product
    merged = policy.weights()[f"{above}.weight"]
    assert merged.dtype == torch.bfloat16
    error = (merged.double() - exact).abs()
    assert (error <= (exact.bfloat16().double() - exact).abs() + 1e-6 * exact.abs().max()).all()


def test_fresh_adapters_publish_the_bases_own_bits() -> None:
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(dtype)
        assert fingerprint(policy.weights()) == fingerprint(policy.base())
        assert fingerprint(policy.weights()) == fingerprint(make_policy(dtype, lora=None).weights())


# -- what is saved
def test_the_saved_model_is_plain_and_the_saved_adapter_is_pefts(tmp_path: Path) -> None:
    policy = move(in_float64(make_policy()))
    assert policy.adapters is not None
    policy.save(tmp_path / "model")
    policy.adapters.save(tmp_path / "adapter")
    ours = logprob(policy, make_batch()).detach()
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True
    )
    assert not any(loading.values())
    theirs = peft.PeftModel.from_pretrained(plain_model(policy), tmp_path / "adapter", autocast_adapter_dtype=False)
    for other in (exact_norms(model), theirs):
        with torch.no_grad():
            torch.testing.assert_close(padded_logprob(other), ours, rtol=0, atol=1e-12)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (3, 5.0, "LORA")


@pytest.mark.model
def test_a_real_model_learns_by_its_adapters_alone(smollm2_folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(smollm2_folder), dtype="bfloat16")
    policy = load_policy(config, vocabulary=[], seed=0, device=CPU, lora=LoraConfig(rank=4))
    size = sum(w.numel() for w in policy.base().values())
    assert sum(p.numel() for p in policy.named_parameters().values()) < size / 100
    text = policy.text
    prompt = Prompt(
        prompt_id=0, token_ids=text.encode_prompt("Name a river."), task="t", representation="r", payload=None
    )
    rollout = Rollout(
        prompt_id=0,
        sample=0,
        token_ids=torch.tensor(text.encode_response("The Danube.")),
        sampler_logprob=None,
        finish="stop",
        policy_version=0,
    )
    sft = Stage(
        name="s",
        steps=9,
        objective=ObjectiveConfig(name="sft"),
        sampling=SamplingConfig(samples_per_prompt=1),
        optim=OptimConfig(lr=2e-3),
    )
    group = Group(prompt=prompt, rollouts=(rollout,), rewards=(1.0,), advantages=(1.0,))
    learner = entered(policy, sft)
    losses = []
    for step in range(4):
        updates = pack([group], micro_batch_tok=4096, prompts_per_update=None, objective=sft.objective, device=CPU)
        losses.append(learner.update(updates, sft, step).loss)
    assert losses[-1] < 0.8 * losses[0], losses
    assert policy.adapters is not None
    policy.adapters.save(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(smollm2_folder)
