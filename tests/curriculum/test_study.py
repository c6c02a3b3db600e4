"""``isomorph study``: a real tiny study that is killed and goes on, its test exam, and what is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import wait_for
from simulated_study import write_study
from typer.testing import CliRunner

from isomorph.curriculum.cli import app
from isomorph.curriculum.report.run_record import read_run
from isomorph.curriculum.study import page, seeds
from isomorph.curriculum.study.analysis import analyse, shortcut_rates
from isomorph.curriculum.study.design import WARM_SEED, Design, PlannedRun
from isomorph.curriculum.study.exam import check_test, committed, read_taken, take_test
from isomorph.curriculum.study.results import append_lines, harvest, read_lines, read_results
from isomorph.engine.config import UserError
from studies import load_study

BASE = """
[model.tiny]
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 16
max_model_len = 160
[log]
tensorboard = false
[data.plans]
kind = "async_plan"
[data.plans.difficulty]
form = "terse"
demonstration = "compact"
min_steps = 2
max_steps = 3
max_duration = 4
[sampling]
max_new_tok = 24
samples_per_prompt = 2
[objective]
name = "dapo"
[batch]
prompts = 2
micro_batch_tok = 512
[eval]
data = "plans"
representations = ["natural", "graph"]
prompts = 8
max_new_tok = 24
every = 2
"""
STUDY = """
[study]
name = "tiny"
question = "Does graph -> words beat words only?"
recipe = "base.toml"
seeds = [1, 2]
budgets = [2, 4]
test_budgets = [4]
baseline = "words"
jobs = 1
[test]
split = "test"
prompts = 6
[[warm_start.stage]]
name = "warm-up"
steps = 2
objective.name = "sft"
batch = { prompts = 4, micro_batch_tok = 512 }
sampling = { max_new_tok = 48, samples_per_prompt = 1 }
mixture = [{ data = "plans", representation = "graph" }, { data = "plans" }]
[[condition.words.stage]]
name = "words"
steps = 4
mixture = [{ data = "plans" }]
[[condition.graph_words.stage]]
name = "graph"
steps = 2
mixture = [{ data = "plans", representation = "graph" }]
[[condition.graph_words.stage]]
name = "words"
steps = 2
mixture = [{ data = "plans" }]
"""
ALL = {f"{name}-seed{seed}" for name in ("warm", "words", "graph_words") for seed in (1, 2)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


@contextlib.contextmanager
def started(isomorph: list[str], place: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [*isomorph, "study", "study.toml", *arguments]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def owner(folder: Path) -> int:
    """The process that writes into ``folder``, as its lock says; 0: none yet."""
    words = (folder / ".lock").read_text().split() if (folder / ".lock").exists() else []
    return int(words[1]) if len(words) > 1 else 0


def finished(place: Path) -> dict[str, float]:
    """Run -> when its summary was written."""
    rows = read_lines(place / "tiny" / "runs.jsonl")
    assert len({(row["condition"], row["seed"]) for row in rows}) == len(rows)
    folders = {f"{r['condition']}-seed{r['seed']}": folder_of(place, r["condition"], r["seed"]) for r in rows}
    return {name: (folder / "summary.json").stat().st_mtime for name, folder in folders.items()}


def folder_of(place: Path, condition: str, seed: int) -> Path:
    return place / "tiny" / (f"warm/seed{seed}" if condition == "warm" else f"runs/{condition}-seed{seed}")


def test_a_study_that_is_killed_goes_on_and_repeats_nothing(place: Path, warm_isomorph: list[str]) -> None:
    runs = place / "tiny" / "runs"
    with started(warm_isomorph, place) as study:
        wait_for(lambda: len(read_lines(place / "tiny" / "runs.jsonl")) >= 2, study)  # a warm start and a condition
        victim = wait_for(lambda: owner(runs / "graph_words-seed1"), study, every=0.005)
        os.kill(owner(place / "tiny"), signal.SIGKILL)
        study.communicate(timeout=60)
    before = finished(place)
    assert {"warm-seed1", "words-seed1"} <= before.keys() < ALL

    with started(warm_isomorph, place) as study:
        wait_for(lambda: owner(runs / "graph_words-seed1") not in (0, victim), study)
        other = wait_for(lambda: owner(runs / "words-seed2"), study, every=0.005)
        os.kill(other, signal.SIGKILL)
        printed, _ = study.communicate(timeout=120)
    assert study.returncode == 0, printed
    after = finished(place)
    assert after.keys() == ALL and {name: after[name] for name in before} == before
    assert not any(f"] {name} {word}" in printed for name in before for word in ("started", "resumed"))
    assert "words-seed2 was killed by SIGKILL; it goes on" in printed

    results = read_results(place / "tiny")
    steps = {key: [point.step for point in curve] for key, curve in results.curves.items()}
    assert len(steps) == 8 and all(own == [0, 2, 4] for own in steps.values())
    for seed in (1, 2):  # one warm start: the same answers before the first step
        first = [results.curve(name, seed, "natural")[0].row["right"] for name in ("words", "graph_words")]
        assert first[0] == first[1]
    for (name, seed), row in results.runs.items():
        rows = [json.loads(line) for line in (runs / f"{name}-seed{seed}" / "steps.jsonl").read_text().splitlines()]
        tokens = [sum(r["tok/response"] for r in rows[:step]) for step in (0, 2, 4)]
        assert [p.response_tok for p in results.curve(name, seed, "natural")] == tokens
        assert row["tokens"]["response_tok"] == tokens[-1]

    before = finished(place)
    again = subprocess.run([*warm_isomorph, "study", "study.toml"], cwd=place, capture_output=True, text=True)
    assert again.returncode == 0 and "started" not in again.stdout and finished(place) == before
    assert "6 done (6 of them before)" in again.stdout
    takes_its_test_exam_once(place, warm_isomorph)


def takes_its_test_exam_once(place: Path, isomorph: list[str]) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*isomorph, "study", "study.toml", *arguments]
        return subprocess.run(command, cwd=place, capture_output=True, text=True)

    refused = call("--test")
    assert refused.returncode == 2 and "PLAN.md must be there" in refused.stderr
    (place / "PLAN.md").write_text("graph_words - words after 4 steps\n")
    taken = call("--test")
    assert taken.returncode == 0, taken.stderr
    results = read_results(place / "tiny")
    points = [p for p in results.points if p.exam == "test"]
    assert len(points) == 8 and {(p.step, len(p.right_I)) for p in points} == {(4, 6)}
    analysis = analyse(results)
    assert analysis.exam == "test" and [c.budget for c in analysis.planned()] == [4]
    twice = call("--test")
    assert twice.returncode == 2 and "was taken on" in twice.stderr and "--test-again" in twice.stderr
    alone = place / "rows"
    alone.mkdir()
    for name in ("study.json", "runs.jsonl", "results.jsonl", "items.jsonl"):
        shutil.copy(place / "tiny" / name, alone / name)
    made = subprocess.run([*isomorph, "study", "--report", "rows"], cwd=place, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (alone / "study.html").read_text() == (place / "tiny" / "study.html").read_text()
    assert "taken once" in (alone / "study.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("steps = 4\n", "steps = 5\n", "equal numbers of steps, got words 5, graph_words 4"),
        ("budgets = [2, 4]\ntest_budgets = [4]", "budgets = [3, 4]", "no evaluation after 3 steps: set eval.every = 1"),
        (
            'name = "graph"\nsteps',
            'name = "graph"\nstep',
            "condition.graph_words: stage.0.steps: must be given; stage.0.step: unknown key",
        ),
        ('baseline = "words"', 'baseline = "word"', "baseline must be one of the conditions, words, graph_words"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds must be different"),
        ('recipe = "base.toml"', 'recipe = "base.toml"\nmeasure = ["code"]', "has no code, only natural, graph"),
        ("prompts = 6", "prompt = 6", "test: eval.prompt: unknown key"),
        ('objective.name = "sft"', 'objective.name = "sft"\nobjective.clip_low = 0.1', "warm_start: stage.0.objective"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(place: Path, old: str, new: str, error: str) -> None:
    assert old in STUDY
    (place / "study.toml").write_text(STUDY.replace(old, new))
    with pytest.raises(UserError) as caught:
        Design(place / "study.toml")
    assert error in str(caught.value) and "study.toml" in str(caught.value)
    assert not (place / "tiny").exists()


def test_what_training_and_exam_would_share_is_refused(place: Path) -> None:
    """Of 60 procedures of a structure's exam 49 were in training that is divided by procedure."""
    own = "[data.exam]\nkind = 'async_plan'\n[data.exam.difficulty]\nform = 'terse'\ndemonstration = 'compact'\n"
    base = BASE.replace("[sampling]", own + "max_steps = 3\nsplit_by = 'structure'\n[sampling]")
    (place / "base.toml").write_text(base.replace('data = "plans"', 'data = "exam"'))
    with pytest.raises(UserError, match=r"data.plans has split_by = 'procedure' and data.exam.*'structure'"):
        Design(place / "study.toml")
    (place / "warm.toml").write_text(
        f"{BASE}[[stage]]\nname = 'warm-up'\nsteps = 2\nmixture = [{{ data = 'plans' }}]\n"
    )
    whole = STUDY.split("[[warm_start.stage]]")
    begins = f'{whole[0]}[warm_start]\nrecipe = "warm.toml"\n[[condition' + whole[1].split("[[condition", 1)[1]
    (place / "study.toml").write_text(begins)
    (place / "base.toml").write_text(BASE.replace("max_duration", "split_by = 'structure'\nmax_duration"))
    with pytest.raises(UserError, match=r"warm_start: data.plans has split_by = 'procedure'"):
        Design(place / "study.toml")
    (place / "base.toml").write_text(BASE)
    Design(place / "study.toml")


