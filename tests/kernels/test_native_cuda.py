"""The row kernels in CUDA C++: their machine code, and on a GPU their results against Triton and float64."""

import math
import re
import subprocess

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.linear_logprob import linear_loss, linear_loss_ref
from isomorph.kernels.token_logprob import TokenStats, row_gradient, row_stats, token_logprob_ref
from isomorph.kernels.types import stats_dtype

pytestmark = pytest.mark.skipif(bool(backend.native_cuda_reason()), reason=backend.native_cuda_reason())
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
EDGES = [1, 2, 7, 8, 9, 1023, 4095, 4096, 4097, 8195, 50257, 151_936]
ROWS = [  # logits -> their gradient
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]


def test_it_imports_without_a_driver_and_has_two_functions() -> None:
    module = backend.native_cuda()
    assert {name for name in dir(module) if not name.startswith("_")} == {"row_stats", "row_gradient"}


def test_tensors_on_the_cpu_are_refused_by_type() -> None:
    row, target = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="device='cuda'"):
        backend.native_cuda().row_stats(torch.zeros(2, 5), target, None, 1.0, row, row, row, 0)


def test_there_is_code_for_every_gpu_and_none_of_it_uses_a_stack() -> None:
    pytest.importorskip("triton", reason="its wheel carries cuobjdump: pip install triton")
    from isomorph.kernels.aot import TOOLS

    def dump(option: str) -> str:
        command = [TOOLS / "cuobjdump", option, backend.native_cuda().__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    assert set(re.findall(r"^arch = sm_(\d+)$", usage, re.MULTILINE)) == {"80", "90", "100"}
    assert "sm_100.ptx" in dump("-lptx")  # what later GPUs compile
    stacks = re.findall(r"REG:\d+ STACK:(\d+)", usage)
    num_kernels = len({dtype for dtype, _ in ROWS}) + len(ROWS)  # stats of each dtype, and the gradients
    assert stacks == ["0"] * (3 * num_kernels)


def _problem(num_rows: int, num_vocab: int, dtype: torch.dtype, gap: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose rows are ``gap`` apart, targets with the first and the last column, and a bias."""
    gen = torch.Generator().manual_seed(num_rows * 7919 + num_vocab)
    packed = (torch.randn(num_rows, num_vocab, generator=gen) * 3).to(dtype)
    logits = torch.full((num_rows, num_vocab + gap), math.nan, dtype=dtype, device=DEVICE)[:, :num_vocab]
    logits.copy_(packed)
    target = torch.randint(0, num_vocab, (num_rows,), generator=gen)
    target[0], target[-1] = 0, num_vocab - 1
    bias = torch.linspace(-1, 1, num_vocab, dtype=stats_dtype(dtype))
    return logits, target.to(DEVICE), bias.to(DEVICE)


def _weights(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.arange(len(stats.lse), dtype=stats.lse.dtype, device=DEVICE)
    return (t + 1).cos(), (t + 2).cos(), (t + 3).cos()


def _truth(logits: Tensor, target: Tensor, bias: Tensor, temperature: float) -> tuple[TokenStats, Tensor]:
    leaf = logits.double().clone().requires_grad_()
    stats = token_logprob_ref(leaf + bias.double(), target, temperature=temperature)
    loss = torch.stack([(s * w).sum() for s, w in zip(stats, _weights(stats), strict=True)]).sum()
    return TokenStats(*(s.detach() for s in stats)), torch.autograd.grad(loss, leaf)[0]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "out_dtype"), ROWS)
@pytest.mark.parametrize("num_vocab", EDGES)
def test_stats_and_gradient_in_place_beside_triton_and_float64(
    num_vocab: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    logits, target, bias = _problem(5, num_vocab, dtype, gap=num_vocab % 2)  # even rows, of float32 at least
    truth, truth_grad = _truth(logits, target, bias, 0.7)
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    bound = 16 * unit * max(1.0, truth.lse.abs().max().item(), logits.double().abs().max().item() / 0.7)
    grads = {}
    for body in ("triton", "cuda"):
        rows = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=DEVICE).copy_(logits)
        stats = row_stats(rows, target, bias_V=bias, inv_temperature=1 / 0.7, body=body)
        for ours, exact in zip(stats, truth, strict=True):
            assert (ours.double() - exact).abs().max() <= bound, body
        out = rows if out_dtype == dtype else rows.view(out_dtype)[:, :num_vocab]
        row_gradient(rows, target, stats, _weights(stats), bias_V=bias, inv_temperature=1 / 0.7, body=body, out_nV=out)
        rounding = torch.finfo(out_dtype).eps / 2 * truth_grad.abs() + torch.finfo(out_dtype).smallest_normal
        assert ((out.double() - truth_grad).abs() <= rounding + 16 * bound).all(), body
        grads[body] = out.double()
    assert (grads["triton"] - grads["cuda"]).abs().max() <= 2 * (rounding.max() + 16 * bound)


@needs_gpu
@pytest.mark.gpu
def test_bits_depend_on_the_row_alone() -> None:
    logits, target, bias = _problem(6, 5001, torch.float32)  # rows start at every residue of 16 bytes
    whole = row_stats(logits, target, bias_V=bias, inv_temperature=1.0, body="cuda")
    whole_out = torch.empty_like(logits)
    weights = _weights(whole)
    row_gradient(logits, target, whole, weights, bias_V=bias, inv_temperature=1.0, body="cuda", out_nV=whole_out)
    for i in range(6):
        row = logits[i : i + 1].clone()
        alone = row_stats(row, target[i : i + 1], bias_V=bias, inv_temperature=1.0, body="cuda")
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))
        own = tuple(w[i : i + 1] for w in weights)
        row_gradient(row, target[i : i + 1], alone, own, bias_V=bias, inv_temperature=1.0, body="cuda", out_nV=row)  # type: ignore[arg-type]
        assert torch.equal(row[0], whole_out[i])


@needs_gpu
@pytest.mark.gpu
def test_what_is_not_finite_stays_in_its_row() -> None:
    logits, target, _ = _problem(7, 5000, torch.float32)
    logits[1], logits[2, 7:4900], logits[4, 1500] = -math.inf, -math.inf, math.nan
    logits[3], logits[5] = -1e4, logits[5] + 1e4
    target[2], target[4] = 3, 9
    stats = row_stats(logits, target, bias_V=None, inv_temperature=1.0, body="cuda")
    assert all(s[1].isnan() and s[4].isnan() for s in stats[:2])
    assert stats.lse[1] == -math.inf and stats.lse[4].isnan()
    fine = [0, 2, 3, 5, 6]
    size = logits.masked_fill(logits.isinf(), 0).abs().amax(1).clamp(min=1)[fine]
    for ours, truth in zip(stats, token_logprob_ref(logits.double(), target), strict=True):
        assert ((ours[fine].double() - truth[fine]).abs() <= 5e-6 * size).all()
    out = torch.empty_like(logits)
    row_gradient(logits, target, stats, _weights(stats), bias_V=None, inv_temperature=1.0, body="cuda", out_nV=out)
    assert out[fine].isfinite().all() and (out[2, 7:4900] == 0).all() and out[1].isnan().all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_loss_runs_on_it(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=gen).to(DEVICE, dtype).requires_grad_() for n in (40, 1000))
    target, row_index = (torch.randint(0, n, (70,), generator=gen).to(DEVICE) for n in (1000, 40))

    def loss_of(stats: TokenStats, rows: slice) -> Tensor:
        return (stats.logprob + 0.1 * stats.entropy).sum()

    with backend.using("linear_loss=cuda"):
        ours = linear_loss(hidden, weight, target, loss_of, row_index_N=row_index, temperature=3.0, chunk_rows=32)
    exact = linear_loss_ref(
        hidden.double(), weight.double(), target, loss_of, row_index_N=row_index, temperature=3.0, chunk_rows=32
    )
    assert abs(ours.item() - exact.item()) <= 1e-5 * abs(exact.item())
    grads, truths = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, exact))
    for grad, truth in zip(grads, truths, strict=True):
        assert (grad.double() - truth).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * truth.norm()
