"""Loads scripts that are no part of the package, whose functions the tests run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

STUDIES = Path(__file__).parents[2] / "studies"


def load_study(name: str) -> ModuleType:
    return load_script(STUDIES / f"{name}.py")


def load_script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
