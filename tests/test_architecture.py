"""Imports point one way: kernels <- engine <- curriculum. Read from the syntax trees, nothing is imported."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "engine", "curriculum")  # each may import those before it, and itself
OURS = "isomorph"
OF_KERNELS = {"torch", "triton", "numpy"}  # besides the standard library
ONE_PLACE = {  # a file, or a folder with a slash at its end
    "vllm": "engine/rollout/vllm_engine.py",
    "transformers": "engine/model/",
    "peft": "engine/model/lora.py",
    "trl": "engine/adapters/trl.py",
    "flash_attn": "kernels/flash.py",
}
EXTRAS = {  # files that import an extra's packages at their own import: only a function's body may import them
    "triton": ("kernels/gpu/", "kernels/aot.py", "kernels/varlen_attention.py"),  # CUDA builds of torch bring it
    "sympy": ("curriculum/rewards/",),
    "pint": ("curriculum/rewards/quantity.py",),
    "scipy": ("curriculum/study/", "curriculum/analogy/"),
}
APART = ("rollout", "update")  # folders of the engine that only its loop brings together


class Import(NamedTuple):
    file: str  # relative to the root, with slashes
    line: int
    module: str  # "" for a relative import
    names: tuple[str, ...]  # what is taken from it

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module or 'a relative import'}"

    def targets(self) -> set[str]:
        """All modules this may load: ``from a import b`` may mean a.b."""
        return {self.module, *(f"{self.module}.{name}" for name in self.names)}

    def reaches(self, package: str) -> bool:
        return any(target == package or target.startswith(f"{package}.") for target in self.targets())


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def imports_of(root: Path, *folders: str) -> list[Import]:
    found = []
    for path in python_files(root, *folders):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=file)):
            if isinstance(node, ast.Import):
                found += [Import(file, node.lineno, alias.name, ()) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = "" if node.level else str(node.module)
                found.append(Import(file, node.lineno, module, tuple(alias.name for alias in node.names)))
            elif _is_dynamic_import(node):
                assert isinstance(node, ast.Call) and isinstance(node.args[0], ast.Constant)
                found.append(Import(file, node.lineno, str(node.args[0].value), ()))
    return found


def _is_dynamic_import(node: ast.AST) -> bool:
    """``importlib.import_module("x")``, ``__import__("x")``."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called in ("import_module", "__import__")


def violations(root: Path) -> list[str]:
    """Every import in the packages under ``root`` that breaks a rule, as file:line: what."""
    return [f"{found}: {broken}" for found in imports_of(root, *PACKAGES) if (broken := _broken_rule(found))]


def _broken_rule(found: Import) -> str | None:
    package, *inner = found.file.split("/")
    top = found.module.partition(".")[0]
    if not found.module:
        return "imports are absolute"
    if top in PACKAGES:
        return "the packages are isomorph.kernels, isomorph.engine, isomorph.curriculum"
    for other in PACKAGES[PACKAGES.index(package) + 1 :]:
        if found.reaches(f"{OURS}.{other}"):
            return f"{package} knows nothing of {other}"
    if top in ONE_PLACE and found.file.startswith(ONE_PLACE[top]):
        return None
    if package == "kernels" and top not in {OURS, *OF_KERNELS, *sys.stdlib_module_names}:
        return f"kernels import {', '.join(sorted(OF_KERNELS))} and the standard library alone"
    if top in ONE_PLACE:
        return f"{top} is imported in {ONE_PLACE[top]} alone"
    if package == "engine" and inner[0] in APART:
        (other,) = set(APART) - {inner[0]}
        if found.reaches(f"{OURS}.engine.{other}"):
            return "rollout and update do not know each other"
    return None


