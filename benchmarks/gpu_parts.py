"""Parts of the GPU suite that measure: ops against their ceilings and beside peers, and a model's parts.

Each yields rows, one as soon as it is there; with ``rehearse`` at sizes that the CPU and Triton's interpreter bear. A
row that is a single figure names it under "check".
"""

import functools
import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from compare import DEVICE, Case, PeakMemory, beside_each_peer, free_memory, measure, only_ours, quantiles, take_turns
from gpu_models import (
    QWEN_1_5B,
    TINY,
    VOCAB_QWEN,
    VOCAB_TINY,
    body_flop,
    changed,
    make_batch,
    make_policy,
    make_prompts,
    make_tokens,
)
from head_inputs import make_head
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.linear_logprob import linear_loss
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.token_logprob import TokenStats

Rows = Iterator[dict[str, Any]]
HOPPER_TFLOPS = 989.4  # dense bfloat16 of an H100 or H200 SXM, by NVIDIA's data sheet: what published MFUs count by


# -- ops
def gemm_ceiling(rehearse: bool) -> Rows:
    """cuBLAS: the largest square that is usual, and the head's shapes, also accumulating into float32 results."""
    side, dim, vocab = (16, 32, 300) if rehearse else (8192, 1536, 151_936)
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    yield {"check": f"mm {side} x {side} x {side}", **timed(lambda: a @ b, 2 * side**3)}
    copied = torch.empty(64 if rehearse else 2**30, dtype=torch.int8, device=DEVICE)
    timing = timed(lambda: copied.clone(), 0)
    yield {"check": "copy, GB/s read and written", "value": 2 * copied.nbytes / timing["median_s"] / 1e9, **timing}
    for rows in (8,) if rehearse else (1024, 2048, 4096, 8192):
        yield from _head_gemms(rows, dim, vocab)


def _head_gemms(rows: int, dim: int, vocab: int) -> Rows:
    a = torch.randn(rows, dim, device=DEVICE).bfloat16()
    w = torch.randn(dim, vocab, device=DEVICE).bfloat16()
    total = torch.zeros(rows, vocab, device=DEVICE)
    calls: dict[str, Callable[[], object]] = {"mm": lambda: a @ w}
    if DEVICE.type == "cuda":  # the CPU has no out_dtype
        calls |= {
            "mm to float32": lambda: torch.mm(a, w, out_dtype=torch.float32),
            "addmm to float32": lambda: torch.addmm(total, a, w, out_dtype=torch.float32),
        }
    for name, call in calls.items():
        try:
            timing: dict[str, Any] = timed(call, 2 * rows * dim * vocab, budget_s=0.5)
        except RuntimeError as failure:
            timing = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
            free_memory()
        yield {"check": f"{name} {rows} x {dim} x {vocab}", **timing}


HEAD, ATTENTION = ("bench_linear_loss", "bench_linear_logprob"), ("bench_packed_attention", "bench_decode_attention")
ROW_OPS = ("bench_layer", "bench_token_logprob", "bench_sample_token", "bench_advantage")


def _ours(files: Sequence[str]) -> Callable[[bool], Rows]:
    """Our bodies, PyTorch's own operations and the ceiling, in turns."""

    def run(rehearse: bool) -> Rows:
        for case in _cases(files, rehearse):
            yield from measure(only_ours(case), max_rounds=1 if rehearse else 20, budget_s=3.0)
            free_memory()

    return run


def _peers(files: Sequence[str]) -> Callable[[bool], Rows]:
    """Every peer in turns with ours."""

    def run(rehearse: bool) -> Rows:
        for case in _cases(files, rehearse):
            yield from beside_each_peer(case, max_rounds=1 if rehearse else 10, budget_s=1.0)

    return run


def _cases(files: Sequence[str], rehearse: bool) -> Iterator[Case]:
    for file in files:
        module = importlib.import_module(file)
        yield from module.tiny_cases() if rehearse else module.cases(quick=False)


ours_head, ours_attention, ours_rows = _ours(HEAD), _ours(ATTENTION), _ours(ROW_OPS)
peers_head, peers_attention, peers_rows = _peers(HEAD), _peers(ATTENTION), _peers(ROW_OPS)


def head_memory(rehearse: bool) -> Rows:
    """linear_loss at N = 65,536 with chunk_rows = 4096, forward and backward: the peak beside the gradients."""
    num, dim, vocab, chunk = (16, 32, 300, 8) if rehearse else (65_536, 1536, 151_936, 4096)
    hidden, weight, target = make_head(num, dim, vocab, torch.float32 if rehearse else torch.bfloat16)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    for body in backend.bodies("linear_loss", DEVICE.type):
        if body == "reference":  # all logits at once
            continue
        memory = PeakMemory()
        with backend.using(f"linear_loss={body}"):
            grads = torch.autograd.grad(linear_loss(*leaves, target, _sum, chunk_rows=chunk), leaves)
        size = sum(grad.nbytes for grad in grads) / 2**20
        peak = memory.mib()
        beside = None if peak is None else peak - size
        yield {"check": f"linear_loss={body}: MiB beside the gradients at N={num}", "value": beside, "peak_mib": peak}
        del grads