def test_an_identity_changes_with_all_that_matters_and_with_nothing_else(place: Path) -> None:
    def identities(study: str = STUDY, base: str = BASE) -> list[str]:
        (place / "study.toml").write_text(study)
        (place / "base.toml").write_text(base)
        design = Design(place / "study.toml")
        runs = design.runs(("words",), (1,))
        assert [run.recipe.run.seed for run in runs] == [1 + WARM_SEED, 1]
        return [design.identity(run, "sha" if run.warm else None) for run in runs]

    warm, words = identities()
    assert identities(base=BASE.replace("[log]", "[run]\nthreads = 2\n[log]")) == [warm, words]
    assert identities(study=STUDY.replace("jobs = 1", "jobs = 2")) == [warm, words]
    changed = identities(study=STUDY.replace('name = "warm-up"\nsteps = 2', 'name = "warm-up"\nsteps = 3'))
    assert changed[0] != warm
    other = identities(base=BASE.replace("max_duration = 4", "max_duration = 5"))
    assert other[0] != warm and other[1] != words
    design = Design(place / "study.toml")
    run = design.run("words", 1)
    assert design.identity(run, "sha") != design.identity(run, "another warm start")
    assert design.identity(run, "sha") != design.identity(design.run("words", 2), "sha")


def test_an_identity_is_of_a_models_weights_wherever_they_lie(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "base.toml").write_text('[model]\npath = "$MODEL"\n' + BASE[BASE.index("[log]") :])

    def identity(folder: str, weights: bytes) -> str:
        (place / folder).mkdir(exist_ok=True)
        (place / folder / "model.safetensors").write_bytes(weights)
        monkeypatch.setenv("MODEL", str(place / folder))
        design = Design(place / "study.toml")
        return design.identity(design.warm_run(1), None)

    assert identity("a", b"1") == identity("b", b"1") != identity("b", b"2")


