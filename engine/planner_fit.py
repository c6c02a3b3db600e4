"""Changes to a recipe that make a stage fit into its device's memory, each with what it costs.

    changes_that_fit(facts, ceilings, adapters)  -> list[Remedy]

Costs are arithmetic, as the plan's own numbers are: seconds are lower bounds, and bytes are not measured.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from isomorph.engine.planner import (
    GIB,
    MOMENTS,
    Facts,
    ModelShape,
    holds_a_sequence,
    largest_micro_tok,
    memory_uses,
    peak_bytes,
)
from isomorph.engine.planner_time import Ceilings, network_bytes, seconds

MOST_RANKS = 64


class Remedy(NamedTuple):
    """A change, or several together."""

    write: tuple[str, ...]  # keys with their values, as a recipe or a command line writes them
    peak_gib: float  # with it, on the device
    host_gib: float  # and in the host's memory, on a GPU
    is_enough: bool
    costs: tuple[str, ...]  # one for each of ``write``


class _Change(NamedTuple):
    write: str
    facts: Facts
    cost: str


_Maker = Callable[[Facts, Ceilings], _Change | None]


def changes_that_fit(facts: Facts, ceilings: Ceilings, adapters: ModelShape | None = None) -> list[Remedy]:
    """Every change that lowers the peak, by itself; and where none is enough, the fewest in turn that are together.

    ``adapters``: the model's sizes with LoRA adapters; None: LoRA is not considered. Empty where the stage fits.
    """
    if fits(facts):
        return []
    kept = [
        _larger_share,
        _shared_weights,
        _no_copy,
        _fewer_sequences,
        _checkpointing,
    ]  # with each way of holding the optimizer
    ways: list[list[_Maker]] = [[_host_optimizer], [_shards]]
    if adapters is not None:
        ways.append([lambda given, _: _adapters(given, adapters)])
    single = [make for make in (*kept, *(way[0] for way in ways), _micro_batch)]
    alone = [_remedy(facts, [change]) for make in single if (change := make(facts, ceilings)) is not None]
    found = [remedy for remedy in alone if remedy.is_enough or remedy.peak_gib < peak_gib(facts)]
    if any(remedy.is_enough for remedy in found):
        return found
    together = [_in_turn(facts, ceilings, [*kept, *way]) for way in ways]
    return found + [remedy for remedy in together if remedy is not None]


def fits(facts: Facts) -> bool:
    """Whether the peak is within the device's memory, and vLLM's share of it holds a sequence."""
    return peak_gib(facts) <= facts.device_gib and holds_a_sequence(facts)


def peak_gib(facts: Facts) -> float:
    """The highest of the step's peaks on the device."""
    return max(peak_bytes(facts, moment) for moment in MOMENTS) / GIB


def host_gib(facts: Facts) -> float:
    """The highest of the step's peaks in host memory, on a GPU."""
    uses = [use for use in memory_uses(facts) if use.is_host]
    return max(sum(use.num_bytes for use in uses if moment in use.moments) for moment in MOMENTS) / GIB


def with_shards(facts: Facts, num_ranks: int) -> Facts:
    """``facts`` with FSDP2 on ``num_ranks``: weights, states and prompts divided among them."""
    share = facts.num_ranks / num_ranks
    prompts, drawn = (max(1, math.ceil(n * share)) for n in (facts.prompts, facts.drawn_prompts))
    changed = dataclasses.replace(
        facts,
        num_ranks=num_ranks,
        num_shards=num_ranks,
        prompts=prompts,
        drawn_prompts=drawn,
        sampler_copies=facts.sampler == "vllm",
    )
    return dataclasses.replace(changed, micro_tok=min(changed.micro_tok, changed.forward_tok))


def _remedy(facts: Facts, changes: list[_Change]) -> Remedy:
    last = changes[-1].facts if changes else facts
    write, costs = tuple(change.write for change in changes), tuple(change.cost for change in changes)
    return Remedy(write, peak_gib(last), host_gib(last), fits(last), costs)


def _in_turn(facts: Facts, ceilings: Ceilings, makers: list[_Maker]) -> Remedy | None:
    """The changes of ``makers`` one upon the other, each that lowers the peak, then a micro-batch that fits."""
    changes: list[_Change] = []
    for make in makers:
        change = make(facts, ceilings)
        if change is None or (make is not _larger_share and peak_gib(change.facts) >= peak_gib(facts)):
            continue
        changes.append(change)
        facts = change.facts
        if not fits(facts) and (smaller := _micro_batch(facts, ceilings)) is not None and fits(smaller.facts):
            return _remedy(facts, [*changes, smaller])
        if fits(facts):
            return _remedy(facts, changes)
    return None


# -- one change each; None where the recipe has it already, or it is refused with what the recipe has
def _larger_share(facts: Facts, ceilings: Ceilings) -> _Change | None:
    if holds_a_sequence(facts):
        return None
    for twentieths in range(math.ceil(facts.memory_frac * 20), 20):
        changed = dataclasses.replace(facts, memory_frac=twentieths / 20)
        if holds_a_sequence(changed):
            cost = "vLLM does not start else: its weights leave no room for the keys and values of one sequence"
            return _Change(f"sampler.memory_frac = {changed.memory_frac:g}", changed, cost)
    return None


