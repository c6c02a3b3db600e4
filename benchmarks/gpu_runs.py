"""Parts of the GPU suite that are programs of their own: tests, training runs, trainers of others.

Their output goes to the log; what they write line by line becomes rows while they run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import DEVICE
from compare import machine as name_of_machine
from gpu_models import SMOLLM2_135M, TINY, VOCAB_SMOLLM2, make_policy
from gpu_rows import Absent

from isomorph.kernels import backend

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Rows = Iterator[Row]
LOOK_S = 0.2
QUICK_TESTS = ([ROOT / "tests" / "kernels" / "test_bit_hash.py"], "not slow")
WORTH = {  # packages that a bare machine may lack, and what is lost without them
    "pydantic": "nothing but kernels runs",
    "pebble": "no training run",
    "tensorboardX": "no training run",
    "hypothesis": "most tests of kernels are not collected",
    "sortedcontainers": "hypothesis needs it",
    "trl": "no step beside TRL",
    "datasets": "TRL needs it",
    "pandas": "datasets needs it",
    "xxhash": "datasets needs it",
    "liger_kernel": "a peer of the head",
    "cut_cross_entropy": "a peer of the head",
    "vllm": "no run with vLLM",
}


def machine(rehearse: bool) -> Rows:
    """Machine, where isomorph was imported from, which implementations run, and what is missing."""
    import isomorph

    row: Row = {"check": "machine", "result": name_of_machine(DEVICE.type), "torch": torch.__version__}
    if DEVICE.type == "cuda":
        facts = torch.cuda.get_device_properties(0)
        row |= {"sm": torch.cuda.get_device_capability(), "sm_count": facts.multi_processor_count}
        row |= {"memory_gib": facts.total_memory / 2**30, "cuda": torch.version.cuda}
    for name in ("triton", "transformers"):
        row[name] = importlib.import_module(name).__version__ if importlib.util.find_spec(name) else None
    yield {**row, "python": sys.version.split()[0], "bodies": backend.table(DEVICE)}
    yield {"check": "isomorph comes from", "result": ", then ".join(map(str, isomorph.__path__))}
    yield {"check": "native module", "result": backend.native_reason() or "built"}
    missing = {name: lost for name, lost in WORTH.items() if importlib.util.find_spec(name) is None}
    yield {"check": "missing", "result": "; ".join(f"{name} ({lost})" for name, lost in missing.items()) or "nothing"}


# -- tests
def gpu_tests(rehearse: bool) -> Rows:
    """Every test that only a GPU can run."""
    yield from run_tests(*(_files_with("mark.gpu"), "gpu") if not rehearse else QUICK_TESTS)


def kernel_tests(rehearse: bool) -> Rows:
    """Those that take CUDA tensors where there are any and are interpreted elsewhere."""
    yield from run_tests(*(_files_with('"cuda"'), "not gpu and not slow") if not rehearse else QUICK_TESTS)


def _files_with(text: str) -> list[Path]:
    return [file for file in sorted((ROOT / "tests" / "kernels").rglob("test_*.py")) if text in file.read_text()]


def run_tests(files: Sequence[Path], marks: str) -> Rows:
    """A row for each test; a file that cannot be collected or loses CUDA's context costs no other file."""
    options = ["-v", "-p", "no:cacheprovider", "-p", "gpu_pytest", "--continue-on-collection-errors", "-m", marks]
    names = [str(file) for file in files]
    while names:
        lost = None
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            command = [sys.executable, "-m", "pytest", *options, *names]
            running = rows_of(command, rows, cwd=ROOT, GPU_PYTEST_ROWS=str(rows), PYTHONPATH=_with_benchmarks())
            for row in (code := _Result(running)):
                lost = row.pop("lost", None) or lost
                yield row
        if lost is None:
            ended = {"result": f"code {code.value}", "holds": code.value in (0, 5)}
            yield {"check": f"pytest -m '{marks}' {' '.join(Path(name).name for name in names)}", **ended}
            return
        yield {"check": f"pytest: CUDA's context was lost in {lost}", "holds": False}
        names = names[names.index(lost) + 1 :]


def _with_benchmarks() -> str:
    return os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])


# -- runs through the command line
def train_builtin(rehearse: bool) -> Rows:
    """SFT, GRPO on graphs, DAPO on natural language; on a GPU again, short, in bfloat16."""
    short = ["stage.0.steps=2", "stage.1.steps=1", "stage.2.steps=1", "eval.prompts=2"]
    yield from _train([] if not rehearse else short)
    if not rehearse:
        yield from _train(["model.dtype=bfloat16", "stage.0.steps=10", "eval.prompts=4"])