def test_a_warm_start_begins_with_a_model_of_its_seed(place: Path) -> None:
    file = place / "study.toml"
    begins = '[warm_start]\nmodel = "first/seed{warm_seed}/model"\n[[warm_start.stage]]'
    file.write_text(STUDY.replace("[[warm_start.stage]]", begins))

    def weights(seed: int, content: bytes) -> None:
        folder = place / "first" / f"seed{seed + WARM_SEED}" / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)

    weights(1, b"1")
    design = Design(file)
    with pytest.raises(UserError, match=r"seed 2 needs a model folder .*first/seed1000002/model"):
        design.check_first_models((1, 2))
    weights(2, b"2")
    design.check_first_models((1, 2))
    warm = design.warm_run(2)
    assert warm.recipe.model.path == str(place / "first" / "seed1000002" / "model") and warm.recipe.model.tiny is None
    before = design.identity(warm, None)
    weights(2, b"3")
    assert Design(file).identity(warm, None) != before
    file.write_text(STUDY.replace("[[warm_start.stage]]", begins.replace("warm_seed", "speed")))
    with pytest.raises(UserError, match=r"only \{seed\} and \{warm_seed\} are replaced, got \{speed\}"):
        Design(file)


def test_a_recipe_that_is_changed_and_changed_back_has_its_runs_again(finished_run: Path, tmp_path: Path) -> None:
    run = PlannedRun(condition="words", seed=1, recipe=read_run(finished_run).recipe, folder=finished_run, warm=None)
    for identity in ("first", "other", "first"):
        harvest(run, identity, tmp_path)
        study = {"measure": ["natural"], "identities": {"words-seed1": identity}}
        (tmp_path / "study.json").write_text(json.dumps(study))
        found = read_results(tmp_path)
        assert found.runs["words", 1]["identity"] == identity and found.points
    harvest(run, "first", tmp_path)
    assert [row["identity"] for row in read_lines(tmp_path / "runs.jsonl")] == ["first", "other", "first"]


