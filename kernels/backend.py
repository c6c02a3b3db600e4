"""Which body runs for which tensor. One place, visible, and overridable.

    triton      our GPU kernels                                   on CUDA; with TRITON_INTERPRET=1 anywhere, for tests
    offset      our GPU kernels, the softmax inside the product   linear_loss on CUDA, if asked for by name
    varlen      flash attention as PyTorch ships it, merged       packed_attention on CUDA, see attention_route.py
    native      C++ (isomorph.kernels._native)                    on the CPU
    cuda        CUDA C++ (isomorph.kernels._native_cuda)          row kernels on CUDA, if built and asked for by name
    torch       PyTorch, arranged for speed and memory            where BODIES says so
    reference   plain PyTorch: the specification of every op      anywhere

``ISOMORPH_BACKEND=reference`` (or ``using("reference")``) takes that body wherever an op has it;
``ISOMORPH_BACKEND=decode_attention=torch,gae=reference`` chooses op by op; an op that lacks it is an error.
``table(device)`` says what runs: it belongs in a run's record. What packed_attention runs on CUDA depends on its inputs
too: ``attention_route.choose`` says.

A choice made by ``using`` holds on the thread that made it. Autograd runs the backward of CUDA tensors on a thread of
its own, so the backward of an op takes the choice that its forward found. For a forward that runs again there, under
``torch.utils.checkpoint``, ``bound`` keeps the choice: ``checkpoint(bound(function), ...)``.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

from isomorph.kernels import flash

try:
    from isomorph.kernels import _native

    _native_module: ModuleType | None = _native
    _native_reason = ""
except ImportError as error:
    _native_module = None
    _native_reason = f"isomorph.kernels._native was not built ({error}); `pip install .` builds it"

try:
    from isomorph.kernels import _native_cuda

    _cuda_module: ModuleType | None = _native_cuda
    _cuda_reason = ""
except ImportError as error:
    _cuda_module = None
    _cuda_reason = (
        f"isomorph.kernels._native_cuda was not built ({error}); where nvcc is, "
        "`pip install . -C cmake.define.ISOMORPH_CUDA=ON` builds it"
    )

NAMES = ("triton", "offset", "varlen", "native", "cuda", "torch", "reference")
OUR_TRITON = ("triton", "offset")
ENVIRONMENT = "ISOMORPH_BACKEND"

# preferred first; every op also has "reference", last
BODIES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "linear": ("torch",),
        "token_logprob": ("native", "torch"),
        "linear_logprob": ("native", "torch"),
        "linear_loss": ("native", "torch"),
        "packed_attention": ("native",),
        "decode_attention": ("native", "torch"),
        "sample_token": ("native",),
        "group_advantage": ("native",),
        "gae": ("native",),
        "assign_groups": ("native",),
        "take_ragged": ("native",),
        "bit_hash": ("native",),
    },
    "cuda": {
        "token_logprob": ("triton", "torch", "cuda"),
        "linear_logprob": ("triton", "torch", "cuda"),
        "linear_loss": ("triton", "torch", "offset", "cuda"),
        "packed_attention": ("triton", "varlen"),  # for given inputs attention_route.py chooses
        "decode_attention": ("triton", "torch"),
        "sample_token": ("triton",),
        "group_advantage": ("triton",),
        "gae": ("triton",),
    },
}
OPS = tuple(BODIES["cpu"])

_override: ContextVar[str] = ContextVar("isomorph_backend", default="")
P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def triton_reason() -> str:
    """Why the Triton bodies cannot run here; empty where they can (on CUDA, or interpreted)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with PyTorch's CUDA builds for Linux"
    if not torch.cuda.is_available() and not interpreting():
        return "there is no CUDA device; TRITON_INTERPRET=1, set before Python starts, runs them slowly on the CPU"
    return ""


@functools.cache
def flash_reason() -> str:
    """Why flash attention cannot be called here, for the varlen body; empty where it can."""
    if triton_reason() or not torch.cuda.is_available():
        return triton_reason() or "there is no CUDA device"
    return flash.flash_reason()


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, on tensors of any device: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native_available() -> bool:
    """Whether the C++ bodies can run here."""
    return _native_module is not None