def train_vllm(rehearse: bool) -> Rows:
    """The same, sampled by vLLM with storage shared; heads as wide as vLLM's kernels require."""
    _need("vllm")
    short = ["stage.0.steps=2", "stage.1.steps=2", "stage.2.steps=1", "eval.prompts=2"]
    model = ["model.tiny.hidden_size=128", f"model.dtype={'float32' if rehearse else 'bfloat16'}"]
    yield from _train([*model, "sampler.kind=vllm", "sampler.publish=shared", "sampler.max_model_len=256", *short])


def _train(settings: Sequence[str]) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        main = "from isomorph.curriculum.cli import main; main()"
        recipe = ROOT / "curriculum" / "recipes" / "smoke.toml"
        command = [sys.executable, "-c", main, "train", str(recipe), *settings, "--run", str(run)]
        name = " ".join(["isomorph train smoke.toml", *settings])
        started = time.monotonic()
        for step in (code := _Result(rows_of(command, run / "steps.jsonl", cwd=Path(folder)))):
            yield {"check": f"a step of {name}", "detail": True, "step_row": step}
        row = {"check": name, "result": f"code {code.value}", "holds": code.value == 0}
        if code.value == 0:
            row |= {"summary": json.loads((run / "summary.json").read_text())}
        yield {**row, "wall_s": round(time.monotonic() - started, 1)}


# -- TRL
def step_beside_trl(rehearse: bool) -> Rows:
    """bench_step.py on a model of SmolLM2-135M's shape."""
    sizes = ["--steps", "1", "--prompts", "2", "--group", "2", "--max-new-tok", "4"]
    if not rehearse:
        sizes = [
            "--steps",
            "4",
            "--prompts",
            "16",
            "--group",
            "8",
            "--max-new-tok",
            "256",
            "--micro-batch-tok",
            "16384",
        ]
    yield from _beside_trl("bench_step.py", sizes, "a step beside TRL's: TRL's seconds over ours", rehearse)


def trl_adapter(rehearse: bool) -> Rows:
    """bench_trl_adapter.py on a model of SmolLM2-135M's shape."""
    sizes = ["--prompt-tok", "8", "--response-tok", "4", "--groups", "1", "--group", "2", "--rounds", "2"]
    if not rehearse:
        sizes = ["--prompt-tok", "600", "--response-tok", "256", "--groups", "4", "--group", "8", "--rounds", "10"]
    check = "TRL's pass over a micro-batch: as it comes over packed"
    yield from _beside_trl("bench_trl_adapter.py", sizes, check, rehearse)


def _beside_trl(script: str, sizes: Sequence[str], check: str, rehearse: bool) -> Rows:
    """What the script writes as it goes; the value is the ratio that it writes last."""
    _need("trl", "accelerate", "datasets", "pandas", "xxhash", "dill", "multiprocess")
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder) / "model", Path(folder) / "rows.jsonl"
        make_policy(*((TINY, 2000) if rehearse else (SMOLLM2_135M, VOCAB_SMOLLM2))).save(model)
        options = ["--model", str(model), "--name", "SmolLM2-135M's shape", "--out", str(out)]
        dtype = ["--dtype", "float32" if rehearse else "bfloat16"]
        command = [sys.executable, str(ROOT / "benchmarks" / script), *options, *dtype, *sizes]
        for row in (code := _Result(rows_of(command, out, cwd=Path(folder)))):
            figure = {"value": row["ratio"]} if "ratio" in row else {"detail": True}
            yield {"check": check, **figure, **row}
    if code.value:
        yield {"check": check, "failed": f"code {code.value}, see the log", "holds": False}


# -- helpers
def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Absent(f"not installed: {', '.join(missing)}")


class _Result:
    """Iterates over a generator and keeps what it returns."""

    def __init__(self, generator: Generator[Row, None, int]) -> None:
        self._generator = generator
        self.value: int | None = None

    def __iter__(self) -> Iterator[Row]:
        self.value = yield from self._generator


def rows_of(command: Sequence[str], file: Path, cwd: Path, **environment: str) -> Generator[Row, None, int]:
    """The lines of ``file`` as the command writes them; returns its exit code."""
    environment = {"TRITON_INTERPRET": "0", **environment}  # a rehearsal interprets kernels in the worker alone
    with subprocess.Popen(command, cwd=cwd, env=os.environ | environment, stdin=subprocess.DEVNULL) as child:
        position, is_done = 0, False
        try:
            while not is_done:
                is_done = child.poll() is not None  # what it wrote before it ended is still read
                written = file.read_bytes()[position:] if file.exists() else b""
                whole = written[: written.rfind(b"\n") + 1]
                position += len(whole)
                yield from map(json.loads, whole.splitlines())
                if not is_done:
                    time.sleep(LOOK_S)
        finally:
            child.kill()
    return child.returncode
