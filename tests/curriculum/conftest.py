"""What the curriculum's tests share."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe

SMOKE = Path(__file__).parents[2] / "curriculum" / "recipes" / "smoke.toml"
# enough of a warm-up for some right answers, a checkpoint in the middle of "symbols", a sample of every step
SHORT = (
    "stage.0.steps=80",
    "stage.1.steps=2",
    "stage.2.steps=1",
    "eval.prompts=16",
    "run.checkpoint_every=81",
    "run.completions_every=1",
)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run; read it, and copy it to change it."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    folder.mkdir()
    threads = torch.get_num_threads()
    run_recipe(
        load_recipe(SMOKE, list(SHORT), Recipe), folder, Console(file=io.StringIO()), lambda: False, ALONE, resume=False
    )
    torch.set_num_threads(threads)  # the recipe asks for one
    return folder
