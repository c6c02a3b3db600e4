"""Anyone's rows: their files, prompts, divisions and orders."""

import csv
import http.server
import json
import random
import re
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import Field, TypeAdapter

from isomorph.curriculum.cli import main
from isomorph.curriculum.inputs import located
from isomorph.curriculum.recipe import Data, Recipe
from isomorph.curriculum.rows.arrow import read_file
from isomorph.curriculum.rows.dataset import Dataset
from isomorph.curriculum.rows.lines import LineRows
from isomorph.curriculum.rows.order import mixed, shuffled
from isomorph.curriculum.rows.source import RowsSource
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.rows.table import training_rows
from isomorph.curriculum.sources import tiny_words
from isomorph.curriculum.stage import Curriculum
from isomorph.curriculum.tasks.task import DataError, Task
from isomorph.engine.config import TinyModel, UserError
from isomorph.engine.effect import idle_paths, leaves
from isomorph.engine.model.load import read_text
from isomorph.engine.model.text import WORD, TextCodec, byte_tokenizer
from isomorph.engine.recipe_file import load_recipe

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if thinking %}think{% endif %}"


def codec() -> TextCodec:
    return TextCodec(byte_tokenizer(), chat_template=False, stop_ids=[1])


def source(path: Path | str, text: TextCodec | None = None, **keys: Any) -> RowsSource:
    return RowsSource(RowsData(kind="rows", path=str(path), **keys), text or codec(), "mine")


def drawn(one: RowsSource, count: int, label: str = "natural", seed: int = 0) -> list[Task]:
    tasks, position = [], 0
    for _ in range(count):
        task, position = one.draw(label, position, seed)
        tasks.append(task)
    return tasks


def lines(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def gsm8k(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of the form of GSM8K's: a story, and a working that ends in ``#### NUMBER``."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        a, b = rng.randrange(2, 60), rng.randrange(2, 9)
        rows.append(
            {
                "question": f"Shop {i} sells {a} pens a day. How many in {b} days?",
                "answer": f"It sells {a} * {b} = <<{a}*{b}={a * b}>>{a * b} pens.\n#### {a * b}",
            }
        )
    return rows


def countdown(count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [{"target": rng.randrange(10, 99), "nums": [rng.randrange(1, 9) for _ in range(3)]} for _ in range(count)]


MATH = [
    {
        "problem": f"What is $\\frac{{{n}}}{{2}}$?",
        "level": f"Level {n % 3}",
        "type": "Algebra",
        "solution": f"It is $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
    }
    for n in range(30)
]
VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"Is {n} even?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(n % 2 == 0)},
        "extra_info": {"split": "train", "index": n},
    }
    for n in range(30)
]
TRL = [
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n}?"}], "solution": f"${n}$"}
    for n in range(30)
]


@pytest.mark.parametrize(
    ("rows", "keys", "question", "answer"),
    [
        (gsm8k(30), dict(prompt="{question}\nEnd with ####.", answer="answer"), "{question}\nEnd with ####.", "answer"),
        (MATH, dict(prompt="problem", answer="solution", representation_column="level"), "{problem}", "solution"),
        (countdown(30), dict(prompt="Make {target} from {nums}: {{}}", answer="{target}"), None, None),
        (VERL, dict(answer="reward_model.ground_truth"), None, None),
        (TRL, dict(answer="solution"), None, "solution"),
    ],
    ids=["gsm8k", "math", "countdown", "verl", "trl"],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_native_rows_make_the_prompts_and_answers_that_the_recipe_says(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    keys: dict[str, Any],
    question: str | None,
    answer: str | None,
    kind: str,
) -> None:
    one = source(written(tmp_path, rows, kind), **keys)
    for task in drawn(one, 12, label="Level 1" if "representation_column" in keys else "natural"):
        row = task.row
        assert row in rows  # whole and unchanged, whatever the file's kind
        if question is not None:
            assert task.question == question.replace("{question}", row.get("question", "")).replace(
                "{problem}", row.get("problem", "")
            )
        if answer is not None:
            assert task.answer == row[answer]
        if "nums" in row:
            assert task.question == f"Make {row['target']} from {row['nums']}: {{}}"
            assert task.answer == str(row["target"])
        if "reward_model" in row:
            assert task.answer == row["reward_model"]["ground_truth"]
        if isinstance(row.get("prompt"), list):
            assert task.messages == tuple(row["prompt"]) and task.question == row["prompt"][-1]["content"]
        assert (task.family, task.data) == ("rows", "mine") and Task.from_json(task.to_json()) == task


def written(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    if kind == "jsonl":
        return lines(folder, rows)
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows, indent=1))
        return folder / "rows.json"
    import pyarrow
    from pyarrow import parquet

    file, table = folder / f"rows.{kind}", pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, file, row_group_size=7)
    else:
        with pyarrow.ipc.new_file(file, table.schema) as out:
            out.write_table(table, max_chunksize=7)
    return file


