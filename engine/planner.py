"""Estimates memory by use from a recipe and a model's sizes, without touching a device.

All numbers are those of one rank: its share of the prompts and, with FSDP2, its shard of the weights.

Memory peaks at three moments of a step:

    generate   the KV cache, and everything that is held throughout
    update     the end of a micro-batch's forward: its activations and one chunk of logits
    step       the end of the last backward: all gradients, no activations

Activations are what autograd saves of transformers' Llama layers. Seconds: engine/planner_time.py; changes that make a
stage fit: engine/planner_fit.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from isomorph.engine.config import EngineConfig, Stage
from isomorph.engine.rollout.decoder import num_prompt_slots
from isomorph.engine.update.logits_chunk import logits_chunk_rows
from isomorph.kernels.kept_tokens import BLOCK_BYTES, COPIES, most_bytes
from isomorph.kernels.linear import onednn_has_bfloat16
from isomorph.kernels.linear_chunks import logits_stride

Moment = Literal["generate", "update", "step"]
MOMENTS: tuple[Moment, ...] = ("generate", "update", "step")
GIB = 2**30
FLOAT64_BYTES = 8  # of a weight; the fused kernels of a layer do not take float64
CONTEXT_BYTES = GIB  # on a GPU: driver, cuBLAS and Triton before the first tensor
VLLM_OVERHEAD_BYTES = 2 * GIB  # vLLM: CUDA graphs and the activations of its largest batch
SAMPLER_LOGIT_COPIES = 4  # float32 [rows, V]: logits, log-probabilities, probabilities, their sums
TRUNCATED_LOGIT_COPIES = 8  # with top-k, top-p or min-p: sorted ones with their int64 ids, too


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder of the Llama family."""

    num_parameters: int  # a tied unembedding counts once; adapters are included
    num_trained: int  # with adapters: those of the adapters only
    adapter_rows: int  # sum of the ranks of a layer's adapters: their intermediate values per token
    num_layers: int
    width: int  # D
    inner: int  # width of the MLP
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_vocab: int
    is_tied: bool
    normalises_heads: bool  # Qwen3, OLMo-2: RMSNorm on queries and keys
    normalises_outputs: bool = False  # OLMo-2: the layer's norms follow attention and MLP

    @property
    def num_backbone(self) -> int:
        """Parameters of the decoder layers: all but embedding and unembedding."""
        return self.num_parameters - self.num_head * (1 if self.is_tied else 2)

    @property
    def has_adapters(self) -> bool:
        return self.num_trained < self.num_parameters

    @property
    def num_head(self) -> int:
        return self.num_vocab * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that memory and time of one step of one stage depend on, on one rank."""

    shape: ModelShape
    weight_bytes: int  # of one weight
    is_gpu: bool
    gradient_checkpointing_every: int | None
    has_reference: bool
    is_sampled: bool  # False: demonstrations
    share_scored: float  # of the step's tokens, whose old log-probabilities need a forward of their own; 0..1
    sampler: Literal["builtin", "vllm"]
    sampler_copies: bool  # vllm: has its own copy of the weights
    num_ranks: int
    num_shards: int  # FSDP2: ranks over which one copy of masters, moments and gradients is sharded; else 1
    memory_frac: float  # vllm
    max_seqs: int
    kv_limit_tok: int | None  # builtin: sampler.kv_tok
    keeps_cache: bool  # builtin: sampler.keep_cache
    prompts: int  # of the step, this rank's share
    samples: int
    drawn_prompts: int  # sampled in one call, this rank's share: those of a step, or of a round of STaR
    drawn_samples: int
    prompt_tok: float  # mean
    response_tok: float  # mean
    micro_tok: float  # packed tokens of the largest micro-batch
    num_updates: int
    num_iterations: int  # passes over the step's rollouts
    kept_bytes: float  # of the kept tokens of all rollouts, at most; 0: nothing is truncated
    device_gib: float
    optimizer_on_host: bool
    copies_checkpoint: bool  # run.checkpoint_in_background
    keeps_start: bool = False  # STaR from the stage's start: a copy of those weights
    overlaps: bool = False  # sampler.overlap: the next step is drawn while this one is learned
    process_gib: float | None = None  # Python and its libraries, before the model is loaded; None: not known

    @property
    def forward_tok(self) -> float:
        """Tokens through the decoder in one pass over the step; the prompt of a group counts once."""
        return self.prompts * (self.prompt_tok + self.samples * self.response_tok)

    @property
    def loss_tok(self) -> float:
        return self.prompts * self.samples * self.response_tok

    @property
    def has_several_micro_batches(self) -> bool:
        """Whether an optimizer step has."""
        return self.forward_tok * self.num_iterations > self.micro_tok * self.num_updates

    @property
    def num_rows(self) -> int:
        """Sequences decoded at once."""
        return min(self.max_seqs, self.drawn_prompts * self.drawn_samples)

    @property
    def kv_bytes_per_tok(self) -> int:
        return 2 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim * self.weight_bytes

    @property
    def kv_tok(self) -> float:
        """Tokens in the KV cache at once: the prompt of a group once, the full length of every response."""
        wanted = self.num_rows * (self.response_tok + self.prompt_tok / self.drawn_samples)
        return wanted if self.kv_limit_tok is None else min(wanted, self.kv_limit_tok)

    @property
    def cache_tok(self) -> float:
        """Tokens that the built-in sampler's KV cache has space for."""
        num_prompts = num_prompt_slots(self.drawn_prompts, self.num_rows, self.drawn_samples)
        wanted = self.num_rows * self.response_tok + num_prompts * self.prompt_tok
        return wanted if self.kv_limit_tok is None else min(wanted, self.kv_limit_tok)


