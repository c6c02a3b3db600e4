"""Every code block of kernels/README.md runs, and the page speaks of every op and of no other."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from isomorph.kernels import backend

PAGE = (Path(__file__).parents[1] / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def module_of(op: str) -> ModuleType:
    (found,) = re.findall(rf"^from (isomorph\.kernels\.\w+) import .*\b{op}\b", SECTIONS[op], re.MULTILINE)
    return import_module(found)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block_runs(block: str) -> None:
    exec(compile(block, "kernels/README.md", "exec"), {"__name__": "example"})


def test_every_op_has_a_section_with_an_example() -> None:
    assert set(backend.OPS) <= set(SECTIONS)
    for op in backend.OPS:
        assert len(re.findall(r"^```python$", SECTIONS[op], re.MULTILINE)) == 1, op


@pytest.mark.parametrize("op", backend.OPS)
def test_signature_is_the_one_on_the_page(op: str) -> None:
    (shown,) = re.findall(rf"^`{op}\((.*?)\)(?: ->[^`]*)?`", SECTIONS[op], re.MULTILINE)
    names = re.findall(r"(\w+)(?:=[^,]*)?(?:, |$)", shown)
    assert names == list(inspect.signature(getattr(module_of(op), op)).parameters)


@pytest.mark.parametrize("op", backend.OPS)
def test_the_specification_is_beside_the_op(op: str) -> None:
    assert callable(getattr(module_of(op), f"{op}_ref"))
