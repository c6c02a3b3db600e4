"""What a GPU machine is asked first, in one call of at most nine minutes, most valuable first.

    PYTHONPATH=.links python benchmarks/gpu_suite.py --out FOLDER [--rehearse]

Every part is a child process with its own time limit; every result is appended to FOLDER/gpu_suite.jsonl the moment it
is there, a failure with its traceback. --rehearse runs each part at tiny sizes on the CPU, Triton interpreted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 540.0
Rows = Iterator[dict[str, Any]]


def gemm_ceiling(rehearse: bool) -> Rows:
    """cuBLAS at the head's shapes, also with float32 results and accumulating into them."""
    import torch
    from compare import DEVICE

    dim, vocab = (32, 300) if rehearse else (1536, 151_936)
    for rows in (8,) if rehearse else (1024, 2048, 4096, 8192):
        a = torch.randn(rows, dim, device=DEVICE).bfloat16()
        w = torch.randn(dim, vocab, device=DEVICE).bfloat16()
        total = torch.zeros(rows, vocab, device=DEVICE)
        calls: dict[str, Callable[[], object]] = {
            "mm": lambda a=a, w=w: a @ w,  # type: ignore[misc]
            "mm to float32": lambda a=a, w=w: torch.mm(a, w, out_dtype=torch.float32),  # type: ignore[misc]
            "addmm to float32": lambda a=a, w=w, c=total: torch.addmm(c, a, w, out_dtype=torch.float32),  # type: ignore[misc]
        }
        for name, call in calls.items():
            try:
                timing: dict[str, Any] = _timed(call, 2 * rows * dim * vocab)
            except (NotImplementedError, RuntimeError) as failure:  # the CPU has no out_dtype; on a GPU this is news
                timing = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
            yield {"check": name, "rows": rows, **timing}


def rows_alone(rehearse: bool) -> Rows:
    """A row gives the same bits alone as in a batch, in every body."""
    import torch
    from compare import DEVICE

    from isomorph.kernels import backend
    from isomorph.kernels.token_logprob import token_logprob

    num, vocab = (4, 300) if rehearse else (256, 151_936)
    logits = torch.randn(num, vocab, device=DEVICE)
    target = torch.randint(vocab, (num,), device=DEVICE)
    for body in backend.bodies("token_logprob", DEVICE.type):
        with backend.using(f"token_logprob={body}"):
            batch = token_logprob(logits, target)
            alone = [token_logprob(logits[i : i + 1], target[i : i + 1]) for i in range(min(num, 16))]
        same = all(torch.equal(b[i : i + 1], a) for i, one in enumerate(alone) for a, b in zip(one, batch, strict=True))
        yield {"check": "bitwise alone and in a batch", "body": body, "same": same}


def peak_memory(rehearse: bool) -> Rows:
    """linear_loss at N = 65,536 with chunk_rows = 4096, forward and backward."""
    import torch
    from compare import DEVICE
    from head_inputs import make_head

    from isomorph.kernels.linear_logprob import linear_loss

    num, dim, vocab, chunk = (16, 32, 300, 8) if rehearse else (65_536, 1536, 151_936, 4096)
    hidden, weight, target = make_head(num, dim, vocab, torch.float32 if rehearse else torch.bfloat16)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    loss = linear_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        target,
        lambda stats, rows: -stats.logprob.sum(),
        chunk_rows=chunk,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if DEVICE.type == "cuda" else None
    yield {"check": "peak memory", "rows": num, "chunk_rows": chunk, "memory_mib": peak, "loss": float(loss.detach())}


def kernel_tests(rehearse: bool) -> Rows:
    """The kernels' tests on this device."""
    chosen = ["tests/kernels/test_packing.py"] if rehearse else ["tests/kernels", "-m", "gpu or not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield {"check": "pytest", "code": done.returncode, "output": done.stdout[-6000:], "errors": done.stderr[-2000:]}


def _ops(file: str) -> Callable[[bool], Rows]:
    def run(rehearse: bool) -> Rows:
        import importlib

        import torch
        from compare import measure

        with torch.set_grad_enabled(file in ("bench_linear_loss", "bench_packed_attention")):
            module = importlib.import_module(file)
            for case in _tiny(module) if rehearse else module.cases(quick=False):
                yield from measure(case, max_rounds=3 if rehearse else 20, budget_s=1.0 if rehearse else 6.0)

    return run


def _tiny(module: Any) -> list[Any]:
    """One case of the file at a size that the interpreter bears."""
    import torch

    sizes = {
        "bench_linear_loss": (4, 16, 300),
        "bench_token_logprob": (4, 300),
        "bench_packed_attention": (4, 3, 2, 2, 1, 16),
        "bench_decode_attention": (1, 2, 2, 1, 16, 8, 4),
    }
    return [module._case(*sizes[module.__name__], torch.float32)]


# name: what runs, seconds; most valuable first
PARTS: dict[str, tuple[Callable[[bool], Rows], float]] = {
    "tests": (kernel_tests, 150.0),
    "gemm": (gemm_ceiling, 40.0),
    "alone": (rows_alone, 40.0),
    "linear_loss": (_ops("bench_linear_loss"), 100.0),
    "memory": (peak_memory, 40.0),
    "packed_attention": (_ops("bench_packed_attention"), 80.0),
    "decode_attention": (_ops("bench_decode_attention"), 40.0),
    "token_logprob": (_ops("bench_token_logprob"), 40.0),
}


def _timed(call: Callable[[], object], flop: int) -> dict[str, float]:
    from compare import _quantiles, _take_turns

    call()
    times = sorted(_take_turns({"it": call}, 20, 2.0)["it"])
    low, high = _quantiles(times)
    median = times[len(times) // 2]
    return {"median_s": median, "p20_s": low, "p80_s": high, "tflops": flop / median / 1e12}


def _child(part: str, rehearse: bool, file: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out
    for row in PARTS[part][0](rehearse):
        _append(file, {"part": part, **row})


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _run_part(part: str, limit_s: float, rehearse: bool, file: Path) -> None:
    command = [sys.executable, __file__, "--out", str(file.parent), "--part", part, *["--rehearse"][: int(rehearse)]]
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {})
    started = time.monotonic()
    with (file.parent / f"{part}.log").open("w+") as log:
        try:
            code: int | str = subprocess.run(
                command, stdout=log, stderr=log, timeout=limit_s, env=environment, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"cut after {limit_s:.0f} s"
        log.seek(0)
        output = log.read()[-6000:] if code else ""
    _append(file, {"part": part, "ended": code, "wall_s": round(time.monotonic() - started, 1), "output": output})
    print(part, "ended with", code, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--part", choices=PARTS, help="this part only, in this process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu_suite.jsonl"
    if args.part:
        return _child(args.part, args.rehearse, file)
    until = time.monotonic() + TOTAL_S
    for part, (_, limit_s) in PARTS.items():
        left_s = until - time.monotonic()
        if left_s < 5:
            _append(file, {"part": part, "ended": "no time left"})
        else:
            _run_part(part, min(limit_s, left_s), args.rehearse, file)


if __name__ == "__main__":
    main()
