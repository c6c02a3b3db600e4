"""Estimates seconds by phase from the facts of a plan, and measures or looks up what a device can do at most.

Seconds of a phase are FLOPs / peak GEMM throughput + bytes / peak bandwidth (``Ceilings``): a lower bound, without
launch overhead, communication or stragglers. All numbers are those of one rank.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from isomorph.engine.config import UserError
from isomorph.engine.planner import FLOAT64_BYTES, Facts, layer_bytes_per_tok
from isomorph.kernels.linear import linear

UPDATE_TRAFFIC = 3  # passes over an activation: written, read by the next op, read or written in backward
HOST_BANDWIDTH = 50e9  # bytes/s of an optimizer in host memory, transfers included: assumed, not measured
OPTIMIZER_TRAFFIC = 32  # bytes a parameter: gradient read twice (norm), master and moments read and written


class Ceilings(NamedTuple):
    """Peak throughput of a device."""

    flops: float  # per second, of a GEMM in the weights' dtype
    bandwidth: float  # bytes read or written per second
    source: str


class Card(NamedTuple):
    """Data-sheet numbers of a GPU."""

    gib: float
    tflops: float  # dense bfloat16
    tb_per_s: float


CARDS = {
    "h100": Card(79.6, 989, 3.35),
    "h200": Card(139.8, 989, 4.8),
    "a100": Card(79.3, 312, 2.04),
    "b200": Card(178.4, 2250, 8.0),
    "l40s": Card(44.4, 362, 0.864),
    "rtx4090": Card(23.6, 165, 1.01),
}


# -- time
def seconds(facts: Facts, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of generate and update, lower bounds, without rewards. With STaR generate is that of a round."""
    shape = facts.shape
    context = facts.prompt_tok + facts.response_tok / 2
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * context  # FLOPs a token
    forward = facts.forward_tok * (2 * shape.num_backbone + attention) + facts.loss_tok * 2 * shape.num_head
    share_again = 0.0 if facts.gradient_checkpointing_every is None else 1 / facts.gradient_checkpointing_every
    num_passes = (2 if shape.has_adapters else 3) + share_again  # frozen weights have no gradient
    num_passes = facts.num_iterations * num_passes + facts.has_reference + facts.share_scored
    of_layer = layer_bytes_per_tok(shape, facts.weight_bytes, is_fused=facts.weight_bytes < FLOAT64_BYTES)
    moved = UPDATE_TRAFFIC * facts.num_iterations * facts.forward_tok * shape.num_layers * of_layer
    stepped = OPTIMIZER_TRAFFIC * shape.num_trained / facts.num_shards * facts.num_updates
    step_bandwidth = HOST_BANDWIDTH if facts.is_gpu and facts.optimizer_on_host else ceilings.bandwidth
    update = num_passes * forward / ceilings.flops + moved / ceilings.bandwidth + stepped / step_bandwidth
    return {"generate": _generate_s(facts, ceilings, attention) if facts.is_sampled else 0.0, "update": update}


def _generate_s(facts: Facts, ceilings: Ceilings, attention: float) -> float:
    """Prefill of all prompts in one pass; then one pass a token, which reads the weights and the KV cache."""
    shape = facts.shape
    prefill = facts.drawn_prompts * facts.prompt_tok * (2 * shape.num_backbone + attention)
    num_drawn = facts.drawn_prompts * facts.drawn_samples
    decode = num_drawn * facts.response_tok * (2 * shape.num_backbone + 2 * shape.num_head + attention)
    num_rounds = facts.response_tok * -(-num_drawn // facts.num_rows)
    read = num_rounds * (shape.num_parameters * facts.weight_bytes + facts.kv_tok * facts.kv_bytes_per_tok / 2)
    return (prefill + decode) / ceilings.flops + read / ceilings.bandwidth


def network_bytes(facts: Facts) -> dict[str, float]:
    """Bytes that one rank sends in a step, by purpose, with ring algorithms: (n - 1) / n of a tensor for each gather.

    data: gradients in float32, all-reduced once an optimizer step. FSDP2: layers gathered in the weights' dtype for
    every forward, and again for the backward (embedding and unembedding once); gradients reduced and scattered in
    float32 after every micro-batch; all weights gathered once to sample and once for a weight sync that copies. With
    hybrid sharding all that within a copy, and shards of gradients all-reduced between copies once an optimizer step.
    """
    shape, n = facts.shape, facts.num_ranks
    if n == 1:
        return {}
    if facts.num_shards == 1:
        return {"gradients": 2 * (n - 1) / n * 4.0 * shape.num_trained * facts.num_updates}
    num_copies, share = n // facts.num_shards, (facts.num_shards - 1) / facts.num_shards
    between = 2 * (num_copies - 1) / num_copies * 4.0 * shape.num_parameters / facts.num_shards
    whole = share * facts.weight_bytes * shape.num_parameters
    layers = share * facts.weight_bytes * shape.num_backbone
    num_batches = max(1, math.ceil(facts.forward_tok / facts.micro_tok))
    num_passes = num_batches * facts.num_iterations  # with gradient
    found = {
        "weights, update": num_passes * (whole + layers),
        "weights, forward alone": num_batches * (facts.has_reference + facts.share_scored) * whole,
        "gradients": num_passes * share * 4.0 * shape.num_parameters,
        "gradients, copies": facts.num_updates * between,
        "weights, sampling": whole if facts.is_sampled and facts.sampler == "builtin" else 0.0,
        "weights, sync": whole if facts.sampler_copies else 0.0,
    }
    return {name: num for name, num in found.items() if num}


# -- of the machine
def card_ceilings(name: str) -> tuple[Card, Ceilings]:
    """Returns a known GPU and its data-sheet ceilings. Raises UserError for an unknown name."""
    if name not in CARDS:
        raise UserError(f"--device must be one of {', '.join(CARDS)}, or be left out for this machine, got {name!r}")
    card = CARDS[name]
    return card, Ceilings(card.tflops * 1e12, card.tb_per_s * 1e12, f"{name}, data sheet")


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Ceilings:
    """Measures a square GEMM and a copy on ``device``: the best of the runs within ``seconds`` for each."""
    size, num_copied = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source, target = (torch.ones(num_copied, dtype=torch.uint8, device=device) for _ in range(2))
    product_s = _best_s(lambda: linear(a, b), device, seconds)
    copy_s = _best_s(lambda: target.copy_(source), device, seconds)
    return Ceilings(2 * size**3 / product_s, 2 * num_copied / copy_s, f"measured on this {device.type.upper()}")


def _best_s(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or best == float("inf"):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
