"""The vLLM sampler against the trainer, in real vLLM: tiny models of each family, and the 135M model by both ways."""

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, MistralConfig, Olmo2Config, Qwen3Config
from truth import causal
from vllm_parts import (
    DEVICE,
    check_that_it_follows,
    check_that_no_tensor_may_stay_behind,
    drift,
    is_shared,
    make_policy,
    make_prompts,
    make_sampling,
    on_cpu,
    same_bits,
    with_real_model,
    with_vllm,
)

from isomorph.engine.config import LoraConfig, ModelConfig, SamplerConfig, UserError
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.lora import attach
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.rollout import vllm_engine
from isomorph.engine.rollout.fingerprint import fingerprint
from isomorph.engine.rollout.tripwire import check_publication, probe_drift
from isomorph.engine.rollout.vllm import VllmSampler, start_vllm
from isomorph.engine.types import Prompt, Rollout, RunFailed
from isomorph.kernels.linear_logprob import linear_logprob

Pair = tuple[Policy, VllmSampler]


# -- refused before vLLM starts
def test_a_missing_vllm_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import finds when there is none
    on_this_device = {
        "cpu": r'needs vLLM: pip install "isomorph\[cpu\]".*torchvision torchaudio torchcodec',
        "cuda": r'needs vLLM: pip install "isomorph\[vllm\]"',
    }
    with pytest.raises(UserError, match=on_this_device[DEVICE.type]):
        start_vllm(make_policy(), SamplerConfig(kind="vllm"), 0)


@with_vllm
def test_what_cannot_be_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = make_policy(), SamplerConfig(kind="vllm", publish="shared", max_seqs=4)
    for other in ("0.31.4", "0.33.1", "0.320.0", "dev"):
        found = rf"must be of version 0\.32, installed is {re.escape(other)}: pip install vllm.*==0\.32\.0"
        with monkeypatch.context() as patch, pytest.raises(UserError, match=found):
            patch.setattr("vllm.__version__", other)
            start_vllm(policy, config, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="without quantisation"):
        patch.setattr(policy.config, "quantization_config", {"bits": 4}, raising=False)
        start_vllm(policy, config, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="initialised outside torchrun"):
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        start_vllm(policy, config, 0)


@with_vllm
@on_cpu
def test_what_the_cpu_build_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    with pytest.raises(UserError, match=r"memory_frac=1e-06 of .* raise it"):
        start_vllm(policy, SamplerConfig(kind="vllm", memory_frac=1e-6), 0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="compiler 'no-such-compiler'"):
        start_vllm(policy, SamplerConfig(kind="vllm"), 0)


# -- the model's folder, a part of the key of vLLM's compile cache
def compile_key(policy: Policy, **options: Any) -> str:
    """As vLLM computes it for an engine that compiles, which ours does on a GPU only."""
    from vllm import EngineArgs

    asked = vllm_engine.engine_options(policy, SamplerConfig(kind="vllm", max_seqs=4), policy.max_model_len, 0)
    return EngineArgs(**{**asked, "enforce_eager": False, **options}).create_engine_config().compute_hash()


