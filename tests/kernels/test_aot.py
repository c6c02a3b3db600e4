"""Compilation without a GPU. Each test compiles in its own process, because this one interprets Triton."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isomorph.kernels.gpu.launch import on_its_device

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
HERE = Path(__file__).parent
GPU = HERE.parents[1] / "kernels" / "gpu"
SOURCES = sorted(
    file for file in GPU.glob("*.py") if re.search(r"^@triton\.jit", file.read_text(encoding="utf-8"), re.M)
)


def _launches(source: str) -> list[tuple[str, set[str]]]:
    """Every ``name_kernel[grid](...)``: the name and its keywords."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    launches = [call for call in calls if isinstance(call.func, ast.Subscript) and _name(call.func).endswith("_kernel")]
    return [(_name(call.func), {keyword.arg or "**" for keyword in call.keywords}) for call in launches]


def _name(node: ast.expr) -> str:
    return node.value.id if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) else ""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_every_gate_refuses_the_kernel_that_was_planted_for_it() -> None:
    done = _run(str(HERE / "bad_kernels.py"))
    assert done.returncode == 0, done.stderr
    failures = json.loads(done.stdout)
    # bounds are saved with one version of Triton; with others nothing is compared
    of_version = json.loads((GPU / "bounds.jsonl").read_text(encoding="utf-8").splitlines()[0])["triton"]
    none_saved = ["no bound is saved"] if triton.__version__.startswith(f"{of_version}.") else []
    assert failures.pop("good") == failures.pop("good barrier") == none_saved  # of a kernel of ours one is
    for gate, found in failures.items():
        assert any(gate in failure for failure in found), (gate, found)


def test_a_barrier_that_is_taken_out_of_the_gradient_in_place_is_missed() -> None:
    """The interpreter runs a program's warps as one, so no test of numbers can show it."""
    script = """
import importlib.util, json, pathlib, sys, tempfile
from isomorph.kernels import aot
from isomorph.kernels.gpu import rows
def failures(module):
    variant = next(v for v in module.variants(90) if v.name == "gradient_kernel [fp32 -> bf16, dlogprob]")
    return list(aot.compile_variant(variant, 90).failures)
text = pathlib.Path(rows.__file__).read_text(encoding="utf-8")
found = [failures(rows)]
parts = text.split("tl.debug_barrier()")
for i in range(1, len(parts)):
    path = pathlib.Path(tempfile.mkdtemp()) / f"rows_{i}.py"
    path.write_text("tl.debug_barrier()".join(parts[:i]) + "pass" + "tl.debug_barrier()".join(parts[i:]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found.append(failures(module))
print(json.dumps(found))
"""
    done = _run("-c", script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], ["barriers 1 < 2"], ["barriers 1 < 2"]]


@pytest.mark.weekly
@pytest.mark.slow
def test_every_kernel_passes_the_gates_in_bfloat16_and_float32() -> None:
    """In its last configuration of each, for one architecture; .ci/run always compiles all, for all architectures."""
    script = """
import sys
from isomorph.kernels import aot
last = {(v.kernel.fn.__name__, dtype): v for v in aot.variants(90) for dtype in ("bf16", "fp32") if dtype in v.label}
assert {name for name, _ in last} == {v.kernel.fn.__name__ for v in aot.variants(90)}
aot.compile_all = lambda archs, only: (aot.compile_variant(v, arch) for arch in archs for v in last.values())
sys.exit(aot.report([90], as_json=True))
"""
    done = _run("-c", script)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and {row["arch"] for row in rows} == {90}, done.stderr
    assert [(row["kernel"], row["failures"]) for row in rows if row["failures"]] == []
    assert done.returncode == 0


def test_interpreted_kernels_are_not_compiled_and_the_error_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isomorph.kernels.aot", "--arch", "90"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 1
    assert "unset it before Python starts" in done.stderr


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """The names of all variants, by architecture."""
    script = "import json; from isomorph.kernels import aot; print(json.dumps({a: [v.name for v in aot.variants(a)] "
    script += "for a in aot.ARCHS}))"
    return json.loads(_run("-c", script).stdout)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_every_kernel_that_is_launched_is_compiled_for_every_architecture(
    file: Path, compiled: dict[str, list[str]]
) -> None:
    """Read from the source: a kernel that ``variants`` forgets would ship without having met a gate."""
    launched = {name for name, _ in _launches(file.read_text(encoding="utf-8"))}
    assert launched and compiled
    for arch, names in compiled.items():
        assert launched <= {name.split(" ")[0] for name in names}, (file.name, arch)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_nothing_is_tuned_at_run_time_and_no_launch_leaves_the_compiler_a_choice(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert not {"autotune", "heuristics"} & {
        n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)
    }
    for name, keywords in _launches(source):
        assert {"enable_fp_fusion", "num_warps"} <= keywords or "**" in keywords, (file.name, name)
    assert "enable_fp_fusion=True" in source  # also where options are handed on


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_every_launch_happens_on_the_device_of_its_tensors(file: Path) -> None:
    """Triton launches on the current device. A private function is called by one that has made it the right one."""
    functions = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
    for function in functions:
        if _launches(ast.unparse(function)) and not function.name.startswith("_"):
            assert "on_its_device" in map(ast.unparse, function.decorator_list), function.name


def test_the_device_of_the_first_argument_is_the_current_one_during_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        entered.append(x)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.ones(2)
    assert on_its_device(lambda first, other: (len(entered) == 1 and entered[0] is first, other))(x, 3) == (True, 3)
    assert not entered


def test_launches_are_found_where_they_are_planted() -> None:
    source = "a_kernel[(1,)](x, N, BLOCK=4, num_warps=4)\nb[0](x)\nc_kernel[grid](x, **options)\n"
    assert _launches(source) == [("a_kernel", {"BLOCK", "num_warps"}), ("c_kernel", {"**"})]
