"""Prose and comments name only what exists: files, modules and what is in them; and every file is on the map."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "engine", "curriculum")
READ = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "pyproject.toml", "CMakeLists.txt", ".ci/run")
READ_IN = (*PACKAGES, "benchmarks", "studies", "docs", "examples")  # CHANGELOG.md names what is gone
MAPPED_IN = (*READ_IN, "tests")
KINDS = {".py", ".pyi", ".toml", ".md", ".cpp", ".h", ".cu", ".txt"}

BEFORE = r"(?<![\w./$-])"
PATH = re.compile(
    BEFORE + r"((?:kernels|engine|curriculum|benchmarks|studies|docs|examples|tests|\.links|\.ci)/[\w./*-]*)"
)
TOP_FILE = re.compile(BEFORE + r"((?:[A-Z]{3,}\.md|pyproject\.toml|CMakeLists\.txt))\b")
MODULE = re.compile(BEFORE + r"(isomorph(?:\.\w+)+)")
MAP = re.compile(r"^## Map$(.*?)^## ", re.MULTILINE | re.DOTALL)
MAP_ROW = re.compile(r"^\| `([\w./-]+)` \| (?=\S)", re.MULTILINE)
IDENTIFIER = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`")
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


class Mention(NamedTuple):
    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}"


def texts(root: Path) -> Iterator[Path]:
    yield from (root / name for name in READ if (root / name).is_file())
    for folder in READ_IN:
        yield from (p for p in sorted((root / folder).rglob("*")) if p.suffix in KINDS and p.is_file())


def mentions(root: Path, *patterns: re.Pattern[str]) -> list[Mention]:
    found = []
    for path in texts(root):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            names = [match for pattern in patterns for match in pattern.findall(line)]
            found += [Mention(path.relative_to(root).as_posix(), number, name.rstrip(".-")) for name in names]
    return found


def missing_paths(root: Path) -> list[str]:
    missing = [m for m in mentions(root, PATH, TOP_FILE) if not _exists(root, m.name) and not _is_written_by(m)]
    links = [m for m in mentions(root, LINK) if m.file.endswith(".md")]  # elsewhere the pattern is code
    missing += [m for m in links if not _exists((root / m.file).parent, m.name.partition("#")[0])]
    return [str(m) for m in missing]


def _is_written_by(m: Mention) -> bool:
    """A benchmark names the file that it will write; a study's author writes its plan."""
    return m.name == "PLAN.md" or (m.file.startswith("benchmarks/") and m.name.startswith("benchmarks/results/"))


def _exists(root: Path, name: str) -> bool:
    return any(True for _ in root.glob(name)) if "*" in name else (root / name).exists()


def missing_modules(root: Path) -> list[str]:
    named = [m for m in mentions(root, MODULE) if "__" not in m.name]
    return [str(m) for m in named if not _is_module_or_in_one(root, m.name.split(".")[1:])]


def _is_module_or_in_one(root: Path, parts: list[str]) -> bool:
    place = root
    for depth, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
            continue
        sources = [f for f in (place / f"{part}.py", place / f"{part}.pyi") if f.is_file()]
        return bool(sources) and all(name in _defined_in(sources[0]) for name in parts[depth + 1 : depth + 2])
    return True


