"""The API page: what pages and examples import is documented, listed, and built by pdoc without a warning."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
API = runpy.run_path(str(ROOT / ".ci" / "api.py"))
NAMES = [(module, name) for module, names in API["public"]().items() for name in names]


def test_many_names_are_public() -> None:
    modules = {module for module, _ in NAMES}
    assert len(NAMES) > 40
    assert {"isomorph.kernels.linear_logprob", "isomorph.engine.types", "isomorph.curriculum.rewards"} <= modules
    assert "isomorph.kernels.backend" in API["public"]()  # imported whole


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_public_name_says_its_shapes_and_its_errors(module: str, name: str) -> None:
    found = API["definition"](module, name)
    assert found is not None, f"{module} does not define {name}"
    assert API["lacks"](found[1]) == []


def test_the_index_is_what_the_docstrings_say() -> None:
    assert API["PAGE"].read_text(encoding="utf-8") == API["index"](), "run python .ci/api.py"


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("def f(): ...", ["a docstring"]),
        ("def f(x: Tensor) -> int:\n '''Of x.'''", ["the shapes"]),
        ("def f() -> tuple[Tensor, int]:\n '''Two.'''", ["the shapes"]),
        ("def f(x: Tensor):\n '''Of x [N, D].'''", []),
        ("def f():\n '''One.'''\n if 1: raise ValueError('a')", ["ValueError"]),
        ("def f():\n '''Raises ValueError.'''\n raise ValueError from None", []),
        ("class F:\n x = 1", ["a docstring"]),
    ],
)
def test_what_a_docstring_lacks_is_noticed(text: str, lacking: list[str]) -> None:
    assert API["lacks"](ast.parse(text).body[0]) == lacking


@pytest.mark.slow
def test_pdoc_builds_the_pages_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="the extra dev brings it")
    command = [sys.executable, "-P", str(ROOT / ".ci" / "api.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr
    page = (tmp_path / "isomorph" / "kernels" / "linear_logprob.html").read_text()
    assert "linear_loss" in page and "float32" in page
