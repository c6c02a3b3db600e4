"""STaR in rounds and rejection sampling: whole runs of a tiny model that has been warmed up."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_stage import curriculum, do_step, group, stage, supervised

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.resume import resumed_recipe
from isomorph.curriculum.stage import Curriculum
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe

RECIPE = """
[model]
path = "{model}"
[run]
threads = 1
checkpoint_every = 1
keep_checkpoints = 100
[data.plans]
kind = "async_plan"
difficulty = {{ form = "terse", demonstration = "compact", min_steps = 2, max_steps = 3, max_duration = 4 }}
[[stage]]
name = "star"
steps = 20
objective.name = "sft"
optim = {{ lr = 1e-3, schedule = "linear" }}
batch = {{ prompts = 4, micro_batch_tok = 1024 }}
sampling = {{ max_new_tok = 48, samples_per_prompt = 1 }}
star = {{ rounds = 2, samples = 8, prompts = 8, epochs = 2, start_from = "{start_from}" }}
mixture = [{{ data = "plans", representation = "graph" }}]
[eval]
data = "plans"
representations = ["graph"]
prompts = 4
max_new_tok = 48
"""


def run(recipe: Recipe, folder: Path, stop: Callable[[], bool] = lambda: False, *, resume: bool = False) -> str:
    folder.mkdir(exist_ok=True)
    console, threads = Console(file=io.StringIO(), width=500), torch.get_num_threads()
    try:
        run_recipe(recipe, folder, console, stop, ALONE, resume=resume)
    finally:
        torch.set_num_threads(threads)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each value of ``start_from``."""
    found = {}
    for start_from in ("previous", "start"):
        found[start_from] = folder = tmp_path_factory.mktemp("star") / start_from
        file = folder.with_suffix(".toml")
        file.write_text(RECIPE.format(model=finished_run / "model", start_from=start_from))
        (folder.parent / "said").write_text(run(load_recipe(file, [], Recipe), folder))
    return found


@pytest.fixture(params=["previous", "start"])
def done(request: pytest.FixtureRequest, both: dict[str, Path]) -> Path:
    return both[request.param]


def test_each_round_trains_on_one_right_answer_a_question(done: Path) -> None:
    (ended,) = summary(done)["stages"]
    assert ended["ended_by"] == "rounds" and len(ended["rounds"]) == 2
    said = (done.parent / "said").read_text()
    for number, counts in enumerate(ended["rounds"], start=1):
        sampled = [
            json.loads(line) for line in (done / "completions" / f"star-round-{number}.jsonl").read_text().splitlines()
        ]
        solved = {row["prompt_id"] for row in sampled if row["correct"] and row["finish"] == "stop"}
        assert (counts["asked"], counts["sampled"]) == (8, 64) == (len({r["prompt_id"] for r in sampled}), len(sampled))
        assert counts["right"] == sum(row["correct"] for row in sampled) > 0
        assert counts["trained_on"] == counts["solved"] == len(solved)
        assert counts["steps"] == -(-2 * len(solved) // 4)
        own = [row for row in rows(done) if row["star/round"] == number]
        assert [row["stage_step"] for row in own] == list(range(1, counts["steps"] + 1))  # a schedule a round
        assert own[0]["lr"] == pytest.approx(1e-3) and all(row["reward/mean"] == 1 for row in own)
        assert f"star, round {number} of 2: {counts['right']} of 64 answers are right" in said
    assert ended["steps"] == len(rows(done)) == sum(counts["steps"] for counts in ended["rounds"])


def resumed(done: Path, folder: Path, last: int) -> dict[str, Any]:
    """The run resumed from the checkpoint after step ``last``."""
    shutil.copytree(done, folder)
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > last:
            shutil.rmtree(checkpoint)
    run(resumed_recipe(read_run_json(folder), (), folder)[0], folder, resume=True)
    return summary(folder)


def test_a_run_resumed_within_a_round_or_between_two_is_the_uninterrupted_one(done: Path, tmp_path: Path) -> None:
    (ended,) = summary(done)["stages"]
    first = ended["rounds"][0]["steps"]
    for last in (first, first + 1) if done.name == "start" else (first,):
        found = resumed(done, tmp_path / str(last), last)
        assert found["stages"] == [ended] and found["tokens"] == summary(done)["tokens"]
        assert found["weights_sha256"] == summary(done)["weights_sha256"], last


def test_a_run_stopped_while_it_samples_a_round_is_the_uninterrupted_one(both: dict[str, Path], tmp_path: Path) -> None:
    done, calls = both["previous"], iter(range(10_000))
    recipe = resumed_recipe(read_run_json(done), (), done)[0]
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", lambda: next(calls) > 60)  # the evaluation polls once a token, of 4 x 48 at most
    assert not (tmp_path / "run" / "steps.jsonl").exists()
    run(recipe, tmp_path / "run", resume=True)
    assert summary(tmp_path / "run")["weights_sha256"] == summary(done)["weights_sha256"]


def test_a_round_begins_with_the_weights_at_the_start_or_with_those_of_the_round_before(
    both: dict[str, Path], finished_run: Path
) -> None:
    """The checkpoint of the first round's last step is written again when the second round has been prepared."""
    start = load_file(finished_run / "checkpoints" / "step-00000083" / "weights.safetensors")
    n = summary(both["start"])["stages"][0]["rounds"][0]["steps"]
    losses = [[row["loss"] for row in rows(folder)[:n]] for folder in both.values()]
    assert losses[0] == losses[1]
    for start_from, folder in both.items():
        found = load_file(folder / "checkpoints" / f"step-{n:08d}" / "weights.safetensors")
        assert all(torch.equal(found[name], start[name]) for name in start) == (start_from == "start")


def sampled(source: Curriculum, reward: float) -> str:
    """A round in which all answers get ``reward``; the line that is told."""
    request = source.pending_samples()
    assert request is not None and len(request.prompts) == 3
    groups = [group(prompt, reward, reward) for prompt in request.prompts]
    return source.record_samples(groups, ["<answer> 1 min </answer>"] * 6)


def test_a_round_without_a_right_answer_is_told_and_passed_over() -> None:
    source = curriculum(supervised("one", star={"rounds": 3, "samples": 2, "prompts": 3}), stage("two"))
    assert "round 1 of 3: 0 of 6 answers are right, to 0 of 3 questions; nothing to train on" in sampled(source, 0.0)
    assert "round 2 of 3: 6 of 6 answers are right, to 3 of 3 questions; 1 steps on 3" in sampled(source, 1.0)
    do_step(source, 1.0)
    sampled(source, 0.0)
    present = source.stage()
    assert present is not None and present.name == "two"
    assert source.finished[0]["ended_by"] == "rounds" and source.finished[0]["steps"] == 1


def test_rounds_that_never_find_a_right_answer_end_the_run() -> None:
    source = curriculum(supervised("one", star={"samples": 2, "prompts": 3}))
    with pytest.raises(UserError, match="stage one: none of the 6 answers of its 1 round"):
        sampled(source, 0.0)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (stage("one", star={}), 'star needs objective.name = "sft"'),
        (supervised("one", star={"keep": "some"}), "keep"),
        (supervised("one", star={"samples": 0}), "greater than or equal to 1"),
    ],
)
def test_rounds_that_cannot_be_are_refused(table: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        curriculum(table)
