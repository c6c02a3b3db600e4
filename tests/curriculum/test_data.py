"""Making and looking at files of tasks."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from isomorph.curriculum.commands.data import (
    inspect_file,
    make_of_recipe,
    make_rows,
    parse_difficulty,
    show_inspection,
    write_rows,
)
from isomorph.curriculum.judge import judge
from isomorph.curriculum.named_recipes import FOLDER
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.stage import Curriculum
from isomorph.curriculum.tasks.async_plan import REPRESENTATIONS, Difficulty, draw_tasks
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.recipe_file import check_tables, load_recipe

SMOKE = Path(FOLDER) / "smoke.toml"
ISOMORPH = [sys.executable, "-c", "from isomorph.curriculum.cli import main; main()"]

# One row in the form of the paper's files; its longest path takes 12 minutes.
QUESTION = (
    "To cook soup, here are the steps and the times needed for each step.\n"
    "Step 1. Boil water ({boil} min)\nStep 2. Cut carrots (3 min)\nStep 3. Simmer (5 min)\n\n\n"
    "These ordering constraints need to be obeyed when executing above steps:\n"
    "Step 1 must precede step 3.\nStep 2 must precede step 3.\n\n\n"
    "Question: What is the shortest possible time to cook soup?"
)


def paper_row(boil: int = 7, answer: str = "12 min") -> str:
    return json.dumps({"question": QUESTION.format(boil=boil), "answer": answer})


def written(folder: Path, *rows: str) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(row + "\n" for row in rows))
    return file


def test_the_same_seed_makes_the_same_rows_and_another_seed_others() -> None:
    one, again, other = (make_rows(["graph"], 5, Difficulty(), seed=s, split="train") for s in (3, 3, 4))
    assert one == again and one != other


def test_row_i_of_every_representation_is_one_procedure() -> None:
    rows = [json.loads(row) for row in make_rows([], 4, Difficulty(), seed=0, split="train")]
    assert [row["representation"] for row in rows] == [name for name in REPRESENTATIONS for _ in range(4)]
    keys = [[row["key"] for row in rows if row["representation"] == name] for name in REPRESENTATIONS]
    assert all(one == keys[0] for one in keys) and len(set(keys[0])) > 1
    assert len({row["question"] for row in rows}) == 4 * len(REPRESENTATIONS)


def test_rows_bring_a_right_demonstration_and_a_sequential_answer() -> None:
    rows = [json.loads(row) for row in make_rows(["natural"], 20, Difficulty(), seed=0, split="eval")]
    assert all(judge("async_plan", row["demonstration"], row["answer"]) == 1.0 for row in rows)
    sequential = [judge("async_plan", f"<answer>{row['sequential_answer']}</answer>", row["answer"]) for row in rows]
    assert 0 < sum(sequential) < len(rows)  # right only where nothing overlaps


def test_no_procedure_is_in_both_splits() -> None:
    train, held_out = (
        {json.loads(row)["key"] for row in make_rows(["code"], 60, Difficulty(), seed=1, split=split)}
        for split in ("train", "eval")
    )
    assert train and held_out and not train & held_out


def test_the_seed_of_an_eval_table_generates_its_tasks(finished_run: Path) -> None:
    recipe = check_tables(read_run_json(finished_run)["recipe"], Recipe, where="run.json")
    text = TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[1])
    curriculum = Curriculum(recipe, text)
    curriculum.load_state_dict({**curriculum.state_dict(), "stage_index": len(recipe.stage)})
    request = curriculum.pending_evaluation()
    assert request is not None
    (asked,) = recipe.eval.all_sets
    data = recipe.data[asked.data]
    assert isinstance(data, GeneratedData)
    num, seed = asked.prompts, recipe.eval.seed
    forms = asked.representations or ()
    drawn = [task for form in forms for task in draw_tasks(data.difficulty, form, num, seed=seed, split="dev")]
    assert forms and [prompt.payload for prompt in request.prompts] == drawn


def test_settings_reach_the_difficulty() -> None:
    difficulty = parse_difficulty(
        ["min_steps=7", "max_steps=7", 'units=["hour"]', "form=terse", "demonstration=compact"]
    )
    rows = [json.loads(row) for row in make_rows(["graph"], 3, difficulty, seed=0, split="train")]
    assert all("7: [" in row["question"] and "hours = {" in row["question"] for row in rows)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["max_step=4"], "did you mean 'max_steps'"),
        (["max_steps"], "must read key=value"),
        (["max_steps=many"], "valid integer"),
        (["min_steps=6"], "min_steps must be at most max_steps"),
    ],
)
def test_wrong_settings_are_refused(settings: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_difficulty(settings)


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(
        UserError, match="--representation must be one of natural, graph, code, table, paraphrase, dialect, got 'poem'"
    ):
        make_rows(["poem"], 1, Difficulty(), seed=0, split="train")
    with pytest.raises(UserError, match="--split must be train, dev or test"):
        make_rows([], 1, Difficulty(), seed=0, split="exam")
    with pytest.raises(UserError, match="--prompts must be at least 1"):
        make_rows([], 0, Difficulty(), seed=0, split="train")
    impossible = Difficulty(min_steps=3, max_steps=3, edge_probability=1.0, max_predecessors=2, min_width=3)
    with pytest.raises(DataError, match="must allow procedures"):
        make_rows(["graph"], 1, impossible, seed=0, split="train")


def test_rows_go_to_a_file_or_the_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(["table"], 2, Difficulty(), seed=0, split="train")
    write_rows(rows, None)
    write_rows(rows, tmp_path / "new" / "rows.jsonl")
    assert (tmp_path / "new" / "rows.jsonl").read_text() == capsys.readouterr().out == "".join(rows)
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(rows, tmp_path)


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [*ISOMORPH, "data", "make", "--prompts", "2000", "--representation", "graph"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["representation"] == "graph"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_made_rows_are_read_back_as_they_were_drawn(representation: str, tmp_path: Path) -> None:
    write_rows(make_rows([representation], 40, Difficulty(), seed=0, split="train"), tmp_path / "rows.jsonl")
    tasks = read_rows(tmp_path / "rows.jsonl", "async_plan", representation)
    drawn = draw_tasks(Difficulty(), representation, 40, seed=0, split="train")
    for name in ("question", "answer", "representation", "demonstration", "sequential_answer"):
        assert [getattr(task, name) for task in tasks] == [getattr(task, name) for task in drawn]
    keys = [task.key for task in drawn]
    assert [task.key for task in tasks] == [str(keys.index(key)) for key in keys]
    assert inspect_file(tmp_path / "rows.jsonl", "async_plan", representation).unsolved == ()


def test_made_rows_of_another_representation_are_refused(tmp_path: Path) -> None:
    write_rows(make_rows([], 1, Difficulty(), seed=0, split="train"), tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="rows.jsonl, line 2: must be of the representation natural, got 'graph'"):
        inspect_file(tmp_path / "rows.jsonl", "async_plan", "natural")
    row = json.loads(make_rows(["graph"], 1, Difficulty(), seed=0, split="train")[0])
    with pytest.raises(DataError, match="line 1: key must be text, got 7"):
        inspect_file(written(tmp_path, json.dumps({**row, "key": 7})), "async_plan", "graph")


def test_an_inspection_counts_what_is_there(tmp_path: Path) -> None:
    rows = [paper_row(), paper_row(boil=9, answer="14 min"), paper_row(), paper_row(answer="15 min")]
    inspection = inspect_file(written(tmp_path, *rows), "async_plan", "natural")
    assert len(inspection.tasks) == 4 and inspection.num_procedures == 2
    assert inspection.duplicates == (3, 4)
    assert inspection.contradictions == (4,)
    assert inspection.unsolved == (4,)
    out = io.StringIO()
    show_inspection(inspection, tmp_path / "rows.jsonl", Console(file=out, width=200))
    text = out.getvalue()
    assert "4 rows, 2 different procedures" in text
    assert "repeated questions: 2 (rows 3, 4)" in text
    assert "answers confirmed by the solver: 75.00%" in text
    assert text.count("answer: 12 min") + text.count("answer: 14 min") == 3  # the samples
    assert str(len(QUESTION.format(boil=7))) in text


def test_a_name_in_brackets_and_an_escape_in_a_question_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[red]set"
    folder.mkdir()
    file = written(folder, json.dumps({"question": "What \x1b[2J is :cat:?", "answer": 7}))
    out = io.StringIO()
    show_inspection(inspect_file(file, "math", "natural"), file, Console(file=out, width=60))
    assert f"{file}: 1 rows" in out.getvalue()
    assert "What \\x1b[2J is :cat:?" in out.getvalue() and "\x1b" not in out.getvalue()


def test_other_families_have_no_solver(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps({"question": "What is 3 + 4?", "answer": 7}))
    assert inspect_file(file, "math", "natural").unsolved is None
    with pytest.raises(UserError, match="--family must be one of"):
        inspect_file(file, "poetry", "natural")


def test_a_broken_row_ends_with_2_and_names_file_and_line(tmp_path: Path, warm_isomorph: list[str]) -> None:
    file = written(tmp_path, paper_row(), '{"question": "unfini')
    command = [*warm_isomorph, "data", "inspect", str(file), "--family", "async_plan", "--representation", "natural"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {file}, line 2: ") and done.stderr.count("\n") == 1


def test_a_recipe_says_what_is_made(tmp_path: Path) -> None:
    recipe = load_recipe(SMOKE, [], Recipe)
    data = recipe.data["plans"]
    assert isinstance(data, GeneratedData)
    rows = {}
    for split, seed in (("train", recipe.run.seed), ("dev", recipe.eval.seed), ("test", recipe.eval.seed)):
        out = tmp_path / f"{split}.jsonl"
        make_of_recipe(SMOKE, None, ["graph"], 6, out, split=split, force=False)
        rows[split] = [json.loads(line) for line in out.read_text().splitlines()]
        drawn = data.tasks("graph", 6, seed=seed, split=split)
        assert [row["question"] for row in rows[split]] == [task.question for task in drawn]
    assert {row["key"] for row in rows["dev"]}.isdisjoint(row["key"] for row in (*rows["train"], *rows["test"]))
    make_of_recipe(SMOKE, "plans", [], None, tmp_path / "all.jsonl", split="dev", force=False)
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == len(REPRESENTATIONS) * 20  # as many as [eval] asks
    with pytest.raises(UserError, match="--data must be one of plans, got 'rows'"):
        make_of_recipe(SMOKE, "rows", [], None, None, split="dev", force=False)
