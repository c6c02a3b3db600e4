"""The table "What is watched" of docs/reading-a-run.md names tests that exist and levels that it explains."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reading-a-run.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def tables(text: str) -> tuple[set[str], list[list[str]]]:
    """The levels, and the rows of the table of faults: fault, level, what sees it, tests."""
    section = text.partition("## What is watched\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    rows = [row for row in rows if row[0] not in ("level", "fault") and not set(row[0]) <= set("- ")]
    return {row[0] for row in rows if len(row) == 2}, [row for row in rows if len(row) != 2]


def problems(text: str, root: Path) -> list[str]:
    levels, faults = tables(text)
    found = []
    for row in faults:
        if len(row) != 4:
            found.append(f"{row}: four cells")
            continue
        fault, level, seen_by, tests = row
        if level not in levels:
            found.append(f"{fault}: the level {level} is not explained")
        if not seen_by and level != "test":
            found.append(f"{fault}: what sees it")
        named = TEST.findall(tests)
        if not named:
            found.append(f"{fault}: no test")
        found += [f"{fault}: {path} has no {name}" for path, name in named if name not in functions(root / path)]
    return found


def functions(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_fault_names_a_test_that_exists() -> None:
    text = DOCUMENT.read_text()
    assert problems(text, ROOT) == []
    assert len(tables(text)[1]) > 30


def test_a_row_that_has_gone_stale_is_found() -> None:
    text = DOCUMENT.read_text()
    renamed = text.replace("::test_one_stale_layer_is_caught", "::test_one_stale_layer_is_not_caught")
    assert [p.partition(":")[0] for p in problems(renamed, ROOT)] == ["one layer is stale"]
    assert problems(text.replace("| warn | `tok/dropped`", "| tell | `tok/dropped`"), ROOT)
