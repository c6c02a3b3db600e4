"""What pages show without running it: commands in a line of text exist with their options; every TOML block is TOML;
and each block of commands that no test runs has its reason here. tests/test_docs_examples.py runs the others."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from isomorph.curriculum.cli import app

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "ARCHITECTURE.md")]
PAGES = [*TOP, ROOT / "kernels" / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(isomorph [^`\n]+)`(?!`)")
COMMAND = re.compile(
    r"^(?:[\w./-]*/)?(?:python3?|pip|pytest|isomorph|git|ruff|mypy|wheels|wheel_aarch64|torchrun|docker)\b"
)
NOT_RUN = {  # a block of commands without a language, by its first line -> who runs it, or why nobody does
    "python3 -m venv .venv && .venv/bin/pip install -q torch==2.13.0 && .venv/bin/pip install -q . &&": ".ci/run",
    "python3 -m venv .venv && .venv/bin/pip install -q --retries 0 --timeout 5 --extra-index-url": ".ci/run",
    "python3 -m venv .venv && .venv/bin/pip install --extra-index-url": "as README's, which .ci/run runs",
    ".venv/bin/pip install scikit-build-core nanobind cmake ninja": ".ci/run; the second line builds C++",
    ".venv/bin/pytest tests/engine/test_objective.py": "the suite itself",
    ".ci/wheels .venv/bin/python borrowed": ".ci/run",
    "python .ci/api.py build/api": "tests/test_api.py",
    "isomorph study studies/demonstrations/STUDY.toml --only mixed": "hours; tests/curriculum/test_study.py loads both",
    "torchrun --nnodes M --nproc-per-node N": "several nodes; tests/test_torchrun.py has two launchers",
    "git clone https://github.com/fangru-lin/procedure_generalization_llm": "downloads the paper's repository",
}


def inline_commands() -> list[tuple[str, str]]:
    """(page, command) of every ``isomorph`` command in backticks."""
    found = ((path, match) for path in PAGES for match in INLINE.findall(path.read_text(encoding="utf-8")))
    return [(path.relative_to(ROOT).as_posix(), command) for path, command in found]


def misspelt(command: str, root: Any) -> list[str]:
    """The words of a command line that the command does not have: a subcommand or an option."""
    words, place = command.replace("[", " ").replace("]", " ").split()[1:], root
    while words and hasattr(place, "commands"):
        if words[0].startswith("-"):
            break
        if words[0] not in place.commands:
            return [words[0]]
        place = place.commands[words.pop(0)]
    options = {"--help", "--install-completion", "--show-completion"}
    options |= {name for one in place.params for name in one.opts}
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]


def test_every_command_in_a_line_of_text_exists_with_its_options() -> None:
    commands = inline_commands()
    assert len(commands) > 25
    root = typer.main.get_command(app)
    wrong = [(page, command, bad) for page, command in commands if (bad := misspelt(command, root))]
    assert wrong == []


def test_a_misspelt_command_is_noticed() -> None:
    root = typer.main.get_command(app)
    assert misspelt("isomorph data inspct FILE", root) == ["inspct"]
    assert misspelt("isomorph train RECIPE [--run DIR] --runs DIR", root) == ["--runs"]
    assert misspelt("isomorph data make --kind routes", root) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name + "/" + path.name)
def test_every_toml_block_is_toml_and_every_command_block_is_run_or_has_a_reason(path: Path) -> None:
    for language, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language == "toml":
            tomllib.loads(text)
        first = text.strip().splitlines()[0]
        if language == "" and COMMAND.match(first):
            assert [reason for start, reason in NOT_RUN.items() if first.startswith(start)], first


def test_every_reason_belongs_to_a_block() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [start for start in NOT_RUN if f"```\n{start}" not in texts] == []
