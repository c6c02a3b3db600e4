import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

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
from isomorph.engine.recipe_file import check_tables, load_recipe

FSDP = dict(model=dict(path="x"), parallel=dict(kind="fsdp"))


class StageBeyond(Stage):
    pass


class File(Section):
    kind: Literal["file"]
    path: str = ""


class Generated(Section):
    kind: Literal["generated"]
    maker: Literal["file", "other"] = "other"
    paths: int = 0


class Toy(EngineConfig):
    """What a curriculum's recipe looks like to the engine."""

    stage: tuple[StageBeyond, ...] = Field(min_length=1)
    data: dict[str, Annotated[File | Generated, Field(discriminator="kind")]] = {}


RECIPE = """
[model.tiny]
hidden_size = 32
num_heads = 2
num_kv_heads = 1

[objective]
name = "grpo"
kl_coef = 0.01

[optim]
lr = 3e-4
weight_decay = 0.1

[sampling]
max_new_tok = 10
samples_per_prompt = 4

[[stage]]
name = "one"
steps = 5

[[stage]]
name = "two"
steps = 7
objective = { name = "dapo" }
optim = { lr = 1e-5 }
sampling = { max_new_tok = 20 }
"""


def recipe(tmp_path: Path, text: str = RECIPE, overrides: tuple[str, ...] = ()) -> Toy:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, list(overrides), Toy)


def refusal(tmp_path: Path, *overrides: str, text: str = RECIPE) -> str:
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, text, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- layers
def test_a_stage_takes_the_top_level_tables_and_lays_its_own_over_them(tmp_path: Path) -> None:
    one, two = recipe(tmp_path).stage
    assert (one.optim.lr, one.optim.weight_decay) == (3e-4, 0.1)
    assert (two.optim.lr, two.optim.weight_decay) == (1e-5, 0.1)
    assert (one.sampling.max_new_tok, two.sampling.max_new_tok) == (10, 20)
    assert one.sampling.samples_per_prompt == two.sampling.samples_per_prompt == 4


def test_another_objective_in_a_stage_brings_its_own_preset(tmp_path: Path) -> None:
    one, two = recipe(tmp_path).stage
    assert (one.objective.name, one.objective.kl_coef, one.objective.aggregation) == ("grpo", 0.01, "sequence")
    assert (two.objective.name, two.objective.kl_coef, two.objective.clip_high) == ("dapo", 0.0, 0.28)


def test_naming_the_same_objective_again_keeps_the_top_level_choices(tmp_path: Path) -> None:
    text = RECIPE.replace('name = "grpo"\n', "").replace('objective = { name = "dapo" }', 'objective.name = "dapo"')
    one, two = recipe(tmp_path, text).stage  # dapo is what the top level means without a name
    assert one.objective == two.objective
    assert two.objective.kl_coef == 0.01


def test_overrides_reach_tables_stages_and_new_tables(tmp_path: Path) -> None:
    toy = recipe(tmp_path, overrides=("run.seed=7", "stage.0.steps=2", "stage.1.optim.lr=0.5", "optim.eps = 1e-5"))
    assert toy.run.seed == 7
    assert [s.steps for s in toy.stage] == [2, 7]
    assert [s.optim.lr for s in toy.stage] == [3e-4, 0.5]
    assert [s.optim.eps for s in toy.stage] == [1e-5, 1e-5]


def test_an_override_is_a_toml_value_or_a_bare_word(tmp_path: Path) -> None:
    toy = recipe(
        tmp_path,
        overrides=("model.dtype=bfloat16", "optim.betas=[0.5, 0.6]", "run.max_mean_drift=0.5", "log.tensorboard=false"),
    )
    assert toy.model.dtype == "bfloat16"
    assert toy.stage[0].optim.betas == (0.5, 0.6)
    assert toy.log.tensorboard is False


def test_extends_lays_a_recipe_over_another(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(RECIPE)
    toy = recipe(tmp_path, 'extends = "base.toml"\n[optim]\nlr = 1.0\n[[stage]]\nname = "only"\nsteps = 1\n')
    assert [s.name for s in toy.stage] == ["only"]
    assert (toy.stage[0].optim.lr, toy.stage[0].optim.weight_decay) == (1.0, 0.1)


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


# -- refusals
@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("run.sead=1", "'seed'"),
        ("optim.learning_rat=1", "'lr'|known keys"),
        ("optim.weight_decy=0.1", "'weight_decay'"),
        ("stage.0.objective.clip_hihg=0.1", "'clip_high'"),
        ("stage.1.sampling.max_new_tokens=3", "'max_new_tok'"),
        ("stage.0.stps=3", "'steps'"),
        ("model.tiny.hiddensize=3", "'hidden_size'"),
        ("moddel.path=x", "'model'"),
        ('data.plans={kind="file", pathz=1}', "'path'"),
        ('data.plans={kind="generated", pathz=1}', "'paths'"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, override: str, nearest: str) -> None:
    message = refusal(tmp_path, override)
    assert "unknown key" in message
    assert any(key in message for key in nearest.split("|"))
    assert "recipe.toml" in message


def test_a_key_far_from_all_lists_what_is_known(tmp_path: Path) -> None:
    assert "known keys: " in refusal(tmp_path, "run.zzzzzz=1")


def test_every_defect_is_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "stage.0.steps=0", "run.sead=1", "stage.1.optim.lr=-1")
    for part in ("stage.0.steps", "got 0", "'seed'", "stage.1.optim.lr", "got -1"):
        assert part in message


