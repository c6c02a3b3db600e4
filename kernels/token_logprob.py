"""Log-probability, entropy and log-sum-exp (LSE) of target tokens, from logits.

    z[i, v] = (logits[i, v] + bias[v]) / temperature
    lse     = log sum_v exp(z[v])      d lse     / d z[v] = p[v]
    logprob = z[y] - lse               d logprob / d z[v] = (v == y) - p[v]
    entropy = lse - sum_v p[v] z[v]    d entropy / d z[v] = -p[v] (log p[v] + entropy)

``linear_logprob`` and ``linear_loss`` use the same two passes over rows of logits besides their matrix products:
``row_stats`` reads a row once, ``row_gradient`` reads and writes it once, in place if the caller wants.
The C++ and Triton kernels reduce each row in a fixed order, so its bits do not depend on the batch.
A row with NaN or +inf, or with -inf only, has no softmax: log-probability and entropy are NaN, and the LSE is that of
``torch.logsumexp``: NaN, +inf or -inf; with both NaN and +inf it is one of the two.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isomorph.kernels import backend
from isomorph.kernels.strides import unit_stride
from isomorph.kernels.types import stats_dtype


class TokenStats(NamedTuple):
    """Statistics of N target tokens, each [N], in nats; float32, or float64 for float64 inputs."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


RowGrads = tuple[Tensor | None, Tensor | None, Tensor | None]  # d loss / d (logprob, entropy, lse), each [N]


# -- reference: the specification
def token_logprob_ref(logits_NV: Tensor, target_ids_N: Tensor, *, temperature: float = 1.0) -> TokenStats:
    """The specification of ``token_logprob``, with PyTorch's softmax and gradients by autograd."""
    check_rows(logits_NV, target_ids_N, temperature)
    z_NV = logits_NV.to(stats_dtype(logits_NV.dtype)) / temperature
    logprob_NV = torch.log_softmax(z_NV, -1)
    logprob = logprob_NV.gather(1, target_ids_N[:, None])[:, 0]
    # as torch.xlogy: a probability of 0 contributes 0 though its logarithm is -inf, also to the gradient
    entropy = -(logprob_NV.exp() * logprob_NV.masked_fill(logprob_NV == -math.inf, 0.0)).sum(-1)
    return TokenStats(logprob, entropy, torch.logsumexp(z_NV, -1))


# -- argument checks
def check_rows(logits_NV: Tensor, target_ids_N: Tensor, temperature: float) -> None:
    """Raises ValueError or TypeError for arguments that ``token_logprob`` does not support."""
    if logits_NV.ndim != 2 or not logits_NV.is_floating_point():
        raise TypeError(f"logits must be floating point [N, V], got {logits_NV.dtype} {tuple(logits_NV.shape)}")
    check_temperature(temperature)
    check_ids("target_ids", target_ids_N, logits_NV.shape[1], "V")
    if target_ids_N.shape[0] != logits_NV.shape[0]:
        raise ValueError(
            f"target_ids must have one id per row of logits {tuple(logits_NV.shape)}, got {len(target_ids_N)}"
        )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless temperature is > 0 and finite."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be > 0 and finite, got {temperature}; greedy decoding has no log-probability"
        )


def check_ids(name: str, ids_N: Tensor, upper: int, upper_name: str) -> None:
    """Raises TypeError unless ids are int64 [N], ValueError unless they lie in 0..upper-1 (see ``check_all``)."""
    if ids_N.ndim != 1 or ids_N.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 [N], got {ids_N.dtype} {tuple(ids_N.shape)}")
    if ids_N.numel() == 0:
        return
    message = f"{name} must lie in 0..{upper - 1} ({upper_name}={upper})"
    if ids_N.is_cuda:
        check_all((ids_N >= 0) & (ids_N < upper), message)
        return
    low, high = (int(bound) for bound in torch.aminmax(ids_N))
    if low < 0 or high >= upper:
        raise ValueError(f"{message}, got {low}..{high}")


def check_all(holds: Tensor, message: str) -> None:
    """Raises ValueError unless all of ``holds`` is True; on CUDA by a device-side assertion, without synchronising."""
    if holds.is_cuda:
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)


# -- passes over rows of logits
def row_stats(
    logits_nV: Tensor, target_n: Tensor, *, bias_V: Tensor | None, inv_temperature: float, body: str
) -> TokenStats:
    """Statistics of every row of logits [n, V], which are not changed. Stride 1 in V; bias in the statistics' dtype."""
    if body == "triton":
        from isomorph.kernels.gpu import rows

        return TokenStats(*rows.row_stats(logits_nV, target_n.contiguous(), bias_V, inv_temperature))
    if body in ("native", "cuda"):
        module, stream = _compiled(body, logits_nV.device)
        out = TokenStats(*(logits_nV.new_empty(len(target_n), dtype=stats_dtype(logits_nV.dtype)) for _ in range(3)))
        module.row_stats(logits_nV, target_n.contiguous(), bias_V, inv_temperature, *out, *stream)
        return out
    z_nV = _scaled(logits_nV, bias_V, inv_temperature)
    z_y_n1 = z_nV.gather(1, target_n[:, None])
    max_n1 = z_nV.amax(1, keepdim=True)
    shifted_nV = z_nV.sub_(max_n1)
    log_sum_n = shifted_nV.logsumexp(1)
    weighted_n = shifted_nV.clamp_(min=-1e30).mul_((shifted_nV - log_sum_n[:, None]).exp_()).sum(1)
    logprob_n = (z_y_n1 - max_n1)[:, 0] - log_sum_n
    max_n = max_n1[:, 0]
    return TokenStats(logprob_n, log_sum_n - weighted_n, torch.where(max_n.isinf(), max_n, max_n + log_sum_n))


