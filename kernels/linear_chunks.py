"""The LM head for one chunk of rows at a time: its logits, their statistics, and its part of the gradients.

Logits are float32 and accumulated in float32 for all inputs (float64 for float64): bfloat16 logits change a probability
ratio by up to 7 %. One buffer of [chunk, V] holds them and is overwritten with their gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.kept_tokens import KeptTokens
from isomorph.kernels.linear import ROW_MULTIPLE, product, rounded_rows, takes_onednn
from isomorph.kernels.strides import aligned, has_unit_stride
from isomorph.kernels.token_logprob import RowGrads, TokenStats, row_gradient, row_stats
from isomorph.kernels.types import stats_dtype

# bytes of logits in a chunk if the caller does not set the rows: the caches of a CPU; enough rows for a GPU's GEMMs
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2 * 2**30}
# Rows of a chunk are a multiple of this where there are so many: oneDNN's on a CPU, a GPU's largest tile of a product.
CHUNK_ROWS = {"cpu": ROW_MULTIPLE, "cuda": 128}
# Logits from one row of the buffer to the next, as a multiple. On a GPU each row of float32 logits, and of bfloat16
# gradients in its first half, begins at 256 bytes for every vocabulary: vector loads, and TMA in the GEMMs, need 16.
STRIDE_MULTIPLE = {"cpu": 1, "cuda": 64}
WIDEN_BYTES = 16 * 2**20  # bytes of a low-precision weight that are widened at a time, if no GEMM reads it as it is
ONEDNN_COLUMNS = 4096  # logits per oneDNN product, so that the memory it allocates stays in the caches until copied


class Head(NamedTuple):
    """The operands of one call of ``linear_logprob`` or ``linear_loss``; shapes as there."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_ids_N: Tensor
    row_index_N: Tensor | None
    bias_V: Tensor | None  # in the dtype of the statistics
    temperature: float
    rows_body: str  # implementation of row_stats and row_gradient
    kept: KeptTokens | None = None  # of each target; None: no logit is left out

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, statistics and sums."""
        return stats_dtype(self.weight_VD.dtype)

    @property
    def gemm_takes_bfloat16(self) -> bool:
        """Whether a GEMM reads bfloat16 and writes float32: cuBLAS, or ours on a CPU with bfloat16 instructions.

        False for float16, in which the gradients would underflow.
        """
        weight_VD, hidden_TD = self.weight_VD, self.hidden_TD
        if weight_VD.dtype != torch.bfloat16 or weight_VD.is_cuda:
            return weight_VD.is_cuda and weight_VD.dtype == torch.bfloat16
        is_plain = has_unit_stride(weight_VD) and has_unit_stride(hidden_TD) and weight_VD.shape[1] % 2 == 0
        is_plain = is_plain and backend.has_memory(weight_VD, hidden_TD)
        return self.rows_body == "native" and is_plain and backend.native().has_bfloat16_gemm()

    def hidden_rows(self, rows: slice) -> Tensor:
        hidden_TD = self.hidden_TD
        hidden_nD = hidden_TD[rows] if self.row_index_N is None else hidden_TD.index_select(0, self.row_index_N[rows])
        return hidden_nD if self.gemm_takes_bfloat16 else hidden_nD.to(self.dtype)

    def weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their weights [v, D] in a dtype that the GEMMs read; one slice if possible."""
        num_vocab, dim = self.weight_VD.shape
        if self.weight_VD.dtype == self.dtype or self.gemm_takes_bfloat16:
            yield slice(0, num_vocab), self.weight_VD
            return
        width = max(1, WIDEN_BYTES // (max(1, dim) * self.dtype.itemsize))
        for start in range(0, num_vocab, width):
            yield slice(start, min(start + width, num_vocab)), self.weight_VD[start : start + width].to(self.dtype)


def make_head(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    row_index_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: float,
    op: str,
    kept: KeptTokens | None = None,
) -> Head:
    bias_V = None if bias_V is None else bias_V.to(stats_dtype(weight_VD.dtype)).contiguous()
    rows_body = backend.choose(op, hidden_TD.device)
    return Head(hidden_TD, weight_VD, target_ids_N.contiguous(), row_index_N, bias_V, temperature, rows_body, kept)


def row_chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def logits_buffer(weight_VD: Tensor, num_rows: int) -> Tensor:
    """Memory for the logits [n, V] of at most ``num_rows`` rows and weight [V, D], with the rows that GEMMs add."""
    num_vocab, device = len(weight_VD), weight_VD.device
    shape = multiplied_rows(num_rows, device), logits_stride(num_vocab, device.type)
    return weight_VD.new_empty(shape, dtype=stats_dtype(weight_VD.dtype))[:, :num_vocab]


def make_logits(hidden_ND: Tensor, weight_VD: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Returns the logits [N, V], float32 (float64 for float64), of hidden [N, D] and weight [V, D]; for sampling.

    They are written to ``buffer``, of ``logits_buffer``, where one is given. Raises ValueError if it is too small.
    """
    if buffer is not None and len(buffer) < multiplied_rows(len(hidden_ND), hidden_ND.device):
        raise ValueError(f"the buffer has {len(buffer)} rows for the logits of {len(hidden_ND)}: make it larger")
    no_target_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    head = make_head(hidden_ND, weight_VD, no_target_N, None, None, 1.0, "linear_logprob")
    chunks = LogitChunks(head, len(hidden_ND), buffer)
    chunks.load(slice(0, len(hidden_ND)))
    return chunks.logits_nV


def default_chunk_rows(head: Head) -> int:
    """Rows of a chunk of CHUNK_BYTES."""
    device = head.weight_VD.device.type
    stride = logits_stride(max(1, len(head.weight_VD)), device)  # an empty vocabulary has no targets
    return whole_rows(CHUNK_BYTES[device] // (stride * head.dtype.itemsize), device)


def whole_rows(fitting: int, device: str = "cpu") -> int:
    """At most ``fitting`` rows, and at least one: a multiple of CHUNK_ROWS where there are so many."""
    multiple = CHUNK_ROWS[device]
    return fitting // multiple * multiple or max(1, fitting)


def logits_stride(num_vocab: int, device: str) -> int:
    """Logits from one row of a chunk's buffer to the next, on a device of this type."""
    multiple = STRIDE_MULTIPLE[device]
    return -(-num_vocab // multiple) * multiple


def multiplied_rows(num_rows: int, device: torch.device) -> int:
    """Rows in the GEMMs of a chunk of ``num_rows``: rounded up on a CPU, so that oneDNN sees few different shapes."""
    return rounded_rows(num_rows) if device.type == "cpu" else num_rows


class LogitChunks:
    """Logits of one chunk at a time, in one buffer: computed, read by ``stats``, overwritten by their gradient."""

    def __init__(self, head: Head, chunk_rows: int, buffer: Tensor | None = None) -> None:
        self.head = head
        num_rows = min(chunk_rows, len(head.target_ids_N))
        self.buffer = logits_buffer(head.weight_VD, num_rows) if buffer is None else buffer
        self.inv_temperature = 1.0 / head.temperature

    def load(self, rows: slice) -> None:
        """Computes the logits of these rows, without bias and temperature, which row_stats and row_gradient apply.

        What is not kept becomes -inf, of which all of their implementations make probability and gradient 0.
        """
        num_rows = rows.stop - rows.start
        hidden_nD = self.head.hidden_rows(rows)
        num_more = multiplied_rows(num_rows, hidden_nD.device) - num_rows
        # padding rows are zeros: they add 0 to the weight's gradient, and their own gradient is not read
        self.hidden_mD = torch.nn.functional.pad(hidden_nD, (0, 0, 0, num_more)) if num_more else hidden_nD
        self.target_n = self.head.target_ids_N[rows]
        self.logits_mV = self.buffer[: num_rows + num_more]
        self.logits_nV = self.logits_mV[:num_rows]
        for columns, weight_vD in self.head.weight_blocks():
            _mm(self.hidden_mD, weight_vD.T, self.logits_mV[:, columns])
        if self.head.kept is not None:
            self.head.kept.exclude_(self.logits_nV, self.target_n, rows)

    def stats(self) -> TokenStats:
        """Statistics of the loaded rows."""
        return row_stats(
            self.logits_nV,
            self.target_n,
            bias_V=self.head.bias_V,
            inv_temperature=self.inv_temperature,
            body=self.head.rows_body,
        )

    def add_gradients(self, rows: slice, stats: TokenStats, grads: RowGrads, into: "Gradients") -> None:
        """Adds the gradients of the loaded rows to ``into``; overwrites the logits with their gradient.

        If a GEMM reads bfloat16, that gradient is bfloat16, in the first half of each row.
        """
        out_mV = self.logits_mV
        if self.head.gemm_takes_bfloat16:
            out_mV = out_mV.view(torch.bfloat16)[:, : out_mV.shape[1]]
        out_nV = out_mV[: len(self.logits_nV)]
        row_gradient(
            self.logits_nV,
            self.target_n,
            stats,
            grads,
            bias_V=self.head.bias_V,
            inv_temperature=self.inv_temperature,
            body=self.head.rows_body,
            out_nV=out_nV,
        )
        out_mV[len(out_nV) :] = 0
        into.add(self.head, rows, self.hidden_mD, out_mV)


class OffsetChunks:
    """The interface of LogitChunks by ``kernels/gpu/offset.py``, which stores exp(logit - target's logit) instead."""

    def __init__(self, head: Head, chunk_rows: int) -> None:
        from isomorph.kernels.gpu import offset, offset_rows

        reason = offset.refusal(head.hidden_TD, head.bias_V is not None)
        if head.kept is not None:
            reason = "it has no logits that kept tokens could be taken from"
        if reason:
            raise ValueError(f"linear_loss=offset is not supported here: {reason}; use linear_loss=triton")
        self.offset, self.rows, self.head = offset, offset_rows, head
        self.weight_VD = aligned(head.weight_VD)
        self.buffer = offset.new_buffer(head.weight_VD, min(chunk_rows, len(head.target_ids_N)))

    def load(self, rows: slice) -> None:
        self.hidden_nD = self.head.hidden_TD[rows]
        if self.head.row_index_N is not None:
            self.hidden_nD = self.head.hidden_TD.index_select(0, self.head.row_index_N[rows])
        self.hidden_nD = aligned(self.hidden_nD)
        self.target_n = self.head.target_ids_N[rows]
        self.exp_nV = self.buffer[: rows.stop - rows.start]
        self.facts = self.offset.exp_chunk(
            self.hidden_nD, self.weight_VD, self.target_n, self.head.temperature, self.exp_nV
        )

    def stats(self) -> TokenStats:
        return TokenStats(self.facts.logprob, self.facts.entropy, self.facts.lse)

    def add_gradients(self, rows: slice, stats: TokenStats, grads: RowGrads, into: "Gradients") -> None:
        dlogprob_n, dentropy_n, dlse_n = grads
        temperature = self.head.temperature
        if dlogprob_n is None or dentropy_n is not None or dlse_n is not None:
            self.rows.whole_gradient_(self.exp_nV, self.facts, grads, self.target_n, temperature)
            into.add(self.head, rows, self.hidden_nD, self.exp_nV)
        else:
            scale_n = self.rows.row_scales(self.facts, dlogprob_n, self.target_n, temperature, self.exp_nV)
            scale_n1 = scale_n[:, None]
            into.add(self.head, rows, (self.hidden_nD * scale_n1).to(self.hidden_nD.dtype), self.exp_nV, scale_n1)


class Gradients:
    """Accumulates the gradients of one call; None for an operand that needs none.

    In float32 (float64 for float64), and rounded by ``cast`` at the end. In bfloat16 a gradient that gets a single
    contribution is stored rounded, to save memory: the weight's if all rows are one chunk, a hidden row's if it is read
    once. Not in float16: what the scale of a loss is to keep above 0 would be 0 already.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], chunk_rows: int) -> None:
        is_one_chunk = len(head.target_ids_N) <= chunk_rows and head.gemm_takes_bfloat16
        weight_dtype = head.weight_VD.dtype if is_one_chunk else head.dtype
        is_read_once = head.row_index_N is None and head.hidden_TD.dtype == torch.bfloat16
        hidden_dtype = torch.bfloat16 if is_read_once else head.dtype

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return head.weight_VD.new_zeros(shape, dtype=dtype)

        self.hidden_TD = zeros(head.hidden_TD.shape, hidden_dtype) if needs[0] else None
        self.weight_VD = zeros(head.weight_VD.shape, weight_dtype) if needs[1] else None
        self.bias_V = zeros(head.weight_VD.shape[:1], head.dtype) if needs[2] else None

    def add(
        self, head: Head, rows: slice, hidden_mD: Tensor, dlogits_mV: Tensor, scale_n1: Tensor | None = None
    ) -> None:
        """Adds the contribution of the rows ``rows``; further rows of ``hidden`` and ``dlogits`` are padding of zeros.

        With ``scale``, the gradient of the logits is scale * dlogits, and ``hidden`` is already multiplied by scale.
        """
        if self.hidden_TD is not None:
            dhidden_mD = hidden_mD.new_zeros(hidden_mD.shape, dtype=head.dtype)
            for columns, weight_vD in head.weight_blocks():
                _addmm(dhidden_mD, dlogits_mV[:, columns], weight_vD)
            dhidden_nD = dhidden_mD[: rows.stop - rows.start]
            if scale_n1 is not None:
                dhidden_nD *= scale_n1
            if head.row_index_N is None:
                self.hidden_TD[rows] = dhidden_nD
            else:
                _add_rows(self.hidden_TD, head.row_index_N[rows], dhidden_nD, head.rows_body)
        if self.weight_VD is not None:
            _add_outer(self.weight_VD, dlogits_mV, hidden_mD)
        if self.bias_V is not None:
            self.bias_V.add_(dlogits_mV.sum(0, dtype=self.bias_V.dtype))

    def multiply_(self, factor: Tensor) -> None:
        for gradient in (self.hidden_TD, self.weight_VD, self.bias_V):
            if gradient is not None:
                gradient.mul_(factor)

    def cast(self, dtypes: tuple[torch.dtype | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias, each in its dtype of ``dtypes``."""
        sums = (self.hidden_TD, self.weight_VD, self.bias_V)
        return tuple(None if s is None else s.to(dtype) for s, dtype in zip(sums, dtypes, strict=True))


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    if takes_onednn(left, right.T, right.numel()):
        for columns in row_chunks(out.shape[1], ONEDNN_COLUMNS):
            out[:, columns] = product(left, right[:, columns].T)
    elif left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        backend.native().bfloat16_gemm(left, right.T, out)


def _addmm(into: Tensor, left: Tensor, right: Tensor) -> None:
    if takes_onednn(left, right.T, right.numel()):
        into += product(left, right.T)
    elif left.dtype == into.dtype:
        into.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
    else:
        into += left @ right  # PyTorch's CPU GEMM sums in float32 and rounds once


def _add_outer(into_VD: Tensor, dlogits_nV: Tensor, hidden_nD: Tensor) -> None:
    """into += dlogits^T hidden, accumulated in the dtype of ``into``."""
    if takes_onednn(dlogits_nV.T, hidden_nD.T, into_VD.numel()):
        for columns in row_chunks(len(into_VD), ONEDNN_COLUMNS):
            into_VD[columns] += product(dlogits_nV[:, columns].T, hidden_nD.T)
    elif into_VD.is_cuda or dlogits_nV.dtype == into_VD.dtype:
        _addmm(into_VD, dlogits_nV.T, hidden_nD)
    else:
        backend.native().bfloat16_outer(dlogits_nV, hidden_nD, into_VD)


def _add_rows(into_TD: Tensor, row_index_n: Tensor, rows_nD: Tensor, body: str) -> None:
    """into[row_index[i]] += rows[i]. Additions to a row are in order of i, so the result is reproducible bitwise."""
    if body in ("triton", "offset"):
        from isomorph.kernels.gpu import rows

        rows.add_rows(into_TD, row_index_n, rows_nD)
    elif into_TD.is_cuda:
        # index_add_ on CUDA adds in no fixed order; index_put_ with accumulate sorts the indices stably
        into_TD.index_put_((row_index_n,), rows_nD, accumulate=True)
    else:
        into_TD.index_add_(0, row_index_n, rows_nD)  # on the CPU in index order
