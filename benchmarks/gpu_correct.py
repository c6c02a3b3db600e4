"""Parts of the GPU suite that check: what a step runs on a GPU, at real sizes, against the specification in float64.

On a GPU everything is bfloat16: the head with its products accumulated to float32 by cuBLAS, Triton's rows, the
gradient of the logits written over them; attention in every layout; decoding, its CUDA graphs replayed. With
``rehearse`` the same code runs tiny in float32, because Triton's interpreter has no product of bfloat16 tiles. Draws
and repeated launches are in gpu_correct_bits.py.

Each row has the figure as "value", what it must not pass as "bound", and whether it "holds". Bounds of the head are
those of its contract: log-probabilities 5e-6 and entropies 1e-5 of the largest logit; gradients 2.5e-3 (hidden rows)
and 3e-3 (weight) of their norm in bfloat16, 1e-5 in float32; bias, the projection on the truth, 5e-4. The worst row of
a gradient: 1e-2 (1e-4) of the root of the sum of its squared terms, about five times what rounding every term takes, so
that one spoilt row among thousands is seen. Its own norm would be the wrong scale: where the terms cancel, the error of
any implementation that rounds them is large beside their sum (on an H200 0.06 to 0.2, PyTorch's operations the same).
The implementation "offset" knows the logarithm of a probability from its rounded bfloat16: it errs by the rounding of
p d loss / d entropy, however small the term, so that this is added to the squares.
Elsewhere the bound is twice the error of PyTorch's plain operations in the same dtype, and one rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from compare import DEVICE, free_memory
from gpu_models import SMOLLM2_135M, TINY, VOCAB_SMOLLM2, VOCAB_TINY, as_float32, make_policy, make_prompts
from torch import Tensor

from isomorph.kernels import attention_route, backend
from isomorph.kernels.decode_attention import CachedKV, decode_attention, decode_attention_ref
from isomorph.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_loss
from isomorph.kernels.packed_attention import packed_attention, packed_attention_ref
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.token_logprob import TokenStats, token_logprob_ref

Rows = Iterator[dict[str, Any]]
Loss = Callable[[TokenStats, slice], Tensor]


def check(what: str, value: float, bound: float) -> dict[str, Any]:
    return {"check": what, "value": value, "bound": bound, "holds": value <= bound}  # of NaN nothing holds


def dtype_here(rehearse: bool) -> torch.dtype:
    return torch.float32 if rehearse else torch.bfloat16


def bodies_here(op: str) -> list[str]:
    """All that run here but the specification."""
    return [body for body in backend.bodies(op, DEVICE.type) if body != "reference"]


def _worst_row(got: Tensor, want: Tensor) -> float:
    """The largest error of a row (all but the first axis) over its norm; one below the usual norm counts as that large.
    Rows of dQ that see few keys are differences of larger numbers, and of one key exactly 0."""
    if not want.numel():
        return 0.0
    got, want = (x.double().flatten(1) for x in (got, want))
    norm = want.norm(dim=1)
    usual = norm.square().mean().sqrt().clamp(min=1e-30)
    return float(((got - want).norm(dim=1) / norm.clamp(min=usual)).max())


# -- the head
class HeadProblem(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    target_N: Tensor
    row_index_N: Tensor  # some rows are read several times, as the last token of a prompt is

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_TD.detach().requires_grad_(), self.weight_VD.detach().requires_grad_()


TEMPERATURE = 0.7


def head(rehearse: bool) -> Rows:
    """linear_logprob and linear_loss, forward and backward, in several chunks; one vocabulary of an odd size."""
    sizes = [(4096, 1536, 151_936), (2048, 3584, 152_064), (4096, 768, 50_257)] if not rehearse else [(11, 24, 301)]
    for num, dim, vocab in sizes:
        made, chunk = make_head_problem(num, dim, vocab, dtype_here(rehearse)), 4 if rehearse else 1024
        truth = _head_stats(made, 256)
        for body in bodies_here("linear_logprob"):
            yield from _check_stats(f"linear_logprob={body} N={num} D={dim} V={vocab}", body, made, truth)
        for name, loss_of in _losses(made, truth).items():
            exact = _head_gradients(made, loss_of, 256)
            for body in bodies_here("linear_loss"):
                if body == "offset" and dim % 8:
                    continue
                what = f"linear_loss={body} N={num} D={dim} V={vocab}, {name}"
                yield from _check_gradients(what, body, made, loss_of, chunk, exact)
            del exact
        del made, truth
        free_memory()


def make_head_problem(num: int, dim: int, vocab: int, dtype: torch.dtype) -> HeadProblem:
    """Logits of standard deviation 4; targets include the first and the last column."""
    gen = torch.Generator(DEVICE).manual_seed(num + vocab)
    rows = num - num // 4
    hidden = torch.randn(rows, dim, device=DEVICE, generator=gen).to(dtype)
    weight = (4 * dim**-0.5 * torch.randn(vocab, dim, device=DEVICE, generator=gen)).to(dtype)
    target = torch.randint(vocab, (num,), device=DEVICE, generator=gen)
    target[0], target[-1] = vocab - 1, 0
    return HeadProblem(hidden, weight, target, torch.arange(num, device=DEVICE) * 5 % num * rows // num)


def _losses(made: HeadProblem, truth: TokenStats) -> dict[str, Loss]:
    """GRPO's clipped one, and one of all three figures, whose gradient takes another way through the kernels."""
    gen = torch.Generator(DEVICE).manual_seed(1)
    num = len(made.target_N)
    noise_N, advantage_N = torch.randn(2, num, device=DEVICE, generator=gen, dtype=torch.float64).unbind()
    old_N = truth.logprob + 0.1 * noise_N

    def grpo(stats: TokenStats, rows: slice) -> Tensor:
        old, advantage = (x[rows].to(stats.logprob.dtype) for x in (old_N, advantage_N))
        ratio = (stats.logprob - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / num

    def every(stats: TokenStats, rows: slice) -> Tensor:
        advantage = advantage_N[rows].to(stats.logprob.dtype)
        return (stats.logprob * advantage - 0.1 * stats.entropy + 0.01 * stats.lse).sum() / num

    return {"GRPO": grpo, "with entropy and LSE": every}


def parts_of(num: int, size: int) -> Iterator[slice]:
    for start in range(0, num, size):
        yield slice(start, min(start + size, num))


@torch.no_grad()
def _head_stats(made: HeadProblem, size: int) -> TokenStats:
    weight = made.weight_VD.double()
    parts = [
        linear_logprob_ref(
            made.hidden_TD[made.row_index_N[rows]].double(), weight, made.target_N[rows], temperature=TEMPERATURE
        )
        for rows in parts_of(len(made.target_N), size)
    ]
    return TokenStats(*(torch.cat(stat) for stat in zip(*parts, strict=True)))


class HeadGradients(NamedTuple):
    """Loss and gradients in float64, and for every row of a gradient the sum of its squared terms, [rows, 2]: those of
    the gradient, and those of p d loss / d entropy."""

    loss: Tensor
    hidden_TD: Tensor
    weight_VD: Tensor
    hidden_terms: Tensor
    weight_terms: Tensor


@torch.no_grad()
def _head_gradients(made: HeadProblem, loss_of: Loss, size: int) -> HeadGradients:
    """By the gradient of the logits, so many rows at a time."""
    weight = made.weight_VD.double()
    norm_V = weight.square().sum(1)
    loss = weight.new_zeros(())
    dhidden, dweight = torch.zeros_like(made.hidden_TD, dtype=torch.float64), torch.zeros_like(weight)
    hidden_terms, weight_terms = weight.new_zeros(len(made.hidden_TD), 2), weight.new_zeros(len(weight), 2)
    for rows in parts_of(len(made.target_N), size):
        index = made.row_index_N[rows]
        hidden = made.hidden_TD[index].double()
        logits = (hidden @ weight.T).requires_grad_()
        with torch.enable_grad():
            stats = token_logprob_ref(logits, made.target_N[rows], temperature=TEMPERATURE)
            part = loss_of(stats, rows)
        dlogits, dentropy = torch.autograd.grad(part, (logits, stats.entropy), allow_unused=True)
        loss += part.detach()
        dhidden.index_add_(0, index, dlogits @ weight)
        dweight += dlogits.T @ hidden
        terms = [dlogits.square_(), torch.zeros_like(dlogits)]
        if dentropy is not None:
            prob = torch.softmax(logits / TEMPERATURE, -1)
            terms[1] = (prob * dentropy[:, None] / TEMPERATURE).square_()
        for i, squared in enumerate(terms):
            hidden_terms[:, i].index_add_(0, index, squared @ norm_V)
            weight_terms[:, i] += squared.T @ hidden.square().sum(1)
    return HeadGradients(loss, dhidden, dweight, hidden_terms, weight_terms)


def _check_stats(what: str, body: str, made: HeadProblem, truth: TokenStats) -> Rows:
    with torch.no_grad(), backend.using(f"linear_logprob={body}"):
        stats = linear_logprob(
            made.hidden_TD, made.weight_VD, made.target_N, row_index_N=made.row_index_N, temperature=TEMPERATURE
        )
    largest = max(1.0, float(truth.lse.abs().max()), float(truth.logprob.abs().max()))
    for name, bound in (("logprob", 5e-6), ("entropy", 1e-5), ("lse", 5e-6)):
        error = float((getattr(stats, name).double() - getattr(truth, name)).abs().max()) / largest
        yield check(f"{what}: {name}", error, bound)


def _check_gradients(what: str, body: str, made: HeadProblem, loss_of: Loss, chunk: int, exact: HeadGradients) -> Rows:
    leaves = made.leaves()
    with backend.using(f"linear_loss={body}"):
        loss = linear_loss(
            *leaves, made.target_N, loss_of, row_index_N=made.row_index_N, temperature=TEMPERATURE, chunk_rows=chunk
        )
        grads = torch.autograd.grad(loss, leaves)
    wide = made.weight_VD.dtype == torch.float32
    scale = max(1.0, abs(float(exact.loss)))
    yield check(f"{what}: loss", abs(float(loss.detach()) - float(exact.loss)) / scale, 1e-5)
    of_hidden = ("hidden", exact.hidden_TD, exact.hidden_terms, 2.5e-3)
    of_weight = ("weight", exact.weight_VD, exact.weight_terms, 3e-3)
    for got, (name, want, terms, bound) in zip(grads, (of_hidden, of_weight), strict=True):
        got = got.double()
        norm = want.norm()
        yield check(f"{what}: gradient of {name}", float((got - want).norm() / norm), 1e-5 if wide else bound)
        row_scale = (terms.sum(1) if body == "offset" else terms[:, 0]).sqrt()
        worst = float(((got - want).norm(dim=1) / row_scale.clamp(min=1e-30)).max())
        yield check(f"{what}: gradient of {name}, worst row", worst, 1e-4 if wide else 1e-2)
        yield check(f"{what}: gradient of {name}, bias", abs(float((got * want).sum() / norm.square()) - 1), 5e-4)
        del got


# -- attention
def layouts_here(rehearse: bool) -> dict[str, PackedLayout]:
    of_groups, of_tree = PackedLayout.from_groups, PackedLayout.from_tree
    if rehearse:
        ragged = of_groups([17, 1, 5, 9], [[7, 0, 1, 12], [3] * 3, [], [20]])
        return {"ragged": ragged, "tree": of_tree([9, 7, 5, 3, 6, 2], [-1, 0, 1, 1, 0, 4])}
    return {
        "P=2048 R=1024 G=8": of_groups([2048], [[1024] * 8]),
        "ragged": of_groups([700, 1, 129, 512, 64], [[300, 0, 1, 129], [257] * 3, [], [31, 640], [128] * 16]),
        "one long prompt": of_groups([16_384], [[512, 100]]),
        "tree": of_tree([512, 300, 200, 100, 257, 64, 33], [-1, 0, 1, 1, 0, 4, -1]),
    }


def attention(rehearse: bool) -> Rows:
    """packed_attention, forward and backward, in every layout and with every width and share of KV heads.

    A new shape of heads compiles every kernel anew, so that the usual one meets all layouts first.
    """
    layouts = layouts_here(rehearse)
    heads = {(12, 2, 128): list(layouts), (9, 3, 64): list(layouts), (28, 4, 128): ["ragged"], (8, 8, 64): ["ragged"]}
    if rehearse:
        heads = {(4, 2, 16): list(layouts), (3, 1, 8): list(layouts)}
    for (num_heads, num_kv, dim), names in heads.items():
        for name in names:
            yield from _check_attention(name, layouts[name].to(DEVICE), num_heads, num_kv, dim, dtype_here(rehearse))
            free_memory()


def _check_attention(
    name: str, layout: PackedLayout, num_heads: int, num_kv: int, dim: int, dtype: torch.dtype
) -> Rows:
    gen = torch.Generator(DEVICE).manual_seed(dim + num_heads)
    shapes = [(layout.num_tok, n, dim) for n in (num_heads, num_kv, num_kv, num_heads)]
    q, k, v, dout = (torch.randn(shape, device=DEVICE, generator=gen).to(dtype) for shape in shapes)
    exact = _by_head(q, k, v, dout, layout, torch.float64)
    plain = _by_head(q, k, v, dout, layout, dtype)
    bounds = [2 * _worst_row(p, e) + 2 * torch.finfo(dtype).eps for p, e in zip(plain, exact, strict=True)]
    for body in bodies_here("packed_attention"):
        if attention_route.why_not(body, dtype, dim, layout.is_tree):
            continue
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with backend.using(f"packed_attention={body}"):
            out = packed_attention(*leaves, layout)
            got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        for of, g, e, bound in zip(("out", "dq", "dk", "dv"), got, exact, bounds, strict=True):
            what = f"packed_attention={body} {name} H={num_heads}/{num_kv} d={dim}: {of}, worst row"
            yield check(what, _worst_row(g, e), bound)


def _by_head(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: PackedLayout, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and gradients of the specification, a query head at a time, because all scores at once would not fit."""
    repeats = q.shape[1] // k.shape[1]
    sums = [torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v)]
    for h in range(q.shape[1]):
        leaves = [
            x[:, i : i + 1].to(dtype).detach().requires_grad_()
            for x, i in ((q, h), (k, h // repeats), (v, h // repeats))
        ]
        out = packed_attention_ref(*leaves, layout)
        grads = torch.autograd.grad(out, leaves, dout[:, h : h + 1].to(dtype))
        for total, part, i in zip(sums, (out.detach(), *grads), (h, h, h // repeats, h // repeats), strict=True):
            total[:, i] += part[:, 0]
    return tuple(sums)


# -- decoding
def decode(rehearse: bool) -> Rows:
    """decode_attention by itself and replayed from a CUDA graph; the sampler with its graphs beside the trainer."""
    shapes = [(8, 8, 12, 2, 128, 2048, 1024), (4, 8, 28, 4, 128, 700, 300), (16, 4, 9, 3, 64, 333, 77)]
    for shape in shapes if not rehearse else [(2, 3, 4, 2, 16, 20, 9)]:
        yield from _check_decode(*shape, dtype_here(rehearse))
        free_memory()
    for dtype in (torch.float32,) if rehearse else (torch.bfloat16, torch.float32):
        yield from _check_sampler(rehearse, dtype)
        free_memory()


def _check_decode(
    prompts: int, group: int, num_heads: int, num_kv: int, dim: int, long: int, own: int, dtype: torch.dtype
) -> Rows:
    """Lengths differ from row to row; what lies beyond them is NaN."""
    gen = torch.Generator(DEVICE).manual_seed(long)
    rows = prompts * group

    def cache(slots: int, length: int, slot_B: Tensor) -> CachedKV:
        lens = torch.randint(1, length + 1, (slots,), device=DEVICE, generator=gen)
        kv = torch.randn(2, slots, num_kv, length, dim, device=DEVICE, generator=gen).to(dtype)
        beyond = torch.arange(length, device=DEVICE) >= lens[:, None]
        kv.masked_fill_(beyond[None, :, None, :, None], torch.nan)
        return CachedKV(kv[0], kv[1], slot_B, lens[slot_B])

    row_B = torch.arange(rows, device=DEVICE)
    q = torch.randn(rows, num_heads, dim, device=DEVICE, generator=gen).to(dtype)
    prompt, mine = cache(prompts, long, row_B // group), cache(rows, own, row_B)
    exact = decode_attention_ref(q.double(), *(CachedKV(*_wide(c[:2]), *c[2:]) for c in (prompt, mine)))
    plain = decode_attention_ref(q, prompt, mine)
    bound = 2 * _worst_row(plain, exact) + 2 * torch.finfo(dtype).eps
    name = f"P={prompts} G={group} H={num_heads}/{num_kv} d={dim} L={long}+{own}"
    for body in bodies_here("decode_attention"):
        with torch.no_grad(), backend.using(f"decode_attention={body}"):
            out = decode_attention(q, prompt, mine)
            yield check(f"decode_attention={body} {name}: worst row", _worst_row(out, exact), bound)
            if DEVICE.type == "cuda" and body == "triton":
                yield check(f"decode_attention={body} {name}: rows that a CUDA graph gives otherwise",
                             _graph_difference(q, prompt, mine), 0.0)  # fmt: skip


def _wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def _graph_difference(q: Tensor, prompt: CachedKV, own: CachedKV) -> float:
    """Rows whose bits differ between a call and a graph that was recorded over other queries and lengths."""
    static_q, static_len = torch.zeros_like(q), torch.ones_like(own.len_B)
    static_own = own._replace(len_B=static_len)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what compiles at its first call must not be recorded
        decode_attention(static_q, prompt, static_own)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(static_q, prompt, static_own)
    static_q.copy_(q)
    static_len.copy_(own.len_B)
    graph.replay()
    return float((out != decode_attention(q, prompt, own)).flatten(1).any(1).sum())


def _check_sampler(rehearse: bool, dtype: torch.dtype) -> Rows:
    """The built-in sampler: its log-probabilities beside the trainer's, and the same draws the second time."""
    from isomorph.engine.config import SamplerConfig
    from isomorph.engine.model.scoring import trainer_logprob
    from isomorph.engine.rollout.builtin import BuiltinSampler
    from isomorph.engine.types import Sampling

    shape, vocab = (TINY, VOCAB_TINY) if rehearse else (SMOLLM2_135M, VOCAB_SMOLLM2)
    num, group, length, new = (2, 3, 7, 5) if rehearse else (6, 5, 200, 96)
    policy = make_policy(shape, vocab, dtype)
    prompts = make_prompts(num, length, vocab)
    sampling = Sampling(temperature=1.0, max_new_tok=new, samples_per_prompt=group, stop_ids=(5, 6), seed=3)
    sampler = BuiltinSampler(policy, SamplerConfig(max_seqs=num * group - 3))  # slots are taken over
    rollouts = sampler.generate(prompts, sampling)
    drawn = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
    name = f"the sampler, {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        trained = torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=1.0))
        drift = (trained - drawn).abs()
        mean, largest = 1e-4, 2e-3
        if dtype == torch.bfloat16:  # two computations that round on their own may differ by more than either errs
            wide = as_float32(policy, shape, vocab)
            error = (torch.cat(trainer_logprob(wide, prompts, rollouts, temperature=1.0)) - trained).abs()
            mean, largest = 1.5 * float(error.mean()), 2.5 * float(error.max())
            del wide
    yield check(f"{name}: mean difference from the trainer's log-probabilities", float(drift.mean()), mean)
    yield check(f"{name}: largest difference", float(drift.max()), largest)
    again = sampler.generate(prompts, sampling)
    differing = sum(not torch.equal(a.token_ids, b.token_ids) for a, b in zip(rollouts, again, strict=True))
    yield check(f"{name}: responses that differ when drawn again, of {len(rollouts)}", differing, 0)
