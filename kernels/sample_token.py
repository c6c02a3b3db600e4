"""Samples one token per row from the softmax of its logits, and returns its log-probability, in one pass.

    z[v]    = logits[b, v] / temperature
    token   = argmax_v z[v] + g[v]        g: Gumbel noise, so that token ~ softmax(z) (Gumbel 1954)
    logprob = z[token] - log sum_v exp(z[v])

Probabilities are not stored. The noise of a column is a function of (rng_key, position, v) only, so a sequence with an
rng_key of its own gets the same noise in every batch:

    i, w   = 256 (v // 1024) + v % 256, v // 256 % 4
    word   = Philox4x32-10(rng_key; counter = (i, 0, position))[w]        Salmon et al., SC 2011
    u      = (word + 1/2) 2^-32, at most 1 - 2^-24
    g      = -log(-log(1 - u))

The largest g belong to u near 0, where floating-point numbers are dense, so two columns get the same large g only if
their 32-bit words are equal: the probability of a tie is 2^-32.
"""

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.strides import unit_stride
from isomorph.kernels.token_logprob import check_temperature
from isomorph.kernels.types import stats_dtype

COLUMNS = 1024  # of one block: the four words of a counter belong to columns 256 apart
_32_BITS = 0xFFFFFFFF


# -- reference: the specification
def sample_token_ref(
    logits_BV: Tensor, rng_key_B: Tensor, position_B: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The specification of ``sample_token``, with the noise in float64."""
    _check(logits_BV, rng_key_B, position_B, temperature)
    z_BV = logits_BV.to(stats_dtype(logits_BV.dtype)) / temperature
    score_BV = z_BV + gumbel_noise(rng_key_B, position_B, z_BV.shape[1]).to(z_BV.dtype)
    token_B = score_BV.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(-1)
    return token_B, torch.log_softmax(z_BV, -1).gather(1, token_B[:, None])[:, 0]


def gumbel_noise(rng_key_B: Tensor, position_B: Tensor, num_vocab: int) -> Tensor:
    """Returns [B, V] float64, the noise g of every column for rng_key [B] and position [B] int64."""
    num_blocks = -(-num_vocab // COLUMNS)
    counter_I = torch.arange(num_blocks * COLUMNS // 4, device=rng_key_B.device)
    words_B4I = torch.stack(_philox(rng_key_B[:, None], position_B[:, None], counter_I), 1)
    words_BV = words_B4I.unflatten(2, (num_blocks, -1)).transpose(1, 2).flatten(1)[:, :num_vocab]
    u_BV = ((words_BV.double() + 0.5) * 2**-32).clamp_(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-u_BV))


def _philox(rng_key_B1: Tensor, position_B1: Tensor, counter_I: Tensor) -> list[Tensor]:
    """Four words [B, I], each a 32-bit number in an int64. Products wrap modulo 2^64, so all 64 bits are exact."""
    c0, c1, c2, c3 = torch.broadcast_tensors(
        counter_I, torch.zeros_like(position_B1), position_B1 & _32_BITS, position_B1 >> 32 & _32_BITS
    )
    k0, k1 = rng_key_B1 & _32_BITS, rng_key_B1 >> 32 & _32_BITS
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _32_BITS) ^ c1 ^ k0, b & _32_BITS, (a >> 32 & _32_BITS) ^ c3 ^ k1, a & _32_BITS
        k0, k1 = (k0 + 0x9E3779B9) & _32_BITS, (k1 + 0xBB67AE85) & _32_BITS
    return [c0, c1, c2, c3]


def _check(logits_BV: Tensor, rng_key_B: Tensor, position_B: Tensor, temperature: float) -> None:
    if logits_BV.ndim != 2 or not logits_BV.is_floating_point() or logits_BV.shape[1] == 0:
        raise TypeError(f"logits must be floating point [B, V], V > 0, got {logits_BV.dtype} {tuple(logits_BV.shape)}")
    check_temperature(temperature)
    for name, values in (("rng_key", rng_key_B), ("position", position_B)):
        if values.shape != logits_BV.shape[:1] or values.dtype != torch.int64:
            raise TypeError(
                f"{name} must be int64 [{len(logits_BV)}], one per row of logits, "
                f"got {values.dtype} {tuple(values.shape)}"
            )


# -- public op
@torch.no_grad()
def sample_token(
    logits_BV: Tensor, rng_key_B: Tensor, position_B: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Samples from softmax(logits / temperature): token ids [B] int64, and their log-probabilities [B] in nats.

    logits [B, V] of any floating-point dtype; log-probabilities are computed and returned in float32 (float64 for
    float64). rng_key and position [B], any int64: together with the column they determine the noise, so equal ones
    give equal tokens. A row's bits do not depend on the other rows (batch-invariant), except in the reference;
    implementations return the same token unless two columns tie up to rounding. A row with NaN gets some valid token id
    and a log-probability of NaN. Nothing synchronises. No gradient. For greedy decoding use argmax.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, and for a temperature that is not > 0 and
    finite.
    """
    body = backend.choose("sample_token", logits_BV.device)
    if body == "reference" or not backend.has_memory(logits_BV, rng_key_B, position_B):
        return sample_token_ref(logits_BV, rng_key_B, position_B, temperature=temperature)
    _check(logits_BV, rng_key_B, position_B, temperature)
    logits_BV = unit_stride(logits_BV)
    token_B = torch.empty_like(rng_key_B, memory_format=torch.contiguous_format)
    logprob_B = logits_BV.new_empty(len(rng_key_B), dtype=stats_dtype(logits_BV.dtype))
    rng_key_B, position_B = rng_key_B.contiguous(), position_B.contiguous()
    operands = (logits_BV.detach(), rng_key_B, position_B, 1.0 / temperature, token_B, logprob_B)
    if body == "triton":
        from isomorph.kernels.gpu import sample

        sample.draw_token(*operands)
    else:
        backend.native().draw_token(*operands)
    return token_B, logprob_B
