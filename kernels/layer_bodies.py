"""Which implementation an op of ``rms_norm.py``, ``swiglu.py`` or ``rotary.py`` runs on given operands."""

from types import ModuleType

import torch
from torch import Tensor

from isomorph.kernels import backend, layer_native

DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "native": layer_native.DTYPES,
}


def layer_body(op: str, *operands: Tensor) -> ModuleType | None:
    """The module with the fused functions for ``op`` on operands of one device and dtype; None: the specification runs.

    It runs for other dtypes, for operands of several, and for tensors without memory (``backend.has_memory``).

    Raises ValueError for a request of an implementation that cannot run on the device.
    """
    first = operands[0]
    name = backend.choose(op, first.device)
    if name not in DTYPES or any(x.dtype != first.dtype for x in operands) or first.dtype not in DTYPES[name]:
        return None
    if not backend.has_memory(*operands):
        return None
    if name == "native":
        return layer_native
    from isomorph.kernels.gpu import layer  # Triton is imported where it is needed

    return layer
