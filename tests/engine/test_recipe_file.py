from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from isomorph.engine.config import (
    EngineConfig,
    LoraConfig,
    Section,
    Stage,
    UserError,
)
from isomorph.engine.recipe_file import load_recipe


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
