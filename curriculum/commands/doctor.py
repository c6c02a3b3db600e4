"""``isomorph doctor``: checks packages, devices, threads, memory and disk, one line each, with advice.

Packages that could be broken are imported inside functions, so that the command can report them.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.curriculum import machine
from isomorph.curriculum.commands.doctor_packages import Finding, State, check_packages, version_of

STYLE_OF: dict[State, str] = {"ok": "green", "missing": "yellow", "problem": "bold red"}

VARIABLES = {
    "OMP_NUM_THREADS": "threads of PyTorch on the CPU",
    "CUDA_VISIBLE_DEVICES": "which GPUs a run may see",
    "ISOMORPH_BACKEND": "implementations of the ops",
    "ISOMORPH_ISA": "instruction set of the C++ module",
    "ISOMORPH_ASYNCHOW": "folder of the paper's JSON Lines",
    "HF_HOME": "folder of models from the hub",
    "HF_HUB_OFFLINE": "1: models are never downloaded",
    "XDG_CACHE_HOME": "folder of vLLM's compiled code and of our model shapes for it",
    "VLLM_LOGGING_LEVEL": "vLLM's log level; ERROR where not set",
}
MIN_MEMORY_GIB, MIN_DISK_GIB = 2.0, 2.0
MIN_SHARE = 0.85  # of the processor time that the threads need; with less they wait for other processes


def doctor(console: Console) -> None:
    """Prints all findings; ends with exit code 1 where nothing can be trained here."""
    findings = examine()
    show_findings(findings, console)
    if not is_sound(findings):
        sys.exit(1)


def examine() -> list[Finding]:
    """All checks in order; takes a few seconds to import PyTorch and to time matrix products."""
    findings = check_packages()
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


def _torch_devices() -> Iterator[Finding]:
    import torch

    from isomorph.kernels.linear import onednn_has_bfloat16

    capability = torch.backends.cpu.get_cpu_capability()
    advice = "" if onednn_has_bfloat16() else f'{machine.SLOW_BFLOAT16}: use model.dtype = "float32"'
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
    version = version_of("triton")
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
        advice = f"correct or unset {str(error).partition(' ')[0]}"
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
