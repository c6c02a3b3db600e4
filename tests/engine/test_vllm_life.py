"""One real vLLM through the steps of a run: generate, pause, free memory, wake, publish, generate again, and all that
can come in between. On a GPU this is what a run does there; on the CPU the driver's mapping of memory has a double.
"""

import random
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from echo import Echo
from stop_truth import check_that_they_end_there, first_end
from transformers import LlamaConfig, Qwen2Config
from vllm_parts import (
    DEVICE,
    check_that_it_follows,
    drift,
    is_shared,
    make_policy,
    make_prompts,
    make_sampling,
    same_bits,
    with_vllm,
)

from isomorph.engine.config import SamplerConfig
from isomorph.engine.drift import check_ends
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.rollout.vllm import VllmSampler, start_vllm
from isomorph.engine.types import Prompt, Rollout

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "copy": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "shared": (Qwen2Config, {"tie_word_embeddings": True}),
}
TEXTS = ["wa wb wc wd we", "wz wy wx", "wk", "wq wr ws wt", "wm wn"]  # with 2 samples each more than fit at once


class Life(NamedTuple):
    policy: Policy
    sampler: VllmSampler
    process: list[tuple[Any, ...]]  # its generators and threads before and after the start


def core_of(sampler: VllmSampler) -> Any:
    return sampler.llm.llm_engine.engine_core.engine_core


def process_state() -> tuple[Any, ...]:
    threads = (torch.get_num_threads(), torch.set_num_threads)
    on_device = torch.cuda.get_rng_state().tolist() if DEVICE.type == "cuda" else []
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return (*threads, *state, on_device)


@pytest.fixture(scope="module", params=["copy", "shared"])
def started(request: pytest.FixtureRequest) -> Iterator[Life]:
    config_class, options = MODELS[request.param]
    policy = make_policy(config_class, **options)
    process = [process_state()]
    sampler = start_vllm(policy, SamplerConfig(kind="vllm", publish=request.param, max_seqs=4, memory_frac=0.3), 7)
    process.append(process_state())
    yield Life(policy, sampler, process)
    sampler.close()


# -- memory that can be freed
@dataclass
class Pages:
    """Stands for the CUDA driver, which unmaps and maps memory for vLLM's allocator: an unmapped page loses its bits.

    All above it is vLLM's own: engine, scheduler, executor, the GPU worker's methods, the allocator and its table.
    """

    core: Any
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    tags: dict[int, str] = field(default_factory=dict)
    unmapped: set[int] = field(default_factory=set)

    def unmap(self, handle: tuple[int, int, int, int]) -> None:
        assert handle[2] not in self.unmapped, "unmapped twice: an error of the driver"
        self.unmapped.add(handle[2])
        self.storages[handle[2]].fill_(0xFF)  # NaN, read as any float

    def map(self, handle: tuple[int, int, int, int]) -> None:
        self.unmapped.remove(handle[2])

    def is_given_back(self) -> bool:
        """Whether all of the KV cache is unmapped, and nothing else."""
        return self.unmapped == {pointer for pointer, tag in self.tags.items() if tag == "kv_cache"}


class Device:
    """The same question to a GPU: is there as much more free memory as the KV cache is large?"""

    def __init__(self, core: Any) -> None:
        self.num_bytes = sum(
            tensor.nbytes for tensor in core.model_executor.driver_worker.worker.model_runner.kv_caches
        )
        self.free_before = torch.cuda.mem_get_info()[0]

    def is_given_back(self) -> bool:
        return torch.cuda.mem_get_info()[0] >= self.free_before + 0.9 * self.num_bytes


