"""Hostile files, names and texts: none is run, none leaves its folder, none is obeyed by a terminal or a browser."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from isomorph.curriculum.candidates import find_candidate
from isomorph.curriculum.commands.show import show_responses
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.page import write_report
from isomorph.curriculum.report.run_record import read_run
from isomorph.curriculum.rewards.answer import Answer
from isomorph.curriculum.rows.gym import Scorer
from isomorph.curriculum.rows.gym_answers import FORMULAS, LITERALS
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.rows.table import training_rows
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import ModelConfig, TinyModel, UserError
from isomorph.engine.foreign import PrintableConsole
from isomorph.engine.model.load import build_tiny, load_policy, read_shape
from isomorph.engine.recipe_file import check_tables, load_recipe
from isomorph.engine.record.best import read_best
from isomorph.engine.record.checkpoint import load_checkpoint, read_state
from isomorph.engine.record.runlog import RunLog

SMOKE = Path(__file__).parents[2] / "curriculum" / "recipes" / "smoke.toml"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\x90q\x9c\u202eevil\u2066\u200f\r"
HARMFUL = set("\x1b\x07\x9b\x90\x9c\u202e\u2066\u200f\r")
MARKUP = "<script>alert(1)</script>\"' onload='alert(1)"


class Evil:
    """Its pickle makes ``canary`` where it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def hostile(canary: Path) -> tuple[bytes, bytes]:
    """As pickle and as torch write it."""
    buffer = io.BytesIO()
    torch.save(Evil(canary), buffer)
    return pickle.dumps(Evil(canary)), buffer.getvalue()


def test_the_pickles_of_these_tests_are_hostile(tmp_path: Path) -> None:
    for content in hostile(tmp_path / "canary"):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(content), weights_only=True)
    assert not (tmp_path / "canary").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
        input=hostile(tmp_path / "canary")[0],
        timeout=60,
    )
    assert done.returncode == 0 and (tmp_path / "canary").exists()


def refused(read: Any) -> str:
    """The sentence that ``read`` ends with."""
    with pytest.raises((UserError, DataError)) as caught:
        read()
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 1500, said
    return said


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_no_file_of_a_run_is_unpickled(run: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    files = [
        *((checkpoint / name, lambda: load_checkpoint(checkpoint)) for name in os.listdir(checkpoint)),
        (checkpoint / "state.json", lambda: read_state(checkpoint)),
        (checkpoint / "state.json", lambda: find_candidate(str(checkpoint)).load()),
        (checkpoint / "weights.safetensors", lambda: find_candidate(str(checkpoint)).load()),
        *((run / name, lambda: read_run(run)) for name in ("run.json", "summary.json", "steps.jsonl")),
        *((run / name, lambda: find_candidate(str(run))) for name in ("run.json", "summary.json")),
        *((run / name, lambda: show_responses(run, None, 1, Console(file=io.StringIO()))) for name in ("run.json",)),
        (run / "model" / "config.json", lambda: find_candidate(str(run)).load()),
        (run / "model" / "model.safetensors", lambda: find_candidate(str(run)).load()),
        (run / "model" / "tokenizer.json", lambda: find_candidate(str(run)).load()),
        (run / "best" / "best.json", lambda: read_best(run)),
    ]
    for content in hostile(canary):
        for file, read in files:
            before = file.read_bytes() if file.exists() else None
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            refused(read)
            assert not canary.exists(), file
            if before is None:
                shutil.rmtree(file.parent)
            else:
                file.write_bytes(before)
        for file in (run / "completions").glob("*.jsonl"):
            file.write_bytes(content)
        refused(lambda: show_responses(run, None, 1, Console(file=io.StringIO())))
        assert all("incomplete" in note for note in read_run(run).notes) and not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.model", "config.json", "vocab.json", "model.gguf"])
def test_no_file_of_a_model_is_unpickled(name: str, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "model"
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16)
    build_tiny(tiny, ["a"], seed=0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    elif name in ("tokenizer.model", "vocab.json"):
        (folder / "tokenizer.json").unlink()
    path = folder / name if name.endswith(".gguf") else folder
    for content in hostile(canary):
        (folder / name).write_bytes(content)
        config = ModelConfig(path=str(path))
        refused(lambda config=config: load_policy(config, vocabulary=[], seed=0, device=torch.device("cpu")))
        assert not canary.exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "rows.arrow"])
def test_no_file_of_rows_is_unpickled(name: str, tmp_path: Path) -> None:
    for content in hostile(tmp_path / "canary"):
        (tmp_path / name).write_bytes(content)
        refused(lambda: training_rows(RowsData(kind="rows", path=str(tmp_path / name))).row(0))
        assert not (tmp_path / "canary").exists()


