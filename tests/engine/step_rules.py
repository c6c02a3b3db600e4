"""Rules for a decoding step that a CUDA graph can record, checked on the CPU while the step runs.

Refused: values read on the host, shapes that depend on values, tensors made of Python numbers (a copy from the host),
moves to another device, and new memory for logits [B, V].
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
FROM_THE_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy", "aten::_pin_memory"}
TO_THE_HOST = {"cpu", "cuda", "item", "numpy", "pin_memory", "tolist"}  # of a CPU tensor some are no operation at all


class Broken(AssertionError):
    """A rule was broken."""


@contextlib.contextmanager
def recordable(num_rows: int, num_vocab: int | None) -> Iterator[list[str]]:
    """Raises Broken where the body breaks a rule; yields the operations so far.

    ``num_vocab``: memory for [num_rows, num_vocab] or more must not be allocated; None: it may.
    """
    operations = _Operations(num_rows, num_vocab)
    with _Methods(), operations:
        yield operations.names


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in TO_THE_HOST:
            raise Broken(f"Tensor.{func.__name__} reads on the host or moves")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, num_rows: int, num_vocab: int | None) -> None:
        super().__init__()
        self.num_rows, self.num_vocab = num_rows, num_vocab
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self.names.append(name)
        is_index = name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
        is_mask = is_index and any(x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None)
        if is_mask or (not is_index and DEPENDS_ON_VALUES & set(func.tags)):
            raise Broken(f"{name}: a value is read on the host, or a shape depends on values")
        if name in FROM_THE_HOST:
            raise Broken(f"{name}: a tensor is made of numbers on the host")
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before and self._is_logits(x):
                raise Broken(f"{name}: new memory for logits {tuple(x.shape)}")
        return out

    def _is_logits(self, x: Tensor) -> bool:
        if self.num_vocab is None or not x.ndim:
            return False
        return x.shape[-1] == self.num_vocab and x.numel() >= self.num_rows * self.num_vocab