def test_the_test_exam_is_refused_where_the_runs_are_of_an_earlier_recipe(place: Path) -> None:
    design = Design(place / "study.toml")
    (place / "PLAN.md").write_text("the plan\n")
    design.out.mkdir()
    runs = [run for run in design.runs(("words", "graph_words"), (1, 2)) if run.condition != "warm"]
    warm = {seed: {"identity": design.identity(design.warm_run(seed), None), "weights_sha256": "w"} for seed in (1, 2)}
    present = design.identities(warm)

    def rows(identities: dict[str, str]) -> list[dict[str, Any]]:
        known = [("warm", seed) for seed in warm] + [(run.condition, run.seed) for run in runs]
        of = [{"condition": c, "seed": s, "identity": identities[f"{c}-seed{s}"]} for c, s in known]
        return [{**row, "weights_sha256": "w"} for row in of]

    append_lines(design.out / "runs.jsonl", rows(present))
    check_test(design, runs, again=False)
    append_lines(design.out / "runs.jsonl", rows(present | {"words-seed2": "of an earlier recipe"}))
    with pytest.raises(UserError, match=r"after all runs of the present recipes.*not done yet: words-seed2$"):
        check_test(design, runs, again=False)
    append_lines(design.out / "runs.jsonl", rows(present))
    with pytest.raises(UserError, match=r"runs/words-seed1 is missing or holds no finished run"):
        take_test(design, runs, {}, print)
    assert not read_taken(design.out)


STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*/STUDY.toml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.parent.name)
def test_the_repositorys_studies_have_a_plan_and_load(file: Path) -> None:
    design = Design(file)
    assert (file.parent / "PLAN.md").is_file() and design.spec.test is not None
    assert design.spec.study.baseline in design.spec.condition


def test_a_failed_run_ends_no_other_and_is_named(place: Path, warm_isomorph: list[str]) -> None:
    broken = """
[condition.broken]
batch = { prompts = 2, micro_batch_tok = 30 }
[[condition.broken.stage]]
name = "words"
steps = 4
mixture = [{ data = "plans" }]
"""
    before, _, after = STUDY.partition("[[warm_start.stage]]")
    (place / "study.toml").write_text(before + after[after.index("[[condition.words.stage]]") :] + broken)
    only = ["--only", "broken", "--only", "words", "--seeds", "1"]
    made = subprocess.run([*warm_isomorph, "study", "study.toml", *only], cwd=place, capture_output=True, text=True)
    assert made.returncode == 1 and "words-seed1 done" in made.stdout
    (error,) = made.stderr.splitlines()
    assert error.startswith("error: 1 of the runs failed: broken-seed1: stage words") and "micro_batch_tok=30" in error
    assert "log: tiny/logs/broken-seed1.log" in made.stdout
    assert set(finished(place)) == set(runs_of_page(place)) == {"words-seed1"}

    (place / "base.toml").write_text(BASE.replace("max_duration = 4", "max_duration = 5"))
    only = ["--only", "words", "--seeds", "1", "--stop-after", "0"]
    stopped = subprocess.run([*warm_isomorph, "study", "study.toml", *only], cwd=place, capture_output=True, text=True)
    assert stopped.returncode == 0 and "stopped after 0 min; go on with: isomorph study study.toml" in stopped.stdout
    assert not runs_of_page(place)  # the run of the earlier recipe is no result of this one


def runs_of_page(place: Path) -> list[str]:
    return [f"{name}-seed{seed}" for name, seed in read_results(place / "tiny").runs]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--report", "tiny", "--only", "words"], "remove the other options"),
        (["--report", "tiny", "--test"], "remove the other options"),
        (["study.toml", "--test", "--seeds", "1"], "--test asks the models of all runs"),
        (["study.toml", "--test-again", "--stop-after", "0"], "--test asks the models of all runs"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments: list[str], error: str) -> None:
    refused = CliRunner().invoke(app, ["study", *arguments])
    assert isinstance(refused.exception, UserError) and error in str(refused.exception)