def double_of_the_driver(core: Any, monkeypatch: pytest.MonkeyPatch) -> Pages:
    import vllm.device_allocator
    from vllm.device_allocator import AllocationData, cumem
    from vllm.v1.worker.gpu_worker import Worker

    pages, allocator = Pages(core), cumem.CuMemAllocator()
    worker = core.model_executor.driver_worker.worker
    tensors = [("kv_cache", tensor) for tensor in worker.model_runner.kv_caches]
    for tag, tensor in [*tensors, *(("weights", weight.data) for weight in worker.get_model().parameters())]:
        storage = tensor.untyped_storage()
        pages.storages[storage.data_ptr()], pages.tags[storage.data_ptr()] = storage, tag
        handle = (0, storage.nbytes(), storage.data_ptr(), 0)
        allocator.pointer_to_data[storage.data_ptr()] = AllocationData(handle, tag)
    monkeypatch.setattr(cumem, "unmap_and_release", pages.unmap)
    monkeypatch.setattr(cumem, "create_and_map", pages.map)
    monkeypatch.setattr(vllm.device_allocator, "get_mem_allocator_instance", lambda: allocator)
    for name in ("discard", "wake_up"):  # the CPU's worker refuses the one and ignores the other
        monkeypatch.setattr(worker, name, types.MethodType(getattr(Worker, name), worker), raising=False)
    monkeypatch.setattr(core.vllm_config.model_config, "enable_sleep_mode", True)
    return pages


@pytest.fixture
def life(started: Life) -> Life:
    """The engine with version 0 of its weights, as it is on this device."""
    assert hasattr(started.sampler, "llm"), "the test that closes it must be the last of this file"
    started.sampler.publish(0)
    return started


@pytest.fixture
def memory(life: Life, monkeypatch: pytest.MonkeyPatch) -> Pages | Device:
    core = core_of(life.sampler)
    return Device(core) if DEVICE.type == "cuda" else double_of_the_driver(core, monkeypatch)