def test_the_code_in_a_models_folder_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``trust_remote_code=False`` transformers asks on the terminal whether to run it."""
    asked: list[str] = []

    def answered(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answered)
    code = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (tmp_path / name).write_text(code)
    kinds = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": kinds}))
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    config = ModelConfig(path=str(tmp_path))
    refused(lambda: load_policy(config, vocabulary=[], seed=0, device=torch.device("cpu")))
    refused(lambda: read_shape(config, []))
    assert not (tmp_path / "canary").exists() and asked == []


@pytest.mark.parametrize("task", sorted(LITERALS | FORMULAS))
def test_an_answer_that_is_python_is_not_run(task: str, tmp_path: Path) -> None:
    """reasoning-gym hands answers to ``eval`` and ``parse_expr``; a right answer is still one."""
    gym = pytest.importorskip("reasoning_gym")
    canary, score, dataset = tmp_path / "canary", Scorer(), gym.create_dataset(task, seed=1, size=3)
    run_it = f"__import__('os').mkdir({str(canary)!r})"
    dataset.score_answer(run_it, dataset[0])
    assert canary.exists(), "the package runs answers no longer: gym_answers can go"
    canary.rmdir()
    for entry in dataset:
        as_row = {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}

        def scored(stated: str, row: dict[str, Any] = as_row) -> float:
            return score(Answer(prompt="", text=f"<answer>{stated}</answer>", gold="", row=row))

        right = str(entry["answer"])
        for stated in (right, right.replace(" ", ""), f"[{right!r}]", "[[1, 2], [3, -4]]", "7", "x**2/2 + sin(3*x)"):
            assert scored(stated) == dataset.score_answer(stated, entry), stated
        assert scored(right) == 1.0
        worst = scored("?!")
        for stated in (run_it, f"[{run_it}]", f"{run_it} + 5!", "oracle_answer", "[oracle_answer]", "(1).__class__"):
            assert scored(stated) == worst, stated
        assert not canary.exists()


class Parsed(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def planted(value: Any, text: str) -> Any:
    """``value`` with ``text`` behind every string in it."""
    if isinstance(value, dict):
        return {key: planted(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [planted(inner, text) for inner in value]
    return value + text if isinstance(value, str) else value


def test_every_text_of_a_page_is_shown_and_none_is_markup_or_mathematics(run: Path, tmp_path: Path) -> None:
    text = MARKUP + ESCAPES + r" $\frac{ $ \ud800".replace(r"\ud800", "\ud800")
    described = json.loads((run / "run.json").read_text())
    kept = described["recipe"]
    described = {**planted(described, text), "recipe": kept}
    (run / "run.json").write_text(json.dumps(described))
    summary = json.loads((run / "summary.json").read_text())
    summary = {**planted(summary, text), "status": "failed" + text, "reason": text}
    (run / "summary.json").write_text(json.dumps(summary))
    for file in (run / "completions").glob("*.jsonl"):
        rows = [planted(json.loads(line), text) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run], tmp_path / "page").read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert "script" not in parsed.tags and not any(name.startswith("on") for name in parsed.attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and not set(page) & HARMFUL


def test_no_console_and_no_log_obeys_what_it_prints(tmp_path: Path) -> None:
    out = io.StringIO()
    console = PrintableConsole(file=out, force_terminal=True, width=200)
    table = Table("head" + ESCAPES, title="title" + ESCAPES)
    table.add_row("cell" + ESCAPES)
    for shown in ("line" + ESCAPES, table):
        console.print(shown)
    console.rule("rule" + ESCAPES)
    plain = io.StringIO()
    RunLog(tmp_path, Console(file=plain, width=200)).say("said" + ESCAPES)
    for text in (out.getvalue(), plain.getvalue()):
        assert not set(text) & (HARMFUL - {"\x1b"}) and "\x1b]" not in text and "\x1b[2J" not in text
        assert r"\x1b[2J" in text and r"\u202e" in text


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("stage", name) for name in ("../up", "a/b", "..", "a\0b", ".hidden", "a" * 300, "é" * 70, "a\nb", "C:\\x")),
        *(("eval", name) for name in ("../up", "a/b", "a\0b", "a" * 300)),
    ],
)
def test_a_name_that_is_part_of_file_names_stays_in_the_run_folder(place: str, name: str) -> None:
    recipe = load_recipe(SMOKE, [], Recipe)
    tables = recipe.model_dump(mode="json")
    if place == "stage":
        tables["stage"][-1]["name"] = name
    else:
        tables["eval"] = {"sets": [{"data": next(iter(recipe.data)), "name": name}]}
    refused(lambda: check_tables(tables, Recipe, where="recipe"))


def test_a_saved_dataset_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"secret")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        said = refused(lambda: training_rows(RowsData(kind="rows", path=str(folder))))
        assert "must lie in" in said


GUARD = """
import json, sys
seen = open("seen", "a", buffering=1)
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
def watch(event, arguments):
    if event in NETWORK:
        seen.write(f"{event} {arguments[1:]!r}\\n")
sys.addaudithook(watch)
from isomorph.curriculum.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["isomorph", *command]
    try:
        main()
    except SystemExit as end:
        print("ended with", end.code, command, file=sys.stderr)
"""


def test_no_command_asks_the_network_for_anything(tmp_path: Path) -> None:
    """Where the kernel allows it, in a network namespace of its own, which has no interface: workers neither."""
    alone = subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    small = ["stage.0.steps=2", "stage.1.steps=1", "stage.2.steps=1", "eval.prompts=2"]
    commands = [
        ["train", "smoke", "--run", "run", *small],
        ["eval", "run", "--prompts", "1"],
        ["report", "run"],
        ["plan", "smoke"],
        ["doctor"],
    ]
    command = [*(["unshare", "-rn"] if alone else []), sys.executable, "-P", "-c", GUARD, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "error:" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "report" / "report.html").is_file() and "accuracy" in done.stdout
    assert (tmp_path / "seen").read_text() == ""
