import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from isomorph.engine.config import (
    PRESETS,
    BatchConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    Section,
    Stage,
    TinyModel,
    UserError,
)
from isomorph.engine.recipe_file import check_tables

FSDP = dict(model=dict(path="x"), parallel=dict(kind="fsdp"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_of_an_objective_fills_its_preset_and_every_line_can_be_overridden(name: str) -> None:
    plain = ObjectiveConfig.model_validate({"name": name})
    assert {key: getattr(plain, key) for key in PRESETS[name]} == PRESETS[name]
    overridden = ObjectiveConfig.model_validate({"name": name, "aggregation": "constant", "scale": "none"})
    assert (overridden.aggregation, overridden.scale) == ("constant", "none")
    assert overridden.baseline == plain.baseline


def test_the_default_objective_is_the_preset_of_its_name() -> None:
    assert ObjectiveConfig() == ObjectiveConfig(name="dapo")
    assert ObjectiveConfig().clip_high == 0.28


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        OptimConfig().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (TinyModel, dict(hidden_size=30, num_heads=4)),
        (TinyModel, dict(num_heads=4, num_kv_heads=3)),
        (TinyModel, dict(hidden_size=12, num_heads=4, num_kv_heads=1)),  # 3 per head: no rotary pairs
        (ModelConfig, dict()),
        (ModelConfig, dict(path="x", tiny=TinyModel())),
        (ModelConfig, dict(path="x", dtype="float16")),
        (SamplerConfig, dict(kind="hf")),
        (SamplerConfig, dict(memory_frac=1.0)),
        (SamplingConfig, dict(temperature=0.0)),
        (SamplingConfig, dict(temperature=math.inf)),
        (SamplingConfig, dict(temperature=math.nan)),
        (SamplingConfig, dict(top_p=0.0)),
        (SamplingConfig, dict(top_p=1.1)),
        (SamplingConfig, dict(top_k=-1)),
        (SamplingConfig, dict(top_k=1)),  # one token to draw: no gradient
        (SamplingConfig, dict(min_p=-0.1)),
        (SamplingConfig, dict(min_p=1.0)),
        (BatchConfig, dict(prompts=0)),
        (BatchConfig, dict(num_iterations=0)),
        (BatchConfig, dict(refills=-1)),
        (OptimConfig, dict(lr=0.0)),
        (OptimConfig, dict(lr=math.inf)),
        (OptimConfig, dict(eps=math.inf)),
        (OptimConfig, dict(weight_decay=math.inf)),
        (ObjectiveConfig, dict(kl_coef=math.inf)),
        (ObjectiveConfig, dict(reward_kl_coef=math.inf)),
        (ObjectiveConfig, dict(entropy_coef=math.inf)),
        (OptimConfig, dict(betas=(1.0, 0.9))),
        (OptimConfig, dict(betas=(0.9, -0.1))),
        (OptimConfig, dict(final_lr_frac=1.5)),
        (OptimConfig, dict(clip_norm=0.0)),
        (ObjectiveConfig, dict(name="ppo")),
        (ObjectiveConfig, dict(clip_low=None)),
        (ObjectiveConfig, dict(clip_high=None)),
        (ObjectiveConfig, dict(clip_low="off")),
        (ObjectiveConfig, dict(clip_low="none", clip_high="none")),
        (ObjectiveConfig, dict(clip_low=1.5)),
        (ObjectiveConfig, dict(kl_coef=-0.1)),
        (ObjectiveConfig, dict(kl_estimator="k4")),
        (ObjectiveConfig, dict(name="sft", reward_kl_coef=0.1)),
        (ObjectiveConfig, dict(name="reinforce_pp", scale="std", reward_kl_coef=0.1)),
        (ObjectiveConfig, dict(name="sft", kl_coef=0.1)),
        (ObjectiveConfig, dict(name="sft", entropy_coef=0.1)),
        (ObjectiveConfig, dict(name="rft", importance_sampling="token")),
        (ObjectiveConfig, dict(name="rft", ratio="sequence")),
        (RunConfig, dict(seed=-1)),
        (ParallelConfig, dict(kind="tensor")),
        (EngineConfig, dict(FSDP, sampler=dict(kind="vllm", publish="shared"))),
        (EngineConfig, dict(FSDP, model=dict(path="x", compile=True))),
        (LoraConfig, dict(rank=0)),
        (LoraConfig, dict(alpha=0.0)),
        (LoraConfig, dict(alpha=math.inf)),
        (LoraConfig, dict(targets=())),
        (LoraConfig, dict(dropout=0.1)),
        (EngineConfig, dict(FSDP, lora=dict())),
        (EngineConfig, dict(model=dict(path="x"), lora=dict(), sampler=dict(kind="vllm", publish="shared"))),
        (RunConfig, dict(keep_checkpoints=0)),
        (Stage, dict(name="s", steps=0)),
        (Stage, dict(name="s", steps=1, sampling=dict(samples_per_prompt=1))),
        (Stage, dict(name="s", steps=1, objective=dict(name="rloo"), sampling=dict(samples_per_prompt=1))),
        (Stage, dict(name="s", steps=1, objective=dict(name="sft"))),  # 8 samples of one demonstration
        (Stage, dict(name="s", steps=1, objective=dict(name="reinforce_pp"), batch=dict(refills=1))),
        (Stage, dict(name="s", steps=1, batch=dict(prompts=6, prompts_per_update=4))),
        (Stage, dict(name="s", steps=1, batch=dict(prompts=2, prompts_per_update=4))),
    ],
)
def test_what_cannot_work_is_refused(section: type[Section], values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        section.model_validate(values)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ModelConfig, dict(path="x")),
        (ModelConfig, dict(tiny=dict())),
        (EngineConfig, dict(FSDP, sampler=dict(kind="vllm", publish="copy"))),
        (EngineConfig, dict(model=dict(path="x"), lora=dict(), sampler=dict(kind="vllm", publish="copy"))),
        (LoraConfig, dict(rank=1, targets=("q_proj",))),
        (ObjectiveConfig, dict(name="grpo", clip_low=None, clip_high=None)),
        (
            ObjectiveConfig,
            dict(name="cispo", clip_high=5.0, importance_sampling="sequence", importance_sampling_mode="mask"),
        ),
        (Stage, dict(name="s", steps=1, objective=dict(name="sft"), sampling=dict(samples_per_prompt=1))),
        (Stage, dict(name="s", steps=1, objective=dict(name="reinforce_pp"), sampling=dict(samples_per_prompt=1))),
        (Stage, dict(name="s", steps=1, objective=dict(name="dapo"), batch=dict(refills=3))),
        (Stage, dict(name="warm-up 2", steps=1, batch=dict(prompts=6, prompts_per_update=3))),
    ],
)
def test_what_can_work_is_accepted(section: type[Section], values: dict[str, object]) -> None:
    section.model_validate(values)


