"""C++ implementations on threads: the same bits with any number of threads and any order of tasks, close to float64.

``python tests/kernels/test_threads.py`` prints the table.
The order of tasks reveals a race: if a task reads what another one writes, the result depends on which ran first. Sizes
are chosen so that the shares of 2, 3 and 8 threads begin inside rows.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.advantage import gae, gae_ref
from isomorph.kernels.bit_hash import bit_hash, bit_hash_ref
from isomorph.kernels.decode_attention import CachedKV, decode_attention, decode_attention_ref
from isomorph.kernels.linear_logprob import linear_loss, linear_loss_ref
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from isomorph.kernels.rotary import rotary, rotary_ref
from isomorph.kernels.sample_token import sample_token, sample_token_ref
from isomorph.kernels.swiglu import swiglu, swiglu_ref
from isomorph.kernels.token_logprob import TokenStats, row_gradient, row_stats, token_logprob_ref

pytestmark = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())
THREADS = (1, 2, 3, 8)
ORDERS = ("forward", "reverse", "shuffled")
VOCABULARIES = (49_152, 151_936)
FLOAT32, BFLOAT16 = 2e-5, 2.0**-8  # largest error over largest entry

Results = tuple[Tensor, ...]


class Problem(NamedTuple):
    run: Callable[[], Results]
    truth: Callable[[], Results]  # float64


class Case(NamedTuple):
    """One body at one size. ``alone``: without PyTorch's GEMMs, whose bits may depend on the number of threads."""

    body: str
    size: str
    limit: float
    make: Callable[[], Problem]
    alone: bool = True


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- rows of logits
def _logits(num_rows: int, num_vocab: int) -> tuple[Tensor, Tensor]:
    """Rows with most of their mass in 64 columns, other ones in each, and targets."""
    logits = _randn(num_rows, num_vocab)
    for row in range(num_rows):
        start = (row + 1) * num_vocab // (num_rows + 1)
        logits[row, start : start + 64] += 6
    return logits, torch.arange(num_rows) * 7919 % num_vocab


def _row_stats(num_rows: int, num_vocab: int) -> Problem:
    logits, target = _logits(num_rows, num_vocab)
    return Problem(
        lambda: row_stats(logits, target, bias_V=None, inv_temperature=1.0, body="native"),
        lambda: token_logprob_ref(logits.double(), target),
    )


def _row_grads(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.arange(len(stats.lse), dtype=stats.lse.dtype)
    return (t + 1).cos(), (t + 2).cos(), (t + 3).cos()


def _row_gradient(num_rows: int, num_vocab: int, place: str) -> Problem:
    logits, target = _logits(num_rows, num_vocab)

    def run() -> Results:
        rows = logits.clone()
        stats = row_stats(rows, target, bias_V=None, inv_temperature=1.0, body="native")
        out = {"apart": torch.empty_like(rows), "in place": rows}.get(place)
        if out is None:
            out = rows.view(torch.bfloat16)[:, :num_vocab]
        row_gradient(
            rows, target, stats, _row_grads(stats), bias_V=None, inv_temperature=1.0, body="native", out_nV=out
        )
        return (out.clone(),)

    def truth() -> Results:
        leaf = logits.double().requires_grad_()
        stats = token_logprob_ref(leaf, target)
        return torch.autograd.grad(list(stats), leaf, list(_row_grads(stats)))

    return Problem(run, truth)


def _draw_token(num_rows: int, num_vocab: int) -> Problem:
    logits, _ = _logits(num_rows, num_vocab)
    key, position = torch.arange(num_rows) + 5, torch.arange(num_rows) * 3
    return Problem(
        lambda: sample_token(logits, key, position), lambda: sample_token_ref(logits.double(), key, position)
    )


# -- products and heads
def _gemm(num_vocab: int) -> Problem:
    x, w = _randn(13, 32).bfloat16(), _randn(num_vocab, 32, seed=1).bfloat16()

    def run() -> Results:
        out = torch.empty(len(x), num_vocab)
        backend.native().bfloat16_gemm(x, w, out)
        return (out,)

    return Problem(run, lambda: (x.double() @ w.double().T,))


def _outer(num_vocab: int) -> Problem:
    a, b = _randn(21, num_vocab, seed=2).bfloat16(), _randn(21, 40, seed=3).bfloat16()

    def run() -> Results:
        out = torch.ones(num_vocab, 40)
        backend.native().bfloat16_outer(a, b, out)
        return (out,)

    return Problem(run, lambda: (1 + a.double().T @ b.double(),))


def _linear_loss(dtype: torch.dtype, num_rows: int, num_vocab: int) -> Problem:
    target = torch.arange(num_rows) * 7919 % num_vocab
    hidden, weight = _randn(num_rows, 32, seed=1).to(dtype), (_randn(num_vocab, 32, seed=2) / 3).to(dtype)

    def run(op: Callable[..., Tensor], wide: torch.dtype) -> Results:
        leaves = [x.to(wide).requires_grad_() for x in (hidden, weight)]
        loss = op(*leaves, target, lambda stats, rows: (stats.logprob + 0.1 * stats.entropy).sum(), chunk_rows=num_rows)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return Problem(lambda: run(linear_loss, dtype), lambda: run(linear_loss_ref, torch.float64))


# -- the rest
def _attention(dtype: torch.dtype) -> Problem:
    layout = PackedLayout.from_groups([70, 5, 131], [[9, 80, 3], [1], [64, 65, 2, 30]])
    q, dout, k, v = (_randn(layout.num_tok, heads, 40, seed=heads).to(dtype) for heads in (6, 6, 2, 2))

    def run(op: Callable[..., Tensor], wide: torch.dtype) -> Results:
        leaves = [x.to(wide).requires_grad_() for x in (q, k, v)]
        out = op(*leaves, layout)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(wide))

    return Problem(lambda: run(packed_attention, dtype), lambda: run(packed_attention_ref, torch.float64))