def _sum(stats: TokenStats, rows: slice) -> Tensor:
    return -stats.logprob.sum()


# -- a model
def layer_stack(rehearse: bool) -> Rows:
    """Forward and backward of Qwen2.5-1.5B's layers at P = 2048, R = 1024, G = 16: packed against repeated prompts.

    Half the layers where 28 do not fit.
    """
    prompt, response, group, at_once = (6, 3, 4, 2) if rehearse else (2048, 1024, 16, 4)
    hidden, layers, *rest = TINY if rehearse else QWEN_1_5B
    if not rehearse and torch.cuda.get_device_properties(0).total_memory < 120 * 2**30:
        layers //= 2
    policy = make_policy((hidden, layers, *rest), VOCAB_TINY)
    packed = [PackedLayout.from_groups([prompt], [[response] * group])]
    repeated = [PackedLayout.from_groups([prompt + response] * at_once, [[]] * at_once)] * (group // at_once)
    seconds, flop = [], []
    for name, layouts in (("packed", packed), ("repeated", repeated)):
        memory = PeakMemory()
        call = functools.partial(_through, policy, [make_batch(layout) for layout in layouts])
        flop.append(body_flop(policy, layouts))
        timing = timed(call, flop[-1], by_host=True)
        seconds.append(timing["median_s"])
        tokens = sum(layout.num_tok for layout in layouts)
        yield {"check": f"{layers} layers, {name}, {tokens} tokens", **timing, "peak_mib": memory.mib()}
    gain, model = seconds[1] / seconds[0], flop[1] / flop[0]
    yield {"check": "gain of packing, percent of the FLOP model's", "value": 100 * gain / model, "gain": gain}


def _through(policy: Any, batches: list[Any]) -> None:
    for batch in batches:
        hidden_TD = policy.hidden(batch)
        hidden_TD.backward(torch.ones_like(hidden_TD))
    policy.model.zero_grad(set_to_none=True)


def update(rehearse: bool) -> Rows:
    """Full fine-tuning of Qwen2.5-1.5B's shape, random weights: one GRPO update, AdamW with float32 masters.

    Then with transformers' own layers in place of the fused ones, and with those compiled.

    With recomputed layers and 16,384 packed tokens a micro-batch too: beside TRL's published 7,282 tokens a second
    and 9.0 % of an H100's peak (1.7 B weights, padding-free, checkpointing, huggingface/trl PR #6092).
    """
    from isomorph.engine.update.learner import Learner
    from isomorph.engine.update.micro_batches import pack

    policy = make_policy(*((TINY, VOCAB_TINY) if rehearse else (QWEN_1_5B, VOCAB_QWEN)))
    weights = sum(p.numel() for p in policy.named_parameters().values())
    for micro_batch_tok, kind in (
        (8192, "nothing recomputed"),
        (16_384, "all layers recomputed"),
        (8192, "layers not fused"),
        (8192, "layers compiled"),
    ):
        learner = Learner(changed(policy, recomputes=kind.startswith("all"), compiles=kind.endswith("compiled")))
        groups, stage = make_groups(rehearse, micro_batch_tok)
        updates = pack(
            groups, micro_batch_tok=micro_batch_tok, prompts_per_update=None, objective=stage.objective, device=DEVICE
        )
        learner.enter(stage)
        batches = [batch for u in updates for batch in u.batches]
        head = 6 * sum(b.num_loss_tok for b in batches) * policy.unembedding.numel()
        flop = body_flop(policy, [b.layout for b in batches]) + head
        memory = PeakMemory()
        call = functools.partial(learner.update, updates, stage, 0)
        with backend.using("rms_norm=reference" if kind == "layers not fused" else ""):
            timing = timed(call, flop, budget_s=5.0, by_host=True)
        tokens = sum(len(b.token_ids) for b in batches)
        repeated = sum(len(g.prompt.token_ids) + len(r.token_ids) for g in groups for r in g.rollouts)
        yield {
            "check": f"update of {weights / 1e9:.2f} B weights, {micro_batch_tok} tokens a micro-batch, {kind}",
            **timing,
            "mfu_percent": None if DEVICE.type == "cpu" else 100 * timing["tflops"] / HOPPER_TFLOPS,
            "packed_tok_s": tokens / timing["median_s"],
            "unpacked_tok_s": repeated / timing["median_s"],
            "peak_mib": memory.mib(),
        }
        learner.close()
        del learner, call  # masters and moments
        free_memory()


def make_groups(rehearse: bool, micro_batch_tok: int) -> tuple[list[Any], Any]:
    """Prompts with random answers, half of them good, and their stage."""
    from isomorph.engine.config import Stage
    from isomorph.engine.types import Group, Rollout

    num, length, response, size, vocab = (2, 6, 3, 2, VOCAB_TINY) if rehearse else (8, 1024, 512, 8, VOCAB_QWEN)
    rng = random.Random(1)
    groups = []
    for prompt in make_prompts(num, length, vocab):
        answers = tuple(
            Rollout(
                prompt_id=prompt.prompt_id,
                sample=sample,
                token_ids=torch.tensor(make_tokens(rng, response, vocab)),
                sampler_logprob=None,
                finish="length",
                policy_version=0,
            )
            for sample in range(size)
        )
        advantages = tuple(1.0 - 2.0 * (g % 2) for g in range(size))
        groups.append(Group(prompt=prompt, rollouts=answers, rewards=advantages, advantages=advantages))
    tables = {
        "name": "gpu",
        "steps": 10,
        "objective": {"name": "grpo"},
        "batch": {"prompts": num, "micro_batch_tok": micro_batch_tok},
    }
    sampling = {"samples_per_prompt": size, "max_new_tok": response}
    return groups, Stage.model_validate({**tables, "sampling": sampling})


def optimizers(rehearse: bool) -> Rows:
    """AdamW's step beside bfloat16 weights, and on the host with its transfers."""
    from isomorph.engine.config import OptimConfig
    from isomorph.engine.update.optimizer import MasterAdamW

    num, width = (2, 16) if rehearse else (32, 4096)
    for on_host in (False, True):
        weights = {
            f"{i}": torch.nn.Parameter(torch.randn(width, width, device=DEVICE).bfloat16() * 0.02) for i in range(num)
        }
        optimizer = MasterAdamW(weights, OptimConfig(), on_host=on_host)
        memory = PeakMemory()

        def step(weights: dict[str, Tensor] = weights, optimizer: MasterAdamW = optimizer) -> None:
            sum((p * 0.5).sum() for p in weights.values()).backward()  # type: ignore[union-attr]
            optimizer.step(lr=1e-6, clip_norm=1.0)
            optimizer.zero_grad()

        timing = timed(step, 0, by_host=True)
        place = "on the host" if on_host else "beside the weights"
        check = f"AdamW {place}, {num * width**2 / 1e6:.0f} M weights, gradients included"
        yield {"check": check, **timing, "peak_mib": memory.mib()}


def energy(rehearse: bool) -> Rows:
    """What NVML says of two busy seconds."""
    from isomorph.engine.record.telemetry import PERIOD_S, Telemetry, find_gpu

    telemetry = Telemetry(*find_gpu(DEVICE))
    size = 64 if rehearse else 8192
    a = torch.randn(size, size, device=DEVICE)
    with telemetry.watching():
        telemetry.begin()
        until = time.perf_counter() + (0.1 if rehearse else 2 * PERIOD_S)
        while time.perf_counter() < until:
            (a @ a).sum().item()
        row = telemetry.end(num_tok=1, num_correct=1)
    yield {"check": "energy of two busy seconds, J", "value": row["energy/step_j"], "reason": telemetry.reason, **row}


def sampler(rehearse: bool) -> Rows:
    """The built-in sampler on Qwen2.5-1.5B's shape: 64 sequences of 8 prompts, its steps recorded as CUDA graphs."""
    from isomorph.engine.config import SamplerConfig
    from isomorph.engine.rollout.builtin import BuiltinSampler
    from isomorph.engine.types import Sampling

    num, group, length, new, vocab = (2, 2, 6, 3, VOCAB_TINY) if rehearse else (8, 8, 512, 256, VOCAB_QWEN)
    policy = make_policy(TINY if rehearse else QWEN_1_5B, vocab)
    builtin = BuiltinSampler(policy, SamplerConfig(max_seqs=num * group))
    prompts = make_prompts(num, length, vocab)

    def generate(new_tok: int) -> object:
        return builtin.generate(
            prompts, Sampling(temperature=1.0, max_new_tok=new_tok, samples_per_prompt=group, stop_ids=(), seed=0)
        )

    first = timed(lambda: generate(1), 0, budget_s=2.0, by_host=True)
    yield {"check": f"prefill of {num} prompts of {length} tokens", **first}
    start = time.perf_counter()
    generate(new)
    yield {"check": "the first decode, recording included", "median_s": time.perf_counter() - start}
    whole = timed(lambda: generate(new), 0, budget_s=8.0, by_host=True)
    times = {f"whole_{name}": value for name, value in whole.items()}
    tok_s = num * group * (new - 1) / (whole["median_s"] - first["median_s"])
    yield {"check": f"decode of {num * group} sequences, tok/s", "value": tok_s, **times}


def timed(call: Callable[[], object], flop: int, *, budget_s: float = 2.0, by_host: bool = False) -> dict[str, float]:
    """Median and spread after a first call; ``by_host`` where the host's own work belongs to it."""
    call()
    by_host = by_host or DEVICE.type == "cpu"
    rounds = 20 if DEVICE.type == "cuda" else 1  # elsewhere this is a rehearsal
    seconds, host_s = take_turns({"it": call}, rounds, budget_s, by_host=by_host)
    low, high = quantiles(seconds["it"])
    median = statistics.median(seconds["it"])
    rate = {"tflops": flop / median / 1e12} if flop else {}
    host = {"host_s": host_s["it"]} if host_s else {}
    return {"median_s": median, "p20_s": low, "p80_s": high, "rounds": len(seconds["it"]), **rate, **host}
