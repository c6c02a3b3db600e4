"""The paper's recipes on stand-ins for its files: budgets and constants, and a step of every stage."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from isomorph.curriculum import assemble
from isomorph.curriculum.cli import app
from isomorph.curriculum.named_recipes import FOLDER, recipe_names
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.paper import paper_section, without_repeated
from isomorph.curriculum.report.run_record import RunRecord, read_run
from isomorph.curriculum.sources import TaskFiles, open_source
from isomorph.engine.config import ModelConfig, UserError
from isomorph.engine.model.load import load_policy
from isomorph.engine.recipe_file import load_recipe

NAMES = [Path(name).name for name in recipe_names() if name.startswith("paper/")]
STUDIES = Path(__file__).parents[2] / "studies"


def script(name: str) -> ModuleType:
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
        assert found is not None and found.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def small_world(stand_ins: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, dict[str, Path]]:
    """Names the stand-ins for each test anew: once, in a whole run, the variables were gone after the first one."""
    recipes, scratch, models = stand_ins
    for name, path in recipes.variables_of(scratch).items():
        monkeypatch.setenv(name, path)
    return recipes, models


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Path, dict[str, Path]]]:
    """The script, the folder of its files, and a folder of a tiny random model for each family."""
    recipes, scratch = script("paper_recipes"), tmp_path_factory.mktemp("paper")
    threads = torch.get_num_threads()
    with recipes.data_folder(scratch, is_real=False):
        train, test = (scratch / "rows" / f"asynchow_natural_{split}.jsonl" for split in ("train", "test"))
        rows = test.read_text().splitlines()
        test.write_text("\n".join([train.read_text().splitlines()[3], *rows[1:]]) + "\n")  # a repeated procedure
        yield recipes, scratch, {family: recipes.make_model(scratch / family, family) for family in recipes.FAMILIES}
    torch.set_num_threads(threads)  # the recipes ask for one


# studies/paper_recipes.py runs all of them
@pytest.mark.parametrize(
    ("name", "family"), [("graph_natural", "olmo2"), ("sft_graph_natural", "llama"), ("math_natural", "qwen2")]
)
def test_a_recipe_runs_a_step_of_every_stage(
    name: str, family: str, small_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, models = small_world
    monkeypatch.setattr(assemble, "write_report", lambda *_: None)  # drawing takes seconds; test_report.py has it
    row = recipes.exercise(f"paper/{name}", models[family], tmp_path / "run", steps=1)
    recipe = load_recipe(FOLDER / "paper" / f"{name}.toml", [], Recipe)
    assert (row["status"], row["family"]) == ("done", family)
    assert row["stages"] == {stage.name: 1 for stage in recipe.stage}
    assert row["evaluated_on"] == sorted(recipe.eval.representations or ())
    if name == "graph_natural":
        check_report(read_run(tmp_path / "run"))
    if name == "sft_graph_natural":
        check_validation(read_run(tmp_path / "run"), tmp_path / "run")


def check_validation(record: RunRecord, run: Path) -> None:
    """The logged loss of rows that no stage trains on is that of transformers' own forward pass in float64."""
    config = ModelConfig(path=str(run / "model"), dtype="float32")
    text = load_policy(config, vocabulary=[], seed=0, device=torch.device("cpu")).text
    source = open_source(record.recipe.data["asynchow"], text, "asynchow", None)  # type: ignore[arg-type]
    assert isinstance(source, TaskFiles)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float64, attn_implementation="eager")
    assert record.summary is not None
    logged = record.summary["exams"][-1]["validation_loss"]
    for form in ("graph", "natural"):
        kept, trained = source.validation[form], source.training[form]
        assert kept and not {task.key for task in kept} & {task.key for task in trained}
        losses = []
        for task in kept:
            prompt, said = text.encode_prompt(task.question), text.encode_response(task.demonstration or "")
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="none"))
        assert logged[f"asynchow/{form}"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert record.rows[-1][f"validation/asynchow/{form}/loss"] == logged[f"asynchow/{form}"]


def check_report(record: RunRecord) -> None:
    """The paper's figures stand beside the run's; the test question that is a training row is left out of a column."""
    assert record.described["rows"]["asynchow"]["repeated"] == ["0"]
    assert record.evaluations[-1].accuracy["natural"].n == 2
    apart = without_repeated(record, "natural")
    assert apart is not None and apart.n == 1
    page = re.sub("<[^>]*>", "", paper_section([record], ["run"]))  # what is read
    assert "78.2% [72.4%, 83.1%]" in page  # 176 of 225, Wilson
    assert "2 questions" in page and "model olmo2" in page and "none of these conditions" in page
    steps = {"stage": tuple(s.model_copy(update={"steps": 40}) for s in record.recipe.stage)}
    alike = dataclasses.replace(record, recipe=record.recipe.model_copy(update=steps))
    row = paper_section([alike], ["run"]).partition("graph 40 → natural 40, GRPO")[2].partition("</tr>")[0]
    row = re.sub("<[^>]*>", "", row)
    assert str(record.evaluations[-1].accuracy["natural"]) in row and str(apart) in row
    other = load_recipe(FOLDER / "smoke.toml", [], Recipe)
    assert paper_section([dataclasses.replace(record, recipe=other)], ["run"]) == ""


NATURAL, GRAPH, CODE = {"natural"}, {"graph"}, {"code"}
BUDGETS: dict[str, list[tuple[set[str], int]]] = {  # arXiv 2602.03542: what its stages train on, and their steps
    "natural": [(NATURAL, 80)],
    "graph": [(GRAPH, 80)],
    "code": [(CODE, 80)],
    "natural_40": [(NATURAL, 40)],
    "graph_40": [(GRAPH, 40)],
    "code_40": [(CODE, 40)],
    "graph_natural": [(GRAPH, 40), (NATURAL, 40)],
    "code_natural": [(CODE, 40), (NATURAL, 40)],
    "graph_code_natural": [(GRAPH | CODE, 40), (NATURAL, 40)],
    "natural_graph": [(NATURAL, 40), (GRAPH, 40)],
    "mixed": [(GRAPH | NATURAL, 80)],
    "math_natural": [(NATURAL, 80)],
    "math_code": [(CODE, 80)],
    "math_code_natural": [(CODE, 40), (NATURAL, 40)],
    "physics_natural": [(NATURAL, 80)],
    "physics_code": [(CODE, 80)],
    "physics_code_natural": [(CODE, 40), (NATURAL, 40)],
}


def loaded(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / "paper" / f"{name}.toml", list(overrides), Recipe)


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_and_constants_of_grpo_are_the_papers(name: str) -> None:
    recipe = loaded(name)
    assert [({part.representation for part in s.mixture}, s.steps) for s in recipe.stage] == BUDGETS[name]
    for i, stage in enumerate(recipe.stage):
        batch, sampling, objective = stage.batch, stage.sampling, stage.objective
        assert (batch.prompts, sampling.samples_per_prompt) == (512, 16)
        assert batch.prompts_per_update is not None
        assert batch.prompts_per_update * sampling.samples_per_prompt == 128  # responses of an optimizer step
        assert (objective.name, objective.kl_coef, objective.kl_estimator) == ("grpo", 0.01, "k3")
        assert (stage.optim.lr, sampling.temperature, sampling.max_new_tok) == (1e-6, 1.0, 6000)
        if i:  # the paper's curriculum is a second run on the first one's model
            assert (stage.optimizer_state, stage.reference) == ("reset", "snapshot")
    data = recipe.data[recipe.stage[0].mixture[0].data]
    assert data.reward == ("strict" if name.startswith("physics") else "paper")  # type: ignore[union-attr]


def test_the_supervised_constants_are_the_papers() -> None:
    for name in ("sft_natural", "sft_graph", "sft_code", "sft_graph_natural"):
        for stage in loaded(name).stage:
            assert stage.star is None
            optim = stage.optim
            assert (optim.lr, optim.schedule, optim.warmup_share, optim.final_lr_frac) == (1e-5, "cosine", 0.05, 0.0)
            # 2 epochs of the rows that the 10 % of procedures for validation leave: 1,235 of 1,373
            assert 8 * (stage.steps - 1) < 2 * 1235 <= 8 * stage.steps == stage.batch.prompts * stage.steps
        assert loaded(name).data["asynchow"].validation_share == 0.1  # type: ignore[union-attr]


def test_stars_rounds_are_the_papers() -> None:
    (stage,) = loaded("star").stage
    assert stage.star is not None
    star = stage.star
    assert (star.rounds, star.samples, star.temperature, star.keep, star.epochs) == (10, 4, 1.0, "one", 2.0)
    assert (star.prompts, star.start_from) == (1373, "previous")
    assert stage.steps >= 10 * 2 * 1373 / stage.batch.prompts - 10  # of ten rounds in which every question is solved
    assert (stage.optim.lr, stage.optim.schedule, stage.optim.warmup_share) == (1e-5, "cosine", 0.05)


def test_a_form_that_is_only_evaluated_on_cannot_be_trained_on() -> None:
    with pytest.raises(UserError, match="no representation 'aave', only natural, graph, code"):
        loaded("natural", "stage.0.mixture.0.representation=aave")
    with pytest.raises(UserError, match=r"eval_share.*eval_files holds what is evaluated on"):
        loaded("natural", "data.asynchow.eval_share=0.2")
    apart = ("data.asynchow.eval_files={}", "data.asynchow.eval_share=0.2", 'eval.representations=["graph"]')
    assert loaded("natural", *apart)


REWARD = """
def right(answer):
    return float("The answer is" in answer.prompt or len(answer.prompt) % 3 > 0)
"""


def test_a_teacher_is_asked_in_rounds_with_examples_and_at_last_with_the_answer(
    small_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, models = small_world
    teacher = script("teacher_answers")
    (tmp_path / "reward.py").write_text(REWARD)

    def here(command: list[str], **_: Any) -> None:  # without the seconds of a new process
        result = CliRunner().invoke(app, command[command.index("eval") :])
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(teacher.subprocess, "run", here)
    monkeypatch.setattr(teacher, "SAMPLES", (1, 1))
    questions = os.environ["ISOMORPH_ASYNCHOW"] + "/asynchow_natural_train.jsonl"
    monkeypatch.chdir(tmp_path)
    options = ["--reward", "reward.py:right", "--max-new-tok", "4", "--max-prompt-tok", "8000"]
    monkeypatch.setattr(sys, "argv", ["", str(models["qwen2"]), questions, str(tmp_path / "answers.jsonl"), *options])
    teacher.main()
    asked = [
        [json.loads(line) for line in (tmp_path / f"answers/round-{i}/said.jsonl").read_text().splitlines()]
        for i in (1, 2, 3)
    ]
    rows = {row["question"]: row for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    solved = {one["prompt"] for one in asked[0] if one["correct"]}
    assert 5 < len(solved) < len(rows) == len({one["prompt"] for one in asked[0]})
    for one in asked[1]:
        shown, question = one["prompt"][:-1], one["prompt"][-1]["content"]
        assert question in rows.keys() - solved and len(shown) == 2 * teacher.EXAMPLES
        for told, answer in zip(shown[::2], shown[1::2], strict=True):
            assert answer["content"] in rows[told["content"]]["answers"]
    for one in asked[2]:
        question, _, given = one["prompt"][-1]["content"].rpartition("\n\nThe answer is ")
        assert question in rows.keys() - solved and given.startswith(rows[question]["gold"] + ". ")
        assert one["text"] in rows[question]["answers"]