def _shared_weights(facts: Facts, ceilings: Ceilings) -> _Change | None:
    if not facts.sampler_copies or facts.num_shards > 1 or facts.shape.has_adapters:
        return None
    changed = dataclasses.replace(facts, sampler_copies=False)
    return _Change('sampler.publish = "shared"', changed, "none: trainer and vLLM then read the same weights")


def _no_copy(facts: Facts, ceilings: Ceilings) -> _Change | None:
    if not facts.copies_checkpoint:
        return None
    changed = dataclasses.replace(facts, copies_checkpoint=False)
    return _Change("run.checkpoint_in_background = false", changed, "training waits while a checkpoint is written")


def _fewer_sequences(facts: Facts, ceilings: Ceilings) -> _Change | None:
    if facts.sampler != "builtin" or not facts.is_sampled:
        return None
    rows, changed = facts.num_rows, facts
    while rows > 1 and peak_bytes(changed, "generate") > facts.device_gib * GIB:
        rows //= 2
        changed = dataclasses.replace(facts, max_seqs=rows)
    if changed is facts:
        return None
    factor = seconds(changed, ceilings)["generate"] / seconds(facts, ceilings)["generate"]
    return _Change(f"sampler.max_seqs = {rows}", changed, f"generate at least {factor:.2f} times as long")


def _checkpointing(facts: Facts, ceilings: Ceilings) -> _Change | None:
    if facts.gradient_checkpointing_every == 1:
        return None
    changed = dataclasses.replace(facts, gradient_checkpointing_every=1)
    factor = seconds(changed, ceilings)["update"] / seconds(facts, ceilings)["update"]
    return _Change(
        "model.gradient_checkpointing_every = 1", changed, f"update {factor:.2f} times as long: one more forward"
    )


def _host_optimizer(facts: Facts, ceilings: Ceilings) -> _Change | None:
    if facts.optimizer_on_host or facts.num_shards > 1 or not facts.is_gpu:
        return None
    changed = dataclasses.replace(facts, optimizer_on_host=True)
    more = seconds(changed, ceilings)["update"] - seconds(facts, ceilings)["update"]
    cost = f"{host_gib(changed):.0f} GiB of host memory a rank; update {more:.1f} s longer at an assumed 50 GB/s"
    return _Change("model.offload_optimizer = true", changed, cost)


def _shards(facts: Facts, ceilings: Ceilings) -> _Change | None:
    """The fewest ranks that are enough, doubled from what there is; the most there can be where none is."""
    if facts.shape.has_adapters or facts.optimizer_on_host:
        return None
    num_ranks = max(2, facts.num_ranks)
    while num_ranks < MOST_RANKS and not fits(with_shards(facts, num_ranks)):
        num_ranks *= 2
    changed = with_shards(facts, num_ranks)
    if changed == facts:
        return None
    sent = sum(network_bytes(changed).values()) / GIB
    sync = ', sampler.publish = "copy"' if facts.sampler == "vllm" and not facts.sampler_copies else ""
    cost = f"{num_ranks} devices; each sends {sent:,.0f} GiB a step to the others"
    whole = " without parallel.shards" if 1 < facts.num_shards < facts.num_ranks else ""
    return _Change(f'parallel.kind = "fsdp"{whole}{sync} on {num_ranks} ranks', changed, cost)


def _adapters(facts: Facts, shape: ModelShape) -> _Change | None:
    if facts.shape.has_adapters or facts.num_shards > 1:
        return None
    sync = ', sampler.publish = "copy"' if facts.sampler == "vllm" and not facts.sampler_copies else ""
    changed = dataclasses.replace(facts, shape=shape, sampler_copies=facts.sampler == "vllm")
    share = shape.num_trained / facts.shape.num_parameters
    return _Change(f"[lora]{sync}", changed, f"adapters alone are trained: {share:.1%} of the weights' number")


def _micro_batch(facts: Facts, ceilings: Ceilings) -> _Change | None:
    """The largest micro-batch that fits; it must hold a prompt with one response, on which the learner insists."""
    largest, least = largest_micro_tok(facts), math.ceil(facts.prompt_tok + facts.response_tok)
    if largest < least or largest >= facts.micro_tok:
        return None
    group_tok = facts.prompt_tok + facts.samples * facts.response_tok
    parts = math.ceil(facts.samples / max(1, (largest - facts.prompt_tok) // facts.response_tok))
    more = (parts - 1) * facts.prompt_tok / group_tok
    cost = "none in its result: gradients do not depend on it; " + (
        f"groups are cut into {parts} parts, {more:.1%} more tokens" if parts > 1 else "groups stay whole"
    )
    return _Change(f"batch.micro_batch_tok = {largest}", dataclasses.replace(facts, micro_tok=largest), cost)