def _defined_in(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        targets = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def map_rows(root: Path) -> list[str]:
    """The first column of ARCHITECTURE.md's map: files, and folders with a slash at their end."""
    (section,) = MAP.findall((root / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    return MAP_ROW.findall(section)


def unmapped_files(root: Path) -> list[str]:
    """Files that neither have a row in the map nor stand under a folder that has one."""
    rows = map_rows(root)
    folders = tuple(row for row in rows if row.endswith("/"))
    files = (p for top in MAPPED_IN for p in sorted((root / top).rglob("*")) if p.suffix in KINDS and p.is_file())
    names = (p.relative_to(root).as_posix() for p in files)
    return [name for name in names if name not in rows and not name.startswith(folders)]


def test_every_file_is_on_the_map_once() -> None:
    """A new file needs a row in ARCHITECTURE.md."""
    rows = map_rows(ROOT)
    assert sorted(set(rows)) == sorted(rows)
    assert [row for row in rows if not _exists(ROOT, row)] == []
    assert unmapped_files(ROOT) == []


def test_a_file_without_a_row_is_caught(tmp_path: Path) -> None:
    (tmp_path / "ARCHITECTURE.md").write_text(
        "## Map\n\n| `engine/a.py` | one |\n| `engine/b/` | two |\n| `engine/d.py` |  |\n\n## More\n`engine/c.py`\n"
    )
    for name in ("engine/a.py", "engine/b/x.py", "engine/c.py", "engine/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert unmapped_files(tmp_path) == ["engine/c.py", "engine/d.py"]


def unknown_identifiers(root: Path, page: str = "ARCHITECTURE.md") -> list[str]:
    """Names in backticks that occur nowhere in code or recipes."""
    tops = (root / top for top in (*MAPPED_IN, "CMakeLists.txt"))
    found = (p for top in tops for p in ([top] if top.is_file() else top.rglob("*")))
    files = (p for p in found if p.suffix in KINDS - {".md"} and p.is_file())
    known = {word for p in files for word in re.findall(r"\w+", p.read_text(encoding="utf-8"))}
    named = IDENTIFIER.findall((root / page).read_text(encoding="utf-8"))
    return [name for name in dict.fromkeys(named) if not known.issuperset(name.split("."))]


def test_every_identifier_in_the_architecture_exists() -> None:
    assert unknown_identifiers(ROOT) == []


def test_a_planted_identifier_is_caught(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "a.py").write_text("class Here:\n    def step(self): ...\n")
    (tmp_path / "ARCHITECTURE.md").write_text("`Here.step()`, `step`, `gone()`, `Here.gone`, `section.key=value`\n")
    assert unknown_identifiers(tmp_path) == ["gone", "Here.gone"]


def missing_imports(root: Path) -> list[str]:
    """Names that scripts outside the packages import from a module of ours, and that it does not define."""
    missing = []
    for path in (p for top in ("benchmarks", "studies", "examples") for p in sorted((root / top).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("isomorph."):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name for name in modules if not _is_module_or_in_one(root, name.split(".")[1:])]
                missing += [f"{path.relative_to(root).as_posix()}:{node.lineno}: {name}" for name in names]
    return missing


def test_every_name_that_a_script_imports_exists() -> None:
    """Most benchmarks run in no test."""
    assert missing_imports(ROOT) == []


def test_a_planted_import_is_caught(tmp_path: Path) -> None:
    for name, text in {
        "kernels/there.py": "A, B = 1, 2\ndef known() -> None: ...\n",
        "benchmarks/a.py": "from isomorph.kernels import there\nfrom isomorph.kernels.there import B, gone, known\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert missing_imports(tmp_path) == ["benchmarks/a.py:2: isomorph.kernels.there.gone"]


def test_every_path_that_is_named_exists() -> None:
    assert missing_paths(ROOT) == []


def test_every_module_that_is_named_exists_and_holds_what_is_named_in_it() -> None:
    assert missing_modules(ROOT) == []


def test_paths_are_found_where_they_are_known_to_be() -> None:
    named = {(m.file, m.name) for m in mentions(ROOT, PATH, TOP_FILE, LINK)}
    assert ("README.md", "curriculum/recipes/quickstart.toml") in named
    assert ("ARCHITECTURE.md", "engine/update/micro_batches.py") in named
    assert any(file.startswith("engine/") for file, _ in named)


@pytest.mark.parametrize(
    "text",
    [
        "see `engine/gone.py`.",
        "# tests/engine/gone.py holds it",
        "[map](GONE.md)",
        "[map](engine/gone.py)",
        "kernels/csrc/*.gone",
        "read GONE.md first",
    ],
)
def test_a_planted_path_is_caught(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(f"first\n{text}\n")
    assert missing_paths(tmp_path)[0].startswith("README.md:2: ")


@pytest.mark.parametrize(
    "text", ["isomorph.kernels.gone", "isomorph.kernels.there.gone", "from isomorph.gone.a import b"]
)
def test_a_planted_module_is_caught(tmp_path: Path, text: str) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "there.py").write_text("def known() -> None: ...\nCONSTANT = 1\nx: int = 2\n")
    (tmp_path / "README.md").write_text(text)
    assert len(missing_modules(tmp_path)) == 1


def test_what_exists_is_not_reported(tmp_path: Path) -> None:
    (tmp_path / "kernels" / "csrc").mkdir(parents=True)
    (tmp_path / "kernels" / "there.py").write_text("def known() -> None: ...\nCONSTANT = 1\nx: int = 2\n")
    (tmp_path / "README.md").write_text(
        "`kernels/`, kernels/there.py. (kernels/csrc/) [x](kernels/*.py) https://a.b/kernels/gone.py [y](https://gone.md)\n"
        "isomorph.kernels isomorph.kernels.there isomorph.kernels.there.known isomorph.kernels.there.CONSTANT\n"
        "[z](#section) README.md $HOME/engine/gone.py isomorph.kernels.there.x\n"
    )
    assert missing_paths(tmp_path) == []
    assert missing_modules(tmp_path) == []


def test_the_quickstarts_table_says_what_was_measured() -> None:
    """Written by ``python studies/quickstart_control.py --table`` from the rows beside it."""
    found = importlib.util.spec_from_file_location("quickstart_control", ROOT / "studies" / "quickstart_control.py")
    assert found is not None and found.loader is not None
    study = importlib.util.module_from_spec(found)
    found.loader.exec_module(study)
    rows = [json.loads(line) for line in study.RESULTS.read_text().splitlines()]
    readme = (ROOT / "README.md").read_text()
    assert readme == study.between(readme, "quickstart", study.section(rows)), (
        "run python studies/quickstart_control.py --table"
    )
