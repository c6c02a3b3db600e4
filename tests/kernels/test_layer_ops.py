"""RMS norm, SwiGLU and rotary embedding in Triton and in C++: values and gradients against float64, strides, bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from isomorph.kernels.rotary import rotary, rotary_ref
from isomorph.kernels.swiglu import swiglu, swiglu_ref

needs_triton = pytest.mark.skipif(bool(backend.triton_reason()), reason=backend.triton_reason())
needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "native": "cpu"}
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BODIES = [pytest.param("triton", marks=needs_triton), pytest.param("native", marks=needs_native)]
CASES = [
    *(pytest.param("triton", dtype, marks=needs_triton) for dtype in DTYPES),
    *(pytest.param("native", dtype, marks=needs_native) for dtype in DTYPES[:2]),
]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator)


def outputs_and_gradients(op: Op, inputs: list[Tensor], constants: tuple[object, ...], weights: int) -> list[Tensor]:
    """``weights``: seed of the random numbers that the outputs are multiplied by before they are added up."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, *constants)
    out = out if isinstance(out, tuple) else (out,)
    factors = [random(*y.shape, seed=weights + i).to(y) for i, y in enumerate(out)]
    loss = sum((y * factor).sum() for y, factor in zip(out, factors, strict=True))
    assert isinstance(loss, Tensor)
    return [*(y.detach() for y in out), *torch.autograd.grad(loss, leaves)]


def check(
    body: str, name: str, op: Op, reference: Op, inputs: list[Tensor], constants: tuple[object, ...] = ()
) -> None:
    """Ours errs at most twice as much as the specification in the same dtype, and a rounding."""
    device = DEVICES[body]
    inputs = [x.to(device) if x.is_contiguous() else x.to(device).as_strided(x.shape, x.stride()) for x in inputs]
    constants = tuple(c.to(device) if isinstance(c, Tensor) else c for c in constants)
    wide = tuple(c.double() if isinstance(c, Tensor) else c for c in constants)
    truth = outputs_and_gradients(reference, [x.double() for x in inputs], wide, 7)
    usual = outputs_and_gradients(reference, inputs, constants, 7)
    with backend.using(f"{name}={body}"):
        ours = outputs_and_gradients(op, inputs, constants, 7)
    for got, theirs, want in zip(ours, usual, truth, strict=True):
        assert got.dtype == theirs.dtype and got.shape == want.shape
        error, other = ((x.double() - want).norm() for x in (got, theirs))
        assert error <= 2 * other + torch.finfo(got.dtype).eps * want.norm(), (float(error), float(other))


@pytest.mark.parametrize(("body", "dtype"), CASES)
@pytest.mark.parametrize(("rows", "dim"), [(5, 24), (70, 96), (3, 4100)])
def test_norms_and_their_gradients(rows: int, dim: int, body: str, dtype: torch.dtype) -> None:
    x, residual = (random(rows, dim, seed=i).to(dtype) for i in range(2))
    weight = (1 + 0.1 * random(dim)).to(dtype)
    check(body, "rms_norm", rms_norm, rms_norm_ref, [x, weight], (EPS,))
    check(body, "rms_norm", add_rms_norm, add_rms_norm_ref, [x, residual, weight], (EPS,))


@pytest.mark.parametrize(("body", "dtype"), CASES)
def test_swiglu_and_its_gradients(body: str, dtype: torch.dtype) -> None:
    gate, up = (4 * random(9, 251, seed=i).to(dtype) for i in range(2))  # three programs, the last one not full
    check(body, "swiglu", swiglu, swiglu_ref, [gate, up])