def test_a_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('id,question,answer\n007,"Two\nlines, and a comma?",1e3\n008,Why?,2020-01-01\n')
    rows = {task.row["id"]: task for task in drawn(source(file, prompt="question", answer="answer", eval_share=0.5), 1)}
    rows |= {t.row["id"]: t for t in source(file, prompt="question", eval_share=0.5).held_out_tasks("natural", 1)}
    assert {key: task.question for key, task in rows.items()} == {"007": "Two\nlines, and a comma?", "008": "Why?"}


def test_json_lines_keep_what_arrow_would_change(tmp_path: Path) -> None:
    """Columns of several types, keys of other rows, texts that look like times; blank lines are no rows."""
    rows = [
        {"prompt": "a", "answer": 1, "more": {"x": 1}},
        {"prompt": "b", "answer": "one", "when": "2020-01-01"},
        {"prompt": "c", "answer": [1, "x"], "more": {"y": None}},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\ufeff\n" + "\n\n".join(json.dumps(row) for row in rows) + "\r\n  \n")
    read = LineRows(file)
    assert [read.row(i) for i in range(len(read))] == rows == list(read.each())
    assert [read.number(i) for i in range(3)] == [2, 4, 6] and read.columns == ("prompt", "answer", "more", "when")


def test_a_row_is_drawn_once_in_each_epoch_and_a_seed_has_its_own_order(tmp_path: Path) -> None:
    one = source(lines(tmp_path, gsm8k(50)), prompt="question", answer="answer")
    num = len(one.dataset.training["natural"])
    first, second = (keys[:num] for keys in np.split(np.array([t.key for t in drawn(one, 2 * num)]), 2))
    assert sorted(first) == sorted(second) and len(set(first)) == num == 45 and list(first) != list(second)
    assert [t.key for t in drawn(one, num, seed=1)] != list(first)


def test_an_order_is_the_published_hash_and_not_a_librarys() -> None:
    """First outputs of SplitMix64 from the states 0 and 1234567, as published with Java's and Vigna's code."""
    assert int(mixed(np.array([0]), 0)[0]) == 0xE220A8397B1DCDAF
    assert int(mixed(np.array([1234567]), 0)[0]) == 6457827717110365317
    assert sorted(shuffled(1000, 5)) == list(range(1000))


def test_a_field_of_a_csv_may_be_longer_than_a_block(tmp_path: Path) -> None:
    long = 'a "quoted" word\n' * 300_000  # 4.8 MB, where pyarrow's own block is 1 MiB
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer"), ("one", "1"), (long, "2"), ("three", "3")])
    rows = read_file(tmp_path / "rows.csv")
    assert [rows.row(i)["prompt"] for i in range(len(rows))] == ["one", long, "three"]
    (tmp_path / "broken.csv").write_text("prompt,answer\n1,2,3\n")
    with pytest.raises(DataError, match="Expected 2 columns, got 3"):
        read_file(tmp_path / "broken.csv")


def test_equal_prompts_are_on_one_side(tmp_path: Path) -> None:
    rows = gsm8k(40)
    rows += [dict(row, answer="#### 0") for row in rows[:20]]
    file = lines(tmp_path, rows)
    parts = Dataset(RowsData(kind="rows", path=str(file), prompt="question", eval_share=0.3), "mine")
    train, held_out = ({rows[i]["question"] for i in side["natural"]} for side in (parts.training, parts.held_out))
    assert not train & held_out and len(held_out) == round(0.3 * 40) and len(train) == 28
    other = Dataset(RowsData(kind="rows", path=str(file), prompt="question", eval_share=0.3, split_seed=1), "mine")
    assert {rows[i]["question"] for i in other.held_out["natural"]} != held_out


def test_examples_are_training_rows_and_are_not_trained_on(tmp_path: Path) -> None:
    rows = gsm8k(30)
    train, test = lines(tmp_path, rows), lines(tmp_path, rows[:10], "test.jsonl")  # the exam's rows are in both
    keys = dict(prompt="question", answer="answer", examples=3, system="Count.")
    for one in (source(train, **keys), source(train, eval_path=str(test), **keys)):
        held_out = one.held_out_tasks("natural", 10)
        tasks = drawn(one, 60)
        shown = {rows[number - 1]["question"]: rows[number - 1]["answer"] for number in one.summary()["examples"]}
        assert len(shown) == 3 and not shown.keys() & {task.question for task in (*held_out, *tasks)}
        for task in (*tasks, *held_out):
            assert task.messages is not None
            assert [m["role"] for m in task.messages] == ["system", *["user", "assistant"] * 3, "user"]
            assert shown == {task.messages[i]["content"]: task.messages[i + 1]["content"] for i in (1, 3, 5)}
            assert task.messages[-1]["content"] == task.question
    assert "10 of its 10 prompts for evaluation are training prompts" in one.left_out[0]


def test_a_chat_is_written_by_the_template_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    file, text = lines(tmp_path, gsm8k(20)), codec()
    keys = dict(prompt="question", chat_template=str(tmp_path / "chat.jinja"), system="Go.")
    one = source(file, text, chat_arguments={"thinking": True}, **keys)
    task = drawn(one, 1)[0]
    assert task.messages is not None
    written = text.tokenizer.decode(text.encode_messages(task.messages, task.data))
    assert written == f"<system>Go.<user>{task.question}think"
    # without a template the contents stand one after the other
    assert text.decode(text.encode_messages(task.messages)) == f"Go.\n\n{task.question}"
    with pytest.raises(UserError, match="chat_arguments are for a chat template"):
        source(file, codec(), prompt="question", chat_arguments={"thinking": True})
    (tmp_path / "chat.jinja").write_text("<user>")
    with pytest.raises(UserError, match="drops or changes the user's turn"):
        source(file, codec(), **keys)


def test_demonstrations_are_a_column_a_template_or_the_last_message(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(20)
    ]
    one = source(lines(tmp_path, chats), prompt="messages", demonstration="messages")
    assert all(t.demonstration == f"{t.question[:-1]}!" and len(t.messages or ()) == 1 for t in drawn(one, 5))
    pairs = [{"prompt": f"{n}?", "completion": [{"role": "assistant", "content": f"{n}!"}]} for n in range(20)]
    one = source(lines(tmp_path, pairs), demonstration="completion")
    assert all(t.demonstration == f"{t.question[:-1]}!" for t in drawn(one, 5))
    one = source(lines(tmp_path, gsm8k(20)), prompt="question", demonstration="<think>{answer}</think>")
    assert all(t.demonstration == f"<think>{t.row['answer']}</think>" for t in drawn(one, 5))
    with pytest.raises(DataError, match="line 1: messages must end with the user's message, ends with assistant"):
        source(lines(tmp_path, chats), prompt="messages")


def test_rows_that_do_not_fit_are_counted_by_number_whenever_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "long " * 40 + str(n) if n % 5 == 0 else str(n)} for n in range(60)]
    file = lines(tmp_path, rows)
    at_once = source(file, max_prompt_tok=100)
    monkeypatch.setattr("isomorph.curriculum.rows.source.CHECKED_AT_ONCE", 10)
    at_the_draw = source(file, max_prompt_tok=100)
    assert at_once.left_out and not at_the_draw.left_out and not at_the_draw.num_too_long
    assert [t.key for t in drawn(at_once, 50)] == [t.key for t in drawn(at_the_draw, 50)]
    assert not any("long" in task.question for task in drawn(at_once, 50))
    assert at_once.summary() == at_the_draw.summary()
    assert at_the_draw.num_too_long["natural"] > 5
    resumed = source(file, max_prompt_tok=100)
    resumed.restore_left_out(json.loads(json.dumps(at_the_draw.left_out_rows())))
    assert resumed.summary() == at_the_draw.summary()
    drawn(resumed, 50)  # rows that are measured again count once
    assert resumed.summary() == at_the_draw.summary()
    assert {(n - 1) % 5 for n in at_the_draw.summary()["left_out_rows"]["natural"]} == {0}  # type: ignore[index]
    with pytest.raises(UserError, match="no natural row fits: .*54 of 54"):
        drawn(source(file, max_prompt_tok=1), 1)