class MemoryUse(NamedTuple):
    """Bytes held for one purpose, and when."""

    name: str
    num_bytes: float
    moments: tuple[Moment, ...]
    is_host: bool = False  # host memory, also on a GPU


# -- memory
def memory_uses(facts: Facts) -> list[MemoryUse]:
    """Returns the memory of every use that is not 0."""
    shape, trained = facts.shape, facts.shape.num_trained
    head_gradient = 0 if shape.has_adapters else shape.num_head * 4.0
    is_apart, is_cut = facts.optimizer_on_host, facts.num_shards > 1
    own = trained / facts.num_shards
    chunk_rows = min(logits_chunk_rows(shape.num_vocab, is_gpu=facts.is_gpu), facts.micro_tok)
    mask_bytes = min(BLOCK_BYTES, COPIES * chunk_rows * shape.num_vocab)
    device = "cuda" if facts.is_gpu else "cpu"
    drawing: tuple[Moment, ...] = MOMENTS if facts.overlaps else ("generate",)
    cached: tuple[Moment, ...] = MOMENTS if facts.keeps_cache else drawing
    logits = chunk_rows * logits_stride(shape.num_vocab, device) * 4
    first: tuple[Moment, ...] = ("update", "step") if facts.has_several_micro_batches else ("step",)
    if facts.is_gpu and is_apart:
        first = MOMENTS  # pinned, for all steps
    found = [
        MemoryUse("weights", shape.num_parameters * facts.weight_bytes, ("generate",) if is_cut else MOMENTS),
        MemoryUse("gathered layers", _gathered_bytes(facts) if is_cut else 0, ("update", "step")),
        MemoryUse("vLLM's weights", shape.num_parameters * facts.weight_bytes if facts.sampler_copies else 0, MOMENTS),
        MemoryUse("weights to draw from", trained * facts.weight_bytes if facts.overlaps else 0, MOMENTS),
        MemoryUse("mismatch of what is drawn", _pass_bytes(facts) + logits if facts.overlaps else 0, MOMENTS),
        MemoryUse("gradients between ranks", _travelling_bytes(facts), ("step",)),
        MemoryUse("masters", own * 4.0 if has_masters(facts) else 0, MOMENTS, is_host=is_apart),
        MemoryUse("moments", own * 8.0, MOMENTS, is_host=is_apart),
        MemoryUse("gradients", own * 4.0, first, is_host=is_apart),
        MemoryUse("sums of gradients", own * 4.0 if _sums_on_device(facts) else 0, ("update",)),
        MemoryUse("activations", facts.micro_tok * activation_bytes_per_tok(facts), ("update",)),
        MemoryUse("logits chunk", logits, ("update",)),
        MemoryUse("head gradient", head_gradient + facts.micro_tok * shape.width * 8, ("update",)),
        MemoryUse("reference", _snapshot_bytes(facts) if facts.has_reference else 0, MOMENTS, is_host=True),
        MemoryUse("weights at the start", _snapshot_bytes(facts) if facts.keeps_start else 0, MOMENTS, is_host=True),
        MemoryUse("checkpoint's copy", _checkpoint_bytes(facts), MOMENTS, is_host=True),
        MemoryUse("KV cache", _kv_bytes(facts) if facts.is_sampled else 0, cached),
        MemoryUse("sampler", _sampler_bytes(facts) if facts.is_sampled else 0, cached),
        MemoryUse("prepacked weights", _prepacked_bytes(facts), drawing),
        MemoryUse("kept tokens, at most", facts.kept_bytes, MOMENTS, is_host=True),
        MemoryUse("packed kept tokens", facts.kept_bytes, ("update", "step"), is_host=True),
        MemoryUse("kept masks", mask_bytes if facts.kept_bytes else 0, ("update",)),
        MemoryUse("device context", CONTEXT_BYTES if facts.is_gpu else 0, MOMENTS),
        MemoryUse("process", (facts.process_gib or 0) * GIB, MOMENTS, is_host=True),
    ]
    return [use for use in found if use.num_bytes]


