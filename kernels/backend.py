"""Selects the implementation of each op for a device. In code and in result files an implementation is a ``body``.

    triton      our Triton kernels                                    on CUDA; on any device with TRITON_INTERPRET=1
    offset      our Triton kernels, softmax in the GEMM's epilogue    linear_loss on CUDA, only if requested by name
    varlen      FlashAttention varlen, called twice and merged        packed_attention on CUDA, see attention_route.py
    native      C++ (isomorph.kernels._native)                        on the CPU
    cuda        CUDA C++ (isomorph.kernels._native_cuda)              row kernels on CUDA, only if requested by name
    torch       PyTorch operators                                     where BODIES lists it
    reference   plain PyTorch: the specification of every op          on every device

``ISOMORPH_BACKEND=reference`` (or ``using("reference")``) selects that implementation for every op that has it;
``ISOMORPH_BACKEND=decode_attention=torch,gae=reference`` selects per op, and is an error for an op that lacks it.
``table(device)`` returns the current selection; a run records it. The implementation of packed_attention on CUDA also
depends on its inputs: see ``attention_route.choose``.

One C++ module has several bodies, for AVX-512, AVX2 and any processor; it runs the best that the processor supports.
``ISOMORPH_ISA=baseline`` (or ``avx2``), set before the first op runs, selects another for the whole process.

C++ and Triton read memory. A fake tensor, a DTensor or another subclass that computes by itself has none of its own:
for it an op runs its specification (see ``has_memory``), except decode_attention where "torch" is selected.

A selection by ``using`` holds on the thread that made it. Autograd runs the backward of CUDA tensors on its own thread,
so the backward of an op uses the selection that its forward used. ``torch.utils.checkpoint`` runs a forward again on
that thread: ``checkpoint(bound(function), ...)`` keeps the selection.
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
from torch import Tensor

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

# In order of preference; every op also has "reference", last.
BODIES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "linear": ("torch",),
        "rms_norm": ("native", "torch"),  # torch: the specification; named, so that without the C++ module nothing
        "swiglu": ("native", "torch"),  # interprets Triton that no test requested
        "rotary": ("native", "torch"),
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
        "rms_norm": ("triton",),
        "swiglu": ("triton",),
        "rotary": ("triton",),
        "token_logprob": ("triton", "torch", "cuda"),
        "linear_logprob": ("triton", "torch", "cuda"),
        "linear_loss": ("triton", "torch", "offset", "cuda"),
        "packed_attention": ("triton", "varlen"),  # attention_route.py selects by the inputs
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
    """Why Triton kernels cannot run here; empty if they can (on CUDA, or interpreted)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; PyTorch's CUDA builds for Linux include it"
    if not torch.cuda.is_available() and not interpreting():
        return "there is no CUDA device; TRITON_INTERPRET=1, set before Python starts, runs Triton slowly on the CPU"
    return ""


@functools.cache
def flash_reason() -> str:
    """Why FlashAttention, which "varlen" calls, cannot run here; empty if it can."""
    if triton_reason() or not torch.cuda.is_available():
        return triton_reason() or "there is no CUDA device"
    return flash.flash_reason()


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, on tensors of any device. For tests: thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native_available() -> bool:
    """Whether the C++ module was built."""
    return _native_module is not None


def native_reason() -> str:
    """Why the C++ module is missing; empty if it was built."""
    return _native_reason


def native() -> ModuleType:
    """The C++ module, set to the number of threads of PyTorch. Only after ``choose`` returned "native".

    The module may be linked to another OpenMP runtime than PyTorch, so ``torch.set_num_threads`` alone has no effect
    on it.
    """
    assert _native_module is not None, _native_reason
    _native_module.use_threads(torch.get_num_threads())
    return _native_module


def native_isa() -> str:
    """The instruction set that the C++ module runs with: "avx512", "avx2" or "baseline"; empty where it was not built.

    Raises ValueError where ISOMORPH_ISA names one that the processor or the build does not have.
    """
    return "" if _native_module is None else str(_native_module.isa())


def native_cuda() -> ModuleType:
    """The CUDA C++ module. Only after ``choose`` returned "cuda"."""
    assert _cuda_module is not None, _cuda_reason
    return _cuda_module


def native_cuda_reason() -> str:
    """Why the CUDA C++ module is missing; empty if it was built."""
    return _cuda_reason


