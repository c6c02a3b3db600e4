"""Log-probability, entropy and log-sum-exp (LSE) of target tokens, from hidden rows and the unembedding.

    z[i, v] = (hidden[row[i]] . weight[v] + bias[v]) / temperature
    lse     = log sum_v exp(z[v])      d lse     / d z[v] = p[v]
    logprob = z[y] - lse               d logprob / d z[v] = (v == y) - p[v]
    entropy = lse - sum_v p[v] z[v]    d entropy / d z[v] = -p[v] (log p[v] + entropy)

With ``kept``, v runs over the kept tokens of target i alone; the other logits get the gradient 0.

Logits are stored for one chunk of rows at a time. ``linear_logprob`` recomputes them in its backward (4 GEMMs in all).
``linear_loss`` computes the gradients in its forward, chunk by chunk, from the derivative of ``loss_of`` (3 GEMMs).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend
from isomorph.kernels.kept_tokens import KeptTokens
from isomorph.kernels.linear_chunks import (
    Gradients,
    LogitChunks,
    OffsetChunks,
    default_chunk_rows,
    make_head,
    row_chunks,
)
from isomorph.kernels.token_logprob import (
    RowGrads,
    TokenStats,
    check_all,
    check_ids,
    check_temperature,
    token_logprob_ref,
)
from isomorph.kernels.types import stats_dtype

LossOf = Callable[[TokenStats, slice], Tensor]


# -- reference: the specification
def linear_logprob_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    *,
    row_index_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    kept: KeptTokens | None = None,
) -> TokenStats:
    """The specification of ``linear_logprob``, with all logits at once and gradients by autograd."""
    compute_dtype = _check(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V, temperature, kept)
    hidden_ND = hidden_TD if row_index_N is None else hidden_TD[row_index_N]
    logits_NV = hidden_ND.to(compute_dtype) @ weight_VD.to(compute_dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(compute_dtype)
    if kept is not None:
        mask_NV = kept.mask(logits_NV.device)
        check_all(mask_NV.gather(1, target_ids_N[:, None]), "each target must be among its kept tokens")
        logits_NV = logits_NV.masked_fill(~mask_NV, -torch.inf)
    return token_logprob_ref(logits_NV, target_ids_N, temperature=temperature)


def linear_loss_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    loss_of: LossOf,
    *,
    row_index_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int = 8192,
    kept: KeptTokens | None = None,
) -> Tensor:
    """The specification of ``linear_loss``: the sum of ``loss_of`` over slices of ``chunk_rows`` rows."""
    _check_chunk_rows(chunk_rows)
    stats = linear_logprob_ref(
        hidden_TD, weight_VD, target_ids_N, row_index_N=row_index_N, bias_V=bias_V, temperature=temperature, kept=kept
    )
    loss = stats.logprob.new_zeros(()) + 0 * stats.logprob.sum()
    for rows in row_chunks(len(target_ids_N), chunk_rows):
        loss = loss + loss_of(TokenStats(*(stat[rows] for stat in stats)), rows)
    return loss


# -- argument checks
def _check(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    row_index_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: float,
    kept: KeptTokens | None,
) -> torch.dtype:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "hidden must be [T, D] and weight [V, D] with the same D, got "
            f"{tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    if not hidden_TD.is_floating_point() or weight_VD.dtype != hidden_TD.dtype:
        raise TypeError(
            f"hidden and weight must have one floating-point dtype, got {hidden_TD.dtype} and "
            f"{weight_VD.dtype}; cast one of them"
        )
    check_temperature(temperature)
    num_vocab = weight_VD.shape[0]
    if bias_V is not None and bias_V.shape != (num_vocab,):
        raise ValueError(f"bias must be [V={num_vocab}], got {tuple(bias_V.shape)}")
    if bias_V is not None:
        check_all(
            torch.isfinite(bias_V), "bias must be finite; to exclude a token, remove its row from the unembedding"
        )
    check_ids("target_ids", target_ids_N, num_vocab, "V")
    num_rows = hidden_TD.shape[0]
    if row_index_N is not None:
        check_ids("row_index", row_index_N, num_rows, "T")
        num_rows = row_index_N.shape[0]
    if target_ids_N.shape[0] != num_rows:
        raise ValueError(
            f"target_ids must have one id for each of the {num_rows} rows, got {target_ids_N.shape[0]}; "
            "pass row_index if several targets read one row, or if some rows have none"
        )
    if kept is not None and (len(kept), kept.num_vocab) != (num_rows, num_vocab):
        raise ValueError(
            f"kept must have one set for each of the {num_rows} targets, of {num_vocab} tokens, got {len(kept)} of "
            f"{kept.num_vocab}"
        )
    return stats_dtype(hidden_TD.dtype)


def _check_chunk_rows(chunk_rows: int) -> None:
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")


# -- autograd
class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_ids_N: Tensor,
        row_index_N: Tensor | None,
        temperature: float,
        kept: KeptTokens | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # unused outputs get None instead of zero gradients
        head = make_head(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V, temperature, "linear_logprob", kept)
        chunk_rows = default_chunk_rows(head)
        chunks = LogitChunks(head, chunk_rows)
        out = TokenStats(*(hidden_TD.new_empty(len(target_ids_N), dtype=head.dtype) for _ in TokenStats._fields))
        for rows in row_chunks(len(target_ids_N), chunk_rows):
            chunks.load(rows)
            for whole, part in zip(out, chunks.stats(), strict=True):
                whole[rows] = part
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_ids_N, row_index_N, *out)
        ctx.temperature, ctx.kept, ctx.bodies = temperature, kept, backend.request()
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor | None) -> tuple[Tensor | None, ...]:
        with backend.using(ctx.bodies):  # autograd may run this on another thread
            return _logprob_backward(ctx, grads_N)


def _logprob_backward(ctx: Any, grads_N: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    hidden_TD, weight_VD, bias_V, target_ids_N, row_index_N, *stats_N = ctx.saved_tensors
    head = make_head(
        hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V, ctx.temperature, "linear_logprob", ctx.kept
    )
    chunk_rows = default_chunk_rows(head)
    gradients = Gradients(head, ctx.needs_input_grad[:3], chunk_rows)
    chunks = LogitChunks(head, chunk_rows)
    for rows in row_chunks(len(target_ids_N), chunk_rows):
        chunks.load(rows)
        dlogprob_n, dentropy_n, dlse_n = (None if grad is None else grad[rows] for grad in grads_N)
        stats = TokenStats(*(stat[rows] for stat in stats_N))
        chunks.add_gradients(rows, stats, (dlogprob_n, dentropy_n, dlse_n), gradients)
    dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
    return *gradients.cast(dtypes), None, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_ids_N: Tensor,
        row_index_N: Tensor | None,
        temperature: float,
        loss_of: LossOf,
        chunk_rows: int,
        needs: tuple[bool, bool, bool],
        kept: KeptTokens | None,
    ) -> Tensor:
        head = make_head(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V, temperature, "linear_loss", kept)
        gradients = Gradients(head, needs, chunk_rows)
        chunks = (OffsetChunks if head.rows_body == "offset" else LogitChunks)(head, chunk_rows)
        loss = hidden_TD.new_zeros((), dtype=head.dtype)
        for rows in row_chunks(len(target_ids_N), chunk_rows):
            chunks.load(rows)
            stats = chunks.stats()
            chunk_loss, grads_n = _loss_and_grads(loss_of, stats, rows)
            loss += chunk_loss
            if any(needs) and any(grad is not None for grad in grads_n):
                chunks.add_gradients(rows, stats, grads_n, gradients)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_loss was differentiated twice, but its gradients are freed after the first backward: "
                "call it again, or use linear_logprob, which recomputes them"
            )
        gradients, ctx.gradients = ctx.gradients, None
        gradients.multiply_(dloss)  # before it is rounded: the scale of a loss may be what keeps it above 0 in float16
        return *gradients.cast(ctx.dtypes), *(None,) * 7


def _loss_and_grads(loss_of: LossOf, stats: TokenStats, rows: slice) -> tuple[Tensor, RowGrads]:
    leaves = TokenStats(*(stat.detach().requires_grad_() for stat in stats))
    with torch.enable_grad():
        loss = loss_of(leaves, rows)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_of must return a scalar tensor for rows {rows.start}..{rows.stop}, got {got}")
    if not loss.requires_grad:
        return loss, (None, None, None)
    dlogprob, dentropy, dlse = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), (dlogprob, dentropy, dlse)


# -- public ops
def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    *,
    row_index_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    kept: KeptTokens | None = None,
) -> TokenStats:
    """Returns log-probability, entropy and LSE, each [N] in nats, of softmax((hidden @ weight.T + bias) / temperature).

    hidden [T, D] and weight [V, D] have the same floating-point dtype; target_ids [N] int64 in 0..V-1; bias [V].
    row_index [N] int64 in 0..T-1 is the hidden row that predicts target i (default: row i). A row may be read many
    times; its gradient is the sum over its targets. ``kept``: for each target the tokens that it was drawn from, itself
    among them; softmax, entropy and LSE are over these alone. Statistics are float32 (float64 for float64).
    Differentiable once, through all three statistics, in hidden, weight and bias. N = 0 returns empty statistics.
    Peak memory besides the gradients: one buffer of about 32 MiB (2 GiB on a GPU), and 16 MiB more if low-precision
    weights are widened; with ``kept``, masks of at most 64 MiB.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, a bias that is not finite, ids out of range, a
    target that is not kept, and a temperature that is not > 0 and finite. On CUDA, values are checked by device-side
    assertions.
    """
    body = backend.choose("linear_logprob", hidden_TD.device)
    if body == "reference" or not backend.has_memory(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V):
        return linear_logprob_ref(
            hidden_TD,
            weight_VD,
            target_ids_N,
            row_index_N=row_index_N,
            bias_V=bias_V,
            temperature=temperature,
            kept=kept,
        )
    _check(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V, temperature, kept)
    operands = (hidden_TD, weight_VD, bias_V, target_ids_N, row_index_N)
    return TokenStats(*_LinearLogprob.apply(*operands, temperature, kept))


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    loss_of: LossOf,
    *,
    row_index_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int = 8192,
    kept: KeptTokens | None = None,
) -> Tensor:
    """Returns the scalar loss of the target tokens; computes its gradients chunk-wise in the forward, with 3 GEMMs.

    ``loss_of(stats, rows)`` is called once per slice of exactly ``chunk_rows`` targets (the last may be shorter), in
    order, with grad enabled and with leaf tensors in ``stats`` (TokenStats, each [n], nats). It must return a scalar;
    the loss is the sum over slices. No gradient flows to other tensors that it reads. A loss that couples tokens, such
    as a mean over a sequence, needs all of them in one slice.
    The other arguments are those of ``linear_logprob``. N = 0 returns 0 with zero gradients.
    Peak memory besides the gradients: one buffer of [chunk_rows, V] float32, and 16 MiB more if low-precision weights
    are widened; with ``kept``, masks of at most 64 MiB. Gradients are accumulated in float32, multiplied by that of the
    loss and rounded once; in bfloat16 those that get one contribution are rounded when it is stored, and again if the
    loss is multiplied by another number than a power of 2.
    Raises what ``linear_logprob`` raises, and ValueError for chunk_rows < 1 or a ``loss_of`` that returns no scalar.
    The result can be differentiated once; a second backward raises RuntimeError.
    """
    body = backend.choose("linear_loss", hidden_TD.device)
    if body == "reference" or not backend.has_memory(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V):
        return linear_loss_ref(
            hidden_TD,
            weight_VD,
            target_ids_N,
            loss_of,
            row_index_N=row_index_N,
            bias_V=bias_V,
            temperature=temperature,
            chunk_rows=chunk_rows,
            kept=kept,
        )
    _check(hidden_TD, weight_VD, target_ids_N, row_index_N, bias_V, temperature, kept)
    _check_chunk_rows(chunk_rows)
    inputs = (hidden_TD, weight_VD, bias_V)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    return _LinearLoss.apply(
        hidden_TD, weight_VD, bias_V, target_ids_N, row_index_N, temperature, loss_of, chunk_rows, needs, kept
    )
