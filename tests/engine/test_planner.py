"""The plan's bytes and FLOPs against what PyTorch keeps, and a budget that is known."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sampler_parts import policy_of

from isomorph.engine import planner
from isomorph.engine.config import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    Stage,
    TinyModel,
    UserError,
)
from isomorph.engine.model.load import build_tiny, read_shape, shape_of
from isomorph.engine.model.lora import attach
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.planner import (
    GIB,
    Facts,
    facts_of,
    largest_kv_tok,
    largest_micro_tok,
    layer_bytes_per_tok,
    memory_uses,
    peak_bytes,
)
from isomorph.engine.planner_time import Ceilings, card_ceilings, seconds
from isomorph.engine.rollout.builtin import plan_decoder
from isomorph.engine.types import Prompt, Rollout, Sampling
from isomorph.kernels import backend

SEVEN_B = Path(__file__).parents[2] / "curriculum" / "recipes" / "shapes" / "qwen2.5-7b"

TRANSFORMERS_OWN = "rms_norm=reference,swiglu=reference,rotary=reference"


def seven_b(
    *, lora: LoraConfig | None = None, num_ranks: int = 1, kind: str = "data", publish: str = "shared", **changes: Any
) -> Facts:
    model = ModelConfig(path=str(SEVEN_B), dtype="bfloat16", gradient_checkpointing_every=1)
    stage = Stage.model_validate(
        {"name": "a", "steps": 1, "objective": {"kl_coef": 0.01}, "batch": {"micro_batch_tok": 16384}}
    )
    sampler = {"kind": "vllm", "memory_frac": 0.3, "publish": publish}
    config = EngineConfig.model_validate({"model": model, "sampler": sampler, "parallel": {"kind": kind}})
    shape = read_shape(model, [], lora)
    facts = facts_of(config, stage, shape, prompt_tok=600, device_gib=139.8, is_gpu=True, num_ranks=num_ranks)
    return dataclasses.replace(facts, **changes)


def gib(facts: Facts) -> dict[str, float]:
    return {use.name: use.num_bytes / GIB for use in memory_uses(facts)}


def test_an_optimizer_on_the_host_takes_its_bytes_along() -> None:
    beside, apart = seven_b(), seven_b(optimizer_on_host=True)
    freed = sum(gib(beside)[name] for name in ("masters", "moments", "gradients"))
    # several micro-batches are added up in float32 on the device
    sums = {"sums of gradients": gib(beside)["gradients"]}
    assert gib(apart) == gib(beside) | sums
    assert "sums of gradients" not in gib(seven_b(optimizer_on_host=True, micro_tok=1e9))
    assert {a.name for a in memory_uses(apart) if a.is_host} >= {"masters", "moments", "gradients"}
    assert (peak_bytes(beside, "step") - peak_bytes(apart, "step")) / GIB == pytest.approx(freed)
    card = card_ceilings("h200")[1]
    assert seconds(apart, card)["update"] > seconds(beside, card)["update"]


def test_several_ranks_share_the_prompts_and_with_fsdp_the_states() -> None:
    billions, size = 7.615616512e9 / GIB, seven_b().shape
    alone, data, cut = seven_b(), seven_b(num_ranks=4), seven_b(num_ranks=4, kind="fsdp", publish="copy")
    assert data.prompts == cut.prompts == -(-alone.prompts // 4)
    assert data.forward_tok < alone.forward_tok / 3 and data.kv_tok < alone.kv_tok
    states = ("weights", "masters", "moments", "gradients", "reference")
    assert [gib(data)[name] for name in states] == [gib(alone)[name] for name in states]
    found = gib(cut)
    # what is kept in parts is kept in float32, the reference too
    for name, num_bytes in (("masters", 4), ("moments", 8), ("gradients", 4), ("reference", 4)):
        assert found[name] == pytest.approx(num_bytes * billions / 4)
    assert found["weights"] == pytest.approx(2 * billions)  # to generate with
    assert [a.moments for a in memory_uses(cut) if a.name == "weights"] == [("generate",)]
    head = size.num_vocab * size.width
    layer = (7_615_616_512 - 2 * head) / 28
    assert found["gathered layers"] == pytest.approx(2 * (2 * head + 2 * layer) / GIB)
    card = card_ceilings("h200")[1]
    assert seconds(data, card)["update"] < seconds(alone, card)["update"] / 2
    own = found["vLLM's weights"] * GIB  # with fsdp it cannot share
    assert peak_bytes(cut, "step") - own < peak_bytes(data, "step") / 2


def test_weights_that_vllm_has_for_itself_are_counted() -> None:
    shared, copied = seven_b(publish="shared"), seven_b(publish="copy")
    assert gib(copied).pop("vLLM's weights") == gib(copied)["weights"] and "vLLM's weights" not in gib(shared)
    for moment in ("generate", "update", "step"):
        assert peak_bytes(copied, moment) - peak_bytes(shared, moment) == gib(copied)["weights"] * GIB


@pytest.mark.parametrize(
    ("weight_bytes", "has_bfloat16", "is_prepacked"),
    [(4, False, True), (2, True, True), (2, False, False), (8, True, False)],
)
def test_weights_are_prepacked_where_onednn_multiplies_them(
    monkeypatch: pytest.MonkeyPatch, weight_bytes: int, has_bfloat16: bool, is_prepacked: bool
) -> None:
    monkeypatch.setattr(planner, "onednn_has_bfloat16", lambda: has_bfloat16)
    facts = dataclasses.replace(seven_b(), sampler="builtin", is_gpu=False, weight_bytes=weight_bytes)
    backbone = facts.shape.num_backbone * weight_bytes / GIB
    assert gib(facts).get("prepacked weights") == (backbone if is_prepacked else None)


def test_a_folder_with_nothing_but_a_config_is_enough() -> None:
    shape = read_shape(ModelConfig(path=str(SEVEN_B)), [])
    assert shape.num_parameters == 7_615_616_512  # as its makers count them
    assert (shape.num_layers, shape.head_dim, shape.is_tied) == (28, 128, False)


def test_states_of_a_7b_model_take_2_4_4_and_8_bytes_a_parameter() -> None:
    found = gib(seven_b())
    billions = 7.615616512e9 / GIB
    assert found["weights"] == found["reference"] == pytest.approx(2 * billions)
    assert found["masters"] == found["gradients"] == pytest.approx(4 * billions)
    assert found["moments"] == pytest.approx(8 * billions)


def test_adapters_alone_have_masters_moments_gradients_and_a_reference() -> None:
    facts = seven_b(lora=LoraConfig(rank=16))
    queries, keys, mlp = 3584 + 3584, 3584 + 512, 3584 + 18944  # in + out, of q and o; k and v; gate, up and down
    trained = 28 * 16 * (2 * queries + 2 * keys + 3 * mlp)
    assert facts.shape.num_trained == trained == 40_370_176
    found, every = gib(facts), gib(seven_b())
    assert found["weights"] == pytest.approx(every["weights"] + 2 * trained / GIB)
    assert found["masters"] == found["gradients"] == pytest.approx(4 * trained / GIB)
    assert found["moments"] == pytest.approx(8 * trained / GIB)
    assert found["reference"] == pytest.approx(2 * trained / GIB)
    assert every["head gradient"] - found["head gradient"] == pytest.approx(4 * facts.shape.num_head / GIB)
    few = seven_b(lora=LoraConfig(rank=16, targets=("q_proj",)))
    assert few.shape.num_trained == 28 * 16 * queries


@pytest.mark.parametrize(
    "objective, batch, share",
    [
        ({}, {}, 0),
        ({}, {"num_iterations": 2}, 0),  # the first update's own, kept for the second
        ({}, {"num_iterations": 2, "prompts_per_update": 4}, 3 / 4),
        ({"reward_kl_coef": 0.1}, {}, 1),
        ({"reward_kl_coef": 0.1}, {"prompts_per_update": 4}, 1),
        ({"old_logprob": "sampler"}, {"prompts_per_update": 4}, 0),
        ({"name": "sft"}, {"prompts_per_update": 4}, 0),
    ],
)
def test_old_log_probabilities_take_the_forwards_that_the_learner_makes(
    objective: dict[str, Any], batch: dict[str, int], share: float
) -> None:
    """tests/engine/test_learner.py counts the learner's."""
    table = {"name": "s", "steps": 1, "objective": objective, "batch": {"prompts": 16, **batch}}
    stage = Stage.model_validate(table | {"sampling": {"samples_per_prompt": 1 if "name" in objective else 8}})
    config = EngineConfig(model=ModelConfig(path="a-model"))
    facts = facts_of(config, stage, seven_b().shape, prompt_tok=10, device_gib=80, is_gpu=True)
    assert facts.share_scored == share


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_gradients_are_there_while_a_second_micro_batch_computes(num_iterations: int) -> None:
    """However often a step passes over its rollouts: each optimizer step has two micro-batches here."""
    config = EngineConfig(model=ModelConfig(path="a-model"))
    table = {"name": "s", "steps": 1, "batch": {"prompts": 16, "num_iterations": num_iterations}}
    stage = Stage.model_validate(table)
    facts = facts_of(config, stage, seven_b().shape, prompt_tok=10, device_gib=80, is_gpu=True)
    facts = dataclasses.replace(facts, micro_tok=facts.forward_tok / 2)
    gradients = next(use for use in memory_uses(facts) if use.name == "gradients")
    assert facts.has_several_micro_batches and gradients.moments == ("update", "step")
    assert not dataclasses.replace(facts, micro_tok=facts.forward_tok).has_several_micro_batches


