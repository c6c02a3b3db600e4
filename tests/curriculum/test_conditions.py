"""Each of the package's conditions runs: a step or two of each from one warm start, of the smallest model."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isomorph.curriculum import assemble
from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe

FOLDER = Path(__file__).parents[2] / "curriculum" / "recipes" / "conditions"
STUDY = Path(__file__).parents[2] / "studies" / "supervised_conditions.py"
CONDITIONS = sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem not in ("base", "warm_up"))
SMALL = (
    "run.threads=1",
    "eval.prompts=1",
    "eval.representations=['natural']",
    "eval.max_new_tok=4",
    "log.tensorboard=false",
)


def shortened(name: str) -> list[str]:
    """Overrides that leave two steps of each stage (seven of an adaptive one), or one round of two questions."""
    stages = load_recipe(FOLDER / f"{name}.toml", [], Recipe).stage
    found = [*SMALL]
    for i, stage in enumerate(stages):
        found += [f"stage.{i}.steps={7 if stage.adaptive else 2}", f"stage.{i}.batch.prompts=2"]
        if not stage.objective.is_supervised:
            found += [f"stage.{i}.sampling.max_new_tok=8", f"stage.{i}.sampling.samples_per_prompt=2"]
        if stage.adaptive:
            found += [f"stage.{i}.adaptive.window=2"]
        if stage.star:
            found += [f"stage.{i}.star.{key}=2" for key in ("samples", "prompts")]
            found += [f"stage.{i}.sampling.max_new_tok=8"]
    return found


def run(name: str, overrides: list[str], folder: Path) -> dict[str, object]:
    folder.mkdir()
    threads = torch.get_num_threads()
    recipe = load_recipe(FOLDER / f"{name}.toml", overrides, Recipe)
    run_recipe(recipe, folder, Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
    torch.set_num_threads(threads)
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
    short = ("stage.0.steps=1", "stage.1.steps=1")
    overrides = [*SMALL, *short, *(f"model.tiny.{key}={value}" for key, value in sizes.items())]
    folder = tmp_path_factory.mktemp("conditions") / "warm_up"
    run("warm_up", overrides, folder)
    return folder


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_runs_from_the_warm_start(
    name: str, warm_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "write_report", lambda *folders: None)  # half the time; test_report.py has it
    if name in ("star", "rejection"):  # a random model is never right; test_star.py has one that has learned
        with pytest.raises(UserError, match=f"stage {name}: none of the "):
            run(name, [*shortened(name), f"model.path={warm_start}/model"], tmp_path / "run")
        return
    found = run(name, [*shortened(name), f"model.path={warm_start}/model"], tmp_path / "run")
    stages = load_recipe(FOLDER / f"{name}.toml", [], Recipe).stage
    assert found["status"] == "done"
    assert [done["name"] for done in found["stages"]] == [stage.name for stage in stages]  # type: ignore[attr-defined]


def test_every_rl_condition_makes_the_same_number_of_steps() -> None:
    for name in CONDITIONS:
        stages = load_recipe(FOLDER / f"{name}.toml", [], Recipe).stage
        assert any(stage.star for stage in stages) or sum(stage.steps for stage in stages) == 60, name


def test_the_study_of_supervised_conditions_fits_these_recipes() -> None:
    """Its overrides are of keys that exist, and the budgets are what its page says."""
    found = importlib.util.spec_from_file_location("supervised_conditions", STUDY)
    assert found is not None and found.loader is not None
    study = importlib.util.module_from_spec(found)
    found.loader.exec_module(study)
    for name, (recipe, _) in study.RUNS.items():
        overrides = study.overrides_of(name, 1, Path("/nowhere"), rehearse=False)
        stages = load_recipe(FOLDER / f"{recipe}.toml", overrides, Recipe).stage
        if star := stages[0].star:
            assert star.rounds * star.samples * star.prompts == 7680 == 60 * 16 * 8
        else:
            assert sum(stage.steps for stage in stages) == 60
    warm_up = [f"stage={study.inline(study.warm_up_stages(rehearse=False))}"]
    demonstrations, habit = load_recipe(FOLDER / "warm_up.toml", warm_up, Recipe).stage
    assert (demonstrations.steps, habit.steps) == (2000, 400)
    assert {part.representation: part.sequential_rate for part in habit.mixture} == {"graph": 0.4, "natural": 1.0}