def test_a_recipe_takes_a_presets_clip_away_by_a_word() -> None:
    assert ObjectiveConfig(name="grpo").clip_low == 0.2
    off = check_tables({"name": "grpo", "clip_low": "off", "clip_high": "off"}, ObjectiveConfig, where="here")
    assert (off.clip_low, off.clip_high) == (None, None)
    assert check_tables(off.model_dump(mode="json"), ObjectiveConfig, where="run.json") == off


# -- what follows from the choices
def test_only_losses_of_single_tokens_are_made_chunk_by_chunk() -> None:
    assert ObjectiveConfig(name="dapo", importance_sampling="token").is_per_token
    assert not ObjectiveConfig(name="gspo").is_per_token
    assert not ObjectiveConfig(name="dapo", importance_sampling="sequence").is_per_token


def test_a_sequence_without_advantage_is_left_out_only_where_nothing_else_gives_it_a_gradient() -> None:
    assert ObjectiveConfig(name="grpo").drops_zero_advantages
    assert ObjectiveConfig(name="rft").drops_zero_advantages
    assert not ObjectiveConfig(name="grpo", kl_coef=0.1).drops_zero_advantages
    assert not ObjectiveConfig(name="grpo", entropy_coef=0.1).drops_zero_advantages
    assert not ObjectiveConfig(name="sft").drops_zero_advantages


