"""Importing isomorph changes nothing in the user's process: every module in a fresh interpreter, before and after."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "engine", "curriculum")

# What others' packages change when they are imported is theirs: they are imported before the first look.
SCRIPT = """
import gc, importlib, json, locale, logging, os, random, signal, sys, threading, warnings
for name in THEIRS:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

def look():
    loggers = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict)}
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "paths of imports": list(sys.path),
        "meta path": [repr(type(finder)) for finder in sys.meta_path],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "threads of torch": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "defaults of torch": [
            str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark,
            torch.backends.mkldnn.enabled, torch.initial_seed(), hash(torch.get_rng_state().numpy().tobytes()),
        ],
        "attention of transformers": sorted(AttentionInterface().keys()),
        "masks of transformers": sorted(AttentionMaskInterface().keys()),
        "loggers": {
            name: [logger.level, logger.disabled, logger.propagate, [repr(handler) for handler in logger.handlers]]
            for name, logger in {"": logging.root, **loggers}.items() if not name.startswith("isomorph")
        },
        "warnings": [repr(entry) for entry in warnings.filters],
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(sys.displayhook), repr(warnings.showwarning)],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "locale": locale.setlocale(locale.LC_ALL),
        "randomness": hash(random.getstate()),
        "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.get_threshold()],
    }

changed = {}
before = look()
for name in OURS:
    importlib.import_module(name)
    after = look()
    for what in before:
        if what == "loggers":  # others' modules make further ones
            after[what] = {name: after[what].get(name) for name in before[what]}
        if after[what] != before[what]:
            changed[f"{name}: {what}"] = [str(before[what])[:2000], str(after[what])[:2000]]
    before = after
print(json.dumps(changed))
"""


def third_party() -> list[str]:
    """Modules of others that ours import at their own import."""
    found = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module))
    return sorted(name for name in found if name.partition(".")[0] not in {"isomorph", *sys.stdlib_module_names})


def test_importing_any_module_changes_nothing_in_the_process() -> None:
    ours = sorted(
        ".".join(("isomorph", *path.relative_to(ROOT).with_suffix("").parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    )
    theirs = third_party()
    assert {"torch", "transformers", "pydantic"} <= set(theirs)
    script = f"THEIRS = {theirs!r}\nOURS = {ours!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
