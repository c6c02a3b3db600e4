"""Options whose default or effect depends on other tables of a recipe."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.environment import notes_on_options
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.resume import resumed_recipe
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import check_tables, load_recipe
from isomorph.engine.record.runlog import read_steps

RECIPES = Path(__file__).parents[2] / "curriculum" / "recipes"
SMOKE = RECIPES / "smoke.toml"
VLLM = RECIPES / "smollm2_asynchow.toml"


def corrections(recipe: Recipe) -> list[str]:
    return [stage.objective.importance_sampling for stage in recipe.stage]


def test_with_vllm_tokens_are_corrected_by_default_and_the_run_says_so() -> None:
    recipe = load_recipe(VLLM, [], Recipe)
    assert corrections(recipe) == ["off", "token", "token"]  # the first is supervised
    (note,) = notes_on_options(recipe)
    assert "the loss of graph, natural is weighted" in note and '"off" turns it off' in note
    own = [f"stage.{i}.objective.importance_sampling=off" for i in (1, 2)]
    assert (
        corrections(load_recipe(VLLM, own, Recipe)) == ["off"] * 3
        and notes_on_options(load_recipe(VLLM, own, Recipe)) == []
    )
    sampler = load_recipe(VLLM, ["stage.1.objective.old_logprob=sampler"], Recipe)
    assert corrections(sampler) == ["off", "off", "token"]
    again = check_tables(recipe.model_dump(mode="json"), Recipe, where="run.json")
    assert corrections(again) == corrections(recipe)


def test_without_vllm_nothing_is_corrected_by_default() -> None:
    recipe = load_recipe(SMOKE, [], Recipe)
    assert set(corrections(recipe)) == {"off"} and notes_on_options(recipe) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage.1.objective.clip_dual=1.1", "clip_dual must be at least 1 \\+ clip_high"),
        ("stage.1.objective.clip_dual=0.5", "clip_dual: input should be greater than 1"),
        ("stage.2.objective.clip_dual=3.0", "clip_dual has no effect, because a step makes one update"),
        ("stage.0.objective.clip_dual=3.0", 'clip_dual is not supported with objective.name = "sft"'),
        ("stage.0.objective.old_logprob=sampler", 'old_logprob is not supported with objective.name = "sft"'),
        ("stage.1.objective.importance_sampling_floor=0.5", "floor has no effect"),
        ("stage.1.optim.warmup_share=1.5", "warmup_share: input should be less than or equal to 1"),
        ("stage.0.optim.warmup_share=0.5", "warmup_steps and warmup_share set the same thing"),
        ("stage.1.optim.decay_norms_and_biases=true", "has no effect, because optim.weight_decay is 0"),
        ("stage.1.optim.clip_norm=0", "clip_norm: input should be greater than 0"),
        ("stage.0.sampling.stop=['x']", "stop has no effect, because demonstrations are not sampled"),
        ("stage.0.sampling.top_p=0.9", "top_p has no effect, because demonstrations are not sampled"),
        ("stage.1.sampling.top_p=0.0", "top_p: input should be greater than 0"),
        ("stage.1.sampling.min_p=1", "min_p = 1 leaves a single token to draw"),
        ("stage.1.sampling.stop=['']", "string should have at least 1 character"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_recipe(SMOKE, [override], Recipe)


def test_vllm_which_does_not_say_what_it_kept_is_refused_with_top_p() -> None:
    expected = "stage 'symbols': sampling.top_k, top_p and min_p are not supported with sampler.kind = \"vllm\""
    for key in ("top_p=0.9", "top_k=20", "min_p=0.1"):
        with pytest.raises(UserError, match=expected):
            load_recipe(SMOKE, ["sampler.kind=vllm", f"stage.1.sampling.{key}"], Recipe)


SAMPLED = ["stage.1.objective.old_logprob=sampler", "stage.2.objective.old_logprob=sampler"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 'stage \'symbols\': objective.old_logprob must be "sampler".* got "trainer"'),
        ([*SAMPLED, "stage.2.batch.refills=1"], "stage 'words': batch.refills is not supported.* got 1"),
        (
            [SAMPLED[0], 'stage.2.objective.name="rft"'],
            "stage 'words': objective.name = \"rft\" has no importance weights",
        ),
        ([*SAMPLED, "sampler.kind=vllm"], 'sampler.overlap has no effect, because sampler.kind is "vllm"'),
        ([*SAMPLED, "parallel.kind=fsdp"], 'sampler.overlap = true is not supported with parallel.kind = "fsdp"'),
        (
            ['stage.1.objective={name="sft"}', 'stage.2.objective={name="sft"}', "sampling.samples_per_prompt=1"],
            "sampler.overlap has no effect, because no stage draws responses",
        ),
    ],
)
def test_what_cannot_be_drawn_one_step_ahead_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_recipe(SMOKE, ["sampler.overlap=true", *overrides], Recipe)


def test_a_recipe_runs_one_step_off_and_is_resumed_with_another_learning_rate(tmp_path: Path) -> None:
    quick = ("stage.0.steps=2", "stage.1.steps=3", "stage.2.steps=2", "eval.prompts=4", "run.checkpoint_every=1")
    options = ("sampler.overlap=true", "stage.2.objective.kl_coef=0.01", "run.keep_checkpoints=9")  # every step updates
    recipe = load_recipe(SMOKE, [*quick, *SAMPLED, *options], Recipe)
    run_recipe(recipe, tmp_path, Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
    assert [row["staleness"] for row in read_steps(tmp_path)] == [0, 0, 0, 1, 1, 0, 1]
    for step in (7, 6, 5):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    described = json.loads((tmp_path / "run.json").read_text())
    again, changes = resumed_recipe(described, ["stage.1.optim.lr=2e-4"], tmp_path)  # not within a step
    run_recipe(again, tmp_path, Console(file=io.StringIO()), lambda: False, ALONE, resume=True, changes=changes)
    rows = read_steps(tmp_path)
    assert [row["staleness"] for row in rows] == [0, 0, 0, 1, 1, 0, 1]
    assert [row["lr"] for row in rows[2:5]] == [1e-4, 1e-4, 2e-4]


def test_a_run_takes_the_options_and_its_evaluations_end_by_the_same_strings(tmp_path: Path) -> None:
    quick = ("stage.0.steps=2", "stage.1.steps=2", "stage.2.steps=1", "eval.prompts=4")
    options = (
        "sampling.stop=['?']",  # what this model writes again and again, since it has hardly learned
        "stage.1.objective.old_logprob=sampler",
        "stage.1.objective.clip_dual=3.0",
        "stage.1.objective.clip_low=off",
        "stage.1.objective.clip_high=off",
        "stage.1.optim.clip_norm=off",
        "stage.1.optim.warmup_share=0.5",
        "stage.2.optim.weight_decay=0.1",
        "stage.2.optim.decay_norms_and_biases=true",
    )
    recipe = load_recipe(SMOKE, [*quick, *options], Recipe)
    assert recipe.stop_strings == ("?",)
    run_recipe(recipe, tmp_path, Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
    for kind in ("step", "exam"):
        files = (tmp_path / "completions").glob(f"{kind}-*.jsonl")
        texts = [json.loads(line)["text"].rstrip() for file in files for line in file.read_text().splitlines()]
        assert any(text.endswith("?") for text in texts) and not any("?" in text[:-1] for text in texts), kind
    refused = load_recipe(SMOKE, [*quick, "stage.2.sampling.stop=['no such words']"], Recipe)
    with pytest.raises(
        UserError, match=r"sampling\.stop: no text that this tokenizer decodes contains 'no such words'"
    ):
        run_recipe(refused, tmp_path / "refused", Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
