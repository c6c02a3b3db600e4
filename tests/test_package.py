"""What is shipped: source distribution, wheel, version, list of licences, instruction sets, GitHub and Docker."""

import email
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / name))


def build(what: str, folder: Path, settings: dict[str, str] | None = None) -> Path:
    pytest.importorskip("scikit_build_core", reason="needs what a build without isolation needs: see CONTRIBUTING.md")
    code = f"import scikit_build_core.build as b; b.build_{what}({str(folder)!r}, {settings or {}!r})"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    (built,) = folder.iterdir()
    return built


def test_the_source_distribution_holds_what_a_build_needs_and_nothing_built(tmp_path: Path) -> None:
    assert script("check_wheel.py")["check_sdist"](build("sdist", tmp_path), VERSION) > 400


def test_the_wheel_holds_every_file_of_the_packages_and_their_types(tmp_path: Path) -> None:
    """Without the C++ module, which takes minutes: `.ci/wheels` builds and checks that one."""
    wheel = build("wheel", tmp_path, {"wheel.cmake": "false"})
    assert script("check_wheel.py")["check_wheel"](wheel, VERSION, compiled=False) > 250


def test_the_version_stands_in_one_place() -> None:
    assert re.search(r"^project\(isomorph LANGUAGES", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    tops = ("kernels", "engine", "curriculum")
    files = [p for top in tops for p in (ROOT / top).rglob("*.py")]
    files += [ROOT / "Dockerfile", ROOT / "README.md", *(ROOT / ".github").rglob("*.yml")]
    number = re.escape(VERSION)
    named = re.compile(rf"^\s*(?:__version__|VERSION)\s*=\s*[\"']{number}|isomorph(?:==|-){number}", re.MULTILINE)
    assert [str(p) for p in files if named.search(p.read_text(encoding="utf-8"))] == []


def test_dev_takes_every_triton_that_the_kernels_are_compiled_with() -> None:
    """CUDA builds of torch pin a version of their own: with one version in [dev], pip finds no torch beside it."""
    of_dev = [Requirement(one) for one in PROJECT["optional-dependencies"]["dev"]]
    (triton,) = (one for one in of_dev if one.name == "triton")
    (versions,) = re.findall(r"^for version in (.*); do$", (ROOT / ".ci" / "triton").read_text(), re.MULTILINE)
    assert "3.7.1" in versions.split()  # torch 2.13.0 for CUDA, as PyPI has it for Linux
    assert [one for one in versions.split() if not triton.specifier.contains(one)] == []
    assert triton.specifier.contains("3.9.0")  # the bounds of kernels/gpu/bounds.jsonl


def test_the_versions_of_python_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["ruff"]["target-version"] == "py311" and tool["mypy"]["python_version"] == "3.11"
    claimed = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if line.startswith("Programming Language")]
    (listed,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    assert [one for one in claimed if one.startswith("3.")] == re.findall(r'"([\d.]+)"', listed)


def test_every_dependency_has_its_licence_listed() -> None:
    """Written by ``python .ci/licences.py``."""
    listed = re.findall(r"^\| ([\w-]+) \| (\S+) \| (\S.*?) \| ", (ROOT / "docs" / "licences.md").read_text(), re.M)
    tools = script("licences.py")
    wanted = {tools["canonical"](one.name) for some in tools["declared"]().values() for one in some}
    assert wanted - {name for name, _, _ in listed} == set(), "run python .ci/licences.py"
    assert [name for name, version, licence in listed if version != "-" and not licence] == []


def test_a_package_states_its_licence_in_one_of_three_ways() -> None:
    licence_of = script("licences.py")["licence_of"]

    class Package:
        def __init__(self, *lines: str) -> None:
            self.metadata = email.message_from_string("\n".join(lines))

    osi = "Classifier: License :: OSI Approved"
    assert licence_of(Package("License-Expression: MIT", f"{osi} :: BSD License")) == "MIT"
    assert licence_of(Package(osi, f"{osi} :: BSD License", "License: text")) == "BSD License"
    assert licence_of(Package("License: Apache 2.0\n        of the year")) == "Apache 2.0"
    assert licence_of(Package("Name: a")) == "not stated in its metadata"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_a_workflow_calls_what_exists_and_repeats_nothing(path: Path) -> None:
    """GitHub has never run them: see CONTRIBUTING.md for the linters that have seen them."""
    import yaml

    workflow = yaml.safe_load(path.read_text())
    assert "never run on GitHub" in path.read_text().replace("Never", "never")
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for command in (step["run"] for step in steps if "run" in step):
        program = command.split()[0]
        assert program == "docker" or (ROOT / program).stat().st_mode & 0o100, command
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action), action


def test_the_image_installs_as_the_readme_says() -> None:
    text = (ROOT / "Dockerfile").read_text()
    readme = (ROOT / "README.md").read_text()
    (pin,) = set(re.findall(r"torch==[\d.]+", readme))
    assert re.findall(r"torch==[\d.]+", text) == [pin]
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"debian:bookworm-slim"}
    assert "not built yet" in text  # remove with the first build
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored) and not {"LICENSE", "README.md", "CMakeLists.txt"} & set(ignored)


def test_the_instruction_set_of_a_process_can_be_named() -> None:
    """A plainer body is selected by ISOMORPH_ISA; a name that is not here is an error, never another body."""
    pytest.importorskip("isomorph.kernels._native", reason="needs the C++ module")
    code = "from isomorph.kernels import _native as n; print(n.isas()[-1], n.isa(), n.has_bfloat16_gemm())"

    def run(isa: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"ISOMORPH_ISA": isa}  # read once, so in a process of its own
        return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)

    assert run("baseline").stdout == "baseline baseline False\n"
    wrong = run("avx1024")
    assert wrong.returncode and "ISOMORPH_ISA is avx1024, but the C++ module runs here with: " in wrong.stderr


def test_the_module_alone_agrees_with_formulas_on_every_instruction_set() -> None:
    """The script that the emulators of other processors run (`.ci/wheels`, `.ci/wheel_aarch64`)."""
    native = pytest.importorskip("isomorph.kernels._native", reason="needs the C++ module")
    command = [sys.executable, "-P", str(ROOT / ".ci" / "native_alone.py"), native.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1].rstrip(":") for line in done.stdout.splitlines()] == native.isas()
    assert subprocess.run([*command, "other"], capture_output=True).returncode != 0
