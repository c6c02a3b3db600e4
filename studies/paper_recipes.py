"""The paper's recipes, each run for a step or two of every stage by a tiny random model of a family of the paper.

    python studies/paper_recipes.py                        prints a line a recipe, writes paper_recipes.jsonl
    python studies/paper_recipes.py --only graph_natural   some of them; writes nothing
    python studies/paper_recipes.py --plan                 writes the table of memory in docs/paper.md

Shows that recipes, data and models fit together, not that anything is learned: two prompts a step, answers of a few
tokens, byte tokens, one thread. Data: the authors' files in $ISOMORPH_ASYNCHOW and $ISOMORPH_PHYSICS_MATH; where a file
is missing, its stand-in from studies/paper_rows.py, which the line says.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.estimate import plan_recipe
from isomorph.curriculum.named_recipes import FOLDER, recipe_names
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.foreign import one_line
from isomorph.engine.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "studies")]

import paper_rows  # noqa: E402
from markers import between  # noqa: E402

RESULTS = Path(__file__).with_suffix(".jsonl")
PAGE = ROOT / "docs" / "paper.md"
FAMILIES = ("qwen2", "llama", "olmo2")
VARIABLES = ("ISOMORPH_ASYNCHOW", "ISOMORPH_PHYSICS_MATH")
SHORT = ("sampler.max_model_len=4096", "sampling.max_new_tok=2048", "eval.max_new_tok=2048")  # of 4,096 positions
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {  # in recipes/shapes/ -> hub name, what is set beside model.path
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", ()),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", ()),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", ()),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", ()),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", ()),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", ()),
    "olmo-2-1b": ("allenai/OLMo-2-0425-1B-Instruct", SHORT),
    "olmo-2-7b": ("allenai/OLMo-2-1124-7B-Instruct", SHORT),
}
CARDS = {"h100": 80, "h200": 139}  # cards that the planner knows, and their GiB


# -- a few steps of each
def make_model(folder: Path, family: str) -> Path:
    """A decoder of ``family`` with random weights, a token for each byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{{ messages[0].content + '\n' }}"
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + 8,  # transformers adds tokens to a tokenizer of some families as it is loaded
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(recipe: Recipe, model: Path, steps: int) -> list[str]:
    """Overrides that make a recipe small; demonstrations keep their length."""
    found = [
        *(f"model.path={model}", 'model.dtype="float32"', 'sampler.kind="builtin"', "run.threads=1"),
        *("eval.prompts=2", "eval.max_new_tok=2"),
    ]
    for i, stage in enumerate(recipe.stage):
        found += [f"stage.{i}.batch.prompts=2", f"stage.{i}.batch.prompts_per_update=1"]
        if not stage.objective.is_supervised:
            found += [f"stage.{i}.sampling.max_new_tok=8", f"stage.{i}.sampling.samples_per_prompt=2"]
    stars = [i for i, stage in enumerate(recipe.stage) if stage.star]
    found += [text for i in stars for text in (f"stage.{i}.star.rounds=1", f"stage.{i}.star.prompts=4")]
    found += ["sampling.max_new_tok=8"] if stars else []
    return [*found, *(f"stage.{i}.steps={steps}" for i in range(len(recipe.stage)))]


@contextlib.contextmanager
def data_folder(scratch: Path, *, is_real: bool = True) -> Iterator[list[str]]:
    """Lets the variables name a folder with a file for each name; yields the names of the authors' own ones."""
    paper_rows.write(scratch / "rows", num_train=24, num_test=4, seed=0)
    own: list[str] = []
    before = {name: os.environ.get(name) for name in (*VARIABLES, "ISOMORPH_TEACHER")}
    for folder in {Path(path) for name in VARIABLES if is_real and (path := before[name])}:
        for file in sorted(folder.glob("*.jsonl")):
            stand_in = scratch / "rows" / file.name
            if stand_in.exists():
                stand_in.unlink()
                stand_in.symlink_to(file.resolve())
                own.append(file.name)
    os.environ.update(variables_of(scratch))
    try:
        yield own
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def variables_of(scratch: Path) -> dict[str, str]:
    """Variable -> where ``data_folder`` has written what it names."""
    return dict.fromkeys(VARIABLES, str(scratch / "rows")) | {
        "ISOMORPH_TEACHER": str(scratch / "rows" / "teacher.jsonl")
    }