def choose(op: str, device: torch.device | str = "cpu") -> str:
    """Name of the implementation that ``op`` runs on ``device``.

    Raises ValueError for an unknown op, and for a request (see ``requested``) that ``op`` cannot meet on ``device``.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return _chosen(op, kind, request(), _machine())


def has_memory(*tensors: Tensor | None) -> bool:
    """Whether C++ and Triton can read the tensors: all are plain, none is of a class with its own dispatch.

    The address of a fake tensor or of a DTensor is 0. Compiled code has fake tensors alone, which stand for plain ones.
    """
    if torch.compiler.is_compiling():
        return True
    plain = Tensor.__torch_dispatch__
    return all(x is None or type(x).__torch_dispatch__ is plain for x in tensors)


def _machine() -> tuple[bool, ...]:
    """What ``bodies`` depends on besides its arguments."""
    return (interpreting(), _native_module is None, _cuda_module is None, bool(triton_reason()), bool(flash_reason()))


@functools.cache
def _chosen(op: str, device_type: str, wanted: str, machine: tuple[bool, ...]) -> str:
    """``choose``, once for each request on a machine: a tiny model's layer asks for every op."""
    return requested(op, device_type) or bodies(op, device_type)[0]


def requested(op: str, device: torch.device | str = "cpu") -> str:
    """Name of the implementation that was requested for ``op``, by ``using`` or ISOMORPH_BACKEND; empty if none was.

    A request without an op's name counts only if ``op`` has that implementation on ``device``. Raises ValueError for a
    request by the op's name that cannot be met.
    """
    here = bodies(op, torch.device(device).type)
    everywhere, per_op = _parse(request())
    if op in per_op and per_op[op] not in here:
        raise ValueError(
            f"{ENVIRONMENT} or using() requests {op}={per_op[op]}, but {op} on {device} has: {', '.join(here)}"
        )
    return per_op.get(op) or (everywhere if everywhere in here else "")


def request() -> str:
    """The request that holds on this thread, in the syntax of ``using``; empty if there is none."""
    return _override.get() or os.environ.get(ENVIRONMENT, "")


def table(device: torch.device | str = "cpu") -> dict[str, str]:
    """Op -> name of the implementation that it runs on ``device``. Raises ValueError as choose and native_isa do."""
    native_isa()
    return {op: choose(op, device) for op in OPS}


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Context: overrides ISOMORPH_BACKEND on this thread; same syntax. Raises ValueError for what cannot run here."""
    _parse(wanted)
    token = _override.set(wanted)
    try:
        yield
    finally:
        _override.reset(token)


def bound(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with the request that holds now, on whatever thread it is called later.

    For ``torch.utils.checkpoint.checkpoint``, which calls its function a second time in the backward.
    """
    wanted = request()

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with using(wanted):
            return function(*args, **kwargs)

    return run


def bodies(op: str, device_type: str) -> tuple[str, ...]:
    """Names of the implementations that can run ``op`` on such a device here, preferred first, "reference" last."""
    if op not in OPS:
        raise ValueError(f"no op is named {op!r}; ops: {', '.join(OPS)}")
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
    """The implementation requested for all ops ("" for none), and those requested for single ops."""
    everywhere, per_op = "", {}
    for part in filter(None, (part.strip() for part in request.split(","))):
        op, equals, name = part.rpartition("=")
        _check_name(name)
        if not equals:
            everywhere = name
        elif op in OPS:
            per_op[op] = name
        else:
            raise ValueError(f"{ENVIRONMENT} names an unknown op {op!r}; ops: {', '.join(OPS)}")
    return everywhere, per_op


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{ENVIRONMENT} must name one of {', '.join(NAMES)}, got {name!r}")
    if name in OUR_TRITON and triton_reason():
        raise ValueError(f"{ENVIRONMENT} or using() requests {name}, which cannot run here: {triton_reason()}")
    if name == "varlen" and flash_reason():
        raise ValueError(f"{ENVIRONMENT} or using() requests varlen, which cannot run here: {flash_reason()}")
    if name == "native" and not native_available():
        raise ValueError(f"{ENVIRONMENT} or using() requests native, which cannot run here: {_native_reason}")
    if name == "cuda" and _cuda_module is None:
        raise ValueError(f"{ENVIRONMENT} or using() requests cuda, which cannot run here: {_cuda_reason}")
