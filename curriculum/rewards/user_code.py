"""Imports users' files: each under a name of its own, with the modules that lie beside it.

Two files of different folders may both import a module ``helpers`` from beside them. Python knows one module of a name,
so the modules of one folder at a time are among those that it knows, and ``enter`` changes between folders. This module
runs in workers of rewards and environments.
"""

import importlib
import importlib.util
import os
import sys
import zlib
from types import ModuleType
from typing import Any

_PREFIX = "reward_file_"  # of the names of users' files
_modules: dict[str, dict[str, ModuleType]] = {}  # folder -> what was imported from it
_seen: set[str] = set()  # names of modules that belong to no folder of the user's
_present = [""]


class DoesNotFit(ValueError):
    """The function cannot be used; the message says why."""


def load(where: str) -> Any:
    """The object at ``file.py:name`` or ``package.module:name``. Raises DoesNotFit, or what importing it raises."""
    module_name, _, name = where.rpartition(":")
    if module_name.endswith(".py"):
        module = _file(module_name)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise
            raise DoesNotFit(f"there is no package {error.name}") from None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise DoesNotFit(f"it has no {name!r}; it has {', '.join(known[:20]) or 'no functions'}")
        found = getattr(found, part)
    return found


def _file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise DoesNotFit("there is no such file")
    enter(home_of(path))
    # a name of its own: a file called json.py must not take the place of that module
    unique = f"{_PREFIX}{zlib.crc32(path.encode()):08x}_{os.path.basename(path)[:-3]}"
    known = sys.modules.get(unique)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def home_of(where: str) -> str:
    """The folder of ``file.py`` or ``file.py:name``; "" for a package."""
    file = where if where.endswith(".py") else where.rpartition(":")[0]
    return os.path.dirname(file) if file.endswith(".py") else ""


def enter(home: str) -> None:
    """Makes the modules in the folder ``home`` those that Python finds, in place of another folder's. "": no change."""
    left = _present[0]
    if home in ("", left):
        return
    if left:
        _modules[left] = {name: sys.modules.pop(name) for name in _of(left)}
        sys.path.remove(left)
    else:
        _seen.update(sys.modules)
    _present[0] = home
    sys.path.insert(0, home)
    sys.modules.update(_modules.get(home, {}))
    importlib.invalidate_caches()


def _of(home: str) -> list[str]:
    """The names of the modules that were imported from ``home``, and from packages in it."""
    found, others = [], set()
    for name in sys.modules.keys() - _seen:
        top = sys.modules.get(name.partition(".")[0])
        file = getattr(top, "__file__", None)
        places = [os.path.dirname(file)] if file else []
        places += [os.path.dirname(place) for place in getattr(top, "__path__", ())]
        if home in places and not name.startswith(_PREFIX):
            found.append(name)
        else:
            others.add(name)
    _seen.update(others)
    return found
