"""Whole runs of a tiny model over rows of other projects' forms, by recipes of at most 25 lines."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import resumed_recipe
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe

RECIPE = """
[model]
tiny = { tokenizer = "bytes", hidden_size = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1, max_model_len = 256 }
[data.mine]
DATA
[[stage]]
name = "rl"
steps = 2
batch = { prompts = 4 }
sampling = { max_new_tok = 8, samples_per_prompt = 2 }
mixture = [{ data = "mine", representation = "LABEL" }]
[eval]
data = "mine"
representations = ["LABEL"]
prompts = 2
max_new_tok = 4
[run]
completions_every = 1
"""
COUNTDOWN = """import re


def score(answer):
    used = sorted(int(n) for n in re.findall(r"[0-9]+", answer.text))
    return 0.25 * (len(answer.text) % 3) + 0.5 * (used == sorted(answer.row["nums"]))
"""
VERL = """def compute_score(data_source, solution_str, ground_truth, extra_info):
    return len(solution_str) % 4 / 4 + (ground_truth in solution_str) + extra_info["index"] / 100
"""


def verl_rows() -> list[dict[str, Any]]:
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
            "extra_info": {"split": "train", "index": n},
        }
        for n in range(20)
    ]


def countdown_rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [{"target": rng.randrange(10, 99), "nums": rng.sample(range(1, 20), 3)} for _ in range(20)]


def chat_rows() -> list[dict[str, Any]]:
    asked = ([{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}] for n in range(20))
    return [{"messages": chat} for chat in asked]


def run(
    folder: Path, data: str, *overrides: str, label: str = "natural", name: str = "run", resume: bool = False
) -> str:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.replace("DATA", data).replace("LABEL", label))
    assert len(recipe.read_text().strip().splitlines()) <= 25
    (folder / name).mkdir(exist_ok=True)
    loaded = load_recipe(recipe, list(overrides), Recipe)
    if resume:
        loaded, _ = resumed_recipe(read_run_json(folder / name), [], folder / name)
    out = Console(file=io.StringIO(), width=200)
    run_recipe(loaded, folder / name, out, lambda: False, ALONE, resume=resume)
    return out.file.getvalue()  # type: ignore[attr-defined]


def completions(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "run" / "completions").glob("step-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_verls_parquet_and_its_function_train_as_they_are(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = verl_rows()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "score.py").write_text(VERL)
    run(
        tmp_path,
        'kind = "rows"\npath = "train.parquet"\nanswer = "reward_model.ground_truth"\n'
        'rewards = [{ function = "score.py:compute_score" }]',
    )
    names: dict[str, Any] = {}
    exec(VERL, names)
    done = completions(tmp_path)
    assert len(done) == 2 * 4 * 2
    for one in done:
        (row,) = [row for row in rows if row["prompt"][0]["content"] in one["prompt"]]
        gold = row["reward_model"]["ground_truth"]
        by_hand = names["compute_score"](row["data_source"], one["text"], gold, row["extra_info"])
        assert one["reward"] == pytest.approx(by_hand)


def test_a_countdown_games_native_rows_reach_the_reward(tmp_path: Path) -> None:
    rows = countdown_rows()
    (tmp_path / "game.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "game.py").write_text(COUNTDOWN)
    run(
        tmp_path,
        'kind = "rows"\npath = "game.jsonl"\nprompt = "Make {target} from {nums}: "\n'
        'rewards = [{ function = "game.py:score" }]',
    )
    asked = {f"Make {row['target']} from {row['nums']}: " for row in rows}
    done = completions(tmp_path)
    assert len(done) == 16 and all(any(prompt in one["prompt"] for prompt in asked) for one in done)
    assert {one["reward"] for one in done} <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_chats_warm_up_and_train_and_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chat_rows())))
    data = (
        'kind = "rows"\npath = "chats.jsonl"\nprompt = "messages"\ndemonstration = "messages"\n'
        'answer = "{messages.1.content}"\nrewards = [{ function = "exact" }]'
    )
    settings = ["stage.0.steps=4", "stage.0.objective.name=sft", "stage.0.sampling.samples_per_prompt=1"]
    settings += ["run.checkpoint_every=2", "stage.0.optim.lr=1e-2"]
    run(tmp_path, data, *settings, name="whole")
    run(tmp_path, data, *settings)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if it had been killed within step 4
    assert "resuming after step 2" in run(tmp_path, data, *settings, resume=True)
    whole, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    assert whole["weights_sha256"] == resumed["weights_sha256"]
    assert [one["text"] for one in completions(tmp_path)] == ["yes"] * 16


def test_reasoning_gyms_task_trains_with_its_own_scorer(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    run(tmp_path, 'kind = "reasoning_gym"\ntasks = { chain_sum = { max_digits = 1 } }', label="chain_sum")
    done = completions(tmp_path)
    assert len(done) == 16 and all(one["rewards"]["reasoning_gym"] == one["reward"] for one in done)
    assert all("between <answer> and </answer>" in one["prompt"] for one in done)