def test_a_folder_and_its_splits(tmp_path: Path) -> None:
    rows = gsm8k(12)
    lines(tmp_path, rows[:5], "train-00000-of-00002.jsonl")
    lines(tmp_path, rows[5:9], "train-00001-of-00002.jsonl")
    lines(tmp_path, rows[9:], "test.jsonl")
    one = source(tmp_path, split="train", eval_split="test", prompt="question")
    assert {t.row["question"] for t in drawn(one, 9)} == {row["question"] for row in rows[:9]}
    assert [t.row for t in one.held_out_tasks("natural", 9)] == rows[9:]
    with pytest.raises(UserError, match="name a split, for example"):
        source(tmp_path, prompt="question")
    with pytest.raises(UserError, match="a file of the split 'dev'; it holds test.jsonl, train-0"):
        source(tmp_path, split="dev", prompt="question")


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list(gsm8k(n, seed=n)) for name, n in (("train", 8), ("test", 4))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    one = source(tmp_path / "saved", split="train", eval_split="test", prompt="question")
    assert sorted(t.question for t in drawn(one, 8)) == sorted(parts["train"]["question"])
    assert [t.question for t in one.held_out_tasks("natural", 4)] == list(parts["test"]["question"])


BAD = [
    (dict(prompt="nothing"), r"data\.mine\.prompt: there is no column 'nothing'; the columns are question, answer"),
    (dict(prompt="{question} {name}"), r"data\.mine\.prompt: there is no column 'name'; the columns are question, ans"),
    (dict(prompt="{question} \\boxed{}"), r"write \{\{ and \}\} for braces"),
    (dict(prompt="question", answer="answer.deep"), r"line 1: must have the column answer\.deep"),
    (dict(prompt="question", chat_template="no.jinja"), r"chat_template: must be a readable file"),
    (dict(prompt="question", eval_share=0.001), r"eval_share = 0\.001 of 20 different prompts leaves no row"),
    (dict(prompt="question", answer="answer", examples=18), r"examples = 18 must leave rows to train on, there are 18"),
]