@pytest.mark.parametrize(
    "override",
    [
        "no equals sign",
        "=3",
        "stage.2.steps=1",
        "stage.x.steps=1",
        "stage.steps=1",
        "stage.0=1",
        "run.seed.x=1",
        "model.dtype.x.y=1",
        "stage.0.name.x=1",
        "objective.name=[1]",
        "objective=3",
        "stage.0.objective=grpo",
        "stage.0.name=a/b",
        "stage.0.name=",
        "model=3",
    ],
)
def test_an_impossible_override_is_a_user_error(tmp_path: Path, override: str) -> None:
    refusal(tmp_path, "run.seed=0", override)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[model", "not valid TOML"),
        ("stage = 3", "stage"),
        ("", "stage: must be given"),
        ("[model.tiny]\n[optim]\nlr = 1.0", "toml: stage: must be given"),
        ('extends = "recipe.toml"', "extends"),
        ("extends = 3", "extends"),
        ('extends = "missing.toml"', "missing.toml"),
    ],
)
def test_a_broken_recipe_is_a_user_error(tmp_path: Path, text: str, named: str) -> None:
    assert named in refusal(tmp_path, text=text)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf[model")
    with pytest.raises(UserError, match="Expected ']'"):  # the table's own defect, not the mark
        load_recipe(tmp_path / "recipe.toml", [], EngineConfig)


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('extends = "recipe.toml"')
    assert "extends" in refusal(tmp_path, text='extends = "other.toml"')


def test_a_recipe_that_is_missing_a_folder_or_not_text_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(UserError, match=path.name):
            load_recipe(path, [], Toy)


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
        (SamplingConfig, dict(top_p=0.9)),  # the sampled log-probabilities would be another policy's
        (SamplingConfig, dict(top_k=5)),
        (BatchConfig, dict(prompts=0)),
        (BatchConfig, dict(num_iterations=0)),
        (BatchConfig, dict(refills=-1)),
        (OptimConfig, dict(lr=0.0)),
        (OptimConfig, dict(lr=math.inf)),
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


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("lora.rank=0",), "lora.rank: input should be greater than or equal to 1, got 0"),
        (("lora.dropout=0.1",), "lora.dropout: unknown key"),
        (("lora.targets=[]",), "lora.targets: "),
        (("lora.rank=4", "sampler.kind=vllm", "sampler.publish=shared"), 'set sampler.publish = "copy"'),
        (("lora.rank=4", "parallel.kind=fsdp"), 'set parallel.kind = "data"'),
    ],
)
def test_what_adapters_cannot_do_is_said_with_what_to_do(
    overrides: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    assert expected in refusal(tmp_path, *overrides)


def test_every_weight_is_trained_unless_there_is_a_table_for_adapters(tmp_path: Path) -> None:
    assert recipe(tmp_path).lora is None
    assert recipe(tmp_path, overrides=("lora.rank=4",)).lora == LoraConfig(rank=4)


# -- what pydantic would let pass, or say twice
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('batch.prompts="80"', "batch: prompts must be a number, without quotes, got '80'"),
        ("batch.prompts=true", "batch: prompts must be a number, got True"),
        ("run.completions_every=true", "run: completions_every must be a number, got True"),
        ("model.compile=1", "model: compile must be true or false, got 1"),
        ("objective.name=grppo", "objective.name: input should be 'grpo'"),
    ],
)
def test_a_value_of_another_kind_is_refused_once(override: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, overrides=(override,))
    assert expected in str(caught.value) and str(caught.value).count(expected) == 1


def test_a_default_that_every_stage_overrides_is_checked(tmp_path: Path) -> None:
    stages = ("stage.0.objective.name=sft", "stage.1.objective.name=grpo")
    with pytest.raises(UserError, match="objective.name: input should be"):
        recipe(tmp_path, overrides=("objective.name=grppo", *stages))


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    assert recipe(tmp_path, overrides=("sampling.temperature=1",)).stage[1].sampling.temperature == 1.0


def test_an_optimizer_on_the_host_and_fsdp_exclude_each_other(tmp_path: Path) -> None:
    assert "model.offload_optimizer" in refusal(tmp_path, "parallel.kind=fsdp", "model.offload_optimizer=true")


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
