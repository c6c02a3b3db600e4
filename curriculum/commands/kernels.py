"""``isomorph kernels compile`` and ``isomorph bench kernels``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from isomorph.engine.config import UserError


def compile_kernels(arch: list[int] | None, *, as_json: bool) -> None:
    """Compiles every GPU kernel for ``arch``, None: for all, and prints a table; a failure ends with its exit code."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("compiling kernels needs Triton, which is not installed: pip install 'triton>=3.6,<3.10'")
    from isomorph.kernels import aot

    unknown = sorted(set(arch or ()) - set(aot.ARCHS))
    if unknown:
        raise UserError(f"--arch must be one of {', '.join(map(str, aot.ARCHS))}, got {unknown[0]}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 makes kernels that cannot be compiled: unset it")
    code = aot.report(arch or aot.ARCHS, as_json=as_json)
    if code:
        sys.exit(code)


def bench_kernels(op: str | None, out: Path | None, *, quick: bool) -> None:
    """Runs benchmarks/all_ops.py of the repository that this file lies in; a failure ends with its exit code."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "all_ops.py"
    if not script.is_file():
        raise UserError(
            f"the benchmarks are not part of the installed package ({script} is missing): clone the repository and "
            "run python benchmarks/all_ops.py there"
        )
    if importlib.util.find_spec("pytest") is None:
        raise UserError('the benchmarks need the extra dev: pip install -e ".[dev,bench]"')
    options = [*(["--op", op] if op else []), *(["--out", str(out)] if out else []), *(["--quick"] if quick else [])]
    code = subprocess.run([sys.executable, str(script), *options], check=False).returncode
    if code:
        sys.exit(code)