def exercise(name: str, model: Path, folder: Path, steps: int = 2) -> dict[str, Any]:
    """A run of the recipe, made small; what it did."""
    path = FOLDER / f"{name}.toml"
    recipe = load_recipe(path, small(load_recipe(path, [], Recipe), model, steps), Recipe)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    try:
        run_recipe(recipe, folder, Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
    except UserError as error:  # STaR by a random model: no answer of its own is right
        if not any(stage.star for stage in recipe.stage):
            raise
        described = json.loads((folder / "run.json").read_text())
        files = sorted({Path(file["path"]).name for place, file in described["files"].items() if "data." in place})
        row = {"recipe": name, "family": described["model"]["type"], "status": one_line(str(error)), "stages": {}}
        return {**row, "files": files, "evaluated_on": [], "seconds": round(time.perf_counter() - started, 1)}
    summary = json.loads((folder / "summary.json").read_text())
    described = json.loads((folder / "run.json").read_text())
    return {
        "recipe": name,
        "family": described["model"]["type"],
        "status": summary["status"],
        "stages": {stage["name"]: stage["steps"] for stage in summary["stages"]},
        "files": sorted({Path(file["path"]).name for place, file in described["files"].items() if "data." in place}),
        "evaluated_on": sorted(summary["exams"][-1]["accuracy"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def run_all(only: list[str]) -> None:
    names = [name for name in recipe_names() if name.startswith("paper/") and (not only or Path(name).name in only)]
    rows = []
    with tempfile.TemporaryDirectory() as text, data_folder(scratch := Path(text)) as own:
        folders = {family: make_model(scratch / family, family) for family in FAMILIES}
        for i, name in enumerate(names):
            family = FAMILIES[i % len(FAMILIES)]
            row = exercise(name, folders[family], scratch / "runs" / name)
            row["stand_ins"] = [file for file in row.pop("files") if file not in own]
            exams = ", ".join(row["evaluated_on"])
            line = f"{name:28} {row['family']:6} {row['status']}  steps {row['stages']}  on {exams}"
            missing = f"  stand-ins: {', '.join(row['stand_ins'])}" if row["stand_ins"] else ""
            print(f"{line}  {row.pop('seconds')} s{missing}", flush=True)
            rows.append({"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **row})
    if not only:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- memory
def plan_rows() -> list[list[str]]:
    """A row for each model: its peaks on two cards, and what is needed to fit."""
    found = []
    for shape, (hub, needed) in MODELS.items():
        row = [f"`{hub}`"]
        for card, gib in CARDS.items():
            row += _fitting(shape, needed, card, gib)
        found.append([*row, " ".join(f"`{text}`" for text in needed) or "-"])
    return found


def _fitting(shape: str, needed: tuple[str, ...], card: str, gib: int) -> list[str]:
    """Peak and options of the first choice that fits a card, in the order of what they cost."""
    choices: list[list[str]] = [
        [],
        ["batch.micro_batch_tok=16384"],
        ["batch.micro_batch_tok=16384", "model.offload_optimizer=true"],
        ["batch.micro_batch_tok=8192", "model.offload_optimizer=true"],
    ]
    for options in choices:
        overrides = [f"model.path={FOLDER / 'shapes' / shape}", *needed, *options]
        planned = plan_recipe(load_recipe(FOLDER / "paper/graph_natural.toml", overrides, Recipe), card, gib, 1)
        stages = planned["stages"]
        peak = max(max(stage["peak_gib"].values()) for stage in stages)
        host = max(sum(stage["arenas_gib"][name] for name in stage["host"]) for stage in stages)
        if peak <= gib:
            return [f"{peak:.0f} + {host:.0f}", " ".join(f"`{text}`" for text in options) or "as it is"]
    return [f"{peak:.0f} + {host:.0f}", "does not fit"]


def write_plan() -> None:
    head = ["`model.path`", "80 GiB", "with", "139 GiB", "with", "also set"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *plan_rows())]
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "plan", "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--plan", action="store_true")
    given = parser.parse_args()
    write_plan() if given.plan else run_all(given.only)