@with_vllm
def test_one_configuration_has_one_key_in_vllms_compile_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import envs

    # vLLM's own cache stays where it is: it knows of our models' classes, and is asked for no more
    monkeypatch.setenv("VLLM_CACHE_ROOT", envs.VLLM_CACHE_ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    policy, same, other = make_policy(), make_policy(), make_policy(rms_norm_eps=1e-4)
    with torch.no_grad():
        same.unembedding[0, 0] += 1  # weights are published and no part of it
    keys = [compile_key(policy), compile_key(same), compile_key(other), compile_key(policy)]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    folders = sorted((tmp_path / "isomorph" / "vllm").iterdir())
    assert len(folders) == 2
    assert [file.name for folder in folders for file in folder.iterdir()] == ["config.json"] * 2
    moved = tmp_path / "elsewhere"  # as a random folder would be
    shutil.copytree(vllm_engine.model_folder(policy), moved)
    assert compile_key(policy, model=str(moved)) != keys[0]


def test_ranks_that_start_together_write_one_whole_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    policy = make_policy()
    with ThreadPoolExecutor(8) as ranks:
        (folder,) = set(ranks.map(lambda _: vllm_engine.model_folder(policy), range(64)))
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    read = AutoConfig.from_pretrained(folder)
    assert read.architectures == ["Qwen2ForCausalLM"]
    assert (read.hidden_size, read.vocab_size) == (policy.config.hidden_size, policy.config.vocab_size)
    (folder / "config.json").write_text("{")  # a disk that was full, an editor
    assert vllm_engine.model_folder(policy) == folder
    assert AutoConfig.from_pretrained(folder).to_dict() == read.to_dict()


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*: set XDG_CACHE_HOME"):
        vllm_engine.model_folder(make_policy())


# -- every family, tiny; Llama and Qwen2 are in test_vllm_life.py
@with_vllm
@pytest.mark.parametrize(
    ("config_class", "publish", "dtype", "options"),
    [
        (MistralConfig, "shared", torch.float32, {"sliding_window": None, "tie_word_embeddings": False}),
        (Olmo2Config, "shared", torch.bfloat16, {"tie_word_embeddings": False}),  # vLLM runs transformers' own layers
        (Qwen3Config, "copy", torch.float32, {"head_dim": 64, "tie_word_embeddings": False}),
        (Qwen3Config, "shared", torch.bfloat16, {"head_dim": 64, "tie_word_embeddings": True}),
    ],
)
def test_every_family_agrees_with_the_trainer(
    config_class: type, publish: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    policy = make_policy(config_class, dtype, **options)
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", publish=publish, max_seqs=8), 0)
    try:
        check_that_it_follows(policy, sampler)
        check_that_no_tensor_may_stay_behind(policy, sampler)
        make_policy(config_class, dtype, **options)  # a reference, for one; vLLM changes the class of OLMo-2's layers
    finally:
        sampler.close()


Error = Callable[[Policy, list[Prompt], list[Rollout]], float]


def check_adapters(policy: Policy, texts: list[str], error: Error, noise: float) -> None:
    """Merged into vLLM's weights by a publication; the trainer's base stays. ``error``: vLLM's over its limit."""
    base = fingerprint(policy.base())
    prompts = make_prompts(policy, texts)
    sampler = start_vllm(
        policy, SamplerConfig(kind="vllm", max_model_len=min(256, policy.max_model_len), max_seqs=8), 0
    )
    try:
        assert sampler.fingerprint() == base  # B = 0
        before = sampler.generate(prompts, make_sampling(policy))
        assert error(policy, prompts, before) <= 1
        for seed, (name, parameter) in enumerate(policy.named_parameters().items()):
            if ".lora_B." in name:
                random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data.copy_(noise * random)
        assert error(policy, prompts, before) > 2  # stale weights would be seen
        publication = sampler.publish(1)
        assert publication.num_bytes == sum(w.nbytes for w in policy.base().values())
        assert publication.fingerprint == fingerprint(policy.weights()) != base == fingerprint(policy.base())
        check_publication(policy, sampler, publication, prompts[0], None)
        assert error(policy, prompts, sampler.generate(prompts, make_sampling(policy))) <= 1
        parameter.data[3, 2] += noise / 10
        with pytest.raises(RunFailed, match="stale weights"):
            check_publication(policy, sampler, publication, prompts[0], None)
    finally:
        sampler.close()


@pytest.mark.weekly
@with_real_model
def test_adapters_are_published_merged_into_weights_that_stay(smollm2_folder: Path) -> None:
    config = ModelConfig(path=str(smollm2_folder))
    policy = load_policy(config, vocabulary=[], seed=0, device=DEVICE, lora=LoraConfig(rank=8))
    texts = ["Say a word on rivers.", "Say a word on mountains."]
    check_adapters(policy, texts, lambda *given: drift(*given) / 1e-3, noise=0.1)


@with_vllm
def test_adapters_are_published_merged_and_rounded_to_bfloat16() -> None:
    plain = make_policy(dtype=torch.bfloat16)
    adapters = attach(plain.model, LoraConfig(rank=8), seed=0, base=None)
    policy = Policy(plain.model, plain.text, adapters=adapters)

    def error(policy: Policy, prompts: list[Prompt], rollouts: list[Rollout]) -> float:
        """vLLM's mean error beside twice the trainer's, both against float64: the size of either depends on the CPU."""
        truth, weights = make_policy(dtype=torch.float64), policy.weights()
        truth.overwrite([weights[name].double() for name in truth.named_parameters()])
        exact, trainer = (torch.cat(trainer_logprob(p, prompts, rollouts, temperature=1.0)) for p in (truth, policy))
        drawn = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
        return ((drawn - exact).abs().mean() / (trainer - exact).abs().mean() / 2).item()

    check_adapters(policy, ["wa wb wc wd we", "wz wy wx"], error, noise=0.5)


# -- the 135M model
@pytest.fixture(scope="module", params=["copy", "shared"])
def started(request: pytest.FixtureRequest, smollm2_folder: Path) -> Iterator[tuple[Policy, VllmSampler, list[Tensor]]]:
    """The policy, vLLM on it, and the weights as they were: starting takes long, so the tests share it."""
    policy = load_policy(ModelConfig(path=str(smollm2_folder)), vocabulary=[], seed=0, device=DEVICE)
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", publish=request.param, max_model_len=256, max_seqs=32), 0)
    yield policy, sampler, policy.snapshot()
    sampler.close()


@pytest.fixture
def pair(started: tuple[Policy, VllmSampler, list[Tensor]]) -> Pair:
    policy, sampler, weights = started
    policy.overwrite(weights)
    return policy, sampler


only_copied = pytest.mark.parametrize("started", ["copy"], indirect=True, scope="module")


def take_steps(policy: Policy, num: int = 2) -> None:
    """Real AdamW steps, so large that stale weights are far off."""
    optimizer = torch.optim.AdamW(policy.named_parameters().values(), lr=1e-4)
    text = "Name three rivers and three mountains."
    token_ids = torch.tensor(policy.text.encode_prompt(text), device=DEVICE)
    positions = torch.arange(len(token_ids), device=DEVICE)
    for _ in range(num):
        hidden_TD = policy.backbone(token_ids[None], positions[None], causal)[0]
        loss = -linear_logprob(hidden_TD[:-1], policy.unembedding, token_ids[1:]).logprob.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@with_real_model
def test_trainer_and_vllm_agree_on_log_probabilities(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(policy, [f"Count from {i} to {i + 3}, then say a word on {i}." for i in range(16)])
    handed: list[tuple[int, list[Rollout]]] = []
    rollouts = sampler.generate(prompts, make_sampling(policy), lambda i, group: handed.append((i, list(group))))
    assert [(r.prompt_id, r.sample) for r in rollouts] == [(i, s) for i in range(16) for s in range(2)]
    assert sorted(i for i, _ in handed) == list(range(16))
    assert all(group == rollouts[2 * i : 2 * i + 2] for i, group in handed)
    assert drift(policy, prompts, rollouts) <= 1e-3
    assert sampler.generate([], make_sampling(policy)) == []
    cooler = sampler.generate(prompts[:2], make_sampling(policy, temperature=0.6))
    assert drift(policy, prompts[:2], cooler, temperature=0.6) <= 1e-3


@with_real_model
def test_they_agree_again_after_optimizer_steps_and_a_publication(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(policy, ["Say a word on rivers.", "Say a word on mountains."])
    before = sampler.generate(prompts, make_sampling(policy))
    take_steps(policy)
    assert drift(policy, prompts, before) > 0.05  # the steps were real
    publication = sampler.publish(2)
    check_publication(policy, sampler, publication, prompts[0], None)
    after = sampler.generate(prompts, make_sampling(policy))
    assert drift(policy, prompts, after) <= 1e-3
    assert {r.policy_version for r in after} == {2}


@with_real_model
def test_publishing_moves_all_bytes_or_none(pair: Pair) -> None:
    policy, sampler = pair
    parameters = policy.named_parameters()
    if not is_shared(sampler):
        assert sampler.publish(3).num_bytes == sum(p.nbytes for p in parameters.values())
        return
    assert sampler.publish(3).num_bytes == 0
    first = sampler.model.model.layers[0]
    query, key = (parameters[f"model.layers.0.self_attn.{m}_proj.weight"] for m in "qk")
    assert query.data_ptr() == first.self_attn.qkv_proj.weight.data_ptr()
    assert key.data_ptr() == first.self_attn.qkv_proj.weight[len(query) :].data_ptr()
    up = parameters["model.layers.0.mlp.up_proj.weight"]
    assert up.data_ptr() == first.mlp.gate_up_proj.weight[len(up) :].data_ptr()


@with_real_model
def test_a_policy_that_moved_without_a_publication_is_caught(pair: Pair) -> None:
    policy, sampler = pair
    prompt = make_prompts(policy, ["Say a word on rivers."])[0]
    publication = sampler.publish(1)
    down = policy.named_parameters()["model.layers.7.mlp.down_proj.weight"]
    if is_shared(sampler):
        down.data = down.data.clone()  # storage of its own again: the sampler no longer follows
        publication = sampler.publish(2)
    with torch.no_grad():
        down[5, 7] += 1e-6
    if is_shared(sampler):
        publication = sampler.publish(3)
    with pytest.raises(RunFailed, match="stale weights"):
        check_publication(policy, sampler, publication, prompt, None)
    if is_shared(sampler):
        down.data = sampler.model.model.layers[7].mlp.down_proj.weight.data


@with_real_model
@on_cpu
@only_copied
def test_a_tensor_left_behind_is_caught_by_its_fingerprint(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sampler = pair
    prompt = make_prompts(policy, ["Say a word on rivers."])[0]
    sampler.publish(1)
    take_steps(policy, 1)
    weights: Any = sampler._weights
    monkeypatch.setattr(
        weights, "prepacked", [p for p in weights.prepacked if "layers.7.mlp.down" not in p.tensor.name]
    )
    with pytest.raises(RunFailed, match="stale weights"):
        check_publication(policy, sampler, sampler.publish(2), prompt, None)


@with_real_model
@on_cpu
@only_copied
def test_a_stale_packed_unembedding_is_caught_by_the_probe(pair: Pair) -> None:
    policy, sampler = pair
    prompt = make_prompts(policy, ["Say a word on rivers."])[0]
    sampler.publish(1)
    stale = sampler.model.lm_head.cpu_linear
    take_steps(policy)
    publication = sampler.publish(2)
    assert publication.fingerprint == fingerprint(policy.named_parameters())
    fresh, sampler.model.lm_head.cpu_linear = sampler.model.lm_head.cpu_linear, stale
    with pytest.raises(RunFailed, match="does not compute with the trainer's weights"):
        check_publication(policy, sampler, publication, prompt, None)
    sampler.model.lm_head.cpu_linear = fresh
    assert probe_drift(policy, sampler, prompt).largest <= 1e-3


@with_real_model
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    prompts = make_prompts(
        policy, ["Name a bird and say why you chose it, in one sentence of at most twelve words."] * 2
    )
    state = torch.get_rng_state()
    first = sampler.generate(prompts, make_sampling(policy))
    sampler.generate(prompts[:1], make_sampling(policy, seed=6))
    again = sampler.generate(prompts, make_sampling(policy))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(first, again)
    other = sampler.generate(prompts, make_sampling(policy, seed=6))
    drawn = {tuple(r.token_ids.tolist()) for r in [*first, *other]}
    assert len(drawn) == 8  # another prompt id, sample or seed: another response


@with_real_model
def test_the_stop_token_is_kept_and_ends_the_response(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    # a frequent word ends a response too, so that both ways of ending come up
    stop_ids = (*policy.text.stop_ids, *policy.text.tokenizer(" the", add_special_tokens=False)["input_ids"])
    prompts = make_prompts(policy, ["Tell a story of the sea.", "Tell a story of the sky."])
    rollouts = sampler.generate(prompts, make_sampling(policy, stop_ids=stop_ids, samples_per_prompt=8))
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        *before, last = rollout.token_ids.tolist()
        assert not set(before) & set(stop_ids)
        assert (last in stop_ids) == (rollout.finish == "stop")
        assert rollout.finish == "stop" or len(rollout.token_ids) == 12
        assert rollout.sampler_logprob is not None and len(rollout.sampler_logprob) == len(rollout.token_ids)


@with_real_model
def test_nothing_but_the_stop_ids_ends_a_response(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    (question,) = make_prompts(policy, ["What is the capital of France?"])
    answer = policy.text.tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
    answered = dataclasses.replace(question, token_ids=(*question.token_ids, *answer))
    greedy = make_sampling(policy, temperature=0.0, samples_per_prompt=1)
    (ended,) = sampler.generate([answered], greedy)
    assert (ended.token_ids.tolist(), ended.finish) == ([policy.text.stop_ids[0]], "stop")
    (endless,) = sampler.generate([answered], dataclasses.replace(greedy, stop_ids=()))
    assert endless.token_ids[0] == policy.text.stop_ids[0]
    assert (len(endless.token_ids), endless.finish) == (12, "length")


@with_real_model
def test_greedy_takes_the_likeliest_token_and_carries_no_log_probability(pair: Pair) -> None:
    policy, sampler = pair
    sampler.publish(1)
    (prompt,) = make_prompts(policy, ["What is the capital of France?"])
    rollouts = sampler.generate([prompt], make_sampling(policy, temperature=0.0, samples_per_prompt=2))
    assert [r.sample for r in rollouts] == [0, 1]
    assert torch.equal(rollouts[0].token_ids, rollouts[1].token_ids)
    assert all(r.sampler_logprob is None for r in rollouts)
    token_ids = torch.tensor([*prompt.token_ids, *rollouts[0].token_ids.tolist()], device=DEVICE)
    with torch.no_grad():
        hidden = policy.backbone(token_ids[None], torch.arange(len(token_ids), device=DEVICE)[None], causal)[0]
        logits_NV = hidden[len(prompt.token_ids) - 1 : -1] @ policy.unembedding.T
    chosen = logits_NV.gather(1, rollouts[0].token_ids.to(DEVICE)[:, None])[:, 0]
    assert (logits_NV.max(1).values - chosen).max() <= 1e-3


@with_real_model
def test_requests_that_vllm_would_bend_are_refused(pair: Pair) -> None:
    policy, sampler = pair
    prompts = make_prompts(policy, ["Say a word on rivers."])
    with pytest.raises(UserError, match="vLLM was started for 256: raise sampler.max_model_len"):
        sampler.generate(prompts, make_sampling(policy, max_new_tok=250))
    with pytest.raises(UserError, match=r"temperature must be 0 or >= 0\.01 with vLLM, got 0\.001"):
        sampler.generate(prompts, make_sampling(policy, temperature=0.001))
    with pytest.raises(UserError, match="can hold one vLLM"):
        start_vllm(policy, SamplerConfig(kind="vllm"), 0)