def row_gradient(
    logits_nV: Tensor,
    target_n: Tensor,
    stats: TokenStats,
    grads: RowGrads,
    *,
    bias_V: Tensor | None,
    inv_temperature: float,
    body: str,
    out_nV: Tensor,
) -> Tensor:
    """Writes d loss / d logits to ``out_nV``, which may be the storage of the logits, and returns it.

    With p = exp(z - z[y] + logprob), which is accurate also for large logits:
    (p (dlse - dlogprob - dentropy (log p + entropy)) + (v == y) dlogprob) / temperature.
    Where z[y] is -inf, p = exp(z - lse): every implementation takes 0 for such a z[y], and gets -lse as its logprob.
    """
    stats = stats._replace(logprob=torch.where(stats.logprob == -math.inf, -stats.lse, stats.logprob))
    if body == "triton":
        from isomorph.kernels.gpu import rows

        rows.row_gradient(logits_nV, target_n.contiguous(), stats, grads, bias_V, inv_temperature, out_nV)
        return out_nV
    if body in ("native", "cuda"):
        module, stream = _compiled(body, logits_nV.device)
        dlogprob_n, dentropy_n, dlse_n = (None if g is None else g.contiguous() for g in grads)
        module.row_gradient(
            logits_nV, target_n.contiguous(), stats.logprob, stats.entropy, dlogprob_n, dentropy_n, dlse_n, bias_V,
            inv_temperature, out_nV, *stream,
        )  # fmt: skip
        return out_nV
    dlogprob_n, dentropy_n, dlse_n = (torch.zeros_like(stats.lse) if g is None else g for g in grads)
    z_nV = _scaled(logits_nV, bias_V, inv_temperature)
    z_y_n1 = z_nV.gather(1, target_n[:, None])
    logp_nV = z_nV.sub_(z_y_n1.masked_fill_(z_y_n1 == -math.inf, 0)).add_(stats.logprob[:, None])
    factor_nV = (dlse_n - dlogprob_n)[:, None]
    if grads[1] is not None:
        factor_nV = factor_nV - dentropy_n[:, None] * (logp_nV + stats.entropy[:, None]).clamp_(min=-1e30)
    dz_nV = logp_nV.exp_().mul_(factor_nV)
    dz_nV.scatter_add_(1, target_n[:, None], dlogprob_n[:, None])
    return (
        torch.mul(dz_nV, inv_temperature, out=out_nV)
        if out_nV.dtype == dz_nV.dtype
        else out_nV.copy_(dz_nV.mul_(inv_temperature))
    )


def _compiled(body: str, device: torch.device) -> tuple[ModuleType, tuple[int, ...]]:
    """The C++ module for ``body``, and its last arguments: on CUDA the stream, else none."""
    if body == "native":
        return backend.native(), ()
    return backend.native_cuda(), (torch.cuda.current_stream(device).cuda_stream,)


def _scaled(logits_nV: Tensor, bias_V: Tensor | None, inv_temperature: float) -> Tensor:
    z_nV = logits_nV.to(stats_dtype(logits_nV.dtype), copy=True)
    return (z_nV if bias_V is None else z_nV.add_(bias_V)).mul_(inv_temperature)


# -- autograd
class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, target_ids_N: Tensor, inv_temperature: float, body: str
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        stats = row_stats(logits_NV, target_ids_N, bias_V=None, inv_temperature=inv_temperature, body=body)
        ctx.save_for_backward(logits_NV, target_ids_N, *stats)
        ctx.inv_temperature, ctx.body = inv_temperature, body
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, target_ids_N, *stats = ctx.saved_tensors
        dlogits_NV = row_gradient(
            logits_NV,
            target_ids_N,
            TokenStats(*stats),
            (grads_N[0], grads_N[1], grads_N[2]),
            bias_V=None,
            inv_temperature=ctx.inv_temperature,
            body=ctx.body,
            out_nV=torch.empty_like(logits_NV),  # saved tensors are not overwritten
        )
        return dlogits_NV, None, None, None


# -- public op
def token_logprob(logits_NV: Tensor, target_ids_N: Tensor, *, temperature: float = 1.0) -> TokenStats:
    """Returns log-probability, entropy and LSE, each [N] in nats, of softmax(logits / temperature).

    logits [N, V] of any floating-point dtype (computed in float32; in float64 for float64), target_ids [N] int64 in
    0..V-1. Differentiable once, through all three statistics. The backward allocates one [N, V], the gradient. If the
    logits come from a linear layer, ``linear_logprob`` avoids storing them.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, ids out of range (on CUDA by a device-side
    assertion, which does not synchronise), and a temperature that is not > 0 and finite.
    """
    body = backend.choose("token_logprob", logits_NV.device)
    if body == "reference" or not backend.has_memory(logits_NV, target_ids_N):
        return token_logprob_ref(logits_NV, target_ids_N, temperature=temperature)
    check_rows(logits_NV, target_ids_N, temperature)
    return TokenStats(*_TokenLogprob.apply(unit_stride(logits_NV), target_ids_N, 1.0 / temperature, body))