@pytest.mark.parametrize(("body", "dtype"), CASES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 20), (1, 1, 2)])
def test_rotary_and_its_gradients(heads: int, kv_heads: int, dim: int, body: str, dtype: torch.dtype) -> None:
    q, k = random(7, heads, dim).to(dtype), random(7, kv_heads, dim, seed=1).to(dtype)
    angle = torch.arange(7)[:, None] / 10 ** torch.arange(dim // 2)
    cos, sin = (torch.cat([f(angle), f(angle)], 1).to(dtype) for f in (torch.cos, torch.sin))
    check(body, "rotary", rotary, rotary_ref, [q, k], (cos, sin))
    check(body, "rotary", rotary, rotary_ref, [q, k], (cos.float(), sin.float()))  # as OLMo-2's
    sliced = random(7, 2 * heads, dim).to(dtype)[:, ::2]  # heads apart: read by stride, not copied
    check(body, "rotary", rotary, rotary_ref, [sliced, k], (cos, sin))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_gradients_of_x_and_the_residual_are_added_up_apart(body: str, shape: tuple[int, ...]) -> None:
    """Both are the same numbers. Leaves that shared memory got the second backward's gradient twice."""
    weight = random(8).to(DEVICES[body])
    sums = []
    for op in (add_rms_norm, add_rms_norm_ref):
        leaves = [random(*shape, seed=i).to(DEVICES[body]).requires_grad_() for i in range(2)]
        with backend.using(f"rms_norm={body}"):
            for _ in range(2):
                y, total = op(*leaves, weight, EPS)
                (y.cos().sum() + total.square().sum()).backward()
        sums.append([leaf.grad for leaf in leaves])
    assert sums[0][0].data_ptr() != sums[0][1].data_ptr()  # type: ignore[union-attr]
    for ours, theirs in zip(*sums, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("body", BODIES)
def test_a_large_gate_gives_no_nan(body: str) -> None:
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], device=DEVICES[body])
    with backend.using(f"swiglu={body}"):
        out, dgate, _ = outputs_and_gradients(swiglu, [gate, torch.ones_like(gate)], (), 3)
    assert torch.equal(out, torch.tensor([-0.0, -0.0, 0.0, 90.0, 200.0], device=gate.device))
    assert dgate.isfinite().all() and dgate[0] == 0


@pytest.mark.parametrize("body", BODIES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(body: str) -> None:
    x, weight = (t.to(DEVICES[body]) for t in (random(300, 96).bfloat16(), random(96).bfloat16()))
    with backend.using(f"rms_norm={body}"):
        batch = rms_norm(x, weight, EPS)
        assert torch.equal(rms_norm(x[200:201], weight, EPS), batch[200:201])


@needs_triton
def test_a_norm_of_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program then adds up the weight's gradient over several tiles, the last of them not full."""
    from isomorph.kernels.gpu import layer

    monkeypatch.setattr(layer, "PROGRAMS", 3)
    monkeypatch.setattr(layer, "TILE", 64)
    check("triton", "rms_norm", rms_norm, rms_norm_ref, [random(29, 24), random(24)], (EPS,))


def test_shapes_and_dtypes_that_do_not_agree_are_refused() -> None:
    x, weight = random(3, 8), random(8)
    with pytest.raises(ValueError, match="of one width"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="residual must have the shape and dtype of x"):
        add_rms_norm(x, x.double(), weight, EPS)
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(x, x[:2])
    with pytest.raises(ValueError, match=r"k must be \[3, heads, 8\]"):
        rotary(x[:, None], x[:2, None], x, x)
    with pytest.raises(ValueError, match="as q or float32"):
        rotary(x[:, None], x[:, None], x.bfloat16(), x.bfloat16())
    with pytest.raises(ValueError, match="d even"):
        rotary(x[:, None, :7], x[:, None, :7], x[:, :7], x[:, :7])


@pytest.mark.parametrize("body", BODIES)
def test_other_dtypes_take_the_specification(body: str) -> None:
    x, weight = random(3, 8).double(), random(8).double()
    with backend.using(body):
        assert torch.equal(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS))
        assert torch.equal(swiglu(x, x), swiglu_ref(x, x))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_and_elements_of_several_tasks_in_cpp(dtype: torch.dtype) -> None:
    """More elements than a task takes, and rows that do not fill the last one; a width that fills no vector."""
    x, residual = (random(531, 130, seed=i).to(dtype) for i in range(2))
    weight = (1 + 0.1 * random(130)).to(dtype)
    check("native", "rms_norm", add_rms_norm, add_rms_norm_ref, [x, residual, weight], (EPS,))
    check("native", "swiglu", swiglu, swiglu_ref, [x, residual])
    q, k = random(531, 5, 26).to(dtype), random(531, 2, 26, seed=1).to(dtype)
    check(
        "native", "rotary", rotary, rotary_ref, [q, k], (random(531, 26).to(dtype), random(531, 26, seed=1).to(dtype))
    )


@needs_native
@pytest.mark.parametrize("isa", backend.native().isas() if backend.native_available() else [])
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    native = backend.native()
    native.use_isa(isa)
    try:
        x, weight = random(9, 70).bfloat16(), (1 + 0.1 * random(70)).bfloat16()
        check("native", "rms_norm", rms_norm, rms_norm_ref, [x, weight], (EPS,))
        check("native", "swiglu", swiglu, swiglu_ref, [x, random(9, 70, seed=3).bfloat16()])
    finally:
        native.use_isa("")


@needs_native
def test_a_nan_stays_one_and_does_not_spread() -> None:
    x = random(3, 40).bfloat16()
    x[1, 5] = torch.nan
    with backend.using("native"):
        y = rms_norm(x, torch.ones(40).bfloat16(), EPS)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
        assert swiglu(x, x).isnan().nonzero().tolist() == [[1, 5]]