def test_a_row_that_a_kill_cut_off_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    append_lines(file, [{"a": 1}])
    with file.open("a") as opened:
        opened.write('{"a": 2')
    assert read_lines(file) == [{"a": 1}]
    append_lines(file, [{"a": 3}])
    assert read_lines(file) == [{"a": 1}, {"a": 3}]
    file.write_text('{"a": \n{"a": 1}\n')
    with pytest.raises(UserError, match="runs.jsonl, line 1"):
        read_lines(file)


def test_a_plan_has_to_be_committed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    plan = tmp_path / "PLAN.md"
    with pytest.raises(UserError, match="must be there"):
        committed(plan)
    plan.write_text("the plan\n")
    assert committed(plan) is None  # no repository
    git("init", "-q")
    with pytest.raises(UserError, match="must be committed"):
        committed(plan)
    git("add", "PLAN.md")
    git("commit", "-qm", "plan")
    assert len(committed(plan) or "") == 40
    plan.write_text("another plan\n")
    with pytest.raises(UserError, match="without changes"):
        committed(plan)


def test_the_page_shows_pairs_difficulty_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "NUM_RESAMPLES", 500)
    write_study(tmp_path, {"words": 0.0, "graph_words": 0.15}, num_items=60, representations=("natural", "graph"))
    rows = [r for r in read_lines(tmp_path / "runs.jsonl") if (r["condition"], r["seed"]) != ("words", 6)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = read_results(tmp_path)
    analysis = analyse(results)
    assert analysis.missing == ("words-seed6",) and all(c.seeds == (1, 2, 3, 4, 5) for c in analysis.comparisons)
    assert shortcut_rates(results) == {"sum": 0.16, "back along last listed": 0.33}
    by_steps = [group for group in analysis.groups if group.by == "steps"]
    items = next(iter(results.items.values()))
    assert sum(group.num_items for group in by_steps) == 60 and len(items["keys"]) == 60
    first = by_steps[0]  # by hand, from the rows
    low = int(first.name.split(" to ")[-1])
    at = [i for i, steps in enumerate(items["steps"]) if steps <= low]
    rates = [
        [int(p.row["right"][i]) for i in at]
        for p in results.points
        if (p.condition, p.step, p.representation) == ("words", 80, "natural")
    ]
    assert first.num_items == len(at)
    assert first.rates["words"] == pytest.approx(sum(map(sum, rates)) / sum(map(len, rates)))
    text = page.write_study(tmp_path).read_text()
    assert "Not finished: words-seed6" in text and "cannot be below 0.0625" in text
    assert "src=&quot;" not in text and 2 * text.count("<img") == text.count("data:image/svg+xml;base64,") == 10
    assert json.loads((tmp_path / "summary.json").read_text())["comparisons"][0]["effect"]["method"] == "bootstrap"


def test_tokens_are_compared_between_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cheapest run ends; the others are interpolated there, item by item."""
    monkeypatch.setattr(seeds, "NUM_RESAMPLES", 200)
    write_study(tmp_path, {"words": 0.0, "graph_words": 0.1}, seeds=(1,), num_items=40, representations=("natural",))
    results = read_results(tmp_path)
    analysis = analyse(results)
    curves = {name: results.curve(name, 1, "natural") for name in ("words", "graph_words")}
    budget = min(curve[-1].response_tok for curve in curves.values())
    (one,) = [c for c in analysis.comparisons if c.kind == "tokens"]
    assert one.budget == budget == analysis.token_budget
    expected = {}
    for name, (*_, before, after) in curves.items():
        share = (budget - before.response_tok) / (after.response_tok - before.response_tok)
        expected[name] = before.rate + share * (after.rate - before.rate)
    assert one.effect.mean == pytest.approx(expected["graph_words"] - expected["words"])


def test_the_table_of_carry_over_has_means_over_seeds_and_the_difference_of_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "NUM_RESAMPLES", 200)
    script = load_study("carry_over_table")
    for name, first, gain in (
        ("rare", "graph20_words40", 0.3),
        ("frequent", "graph20_words40", 0.0),
        ("control", "coin20_words40", 0.0),
    ):
        effects = {"words": 0.0, first: gain}
        write_study(tmp_path / name, effects, budgets=(30, 60), num_items=37, representations=("natural",))

    def mean(name: str, condition: str, step: int) -> float:
        rows = read_lines(tmp_path / name / "results.jsonl")
        rights = [row["right"] for row in rows if (row["condition"], row["step"]) == (condition, step)]
        return 100 * sum(right.count("1") for right in rights) / sum(map(len, rights))

    rare, frequent, control = (read_results(tmp_path / name) for name in ("rare", "frequent", "control"))
    text = script.table(rare, frequent, control)
    cells = " | ".join(f"{mean('rare', 'graph20_words40', step):.1f} %" for step in (0, 30, 60))
    assert f"| rare | `graph20_words40` | {cells} |" in text and text.count("\n| frequent |") == 2
    assert text.count("\n| rare |") == 3  # both of rare, and the coin; the words of both are the same runs
    gains = [mean(name, "graph20_words40", 60) - mean(name, "words", 60) for name in ("rare", "frequent")]
    assert f"| {gains[0]:+.1f} (" in text
    line = next(line for line in text.splitlines() if "after 60 steps, where reward is rare" in line)
    assert f": {gains[0] - gains[1]:+.1f} (" in line and "6 seeds, dev exam" in line
    beside = mean("rare", "graph20_words40", 30) - mean("control", "coin20_words40", 30)
    assert f"`graph20_words40` minus `coin20_words40` after 30 steps: {beside:+.1f} (" in text
    assert "frequent" not in script.table(rare, None) and "coin" not in script.table(rare, frequent)
    assert "new seeds" not in text
    text = script.table(rare, None, None, control)  # as if it were the study with new seeds
    assert text.count("\n| rare, new seeds |") == 2 and "New seeds: 1 to 6, dev exam." in text


def test_the_page_has_the_table_of_the_committed_rows() -> None:
    script = load_study("carry_over_table")
    page = (Path(__file__).parents[2] / "docs" / "carry-over.md").read_text()
    assert page == script.between(page, script.MARKER, script.committed()), (
        "run python studies/carry_over_table.py --page docs/carry-over.md"
    )


def test_the_page_has_what_was_read_from_the_traces() -> None:
    script = load_study("carry_over_analogy")
    page = (Path(__file__).parents[2] / "docs" / "carry-over.md").read_text()
    assert page == script.between(page, script.MARKER, script.table(read_lines(script.ROWS))), (
        "run python studies/carry_over_analogy.py --page docs/carry-over.md"
    )


def test_accuracy_by_wording_is_a_count_over_the_committed_rows() -> None:
    script = load_study("carry_over_table")
    wording = {row["items"]: row["wording"] for row in read_lines(script.RARE / "items.jsonl")}
    right, asked = 0, 0
    for row in read_lines(script.RARE / "results.jsonl"):
        if (row["exam"], row["condition"], row["step"], row["representation"]) == ("test", "words", 60, "natural"):
            kept = [mark for mark, which in zip(row["right"], wording[row["items"]], strict=True) if which == "kept"]
            right, asked = right + kept.count("1"), asked + len(kept)
    assert f"words, test exam, kept wordings: 6.8% after 30 steps, {right / asked:.1%} after 60" in script.details()


def test_traces_before_the_switch_are_summed_up_over_seeds(tmp_path: Path) -> None:
    script = load_study("carry_over_analogy")
    alignments, gains = [0.2, 0.4, 0.5, 0.9, 0.6], [0.1, 0.3, 0.2, 0.6, 0.5]
    known = {"value": 0.5, "low": 0.0, "high": 1.0, "n": 9}
    likeness = {"analogy": known, "frequency": known, "analogy_minus_frequency": known | {"value": None}}
    rows = [
        {
            "seed": seed,
            "analogy": likeness,
            "before_the_habit": {"natural": x / 2},
            "alignment": {"alignment": x, "gain": y, "readable": 50, "items": 200, "slope": known},
        }
        for seed, x, y in zip(range(21, 26), alignments, gains, strict=True)
    ]
    text = script.table(rows)
    mean, error = np.mean(alignments), np.std(alignments, ddof=1) / 5**0.5
    half = 2.7764451 * error  # Student's t, four degrees of freedom
    assert f"| {mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}) | 5 |" in text
    assert "| +0.250 (+0.250 to +0.250) | 5 |" in text  # readable
    assert "| nearest minus mean | - | 0 |" in text
    r = np.corrcoef(alignments, gains)[0, 1]
    low, high = (np.tanh(np.arctanh(r) + sign * 1.959964 / 2**0.5) for sign in (-1, 1))  # Fisher's, n - 3 = 2
    assert f"{r:+.2f} ({low:+.2f} to {high:+.2f})" in text and "5 seeds. Seeds 21 to 25;" in text
    assert "they solved 10%, 20%, 25%, 30%, 45% of the words" in text
    assert "not defined for 3 seeds" in script.table(rows[:3])