def test_the_old_key_of_the_kl_estimator_is_refused_with_both_new_names() -> None:
    with pytest.raises(UserError, match="kl_estimator .* reward_kl_coef"):
        check_tables({"name": "grpo", "kl_coef": 0.1, "kl": "k1"}, ObjectiveConfig, where="r.toml", inside="objective")


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        (TinyModel, dict(max_tok=64), "max_model_len"),
        (ModelConfig, dict(path="x", recompute_every=1), "gradient_checkpointing_every"),
        (ModelConfig, dict(path="x", optimizer="host"), "offload_optimizer = true"),
        (BatchConfig, dict(max_tok=64), "micro_batch_tok"),
        (BatchConfig, dict(epochs=2), "num_iterations"),
        (ObjectiveConfig, dict(tis="token"), "importance_sampling"),
        (ObjectiveConfig, dict(tis_mode="mask"), "importance_sampling_mode"),
        (ObjectiveConfig, dict(tis_cap=2.0), "importance_sampling_cap"),
        (Stage, dict(name="a", steps=1, optimizer="carry"), "optimizer_state"),
        (Stage, dict(name="a", steps=1, reference="anchor"), 'reference = "snapshot"'),
        (Stage, dict(name="a", steps=1, reference="keep"), 'reference = "previous"'),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(section: type[Section], old: dict[str, Any], new: str) -> None:
    with pytest.raises(ValidationError, match=f"has a new name: write {re.escape(new)}"):
        section.model_validate(old)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (SamplerConfig, dict(tensor_parallel_size=2), "tensor_parallel_size is not supported, because each rank has"),
        (ParallelConfig, dict(kind="hsdp"), 'kind = "hsdp" is not supported: for hybrid sharding'),
    ],
)
def test_what_is_not_there_is_refused_by_name(section: type[Section], values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        section.model_validate(values)


@pytest.mark.parametrize(
    ("section", "values", "what", "remedy"),
    [
        (EngineConfig, dict(FSDP, model=dict(path="x", compile=True)), "model.compile = true", "remove model.compile"),
        (EngineConfig, dict(FSDP, sampler=dict(kind="vllm", publish="shared")), 'publish = "shared"', '"copy"'),
        (EngineConfig, dict(FSDP, model=dict(path="x", offload_optimizer=True)), "offload_optimizer", '"data"'),
        (EngineConfig, dict(FSDP, lora=dict()), "[lora]", 'set parallel.kind = "data"'),
        (EngineConfig, dict(FSDP, sampler=dict(keep_cache=True)), "sampler.keep_cache", "remove sampler.keep_cache"),
        (EngineConfig, dict(FSDP, sampler=dict(overlap=True)), "sampler.overlap", 'parallel.kind = "data"'),
        (ObjectiveConfig, dict(name="sft", kl_coef=0.1), "kl_coef", "remove it"),
        (ObjectiveConfig, dict(name="reinforce_pp", scale="std", reward_kl_coef=0.1), "reward_kl_coef", '"batch"'),
    ],
)
def test_what_does_not_go_together_is_named_with_what_to_do(
    section: type[Section], values: dict[str, object], what: str, remedy: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        section.model_validate(values)
    (message,) = [defect["msg"] for defect in refused.value.errors()]
    before, _, after = message.partition(" is not supported with ")
    assert what in before and remedy in after.partition(": ")[2]
