"""Part of the GPU suite that times tile sizes and launch options other than those that we ship.

Each row is one candidate for one kernel; "shipped" marks the present choice. Candidates are tried by replacing the
constants of ``kernels/gpu`` in this process. A candidate that does not compile or does not fit is a row, too. Whoever
changes a constant afterwards changes the bits of results: the tests and the compile gate come after it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compare import DEVICE, free_memory
from gpu_parts import timed

from isomorph.kernels.packed_attention import packed_attention
from isomorph.kernels.packed_layout import PackedLayout

Rows = Iterator[dict[str, Any]]
ROW_BLOCKS = ((4096, 8), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 16), (8192, 8), (8192, 16))
DRAW_BLOCKS = ((1024, 8), (256, 4), (512, 4), (512, 8), (1024, 4), (1024, 16))
# the fifth entry: products issued ahead of the softmax; (128, 64, 8, 3) is what sm_90 had before
FORWARD = ((128, 64, 8, 3), (128, 64, 8, 3, True), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3))
GRAD_Q = ((128, 64, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2), (64, 128, 8, 2), (128, 32, 8, 3), (128, 128, 8, 1))
GRAD_KV = ((32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 3))
PIECES = (512, 2048, 4096)


@contextlib.contextmanager
def replaced_constants(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def tune(rehearse: bool) -> Rows:
    """Row statistics, their gradient, draws, RMS norm, and the three kernels of packed attention."""
    yield from _rows(rehearse)
    free_memory()
    yield from _draws(rehearse)
    yield from _norms(rehearse)
    free_memory()
    for heads, kv_heads, dim in ((12, 2, 128), (9, 3, 64)) if not rehearse else ((2, 1, 8),):
        yield from _attention(rehearse, heads, kv_heads, dim)
        free_memory()


def _timed(check: str, call: Callable[[], object], flop: int = 0, byte: int = 0) -> dict[str, Any]:
    try:
        timing: dict[str, Any] = timed(call, flop, budget_s=0.15)
    except Exception as failure:  # a candidate that the compiler or the GPU refuses
        return {"check": check, "failed": f"{type(failure).__name__}: {failure}"[:300]}
    return {"check": check, **timing, **({"gb_s": byte / timing["median_s"] / 1e9} if byte else {})}


def _rows(rehearse: bool) -> Rows:
    from isomorph.kernels.gpu import rows

    num, vocab = (3, 300) if rehearse else (4096, 151_936)
    logits = torch.randn(num, vocab, device=DEVICE)
    target = torch.randint(vocab, (num,), device=DEVICE)
    stats = rows.row_stats(logits, target, None, 1.0)
    grads = (torch.ones(num, device=DEVICE), None, None)
    out = torch.empty(num, vocab, dtype=torch.bfloat16, device=DEVICE)
    for i, (block, warps) in enumerate(ROW_BLOCKS[:1] if rehearse else ROW_BLOCKS):
        name = f"BLOCK_V {block}, {warps} warps{', shipped' if not i else ''}"
        with replaced_constants(rows, BLOCK_V=block, NUM_WARPS=warps):
            yield _timed(f"row_stats, {name}", lambda: rows.row_stats(logits, target, None, 1.0), byte=logits.nbytes)
            gradient = lambda: rows.row_gradient(logits, target, stats, grads, None, 1.0, out)  # noqa: E731
            yield _timed(f"row_gradient, {name}", gradient, byte=logits.nbytes + out.nbytes)


def _draws(rehearse: bool) -> Rows:
    from isomorph.kernels.gpu import sample

    num, vocab = (3, 300) if rehearse else (256, 151_936)
    logits, key = torch.randn(num, vocab, device=DEVICE), torch.arange(num, device=DEVICE)
    token, logprob = torch.empty_like(key), torch.empty(num, device=DEVICE)
    for i, (counters, warps) in enumerate(DRAW_BLOCKS[:1] if rehearse else DRAW_BLOCKS):
        with replaced_constants(sample, COUNTERS=counters, NUM_WARPS=warps):
            name = f"COUNTERS {counters}, {warps} warps{', shipped' if not i else ''}"
            yield _timed(
                f"draw_token, {name}",
                lambda: sample.draw_token(logits, key, key, 1.0, token, logprob),
                byte=logits.nbytes,
            )


def _norms(rehearse: bool) -> Rows:
    from isomorph.kernels.gpu import layer

    num, dim = (5, 24) if rehearse else (8192, 1536)
    dtype = torch.float32 if rehearse else torch.bfloat16
    x, residual, dy = (torch.randn(num, dim, device=DEVICE).to(dtype) for _ in range(3))
    weight = torch.ones(dim, device=DEVICE, dtype=dtype)
    total, rstd = layer.rms_norm(x, residual, weight, 1e-6)[1:]
    assert total is not None
    for i, (tile, programs) in enumerate(
        [(4096, 256)] if rehearse else [(4096, 256), (2048, 256), (4096, 512), (8192, 256), (2048, 512), (2048, 1024)]
    ):
        name = f"TILE {tile}, PROGRAMS {programs}{', shipped' if not i else ''}"
        with replaced_constants(layer, TILE=tile, PROGRAMS=programs):
            yield _timed(f"rms_norm, {name}", lambda: layer.rms_norm(x, residual, weight, 1e-6), byte=4 * x.nbytes)
            gradient = lambda: layer.rms_norm_gradient(total, weight, rstd, dy, dy)  # noqa: E731
            yield _timed(f"rms_norm_gradient, {name}", gradient, byte=4 * x.nbytes)


def _attention(rehearse: bool, heads: int, kv_heads: int, dim: int) -> Rows:
    from isomorph.kernels import backend
    from isomorph.kernels.gpu import attention_tiles
    from isomorph.kernels.gpu.attention_tiles import Tile

    prompt, response, group = (6, 4, 2) if rehearse else (2048, 1024, 8)
    dtype = torch.float32 if rehearse else torch.bfloat16
    layout = PackedLayout.from_groups([prompt], [[response] * group]).to(DEVICE)
    leaves = [
        torch.randn(layout.num_tok, n, dim, device=DEVICE).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    dout = torch.randn(layout.num_tok, heads, dim, device=DEVICE).to(dtype)

    def forward() -> torch.Tensor:
        return packed_attention(*leaves, layout)

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, dout)

    arch = 90 if DEVICE.type != "cuda" else attention_tiles.table_arch(*torch.cuda.get_device_capability())
    key = (arch, 64 if dim <= 64 else 128, 2)
    shipped = attention_tiles.CONFIGS[key]
    tried = [("shipped", shipped)]
    for field, candidates in (("forward", FORWARD), ("grad_q", GRAD_Q), ("grad_kv", GRAD_KV)):
        tried += [(f"{field} {tile}", shipped._replace(**{field: Tile(*tile)})) for tile in candidates]
    tried += [(f"piece {piece}", shipped._replace(piece=piece)) for piece in PIECES]
    for name, config in tried[:1] if rehearse else tried:
        attention_tiles.CONFIGS[key] = config
        try:
            with backend.using("packed_attention=triton"):
                of = f"packed_attention H={heads}/{kv_heads} d={dim}, {name}"
                if name == "shipped" or name.startswith("forward"):
                    yield _timed(f"{of}: forward", forward)
                if not name.startswith("forward"):
                    yield _timed(f"{of}: forward and backward", both)
        finally:
            attention_tiles.CONFIGS[key] = shipped
