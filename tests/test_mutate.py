"""tests/mutate.py: what it leaves out, and its table. Mutants themselves need cosmic-ray, not installed for tests."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from studies import load_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    return load_script(Path(__file__).with_name("mutate.py"))


def test_every_file_and_every_test_file_is_there(mutate: ModuleType) -> None:
    for file in mutate.FILES:
        names = [word for word in mutate.test_command(Path("python"), file).split() if word.startswith("tests/")]
        assert (ROOT / file).is_file()
        assert names and all((ROOT / name).is_file() for name in names)


def test_annotations_and_all_are_left_out(mutate: ModuleType) -> None:
    function = "def a(b: int | None = 3 | 4) -> int | str:\n    c: int | None = b or 1\n    return c or 2\n"
    source = f'__all__ = ["a"]\n\n{function}'
    places = mutate.left_out(source)
    lines = source.splitlines()
    assert (3, lines[2].index("|")) in places  # of the argument's annotation
    assert (3, lines[2].rindex("|")) in places  # of what it returns
    assert (4, lines[3].index("|")) in places
    assert (1, lines[0].index('"a"')) in places
    assert (3, lines[2].index("3 |") + 2) not in places  # of the default
    assert (4, lines[3].index("or")) not in places and (5, lines[4].index("or")) not in places


def test_the_last_verdict_on_a_mutant_counts_and_survivors_have_a_reason(mutate: ModuleType) -> None:
    file = next(iter(mutate.FILES))
    one = {"file": file, "line": 3, "was": "a < b", "is": "a <= b", "outcome": "survived"}
    two = {"file": file, "line": 9, "was": "x + 1", "is": "x + 2", "outcome": "survived"}
    rows = [one, two, one | {"outcome": "killed"}]
    assert f"| {file} | 2 | 1 | 1 | 0 |" in mutate.table(rows, {})
    assert "`x + 1` -> `x + 2`: NOT EXPLAINED" in mutate.table(rows, {})
    reasons = {f"{file}: x + 1 -> x + 2": "equivalent: x is not read again"}
    assert f"| {file} | 2 | 1 | 1 | 1 |" in mutate.table(rows, reasons)


def test_every_survivor_that_is_committed_has_a_reason(mutate: ModuleType) -> None:
    reasons = json.loads(mutate.REASONS.read_text())
    assert "NOT EXPLAINED" not in mutate.table(mutate.rows_there(), reasons)