@pytest.mark.parametrize("prompts, max_seqs", [(128, 256), (4, 256), (64, 20), (3, 1)])
def test_the_cache_is_that_of_the_decoder(prompts: int, max_seqs: int) -> None:
    facts = seven_b(sampler="builtin", drawn_prompts=prompts, drawn_samples=8, max_seqs=max_seqs, kv_limit_tok=None)
    sampling = Sampling(
        temperature=1.0, max_new_tok=int(facts.response_tok), samples_per_prompt=8, stop_ids=(1,), seed=0
    )
    spec = plan_decoder([int(facts.prompt_tok)] * prompts, sampling, max_seqs, None)
    assert gib(facts)["KV cache"] * GIB == pytest.approx(spec.kv_tok * facts.kv_bytes_per_tok)


def test_kept_tokens_are_counted_in_host_memory_at_their_most() -> None:
    config, shape = EngineConfig(model=ModelConfig(path="a-model")), seven_b().shape
    for cut, num_words in (({}, None), ({"top_p": 0.9}, -(-shape.num_vocab // 32)), ({"top_k": 50, "min_p": 0.1}, 50)):
        sampling = {"max_new_tok": 100, "samples_per_prompt": 8, **cut}
        stage = Stage.model_validate({"name": "s", "steps": 1, "sampling": sampling, "batch": {"prompts": 6}})
        facts = facts_of(config, stage, shape, prompt_tok=10, device_gib=80, is_gpu=True, num_ranks=2)
        found = {use.name: use for use in memory_uses(facts)}
        if num_words is None:
            assert "kept tokens, at most" not in found
            continue
        use = found["kept tokens, at most"]
        assert use.num_bytes == 6 * 8 * 100 * (4 * num_words + 8) and use.is_host  # every rank has all rollouts


def test_frozen_weights_need_no_gradients_of_their_own() -> None:
    endless = Ceilings(1e15, 1e30, "test")
    options: dict[str, Any] = dict(has_reference=False, share_scored=0.0, gradient_checkpointing_every=None)
    one, every = (seconds(seven_b(lora=lora, **options), endless)["update"] for lora in (LoraConfig(rank=1), None))
    assert one == pytest.approx(every * 2 / 3, rel=1e-3)


def test_the_reference_is_in_host_memory_and_gradients_are_gone_while_sampling() -> None:
    facts = seven_b()
    generate = peak_bytes(facts, "generate") / GIB
    parts = ("weights", "masters", "moments", "KV cache", "sampler", "device context")
    assert generate == pytest.approx(sum(gib(facts)[part] for part in parts))


def test_what_fits_fits_exactly() -> None:
    facts = seven_b()
    largest = largest_micro_tok(facts)
    assert largest > 0
    for num_tok, fits in ((largest, True), (largest + 1, False)):
        assert (peak_bytes(dataclasses.replace(facts, micro_tok=num_tok), "update") <= 139.8 * GIB) is fits
    assert largest_micro_tok(seven_b(gradient_checkpointing_every=None)) < largest / 2
    assert largest_micro_tok(seven_b(device_gib=79.6)) == 0
    kv_gib = largest_kv_tok(facts) * facts.kv_bytes_per_tok / GIB
    assert kv_gib == pytest.approx(0.3 * 139.8 - 2 - gib(facts)["weights"], rel=1e-3)


def test_vllm_keeps_to_its_share_of_the_memory_however_many_sequences_are_asked_for() -> None:
    own = 7.615616512e9 * 2 / GIB + 2
    for rows in (64, 8192):
        assert gib(seven_b(max_seqs=rows))["KV cache"] == pytest.approx(0.3 * 139.8 - own)
    assert gib(seven_b(is_gpu=False, max_seqs=1))["KV cache"] < 1  # what one sequence needs


def test_a_cache_that_is_kept_is_there_while_the_learner_runs() -> None:
    builtin: dict[str, Any] = dict(sampler="builtin", sampler_copies=False, device_gib=300.0)
    freed, kept = seven_b(**builtin), seven_b(**builtin, keeps_cache=True)
    assert gib(freed) == gib(kept) and peak_bytes(freed, "generate") == peak_bytes(kept, "generate")
    more = (gib(kept)["KV cache"] + gib(kept)["sampler"]) * GIB
    for moment in ("update", "step"):
        assert peak_bytes(kept, moment) == pytest.approx(peak_bytes(freed, moment) + more)
    assert 0 < largest_kv_tok(kept) < largest_kv_tok(freed)


def test_what_draws_while_another_step_is_learned_is_there_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """7.6e9 weights of 2 bytes once more; cache, logits and packed weights of drawing beside what learning holds."""
    monkeypatch.setattr(planner, "onednn_has_bfloat16", lambda: True)
    cpu: dict[str, Any] = dict(sampler="builtin", is_gpu=False, device_gib=300.0)
    in_turn, at_once = seven_b(**cpu), seven_b(**cpu, overlaps=True)
    assert gib(at_once)["weights to draw from"] == pytest.approx(2 * 7.615616512e9 / GIB)
    own = gib(at_once).keys() - gib(in_turn).keys()
    assert own == {"weights to draw from", "mismatch of what is drawn"}
    drawn = sum(gib(at_once)[name] for name in {"KV cache", "sampler", "prepacked weights", *own})
    assert (peak_bytes(at_once, "update") - peak_bytes(in_turn, "update")) / GIB == pytest.approx(drawn)
    assert largest_kv_tok(at_once) < largest_kv_tok(in_turn)


def test_the_key_and_value_budget_of_the_recipe_holds() -> None:
    assert seven_b(kv_limit_tok=1000).kv_tok == 1000


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8)], ids=["every weight", "adapters"])
@pytest.mark.parametrize(
    ("gradient_checkpointing_every", "is_fused"),
    # of a layer that is computed again only the input is kept, fused or not
    [(None, True), (1, True), (2, True), pytest.param(None, False, id="transformers' own layers")],
)
def test_a_layers_bytes_are_those_that_autograd_keeps(
    gradient_checkpointing_every: int | None, lora: LoraConfig | None, is_fused: bool
) -> None:
    """Counted by hooks on a real packed pass: the difference that two layers make, so that all else cancels."""
    facts_by_layers = {}
    for num_layers in (2, 4):
        tiny = TinyModel(hidden_size=64, num_layers=num_layers, num_heads=4, num_kv_heads=2, intermediate_size=96)
        policy = build_tiny(tiny, ["a", "b"], seed=0, dtype=torch.float32, device=torch.device("cpu"))
        adapters = None if lora is None else attach(policy.model, lora, seed=0, base=None)
        policy = type(policy)(
            policy.model, policy.text, gradient_checkpointing_every=gradient_checkpointing_every, adapters=adapters
        )
        with backend.using("" if is_fused else TRANSFORMERS_OWN):
            num_tok, kept = _kept_bytes(policy)
        facts_by_layers[num_layers] = kept / num_tok
        shape = shape_of(policy.model)
    measured = (facts_by_layers[4] - facts_by_layers[2]) / 2
    whole, light = layer_bytes_per_tok(shape, 4, is_fused=is_fused), 4 * shape.width
    expected = {None: whole, 1: light, 2: (whole + light) / 2}[gradient_checkpointing_every]
    assert measured == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("is_fused", [True, False])