def circle(root: Path) -> list[str]:
    """Files that import each other in a circle, imports within functions included; [] where there is none."""
    files = {f"{OURS}.{'.'.join(p.relative_to(root).with_suffix('').parts)}": p for p in python_files(root, *PACKAGES)}
    graph: dict[str, set[str]] = {path.relative_to(root).as_posix(): set() for path in files.values()}
    for found in imports_of(root, *PACKAGES):
        imported = {files[target].relative_to(root).as_posix() for target in found.targets() & files.keys()}
        graph[found.file] |= imported - {found.file}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def private_imports(root: Path, *folders: str) -> list[str]:
    """``from somewhere of ours import _name``: what another file may use has a public name."""
    ours = {path.stem for path in python_files(root, "benchmarks")} | {OURS}
    return [
        f"{found.file}:{found.line}: {name} of {found.module}"
        for found in imports_of(root, *folders)
        if found.module.partition(".")[0] in ours
        for name in found.names
        if name.startswith("_") and not name.startswith("_native")  # modules of C++
    ]


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(ROOT) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    for name, line in (("a", "from isomorph.engine import b"), ("b", "def f():\n    import isomorph.engine.c.d")):
        (tmp_path / "engine" / "c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "engine" / f"{name}.py").write_text(line + "\n")
    (tmp_path / "engine" / "c" / "d.py").write_text("import torch\n")
    assert circle(tmp_path) == []
    (tmp_path / "engine" / "c" / "d.py").write_text("from isomorph.engine.a import x\n")
    assert set(circle(tmp_path)) == {"engine/a.py", "engine/b.py", "engine/c/d.py"}


def test_no_private_name_is_imported() -> None:
    assert private_imports(ROOT, *PACKAGES, "benchmarks", "studies") == []


def test_a_planted_private_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "compare.py").write_text("_hidden = shown = 0\n")
    (tmp_path / "benchmarks" / "a.py").write_text(
        "from compare import _hidden, shown\nfrom isomorph.kernels.b import _c\nfrom isomorph.kernels import _native\n"
    )
    assert private_imports(tmp_path, "benchmarks") == [
        "benchmarks/a.py:1: _hidden of compare",
        "benchmarks/a.py:2: _c of isomorph.kernels.b",
    ]