def _decode(dtype: torch.dtype) -> Problem:
    q, prompts, own = (_randn(*shape).to(dtype) for shape in ((9, 6, 40), (2, 3, 2, 70, 40), (2, 9, 2, 33, 40)))
    prompt_slot = torch.tensor([0, 0, 0, 0, 2, 2, 1, 1, 1])
    prompt_len = torch.tensor([70, 70, 70, 70, 3, 3, 41, 41, 40])
    own_slot, own_len = torch.arange(9).flip(0), torch.tensor([1, 33, 2, 0, 7, 7, 12, 30, 8])

    def run(op: Callable[..., Tensor], wide: torch.dtype) -> Results:
        prompt = CachedKV(*prompts.to(wide), prompt_slot, prompt_len)
        return (op(q.to(wide), prompt, CachedKV(*own.to(wide), own_slot, own_len)),)

    return Problem(lambda: run(decode_attention, dtype), lambda: run(decode_attention_ref, torch.float64))


# -- layers
def _layer(name: str, dtype: torch.dtype) -> Problem:
    """Of 531 rows: several tasks, the last one not full, and vectors that the width does not fill."""
    x, residual, weight = _randn(531, 130), _randn(531, 130, seed=1), 1 + 0.1 * _randn(130, seed=2)
    q, k = _randn(531, 5, 26), _randn(531, 2, 26, seed=1)
    angle = torch.arange(531)[:, None] / 10 ** torch.arange(13)
    cos, sin = (torch.cat([f(angle), f(angle)], 1) for f in (torch.cos, torch.sin))
    op, reference, inputs, constants = {
        "rms_norm": (rms_norm, rms_norm_ref, [x, weight], ()),
        "add_rms_norm": (add_rms_norm, add_rms_norm_ref, [x, residual, weight], ()),
        "swiglu": (swiglu, swiglu_ref, [x, residual], ()),
        "rotary": (rotary, rotary_ref, [q, k], (cos, sin)),
    }[name]
    rest = (1e-5,) if "norm" in name else ()

    def run(op: Callable[..., Any], wide: torch.dtype) -> Results:
        leaves = [t.to(dtype).to(wide).requires_grad_() for t in inputs]
        out = op(*leaves, *(t.to(dtype).to(wide) for t in constants), *rest)
        out = out if isinstance(out, tuple) else (out,)
        factors = [_randn(*y.shape, seed=3 + i).to(wide) for i, y in enumerate(out)]
        return *(y.detach() for y in out), *torch.autograd.grad(out, leaves, factors)

    return Problem(lambda: run(op, dtype), lambda: run(reference, torch.float64))


def _gae() -> Problem:
    reward, value = _randn(2, 3000)
    offsets = torch.tensor([0, 1, 700, 700, 2999, 3000])
    return Problem(
        lambda: gae(reward, value, offsets, gamma=0.99, lam=0.95),
        lambda: gae_ref(reward.double(), value.double(), offsets, gamma=0.99, lam=0.95),
    )


def _bit_hash() -> Problem:
    tensor = _randn(300_001)  # enough to be shared out, and a rest
    return Problem(lambda: (bit_hash(tensor),), lambda: (bit_hash_ref(tensor),))