def test_norms_behind_attention_and_mlp_keep_their_float32_rows(is_fused: bool) -> None:
    """OLMo-2 in bfloat16, where float32 is twice as wide; measured as above. Fused norms keep none."""
    kept = {}
    for num_layers in (2, 4):
        policy = policy_of("olmo2", torch.bfloat16, num_hidden_layers=num_layers, hidden_size=64, intermediate_size=96)
        with backend.using("" if is_fused else TRANSFORMERS_OWN):
            num_tok, num_bytes = _kept_bytes(policy)
        kept[num_layers] = num_bytes / num_tok
    expected = layer_bytes_per_tok(shape_of(policy.model), 2, is_fused=is_fused)
    assert (kept[4] - kept[2]) / 2 == pytest.approx(expected, rel=0.05)


def _kept_bytes(policy: Any) -> tuple[int, int]:
    rollout = Rollout(
        prompt_id=0,
        sample=0,
        token_ids=torch.ones(64, dtype=torch.int64),
        sampler_logprob=None,
        finish="stop",
        policy_version=0,
    )
    prompt = Prompt(prompt_id=0, token_ids=(1,) * 65, task="t", representation="graph", payload=None)
    batch = pack_parts([Part(prompt, (rollout, rollout), (1.0, 1.0))], policy.device)
    parameters = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TD = policy.hidden(batch)
    assert hidden_TD.requires_grad
    return len(batch.token_ids), sum(storage.nbytes() for storage in storages.values())