def native_reason() -> str:
    """Why the C++ bodies cannot run here; empty where they can."""
    return _native_reason


def native() -> ModuleType:
    """The C++ module, for an op whose ``choose`` said "native", set to run on as many threads as PyTorch.

    It may be linked with another OpenMP runtime than PyTorch is, which PyTorch's own setting does not reach.
    """
    assert _native_module is not None, _native_reason
    _native_module.use_threads(torch.get_num_threads())
    return _native_module


def native_cuda() -> ModuleType:
    """The CUDA C++ module, for an op whose ``choose`` said "cuda"."""
    assert _cuda_module is not None, _cuda_reason
    return _cuda_module


def native_cuda_reason() -> str:
    """Why the CUDA C++ bodies cannot run here; empty where they can, given a CUDA device."""
    return _cuda_reason


def choose(op: str, device: torch.device | str = "cpu") -> str:
    """Name of the body that ``op`` runs on ``device``. Raises ValueError for a choice that cannot be met."""
    return asked(op, device) or bodies(op, torch.device(device).type)[0]


def asked(op: str, device: torch.device | str = "cpu") -> str:
    """The body that was asked for; empty where none was. Raises ValueError for a choice that cannot be met."""
    here = bodies(op, torch.device(device).type)
    everywhere, per_op = _parse(request())
    if op in per_op and per_op[op] not in here:
        raise ValueError(f"{ENVIRONMENT} asks for {op}={per_op[op]}, but on {device} {op} has: {', '.join(here)}")
    return per_op.get(op) or (everywhere if everywhere in here else "")


def request() -> str:
    """What is asked for here, as ``using`` takes it; empty where nothing is."""
    return _override.get() or os.environ.get(ENVIRONMENT, "")


def table(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every op and the body it runs on ``device``."""
    return {op: choose(op, device) for op in OPS}


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Override the choice inside the block; same syntax as the environment variable, which it outranks."""
    _parse(wanted)
    token = _override.set(wanted)
    try:
        yield
    finally:
        _override.reset(token)


def bound(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with the bodies that are asked for now, whenever and on whatever thread it runs.

    For ``torch.utils.checkpoint.checkpoint``, which calls its function a second time in the backward.
    """
    wanted = request()

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with using(wanted):
            return function(*args, **kwargs)

    return run


def bodies(op: str, device_type: str) -> tuple[str, ...]:
    """The bodies that can run ``op`` on such a device here, preferred first; "reference" is always the last."""
    if op not in OPS:
        raise ValueError(f"no op is called {op!r}; there are: {', '.join(OPS)}")
    names = BODIES.get(device_type, {}).get(op, ())
    if device_type == "cpu" and interpreting():
        names = (*names, *(name for name in BODIES["cuda"].get(op, ()) if name in OUR_TRITON))
    absent = {"native"} if not native_available() else set()
    if _cuda_module is None:
        absent.add("cuda")
    if triton_reason():
        absent.update(OUR_TRITON)
    if "varlen" in names and flash_reason():
        absent.add("varlen")
    return (*(name for name in names if name not in absent), "reference")


@functools.cache
def _parse(request: str) -> tuple[str, dict[str, str]]:
    """The body for all ops ("" for none), and the bodies of single ops."""
    everywhere, per_op = "", {}
    for part in filter(None, (part.strip() for part in request.split(","))):
        op, equals, name = part.rpartition("=")
        _check_name(name)
        if not equals:
            everywhere = name
        elif op in OPS:
            per_op[op] = name
        else:
            raise ValueError(f"{ENVIRONMENT} names an op {op!r}; there are: {', '.join(OPS)}")
    return everywhere, per_op


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{ENVIRONMENT} must name one of {', '.join(NAMES)}, got {name!r}")
    if name in OUR_TRITON and triton_reason():
        raise ValueError(f"Triton bodies were asked for, but {triton_reason()}")
    if name == "varlen" and flash_reason():
        raise ValueError(f"varlen bodies were asked for, but {flash_reason()}")
    if name == "native" and not native_available():
        raise ValueError(f"native bodies were asked for, but {_native_reason}")
    if name == "cuda" and _cuda_module is None:
        raise ValueError(f"CUDA C++ bodies were asked for, but {_cuda_reason}")