def _cases() -> Iterator[Case]:
    for num_vocab in VOCABULARIES:
        for num_rows in (1, 5):
            size = f"[{num_rows}, {num_vocab}]"
            yield Case("row_stats", size, FLOAT32, partial(_row_stats, num_rows, num_vocab))
            for place, limit in (("apart", FLOAT32), ("in place", FLOAT32), ("in bfloat16 in place", BFLOAT16)):
                yield Case(f"row_gradient, {place}", size, limit, partial(_row_gradient, num_rows, num_vocab, place))
            yield Case("draw_token", size, FLOAT32, partial(_draw_token, num_rows, num_vocab))
        if backend.native().has_bfloat16_gemm():
            yield Case("bfloat16_gemm", f"[13, 32] x [{num_vocab}, 32]", FLOAT32, partial(_gemm, num_vocab))
            yield Case("bfloat16_outer", f"[21, {num_vocab}] x [21, 40]", FLOAT32, partial(_outer, num_vocab))
        for dtype, limit in ((torch.bfloat16, BFLOAT16), (torch.float32, FLOAT32)):
            size = f"{str(dtype)[6:]}, N=5, V={num_vocab}"
            yield Case("linear_loss", size, limit, partial(_linear_loss, dtype, 5, num_vocab), alone=False)
    for dtype, limit in ((torch.float32, FLOAT32), (torch.bfloat16, 2 * BFLOAT16)):
        yield Case("packed_attention", f"{str(dtype)[6:]}, T=460", limit, partial(_attention, dtype))
        yield Case("decode_attention", f"{str(dtype)[6:]}, B=9", limit, partial(_decode, dtype))
        for name in ("rms_norm", "add_rms_norm", "swiglu", "rotary"):
            yield Case(name, f"{str(dtype)[6:]}, N=531", limit, partial(_layer, name, dtype))
    yield Case("gae", "T=3000", FLOAT32, _gae)
    yield Case("bit_hash", "1200004 bytes", 0.0, _bit_hash)


CASES = list(_cases()) if backend.native_available() else []


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with backend.using("native"):
            yield
    finally:
        torch.set_num_threads(before)


class Found(NamedTuple):
    error: dict[int, float]  # on so many threads: the largest difference from float64, over the largest entry
    same_on_threads: bool
    same_in_orders: bool


def _error(results: Results, truth: Results) -> float:
    return max(
        ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()
        for ours, exact in zip(results, truth, strict=True)
    )


def _same(results: Results, others: Results) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def find(case: Case) -> Found:
    """Runs the case on each number of threads and in each order of tasks."""
    problem = case.make()
    truth = tuple(x.double() for x in problem.truth())
    on_threads, in_order = {}, {}
    for count in THREADS:
        with _threads(count):
            on_threads[count] = problem.run()
    with _threads(3):  # tasks take turns with three pieces of scratch
        for order in ORDERS:
            backend.native().use_order(order)
            try:
                in_order[order] = problem.run()
            finally:
                backend.native().use_order("")
    first = on_threads[1] if case.alone else in_order["forward"]
    return Found(
        {count: _error(results, truth) for count, results in on_threads.items()},
        all(_same(results, on_threads[1]) for results in on_threads.values()),
        all(_same(results, first) for results in in_order.values()),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.body}-{case.size}")
def test_bits_depend_neither_on_the_number_of_threads_nor_on_the_order_of_tasks(case: Case) -> None:
    found = find(case)
    assert all(error <= case.limit for error in found.error.values()), found.error
    assert found.same_in_orders
    assert found.same_on_threads or not case.alone


@pytest.mark.parametrize("count", THREADS)
def test_loops_run_on_as_many_threads_as_pytorch_is_set_to(count: int) -> None:
    with _threads(count):
        assert backend.native().team_size() == count


OTHER_RUNTIME = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)  # before PyTorch, whose runtime would answer for it
sys.modules["isomorph.kernels._native"] = module
import torch
from isomorph.kernels import backend
assert backend.native() is module
torch.set_num_threads(3)
print(module.team_size(), backend.native().team_size())
"""


def test_an_openmp_runtime_other_than_pytorchs_is_steered_too(tmp_path: Path) -> None:
    module, old, new = str(backend.native().__file__), b"libgomp.so.1\0", b"libgomq.so.1\0"
    code = Path(module).read_bytes()
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    if old not in code or not runtimes:
        pytest.skip("the module is not linked with libgomp")
    (tmp_path / "_native.so").write_bytes(code.replace(old, new))
    (tmp_path / "libgomq.so.1").write_bytes(Path(min(runtimes)).read_bytes().replace(old, new))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_RUNTIME, str(tmp_path / "_native.so")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "3"], done.stdout + done.stderr  # PyTorch's setting alone does not reach it


if __name__ == "__main__":
    print("| body | size | " + " | ".join(f"{count} thr." for count in THREADS) + " | bits on threads | in orders |")
    print("| --- | --- |" + " ---: |" * len(THREADS) + " --- | --- |")
    for case in CASES:
        found = find(case)
        bits = ("same" if same else "differ" for same in (found.same_on_threads, found.same_in_orders))
        row = (case.body, case.size, *(f"{error:.1e}" for error in found.error.values()), *bits)
        print("| " + " | ".join(row) + " |", flush=True)