@pytest.fixture(params=["step by step", "one step ahead"])
def pace(request: pytest.FixtureRequest, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU vLLM starts a step before it has read the one before; the CPU build does so when given the queue."""
    core = core_of(life.sampler)
    is_ahead = request.param == "one step ahead"
    if DEVICE.type == "cuda" and is_ahead != (core.batch_queue is not None):
        pytest.skip("a GPU has a pace of its own")
    if is_ahead and core.batch_queue is None:
        monkeypatch.setattr(core, "batch_queue", deque(maxlen=2))
        monkeypatch.setattr(core, "batch_queue_size", 2)
        monkeypatch.setattr(core, "step_fn", core.step_with_batch_queue)


def draw(life: Life, **changes: Any) -> list[Rollout]:
    return life.sampler.generate(make_prompts(life.policy, TEXTS), make_sampling(life.policy, **changes))


def is_empty(sampler: VllmSampler) -> bool:
    front, core = sampler.llm.llm_engine.output_processor, core_of(sampler)
    held = [front.request_states, front.parent_requests, front.external_req_ids, core.scheduler.requests]
    return not any(held) and not core.scheduler.has_requests() and not core.batch_queue


# -- the steps of a run
@with_vllm
def test_starting_leaves_the_generators_and_threads_of_the_process_alone(started: Life) -> None:
    before, after = started.process
    assert after == before


@with_vllm
def test_it_follows_the_trainer(life: Life) -> None:
    check_that_it_follows(life.policy, life.sampler)


@with_vllm
def test_rollouts_of_three_turns(life: Life) -> None:
    prompts = make_prompts(life.policy, TEXTS)
    sampling = make_sampling(life.policy, max_new_tok=40)
    drawn = []
    for delay_s in (0.0, 0.01):  # does not change a bit
        dialogue = Echo(delay_s=delay_s)
        rollouts = life.sampler.generate(prompts, sampling, dialogue=dialogue)
        drawn.append([(r.token_ids.tolist(), str(r.sampler_logprob), r.environment_reward) for r in rollouts])
        assert not dialogue.open and is_empty(life.sampler)
    assert drawn[0] == drawn[1]
    check_ends(rollouts, sampling)
    assert any(r.num_turns == 3 for r in rollouts)
    truth = trainer_logprob(life.policy, prompts, rollouts, temperature=1.0)
    for rollout, logprob in zip(rollouts, truth, strict=True):
        assert rollout.sampler_logprob is not None
        own = torch.ones(len(logprob), dtype=torch.bool) if rollout.is_target is None else rollout.is_target
        torch.testing.assert_close(rollout.sampler_logprob[own], logprob[own], rtol=0, atol=2e-4)


@with_vllm
def test_responses_end_with_the_token_that_completes_a_stop_string(life: Life, pace: None) -> None:
    prompts, stop = make_prompts(life.policy, TEXTS), ("wc wd", "we", "wk", "wa wa")
    free, ended = (
        life.sampler.generate(prompts, make_sampling(life.policy, samples_per_prompt=6, max_new_tok=20, stop=strings))
        for strings in ((), stop)
    )
    check_that_they_end_there(life.policy, stop, free, ended)
    check_ends(ended, make_sampling(life.policy, max_new_tok=20, stop=stop))
    assert not life.sampler.llm.llm_engine.has_unfinished_requests()
    sampling = make_sampling(life.policy, max_new_tok=40, stop=stop)
    rollouts = life.sampler.generate(prompts, sampling, dialogue=Echo(num_tok=9))
    check_ends(rollouts, sampling)
    turns = [turn.tolist() for r in rollouts for turn in r.turns[: -1 if r.finish == "length" else None]]
    ends = [(first_end(life.policy.text, stop, turn), len(turn)) for turn in turns if turn[-1] not in sampling.stop_ids]
    assert len(ends) > 4 and all(found == length for found, length in ends)


@with_vllm
def test_generate_sleep_learn_publish_and_generate_again(life: Life, memory: Pages | Device, pace: None) -> None:
    policy, sampler = life.policy, life.sampler
    prompts = make_prompts(policy, TEXTS)
    for version in (1, 2, 3):
        before = draw(life)
        assert is_empty(sampler)
        with sampler.asleep():
            assert memory.is_given_back()
            weights = [weight.clone() for weight in policy.snapshot()]
        assert not memory.is_given_back()
        assert all(torch.equal(a, b) for a, b in zip(weights, policy.snapshot(), strict=True))
        assert same_bits(draw(life), before)  # nothing of what was cached is used again
        policy.overwrite([0.95 * weight for weight in policy.snapshot()])
        sampler.publish(version)
        after = draw(life)
        assert drift(policy, prompts, after) < 1e-4
        assert not same_bits(after, before)


@with_vllm
def test_without_memory_to_give_back_it_is_paused_all_the_same(life: Life) -> None:
    before = draw(life)
    with life.sampler.asleep():
        assert core_of(life.sampler).is_scheduler_paused()
    assert not core_of(life.sampler).is_scheduler_paused()
    assert same_bits(draw(life), before)


@with_vllm
def test_requests_that_are_left_over_do_not_keep_it_awake(life: Life, memory: Pages | Device, pace: None) -> None:
    """Unfinished requests that were added to the engine directly."""
    before = draw(life)
    requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in make_prompts(life.policy, TEXTS)]
    from vllm import SamplingParams

    life.sampler.llm.enqueue(requests, SamplingParams(n=2, max_tokens=12, detokenize=False), use_tqdm=False)
    for _ in range(3):
        life.sampler.llm.llm_engine.step()
    assert not is_empty(life.sampler)
    with life.sampler.asleep():
        assert is_empty(life.sampler)
        assert memory.is_given_back()
    assert same_bits(draw(life), before)


@with_vllm
def test_an_empty_batch(life: Life, memory: Pages | Device) -> None:
    before = draw(life)
    assert life.sampler.generate([], make_sampling(life.policy)) == []
    for _ in range(2):  # twice in a row, nothing drawn between
        with life.sampler.asleep():
            assert memory.is_given_back()
        assert life.sampler.generate([], make_sampling(life.policy)) == []
    assert same_bits(draw(life), before)


class Stop(BaseException):
    """A stop signal may raise something that is no Exception."""


@with_vllm
@pytest.mark.parametrize("error", [ValueError, Stop, KeyboardInterrupt])
def test_what_a_callback_raises_leaves_no_request_behind(
    life: Life, memory: Pages | Device, pace: None, error: type[BaseException]
) -> None:
    before = draw(life)
    handed: list[int] = []

    def judge(index: int, group: list[Rollout]) -> None:
        handed.append(index)
        if len(handed) == 2:
            raise error("of the judge")

    def interrupted() -> None:
        handed.clear()
        prompts: list[Prompt] = make_prompts(life.policy, TEXTS)
        with pytest.raises(error, match="of the judge"):
            life.sampler.generate(prompts, make_sampling(life.policy), judge)
        assert len(handed) == 2  # of 5: the others were running or waiting
        assert is_empty(life.sampler)

    state = torch.get_rng_state()
    interrupted()
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(draw(life), before)
    interrupted()
    with life.sampler.asleep():
        assert memory.is_given_back()
    assert same_bits(draw(life), before)


@with_vllm
def test_a_stop_between_two_tokens_leaves_no_request_behind(life: Life, memory: Pages | Device, pace: None) -> None:
    before, called = draw(life), []

    def stop() -> None:
        called.append(True)
        if len(called) == 5:
            raise Stop

    with pytest.raises(Stop):
        life.sampler.generate(make_prompts(life.policy, TEXTS), make_sampling(life.policy), on_step=stop)
    assert is_empty(life.sampler)
    with life.sampler.asleep():
        assert memory.is_given_back()
    assert same_bits(draw(life), before)


@with_vllm
@pytest.mark.parametrize("num_steps", [0, 3])
def test_an_interrupt_while_the_model_computes(life: Life, memory: Pages | Device, num_steps: int) -> None:
    before = draw(life)
    left = [num_steps]

    def interrupt(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    hook = life.sampler.model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(life)
    hook.remove()
    assert is_empty(life.sampler)
    with life.sampler.asleep():
        assert memory.is_given_back()
    assert same_bits(draw(life), before)


@with_vllm
def test_what_the_learner_raises_wakes_it_up(life: Life, memory: Pages | Device) -> None:
    before = draw(life)
    with pytest.raises(ValueError, match="of the learner"), life.sampler.asleep():
        raise ValueError("of the learner")
    assert not memory.is_given_back()
    assert same_bits(draw(life), before)


@with_vllm
def test_nothing_is_generated_while_it_sleeps(life: Life, memory: Pages | Device) -> None:
    before = draw(life)
    with life.sampler.asleep():
        with pytest.raises(RuntimeError, match="vLLM is paused: leave the context"):
            draw(life)
        with pytest.raises(RuntimeError, match="vLLM is paused: leave the context"), life.sampler.asleep():
            pass
        assert memory.is_given_back()
    assert same_bits(draw(life), before)


@with_vllm
def test_publishing_while_it_sleeps(life: Life, memory: Pages | Device) -> None:
    policy, sampler = life.policy, life.sampler
    prompts, before = make_prompts(policy, TEXTS), draw(life)
    with sampler.asleep():
        policy.overwrite([0.9 * weight for weight in policy.snapshot()])
        publication = sampler.publish(9)
        assert memory.is_given_back()
        assert (publication.num_bytes == 0) == is_shared(sampler)
    after = draw(life)
    assert {r.policy_version for r in after} == {9}
    assert drift(policy, prompts, after) < 1e-4 < drift(policy, prompts, before)


@with_vllm
def test_closing_while_it_sleeps(life: Life, memory: Pages | Device) -> None:
    """The last test: the engine is gone afterwards. Another one starts in the same process, for the other parameter."""
    from vllm.distributed import model_parallel_is_initialized

    with life.sampler.asleep():
        life.sampler.close()
        assert not memory.is_given_back()  # what has no memory cannot be freed
    life.sampler.close()
    assert not model_parallel_is_initialized()
    assert not torch.distributed.is_initialized()