def test_the_packages_are_read_at_all() -> None:
    files = {found.file.split("/")[0] for found in imports_of(ROOT, *PACKAGES)}
    assert files == set(PACKAGES)
    for module, place in ONE_PLACE.items():
        if (ROOT / place).exists():
            files = [found.file for found in imports_of(ROOT, *PACKAGES) if found.module.startswith(module)]
            assert any(file.startswith(place) for file in files)


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("kernels/a.py", "from isomorph.engine.types import Prompt", "knows nothing of engine"),
        ("kernels/a.py", "from isomorph import engine", "knows nothing of engine"),
        ("kernels/a.py", "import isomorph.curriculum.tasks.task", "knows nothing of curriculum"),
        ("kernels/a.py", "import transformers", "standard library alone"),
        ("kernels/a.py", "import flash_attn", "standard library alone"),
        ("kernels/a.py", "def f():\n    import pydantic", "standard library alone"),
        ("kernels/csrc/a.py", "import scipy.special", "standard library alone"),
        ("engine/a.py", "from isomorph.curriculum.stage import Curriculum", "knows nothing of curriculum"),
        ("engine/a.py", "if True:\n    from isomorph import curriculum as c", "knows nothing of curriculum"),
        ("engine/a.py", "import kernels.packing", "the packages are"),
        ("engine/a.py", "from engine.types import Prompt", "the packages are"),
        ("curriculum/a.py", "from curriculum import task", "the packages are"),
        ("curriculum/a.py", "import importlib\nimportlib.import_module('kernels')", "the packages are"),
        ("curriculum/a.py", "__import__('vllm')", "vllm is imported"),
        ("curriculum/a.py", "from . import task", "absolute"),
        ("curriculum/tasks/a.py", "from ..task import Task", "absolute"),
        ("curriculum/a.py", "import vllm", "vllm is imported"),
        ("engine/rollout/weights.py", "from vllm import LLM", "vllm is imported"),
        ("engine/rollout/vllm.py", "import transformers", "transformers is imported"),
        ("curriculum/a.py", "from transformers.modeling_utils import x", "transformers is imported"),
        ("engine/model_a.py", "import transformers", "transformers is imported"),
        ("engine/model/policy.py", "import peft", "peft is imported"),
        ("engine/loop.py", "import trl", "trl is imported"),
        ("engine/rollout/a.py", "from isomorph.engine.update.micro_batches import pack", "do not know each other"),
        ("engine/update/a.py", "from isomorph.engine import rollout", "do not know each other"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, file: str, line: str, rule: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:") and rule in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (
            "kernels/a.py",
            "import numpy as np, torch, math\nfrom triton import language\nfrom isomorph.kernels import b",
        ),
        ("engine/a.py", "from isomorph.kernels.packing import x\nimport pydantic, safetensors.torch"),
        ("engine/loop.py", "from isomorph.engine.rollout import a\nfrom isomorph.engine.update import b"),
        ("engine/model/load.py", "import transformers"),
        ("engine/model/text.py", "from transformers import PreTrainedTokenizerFast"),
        ("engine/rollout/vllm_engine.py", "import vllm\nfrom isomorph.engine.rollout.weights import x"),
        ("curriculum/a.py", "from isomorph.engine.rollout.vllm import start\nfrom isomorph.kernels import backend"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []


def top_level(root: Path) -> dict[str, set[str]]:
    """Each module of the packages and all that it loads when it is imported, directly or through others of ours."""
    direct: dict[str, set[str]] = {}
    for path in python_files(root, *PACKAGES):
        body = ast.Module(ast.parse(path.read_text(encoding="utf-8")).body, [])
        at_import = [node for node in body.body if isinstance(node, ast.Import | ast.ImportFrom)]
        targets: set[str] = set()
        for node in at_import:
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif node.module:
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        direct[path.relative_to(root).as_posix()] = targets
    file_of = {f"{OURS}.{file.removesuffix('.py').replace('/', '.')}": file for file in direct}

    def closure(file: str, seen: set[str]) -> set[str]:
        if file in seen:
            return set()
        seen.add(file)
        return direct[file].union(*(closure(file_of[t], seen) for t in direct[file] if t in file_of))

    return {file: closure(file, set()) for file in direct}


def needs_an_extra(root: Path) -> list[str]:
    """Modules that a plain ``pip install isomorph`` could not import, except those that EXTRAS names."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    plain = {str(re.match(r"[A-Za-z0-9_-]+", line)[0]) for line in needed} | {OURS, *sys.stdlib_module_names}  # type: ignore[index]
    return [
        f"{file}: {package}"
        for file, loaded in top_level(root).items()
        for package in sorted({target.partition(".")[0] for target in loaded} - plain)
        if not file.startswith(EXTRAS.get(package, ("-",)))
    ]


def test_a_plain_install_imports_every_module() -> None:
    assert needs_an_extra(ROOT) == []


def test_an_extra_reached_through_another_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "curriculum/study").mkdir(parents=True)
    (tmp_path / "curriculum/study/seeds.py").write_text("import numpy\nfrom scipy import stats\n")
    (tmp_path / "curriculum/page.py").write_text("from isomorph.curriculum.study import seeds\n")
    (tmp_path / "curriculum/cli.py").write_text("def f():\n    import datasets\n")
    assert needs_an_extra(tmp_path) == ["curriculum/page.py: scipy"]


def test_nothing_else_in_the_repository_imports_the_packages_by_their_bare_names() -> None:
    outside = [f for f in imports_of(ROOT, "tests", "benchmarks", "studies") if f.module.partition(".")[0] in PACKAGES]
    assert [str(found) for found in outside] == []


def test_no_folder_is_a_package_without_isomorph() -> None:
    """Without ``__init__.py`` an installed package called kernels always wins over our folder.

    The two below a package: users import ``Answer`` and ``Done`` from there.
    """
    found = [str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")]
    assert sorted(found) == ["curriculum/environments/__init__.py", "curriculum/rewards/__init__.py"]


def test_kernels_means_somebody_elses_package_or_none() -> None:
    """In a process of its own: ``python -m pytest`` puts the folder that it is called in on this one's path."""
    find = (
        "import importlib.util, json; spec = importlib.util.find_spec('kernels'); "
        "print(json.dumps([] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", find], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not any(Path(place).resolve().is_relative_to(ROOT) for place in json.loads(found.stdout) if place)


def test_no_test_forks_the_process_that_runs_it() -> None:
    """A fork has the locks of threads that it lacks, and waits for them for ever: tests/engine/apart.py is the way."""
    forks = re.compile(r"os\.fork\(|get_context\(.fork.\)")
    files = {path for path in python_files(ROOT, "tests") if path.name.startswith("test_")} - {Path(__file__)}
    assert [path.name for path in sorted(files) if forks.search(path.read_text())] == []


def test_functions_fit_on_a_screen() -> None:
    """60 lines; one Triton kernel may be longer, where its halves would share all their variables."""
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for path in python_files(ROOT, *PACKAGES, "benchmarks", "studies")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= (75 if any("jit" in ast.unparse(d) for d in node.decorator_list) else 60)
    ]
    assert long == []