def test_seconds_are_flops_over_one_ceiling_and_bytes_over_the_other() -> None:
    facts = seven_b(has_reference=False, share_scored=0.0, gradient_checkpointing_every=None)
    endless = Ceilings(1e15, 1e30, "test")
    one = seconds(facts, endless)["update"]
    ideal = 6 * facts.shape.num_backbone * facts.forward_tok + 6 * facts.shape.num_head * facts.loss_tok
    assert ideal < one * 1e15 < 1.1 * ideal  # the rest is attention
    again = seconds(dataclasses.replace(facts, gradient_checkpointing_every=1, has_reference=True), endless)["update"]
    assert again == pytest.approx(one * 5 / 3)
    assert seconds(dataclasses.replace(facts, is_sampled=False), endless)["generate"] == 0
    slow = seconds(facts, Ceilings(1e30, 4e12, "test"))["generate"]
    assert slow > facts.response_tok * facts.shape.num_parameters * 2 / 4e12  # each round reads the weights


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UserError, match="h200"):
        card_ceilings("h300")


def test_the_command_estimates_a_recipe_without_weights(tmp_path: Path, warm_isomorph: list[str]) -> None:
    recipe = SEVEN_B.parents[1] / "paper" / "graph_natural.toml"
    command = [*warm_isomorph, "plan", str(recipe)]
    command += [f"model.path={SEVEN_B}", "model.gradient_checkpointing_every=1", "--device", "h200", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "weights",
        "moments",
        "reference (host)",
        "largest batch.micro_batch_tok",
        "989.00 TFLOP/s",
        "one of 2 ranks",
    ):
        assert word in done.stdout, done.stdout
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    planned = json.loads(done.stdout)
    assert [stage["stage"] for stage in planned["stages"]] == ["graph", "natural"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.weekly)])
def test_a_real_steps_peak_memory_is_within_a_tenth_of_the_plan(
    smollm2_folder: Path, tmp_path: Path, num_ranks: int
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\npath = "{smollm2_folder}"\n[run]\ncheckpoint_every = 99\n[data.plans]\nkind = "async_plan"\n'
        '[[stage]]\nname = "rl"\nsteps = 2\nobjective = { name = "dapo", entropy_coef = 0.01 }\n'
        "sampling = { max_new_tok = 8, samples_per_prompt = 4 }\nbatch = { prompts = 2, micro_batch_tok = 4096 }\n"
        'mixture = [{ data = "plans", representation = "graph" }]\n'
        '[eval]\ndata = "plans"\nrepresentations = ["graph"]\nprompts = 1\nmax_new_tok = 2\n'
    )
    script = tmp_path / "train.py"  # torchrun takes no -c
    script.write_text("from isomorph.curriculum.cli import main\n\nmain()\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "--"]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), str(script), "train", str(recipe)]
    command += ["--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "estimated/measured, stage rl: peak_gib" in done.stdout
    peak = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["rl"]["peak_gib"]
    assert peak["plan"] == pytest.approx(peak["fact"], rel=0.1)
