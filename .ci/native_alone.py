"""The C++ module of a wheel by itself: loaded from its file, on numpy arrays, beside formulas in float64.

    python native_alone.py _native....so [INSTRUCTION_SET ...]

Needs numpy only, so that it also runs where PyTorch does not: in an emulator of another processor. With names it is an
error if the module does not run with exactly these instruction sets here. Prints a line per instruction set.
"""

import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType

import numpy as np


def load(path: Path) -> ModuleType:
    """The module of a file, without the package around it."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(native: ModuleType, dtype: type) -> float:
    """Statistics of rows of logits [n, V], of a width that no vector divides."""
    logits = np.random.default_rng(0).normal(size=(5, 1003)).astype(dtype)
    target = np.array([0, 1002, 17, 500, 8])
    out = [np.empty(5, np.float32) for _ in range(3)]
    native.row_stats(logits, target, None, 0.5, *out)
    z = logits.astype(np.float64) * 0.5
    lse = np.log(np.exp(z).sum(1))
    p = np.exp(z - lse[:, None])
    truth = (z[range(5), target] - lse, lse - (p * z).sum(1), lse)
    return max(float(abs(a - b).max()) for a, b in zip(out, truth, strict=True))


def attention(native: ModuleType) -> float:
    """Two causal segments of which the second sees the first; grouped heads."""
    num_tok, heads, kv_heads, dim = 37, 4, 2, 24
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(num_tok, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    out, lse = np.empty_like(q), np.empty((num_tok, heads), np.float32)
    native.packed_attention(q, k, v, np.array([[0, 20, 37, -1], [20, 37, 37, 0]]), dim**-0.5, out, lse)
    k64, v64 = (np.repeat(x.astype(np.float64), heads // kv_heads, axis=1) for x in (k, v))
    score = np.einsum("thd,shd->hts", q.astype(np.float64), k64) * dim**-0.5
    score[:, *np.triu_indices(num_tok, 1)] = -np.inf
    p = np.exp(score - score.max(2, keepdims=True))
    return float(abs(out - np.einsum("hts,shd->thd", p / p.sum(2, keepdims=True), v64)).max())


def swiglu(native: ModuleType) -> float:
    gate, up = np.random.default_rng(2).normal(size=(2, 999)).astype(np.float32)
    out = np.empty_like(gate)
    native.swiglu(False, gate.size, gate.ctypes.data, up.ctypes.data, out.ctypes.data)
    wide = gate.astype(np.float64)
    return float(abs(out - wide / (1 + np.exp(-wide)) * up).max())


def advantages(native: ModuleType) -> float:
    """Generalised advantages of two sequences, beside the recursion."""
    reward, value = np.random.default_rng(3).normal(size=(2, 9)).astype(np.float32)
    offset, out = np.array([0, 4, 9]), np.empty(9, np.float32)
    native.gae(reward, value, offset, 0.9, 0.8, out)
    truth = np.zeros(9)
    for begin, end in ((0, 4), (4, 9)):
        later = 0.0
        for i in reversed(range(begin, end)):
            next_value = float(value[i + 1]) if i + 1 < end else 0.0
            later = truth[i] = float(reward[i]) + 0.9 * next_value - float(value[i]) + 0.9 * 0.8 * later
    return float(abs(out - truth).max())


def main() -> None:
    native, wanted = load(Path(sys.argv[1])), sys.argv[2:]
    found = native.isas()
    assert not wanted or found == wanted, f"wanted {wanted}, the module runs here with {found}"
    for isa in found:
        native.use_isa(isa)
        errors = {
            "rows float32": rows(native, np.float32),
            "rows float16": rows(native, np.float16),
            "attention": attention(native),
            "swiglu": swiglu(native),
            "gae": advantages(native),
        }
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"{platform.machine()} {isa}: largest errors {listed}")
        assert max(errors.values()) < 1e-5, errors


if __name__ == "__main__":
    main()
