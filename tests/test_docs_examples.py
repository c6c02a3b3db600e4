"""Every code block in docs/ that is Python or a shell command runs, page by page, in the order of the page."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isomorph.engine.config import ModelConfig, TinyModel
from isomorph.engine.model.load import load_policy

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(
    r"^`([\w-]+\.(?:jsonl|toml|py))`", re.MULTILINE
)  # a paragraph that begins with it: the block is that file
RUNS = {"sh", "python"}
SHOWN = {"", "toml", "jsonl"}
QUICK = {"own-reward.md"}
# tables: tests/test_migration.py, tests/test_package.py, tests/test_scale.py
WITHOUT_BLOCKS = {"migration.md", "licences.md", "scale.md"}
VOCABULARY = ("<answer>", "</answer>", *"0123456789+?.", "What", "is", "a", "number", "End", "with")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(language, text, name of the file that it is, or "") of each block."""
    end = 0
    for found in BLOCK.finditer(page):
        named = FILE.findall(page[end : found.start()])
        end = found.end()
        is_file = named and (found[1] in SHOWN or named[-1].endswith(".py"))
        yield found[1], found[2], named[-1] if is_file else ""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, as transformers loads it: the pages' ``my-model``."""
    folder = tmp_path_factory.mktemp("model") / "my-model"
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, max_model_len=128)
    device = torch.device("cpu")
    load_policy(ModelConfig(tiny=tiny), vocabulary=VOCABULARY, seed=0, device=device).save(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, model_folder: Path, warm_script: Path) -> Path:
    """A folder with what a reader has: the repository's recipes, a model, and the commands on the path."""
    (tmp_path / "curriculum").symlink_to(ROOT / "curriculum")
    (tmp_path / "my-model").symlink_to(model_folder)
    commands = tmp_path / "bin"
    commands.mkdir()
    shutil.copy(warm_script, commands / "isomorph")
    torchrun = commands / "torchrun"
    torchrun.write_text(
        f"#!{sys.executable} -P\nimport sys; from torch.distributed.run import main; sys.exit(main())\n"
    )
    torchrun.chmod(0o755)
    return tmp_path


def run(language: str, text: str, place: Path) -> str:
    """What the block prints."""
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-P", "-c", text]
    path = os.pathsep.join((str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_page(page: Path, place: Path) -> list[str]:
    """Writes the page's files and runs its blocks; what each of these printed."""
    printed = []
    for language, text, name in blocks(page.read_text(encoding="utf-8")):
        if name:
            (place / name).write_text(text)
        elif language in RUNS:
            printed.append(run(language, text, place))
    return printed


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name not in QUICK else [])
        for p in PAGES
        if p.name != "reading-a-run.md"
    ],
)
def test_a_page_runs_from_its_first_block_to_its_last(page: Path, place: Path) -> None:
    run_page(page, place)


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("┃ ").split("┃")]


@pytest.mark.slow
def test_reading_a_run_runs_and_prints_what_the_pages_explain(place: Path) -> None:
    """The README's sample of the last lines, and the fields of the console line in docs/reading-a-run.md."""
    path = ROOT / "docs" / "reading-a-run.md"
    page = path.read_text(encoding="utf-8")
    assert re.search(r"^isomorph train ", page, re.MULTILINE)
    printed = run_page(path, place)[0]
    fields = re.findall(r"^\| `([^`]+)`", page.partition("## The files")[0], re.MULTILINE)
    fields = [name.partition(" a/b")[0] for row in fields for name in row.split(", ")]
    assert len(fields) > 5 and [name for name in fields if name not in printed and name != "no answer"] == []
    (sample,) = [text for _, text, _ in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if "┃" in text]
    (head,) = [line for line in sample.splitlines() if line.startswith("┃")]
    assert columns(head) in [columns(line) for line in printed.splitlines() if line.startswith("┃")]
    for line in sample.splitlines():
        labels = re.findall(r"[a-z][a-z-]+(?: [a-z-]+)*(?= [\d.]+)", line) if "[" not in line else [line.split(":")[0]]
        assert [label for label in labels if label.split(" after ")[0] not in printed and label != "no answer"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_run_or_shown(page: Path) -> None:
    found = list(blocks(page.read_text(encoding="utf-8")))
    assert found or page.name in WITHOUT_BLOCKS
    assert {language for language, _, _ in found} <= RUNS | SHOWN


def test_a_broken_block_is_noticed(place: Path) -> None:
    with pytest.raises(AssertionError, match="assert 1 == 2"):
        run("python", "assert 1 == 2", place)
    with pytest.raises(AssertionError, match="no-such-command"):
        run("sh", "no-such-command; true", place)