@pytest.mark.parametrize(("keys", "said"), BAD, ids=lambda value: str(value)[:30])
def test_a_wrong_key_is_one_sentence(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, DataError), match=said):
        source(lines(tmp_path, gsm8k(20)), **keys)


def test_what_is_no_data_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "twice.csv").write_text("prompt,a,a\n1,2,3\n")
    with pytest.raises(DataError, match="twice.csv: columns must have different names, two are called 'a'"):
        source(tmp_path / "twice.csv")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "state.json").write_text("[]")  # of a program that is not datasets
    with pytest.raises(DataError, match="state.json: must hold at least one row"):
        source(tmp_path / "more")
    file, other = lines(tmp_path, gsm8k(20)), lines(tmp_path, [{"question": "a"}], "test.jsonl")
    with pytest.raises(UserError, match="data.mine.answer, rows for evaluation: there is no column 'answer'; the col"):
        source(file, prompt="question", answer="answer", eval_path=str(other))
    with pytest.raises(UserError, match="hub:a b: must be the name of a dataset of the hub, OWNER/NAME"):
        source("hub:a b")


def test_a_broken_line_in_the_middle_names_its_line(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in gsm8k(3000)]
    file = tmp_path / "rows.jsonl"
    for bad, said in (
        ('{"question": "half', "line 1501: must be a JSON object in UTF-8: Unterminated string starting at, column 14"),
        ("[1]", "line 1501: must be a JSON object, is list"),
        ('{"question": "\\ud800 x"}', "line 1501: holds half a surrogate pair"),
        ('{"answer": "1"}', "line 1501: must have the column question, has answer"),
        ('{"question": " "}', "line 1501: question must be a question, is empty"),
        ('{"question": null}', "line 1501: column question must have a value, is null"),
    ):
        file.write_text("\n".join([*rows[:1500], bad, *rows[1500:]]))
        with pytest.raises(DataError, match=f"{file}, {said}"):
            source(file, prompt="question")
    file.write_bytes("\n".join(rows[:4]).encode() + b'\n{"question": "\xff"}')
    with pytest.raises(DataError, match="line 5: must be a JSON object in UTF-8"):
        source(file, prompt="question")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=f"{name}: must (hold at least one row, is empty|be a readable)"):
            training_rows(RowsData(kind="rows", path=str(tmp_path / name)))
    with pytest.raises(UserError, match="there is no such file or folder; paths are relative to the recipe's folder"):
        source(tmp_path / "none.jsonl")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: of a private or missing dataset with 401, of a gated one with 403; or not at all."""

    def do_GET(self) -> None:
        if "slow" in self.path:
            time.sleep(60)
            return
        code, name = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_the_hub_says_within_five_seconds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # noqa: F401  (its import takes seconds, which are not the hub's)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name, said in (
        ("a/private", "the hub has no such dataset, or it is private"),
        ("a/gated", "the dataset asks for its conditions to be accepted"),
        ("a/slow", r"the hub cannot be reached \(TimeoutError: no answer within 4.0 s\), and the dataset is not"),
    ):
        started = time.monotonic()
        with pytest.raises(UserError, match=f"hub:{name}: {said}"):
            source(f"hub:{name}")
        assert time.monotonic() - started < 30  # of 60; a busy machine adds its own
    server.shutdown()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        source("hub:a/none")


RECIPE = """
[model.tiny]
tokenizer = "bytes"
[data.gsm8k]
kind = "rows"
path = "{path}"
prompt = "{{question}} Then ####."
answer = "answer"
rewards = [{{ function = "numeric" }}]
[[stage]]
name = "rl"
steps = 2
mixture = [{{ data = "gsm8k" }}]
[eval]
data = "gsm8k"
representations = ["natural"]
"""


def test_the_command_says_one_sentence_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(tmp_path, gsm8k(20))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "run.toml").write_text(RECIPE.format(path="rows.jsonl"))
    for override, said in (
        ("path=none.jsonl", f"{tmp_path}/none.jsonl: there is no such file or folder"),
        ("path=empty.jsonl", "empty.jsonl: must hold at least one row"),
        ("prompt=problem", "there is no column 'problem'; the columns are question, answer"),
        ("prompt={question} {hint}", "there is no column 'hint'"),
        ("representation_column=kind", "there is no column 'kind'"),
        ("max_prompt_tok=3", "no natural row fits"),
        ("representation_column=answer", "data 'gsm8k' has no row for training of representation 'natural', only "),
        ("chat_arguments={ a = 1 }", "error: data.gsm8k: chat_arguments are for a chat template"),
        ("subset=main", "run.toml: data.gsm8k: subset is of a hub dataset"),
        ("promt=question", "unknown key; did you mean 'prompt'?"),
    ):
        argv = ["isomorph", "train", str(tmp_path / "run.toml"), f"data.gsm8k.{override}"]
        monkeypatch.setattr(sys, "argv", [*argv, "--run", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error
        assert re.findall("^error: .*$", error, re.MULTILINE) == error.splitlines()
        assert not (tmp_path / "run").exists()


def test_a_recipe_finds_its_rows_beside_itself(tmp_path: Path) -> None:
    lines(tmp_path, gsm8k(20))
    (tmp_path / "run.toml").write_text(RECIPE.format(path="rows.jsonl"))
    recipe = located(load_recipe(tmp_path / "run.toml", [], Recipe))
    assert recipe.folder == tmp_path and recipe.data["gsm8k"].path == str(tmp_path / "rows.jsonl")  # type: ignore[union-attr]
    one = Curriculum(recipe, codec(), 512)
    first = one.take(7)
    assert [codec().decode(prompt.token_ids) for prompt in first] == [
        f"{prompt.payload.row['question']} Then ####." for prompt in first
    ]
    other = Curriculum(recipe, codec(), 512)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.take(40) == other.take(40)  # an interrupted run goes on with the rows of the uninterrupted one


def test_every_table_of_data_that_the_page_shows_is_a_valid_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-task.md").read_text(encoding="utf-8")
    blocks = [tomllib.loads(text) for text in re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]
    tables = {name: table for block in blocks for name, table in block["data"].items()}
    assert tables.keys() == {"sums", "gsm8k", "verl", "trl", "countdown", "chats", "gym"}
    for name, table in tables.items():
        checked = TypeAdapter(Annotated[Data, Field(discriminator="kind")]).validate_python(table)
        assert not {path for path in leaves(table) if path in idle_paths(checked)}, name


def test_a_tiny_model_reads_the_words_of_its_training_rows_or_bytes(tmp_path: Path) -> None:
    lines(tmp_path, gsm8k(20))
    (tmp_path / "run.toml").write_text(RECIPE.format(path="rows.jsonl"))
    settings = ["model.tiny.tokenizer=words", "model.tiny.max_words=30"]
    recipe = located(load_recipe(tmp_path / "run.toml", settings, Recipe))
    words, notes = tiny_words(recipe)
    assert len(words) == 30 and words[:2] == ["</answer>", "<answer>"]
    data = recipe.data["gsm8k"]
    assert isinstance(data, RowsData)
    parts = Dataset(data, "gsm8k")
    counts: Counter[str] = Counter()
    for i in parts.training["natural"]:
        row = parts.side.rows.row(int(i))
        counts.update(re.findall(WORD, f"{row['question']} Then ####. {row['answer']}"))
    assert sorted(counts.values(), reverse=True)[:28] == [counts[word] for word in words[2:]]
    lost = [count for word, count in counts.items() if word not in words]
    share = sum(lost) / sum(counts.values())
    assert notes[0].startswith(f"the tiny model reads {len(lost)} words of the training rows as [UNK], {share:.1%} of")
    text, positions = read_text(recipe.model, words)
    assert positions == recipe.model.tiny.max_model_len  # type: ignore[union-attr]
    unknown = {word for word in counts if word not in words}
    ids = text.encode_prompt("Shop " + " ".join(sorted(unknown)))
    assert ids.count(text.tokenizer.unk_token_id) == len(unknown) > 5
    reads_all, _ = read_text(recipe.model.model_copy(update={"tiny": TinyModel(tokenizer="bytes")}), [])
    for said in ("½ é \n\t 漢字 <answer>7</answer>", "\u200b 🙂 ## \\frac{1}{2}"):
        assert reads_all.decode(reads_all.encode_prompt(said)) == said
        assert len(reads_all.encode_response(said)) == len(said.encode()) + 1
