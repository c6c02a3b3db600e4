"""Changes that make a stage fit, and what ranks, STaR, checkpoints and the process add: by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from isomorph.engine.config import EngineConfig, LoraConfig, ModelConfig, Stage
from isomorph.engine.model.load import read_shape
from isomorph.engine.planner import GIB, Facts, facts_of, memory_uses, peak_bytes
from isomorph.engine.planner_fit import Remedy, changes_that_fit, fits, peak_gib, with_shards
from isomorph.engine.planner_time import card_ceilings, network_bytes, seconds

SEVEN_B = Path(__file__).parents[2] / "curriculum" / "recipes" / "shapes" / "qwen2.5-7b"
WEIGHTS, HEAD = 7_615_616_512, 152_064 * 3584  # of Qwen2.5-7B; the unembedding has a tensor of its own
CARD = card_ceilings("h200")[1]


def seven_b(num_ranks: int = 1, kind: str = "data", shards: int | None = None, **changes: Any) -> Facts:
    """2 prompts of 100 tokens with 3 responses of 50 on each rank."""
    model = ModelConfig(path=str(SEVEN_B), dtype="bfloat16")
    batch, sampling = {"prompts": 2 * num_ranks}, {"samples_per_prompt": 3, "max_new_tok": 50}
    stage = Stage.model_validate({"name": "a", "steps": 1, "batch": batch, "sampling": sampling})
    config = EngineConfig.model_validate({"model": model, "parallel": {"kind": kind, "shards": shards}})
    facts = facts_of(
        config, stage, read_shape(model, []), prompt_tok=100, device_gib=139.8, is_gpu=True, num_ranks=num_ranks
    )
    return dataclasses.replace(facts, **changes)


def uses(facts: Facts) -> dict[str, float]:
    return {use.name: use.num_bytes for use in memory_uses(facts)}


def test_gradients_of_data_parallel_ranks_travel_twice_in_float32() -> None:
    assert network_bytes(seven_b(1)) == {}
    assert network_bytes(seven_b(4)) == {"gradients": pytest.approx(2 * 3 / 4 * 4 * WEIGHTS)}
    assert network_bytes(seven_b(4, num_updates=2)) == {"gradients": pytest.approx(2 * 2 * 3 / 4 * 4 * WEIGHTS)}


def test_fsdp_gathers_layers_twice_a_micro_batch_and_reduces_gradients_once() -> None:
    """500 packed tokens in micro-batches of 250: two passes. Layers are 2 bytes a weight, gradients 4."""
    facts = seven_b(4, "fsdp", micro_tok=250)
    assert facts.forward_tok == 2 * (100 + 3 * 50)
    layers = WEIGHTS - 2 * HEAD
    expected = {
        "weights, update": 2 * 3 / 4 * 2 * (WEIGHTS + layers),
        "gradients": 2 * 3 / 4 * 4 * WEIGHTS,
        "weights, sampling": 3 / 4 * 2 * WEIGHTS,
    }
    assert network_bytes(facts) == {name: pytest.approx(num) for name, num in expected.items()}
    repeated = network_bytes(dataclasses.replace(facts, has_reference=True, sampler="vllm", sampler_copies=True))
    assert repeated["weights, forward alone"] == pytest.approx(2 * 3 / 4 * 2 * WEIGHTS)
    assert repeated["weights, sync"] == pytest.approx(3 / 4 * 2 * WEIGHTS) and "weights, sampling" not in repeated


def test_copies_of_shards_gather_among_themselves_and_sum_gradients_once_a_step() -> None:
    """As above, on 8 ranks as 2 copies of 4 shards: 2 * 1/2 of a shard of gradients travels between the copies."""
    whole, facts = seven_b(4, "fsdp", micro_tok=250), seven_b(8, "fsdp", 4, micro_tok=250)
    assert facts.num_shards == 4 and facts.forward_tok == whole.forward_tok
    between = {"gradients, copies": pytest.approx(2 * 1 / 2 * 4 * WEIGHTS / 4)}
    assert network_bytes(facts) == network_bytes(whole) | between
    held, of_whole = uses(facts), uses(whole)
    assert (
        held.pop("checkpoint's copy") == of_whole.pop("checkpoint's copy") / 2
    )  # each copy writes half of the tensors
    assert held == of_whole
    assert seven_b(2, "fsdp", 4).num_shards == 2


def test_a_second_pass_over_the_rollouts_takes_as_long_as_the_first() -> None:
    once = seconds(seven_b(), CARD)["update"]
    twice = seconds(seven_b(num_iterations=2, num_updates=2), CARD)["update"]
    assert twice == pytest.approx(2 * once, rel=1e-9)


def test_a_checkpoints_copy_is_what_the_checkpoint_holds() -> None:
    """Weights in bfloat16, masters and two moments in float32; float32 weights are their own masters."""
    assert uses(seven_b())["checkpoint's copy"] == (2 + 4 + 8) * WEIGHTS
    assert uses(seven_b(weight_bytes=4))["checkpoint's copy"] == (4 + 8) * WEIGHTS
    assert uses(seven_b(4, "fsdp"))["checkpoint's copy"] == pytest.approx((4 + 8) * WEIGHTS / 4)
    assert uses(seven_b(has_reference=True))["checkpoint's copy"] == (2 + 4 + 8 + 2) * WEIGHTS
    assert "checkpoint's copy" not in uses(seven_b(copies_checkpoint=False))
    on_cpu = {name: peak_bytes(seven_b(is_gpu=False, copies_checkpoint=it), "step") for name, it in BOTH.items()}
    assert on_cpu["copied"] - on_cpu["not"] == (2 + 4 + 8) * WEIGHTS
    assert peak_bytes(seven_b(), "step") == peak_bytes(seven_b(copies_checkpoint=False), "step")  # host memory


BOTH = {"copied": True, "not": False}


def test_the_process_counts_where_it_shares_memory_with_the_tensors() -> None:
    assert peak_gib(seven_b(process_gib=0.5)) == peak_gib(seven_b())
    small, none = seven_b(is_gpu=False, process_gib=0.5), seven_b(is_gpu=False)
    assert peak_gib(small) - peak_gib(none) == pytest.approx(0.5)


def test_what_star_samples_between_steps_has_a_cache_of_its_own() -> None:
    """64 questions with 4 answers each: 256 sequences of 50 tokens, and 64 prompts of 100."""
    step = seven_b(is_sampled=False)
    assert "KV cache" not in uses(step)
    star = seven_b(drawn_prompts=64, drawn_samples=4)
    assert star.num_rows == 256 and star.kv_tok == 256 * 50 + 64 * 100
    assert uses(star)["KV cache"] == star.kv_tok * 2 * 28 * 4 * 128 * 2
    started = uses(seven_b(keeps_start=True))
    assert started["weights at the start"] == 2 * WEIGHTS
    longer = seconds(star, CARD)
    assert longer["update"] == seconds(step, CARD)["update"] and longer["generate"] > 0


def by_key(remedies: list[Remedy]) -> dict[str, Remedy]:
    return {remedy.write[0].split(" = ")[0]: remedy for remedy in remedies if len(remedy.write) == 1}


def test_what_fits_needs_no_change() -> None:
    assert fits(seven_b(copies_checkpoint=False)) and changes_that_fit(seven_b(copies_checkpoint=False), CARD) == []


def test_each_change_says_what_it_leaves_and_what_it_costs() -> None:
    """16 bytes a weight in bfloat16 with masters: 113.5 GiB of weights, masters, moments and gradients in 80 GiB."""
    facts = seven_b(device_gib=79.6)
    lora = read_shape(ModelConfig(path=str(SEVEN_B), dtype="bfloat16"), [], LoraConfig())
    found = by_key(changes_that_fit(facts, CARD, lora))
    assert found.keys() >= {"model.offload_optimizer", "parallel.kind", "[lora]"}
    on_host = found["model.offload_optimizer"]
    assert on_host.is_enough and on_host.peak_gib == pytest.approx(
        peak_gib(dataclasses.replace(facts, optimizer_on_host=True))
    )
    held = (4 + 8 + 4 + 14) * WEIGHTS / GIB  # masters, moments, gradients, and the checkpoint's copy
    assert f"{held:.0f} GiB of host memory" in on_host.costs[0]
    ranks = found["parallel.kind"]
    assert ranks.write == ('parallel.kind = "fsdp" on 2 ranks',) and ranks.is_enough
    assert ranks.peak_gib == pytest.approx(peak_gib(with_shards(facts, 2)))
    assert "0.5% of the weights" in found["[lora]"].costs[0]


def test_checkpointing_costs_one_more_forward() -> None:
    free = seven_b(micro_tok=16384, prompts=64, device_gib=160)
    assert not fits(free)
    (found,) = [r for r in changes_that_fit(free, CARD) if r.write[0].startswith("model.gradient_checkpointing")]
    assert found.costs[0].startswith("update 1.29") and found.peak_gib < peak_gib(free)
    # 4 passes where there were 3, beside the optimizer's step


def test_a_smaller_micro_batch_repeats_prompts_of_groups_that_it_cuts() -> None:
    """Of 10,000 + 3 * 5,000 tokens 22,000 fit: two parts, of two responses and of one, repeat the prompt once."""
    free = seven_b(micro_tok=50_000, prompt_tok=10_000.0, response_tok=5_000.0)
    room = peak_gib(dataclasses.replace(free, micro_tok=22_000))
    (cut,) = [r for r in changes_that_fit(dataclasses.replace(free, device_gib=room), CARD) if "micro" in r.write[0]]
    assert cut.write == ("batch.micro_batch_tok = 22000",) and cut.is_enough
    assert "cut into 2 parts, 40.0% more tokens" in cut.costs[0]


def test_changes_are_put_together_where_none_is_enough_alone() -> None:
    """The optimizer in host memory leaves weights, sums of gradients, and activations; checkpointing shrinks these."""
    facts = seven_b(micro_tok=32768, prompts=12800, device_gib=52)
    remedies = changes_that_fit(facts, CARD)
    assert not any(remedy.is_enough for remedy in by_key(remedies).values())
    together = [remedy for remedy in remedies if len(remedy.write) > 1 and remedy.is_enough]
    assert any("model.offload_optimizer = true" in remedy.write for remedy in together)
    assert all(remedy.peak_gib <= 52 and len(remedy.write) == len(remedy.costs) for remedy in together)
    assert changes_that_fit(dataclasses.replace(facts, device_gib=1), CARD) != []


def test_a_share_of_the_memory_without_room_for_a_sequence_does_not_fit() -> None:
    """14.2 GiB of weights and 2 GiB besides leave nothing of 16 GiB, a fifth of 80."""
    vllm = seven_b(copies_checkpoint=False, device_gib=80, optimizer_on_host=True, sampler="vllm", memory_frac=0.2)
    assert peak_gib(vllm) < 80 and not fits(vllm)
    (found,) = [remedy for remedy in changes_that_fit(vllm, CARD) if remedy.is_enough]
    assert found.write == ("sampler.memory_frac = 0.25",) and "vLLM does not start" in found.costs[0]