def _sums_on_device(facts: Facts) -> bool:
    """Whether gradients for masters in host memory are added up on the device before they move (host_gradients.py)."""
    return facts.is_gpu and facts.optimizer_on_host and facts.has_several_micro_batches


def activation_bytes_per_tok(facts: Facts) -> float:
    """Bytes a token: activations saved for backward, and those of the layer that is being computed."""
    shape, size = facts.shape, facts.weight_bytes
    layer = layer_bytes_per_tok(shape, size, is_fused=size < FLOAT64_BYTES)
    every = facts.gradient_checkpointing_every
    num_recomputed = 0 if every is None else -(-shape.num_layers // every)
    kept = (shape.num_layers - num_recomputed) * layer + num_recomputed * shape.width * size
    run_again = layer if num_recomputed else 0
    at_work = size * (2 * shape.inner + 2 * shape.width)  # gradients of the MLP's inner rows
    return kept + run_again + at_work + 3 * size * shape.width


def layer_bytes_per_tok(shape: ModelShape, size: int, *, is_fused: bool = False) -> float:
    """Bytes a token that autograd saves of one decoder layer; ``size``: bytes of a weight.

    RMSNorm saves its input in float32, the normalised rows and its output. With adapters norms are frozen and the
    normalised rows are not saved; but the product with each A is. ``is_fused``: with the kernels of
    engine/model/layers.py a norm saves its input and its output, and SwiGLU no SiLU. A norm that follows attention or
    MLP (OLMo-2) multiplies in float32; its output is added and not saved, but the layer's input is.
    """
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    of_norm = 2 * size if is_fused else 4 + (1 if shape.has_adapters else 2) * size
    is_wide = shape.normalises_outputs and not is_fused and not shape.has_adapters
    norms = 2 * shape.width * (of_norm + (4 - size if is_wide else 0))
    of_head_norm = size if is_fused else of_norm  # the output is rotated, and not saved
    head_norms = (queries + keys) * of_head_norm if shape.normalises_heads else 0
    attention = size * (2 * queries + 2 * keys) + 4 * shape.num_heads  # q, out, k, v; LSE
    mlp = size * (3 if is_fused else 4) * shape.inner  # gate, silu(gate), up, their product
    return norms + head_norms + attention + mlp + size * shape.adapter_rows


def _pass_bytes(facts: Facts) -> float:
    """Activations of a micro-batch's pass without gradient: of one layer."""
    shape, size = facts.shape, facts.weight_bytes
    return facts.micro_tok * layer_bytes_per_tok(shape, size, is_fused=size < FLOAT64_BYTES)


def _gathered_bytes(facts: Facts) -> float:
    """FSDP2: embedding and unembedding are unsharded during the whole pass, and so are two layers (one prefetched)."""
    shape = facts.shape
    outside = shape.num_parameters - shape.num_backbone
    return facts.weight_bytes * (outside + 2 * shape.num_backbone / shape.num_layers)


def _travelling_bytes(facts: Facts) -> float:
    """Gradients on their way between ranks, at the end of the backward.

    Data parallel: none beside the gradients themselves. FSDP2: of embedding and unembedding, which are reduced last,
    the full gradient and its float32 copy; gloo, on the CPU, copies that once more.
    """
    shape = facts.shape
    if facts.num_shards == 1:
        return 0
    outside = shape.num_parameters - shape.num_backbone
    return outside * (facts.weight_bytes + 4.0 + (0 if facts.is_gpu else 4))


def has_masters(facts: Facts) -> bool:
    """Whether float32 masters are kept apart from the weights that are computed with."""
    return facts.weight_bytes < 4 or facts.optimizer_on_host or facts.num_shards > 1


def _checkpoint_bytes(facts: Facts) -> float:
    """What is copied for a checkpoint that is written while training goes on: on the first rank, or its own shards."""
    if not facts.copies_checkpoint:
        return 0
    own = facts.shape.num_trained / facts.num_shards
    weights = 4.0 if facts.num_shards > 1 else facts.weight_bytes + (4.0 if has_masters(facts) else 0.0)
    num_writers = facts.num_ranks / facts.num_shards if facts.num_shards > 1 else 1  # copies, each writes every n-th
    return (own * (weights + 8) + (facts.has_reference + facts.keeps_start) * _snapshot_bytes(facts)) / num_writers


def _snapshot_bytes(facts: Facts) -> float:
    """A copy of weights in host memory: in their dtype; with FSDP2 a shard of float32 masters."""
    size = 4 if facts.num_shards > 1 else facts.weight_bytes
    return facts.shape.num_trained * size / facts.num_shards


def _kv_bytes(facts: Facts) -> float:
    """The KV cache: what the sequences need; vLLM within its share of the memory, of which it takes all on a GPU."""
    if facts.sampler == "builtin":
        return facts.cache_tok * facts.kv_bytes_per_tok
    wanted = facts.kv_tok * facts.kv_bytes_per_tok
    share = _vllm_share_bytes(facts)
    return share if facts.is_gpu else min(wanted, share)


def _vllm_share_bytes(facts: Facts) -> float:
    """What ``sampler.memory_frac`` leaves for vLLM's KV cache."""
    own = facts.shape.num_parameters * facts.weight_bytes + VLLM_OVERHEAD_BYTES
    return max(0.0, facts.memory_frac * facts.device_gib * GIB - own)


def holds_a_sequence(facts: Facts) -> bool:
    """Whether vLLM's share of the memory has room for the keys and values of one sequence: it does not start else."""
    if not facts.is_sampled or facts.sampler == "builtin":
        return True
    return _vllm_share_bytes(facts) >= (facts.prompt_tok + facts.response_tok) * facts.kv_bytes_per_tok


def _sampler_bytes(facts: Facts) -> float:
    if facts.sampler == "vllm":
        return VLLM_OVERHEAD_BYTES
    copies = TRUNCATED_LOGIT_COPIES if facts.kept_bytes else SAMPLER_LOGIT_COPIES
    return copies * 4 * facts.num_rows * facts.shape.num_vocab


def _prepacked_bytes(facts: Facts) -> float:
    """Prepacked copies of the weights: the built-in sampler, on a CPU whose oneDNN multiplies their dtype."""
    is_prepacked = facts.is_sampled and facts.sampler == "builtin" and not facts.is_gpu
    is_prepacked &= facts.weight_bytes == 4 or (facts.weight_bytes == 2 and onednn_has_bfloat16())
    return facts.shape.num_backbone * facts.weight_bytes if is_prepacked else 0


def peak_bytes(facts: Facts, moment: Moment) -> float:
    """Bytes in use at ``moment`` on the device; on the CPU, of the process."""
    return sum(a.num_bytes for a in memory_uses(facts) if moment in a.moments and not (facts.is_gpu and a.is_host))


def largest_micro_tok(facts: Facts) -> int:
    """Packed tokens of the largest micro-batch that fits; 0 if none does."""
    low, high = 0, 1
    while _fits(facts, high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(facts, middle) else (low, middle)
    return low


def _fits(facts: Facts, micro_tok: int) -> bool:
    tried = dataclasses.replace(facts, micro_tok=micro_tok)
    return max(peak_bytes(tried, "update"), peak_bytes(tried, "step")) <= facts.device_gib * GIB


def largest_kv_tok(facts: Facts) -> int:
    """Capacity of the KV cache in tokens beside everything else; with vLLM within its share of the memory."""
    uses = [a for a in memory_uses(facts) if a.name != "KV cache" and not (facts.is_gpu and a.is_host)]
    moments = MOMENTS if facts.keeps_cache or facts.overlaps else ("generate",)
    rest = max(sum(a.num_bytes for a in uses if moment in a.moments) for moment in moments)
    free = facts.device_gib * GIB - rest
    if facts.sampler == "vllm":
        free = min(free, _vllm_share_bytes(facts))
    return max(0, int(free / facts.kv_bytes_per_tok))


# -- from a recipe
def facts_of(
    config: EngineConfig,
    stage: Stage,
    shape: ModelShape,
    *,
    prompt_tok: float,
    device_gib: float,
    is_gpu: bool,
    num_ranks: int = 1,
) -> Facts:
    """Facts of the longest step of ``stage``: all responses of maximum length, on the rank with most prompts."""
    is_supervised, batch = stage.objective.is_supervised, stage.batch
    num_parts = batch.prompts // (batch.prompts_per_update or batch.prompts)
    num_updates = batch.num_iterations * num_parts
    # the first update of a round computes its own with its gradient, unless the reward needs them before
    share_scored = 1.0 if stage.objective.reward_kl_coef > 0 else 1 - 1 / num_parts
    num_tok, cut = (
        batch.prompts * stage.sampling.samples_per_prompt * stage.sampling.max_new_tok,
        stage.sampling.truncation,
    )
    facts = Facts(
        shape=shape,
        weight_bytes={"float32": 4, "bfloat16": 2}[config.model.dtype],
        is_gpu=is_gpu,
        gradient_checkpointing_every=config.model.gradient_checkpointing_every,
        has_reference=stage.objective.needs_reference,
        is_sampled=not is_supervised,
        share_scored=share_scored if stage.objective.old_logprob == "trainer" and not is_supervised else 0.0,
        sampler=config.sampler.kind,
        sampler_copies=config.sampler.kind == "vllm" and config.sampler.publish == "copy",
        num_ranks=num_ranks,
        num_shards=min(config.parallel.shards or num_ranks, num_ranks) if config.parallel.kind == "fsdp" else 1,
        memory_frac=config.sampler.memory_frac,
        max_seqs=config.sampler.max_seqs,
        kv_limit_tok=config.sampler.kv_tok,
        keeps_cache=config.sampler.kind == "builtin" and config.sampler.keep_cache,
        prompts=-(-batch.prompts // num_ranks),
        samples=stage.sampling.samples_per_prompt,
        drawn_prompts=-(-batch.prompts // num_ranks),
        drawn_samples=stage.sampling.samples_per_prompt,
        prompt_tok=prompt_tok,
        response_tok=stage.sampling.max_new_tok,
        micro_tok=batch.micro_batch_tok,
        num_updates=num_updates,
        num_iterations=batch.num_iterations,
        kept_bytes=most_bytes(num_tok, shape.num_vocab, cut.top_k) if cut.is_on and not is_supervised else 0,
        device_gib=device_gib,
        optimizer_on_host=config.model.offload_optimizer,
        copies_checkpoint=config.run.checkpoint_in_background,
        overlaps=config.sampler.overlap and not is_supervised,
    )
    return dataclasses.replace(
        facts, micro_tok=min(batch.micro_batch_tok, facts.forward_tok / num_updates * batch.num_iterations)
    )
