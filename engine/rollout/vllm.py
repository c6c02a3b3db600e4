"""The vLLM sampler: ``vllm.LLM`` in the trainer's process.

vLLM starts with random weights; the first ``publish`` replaces them before anything is sampled. Two kinds of sync:

    shared   the policy's parameters become views of vLLM's fused tensors: publishing moves 0 bytes. Start the sampler
             before the learner, so that nothing refers to the policy's earlier storage.
    copy     vLLM has tensors of its own; publishing copies every weight, adapters merged in.

On the CPU vLLM multiplies by prepacked copies of its weights and frees the originals. With "copy" they are prepacked
again at each publish, tensor by tensor. With "shared" nothing is prepacked, which makes decoding slower.

During the update the engine is paused, on every device; on a GPU it also frees the memory of its KV cache. vLLM permits
that only while its scheduler has no request, and the scheduler removes a finished request one step after its last
token. ``VllmSampler`` therefore steps the engine until it is empty after every ``generate``, even after an exception.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from isomorph.engine.config import NO_KEPT_TOKENS, SamplerConfig, UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.stop_strings import StopStrings
from isomorph.engine.rollout.turns import Conversations
from isomorph.engine.rollout.vllm_engine import (
    check_setup,
    clean_up,
    import_vllm,
    model_of,
    sampling_params,
    start_engine,
    watch_for_strings,
)
from isomorph.engine.rollout.vllm_turns import VllmTurns
from isomorph.engine.rollout.weights import CopiedWeights, SharedWeights
from isomorph.engine.types import Dialogue, Finish, OnGroup, OnStep, Prompt, Publication, Rollout, RunFailed, Sampling

LEAST_TEMPERATURE = 0.01  # vLLM silently raises a lower one to this


def start_vllm(policy: Policy, config: SamplerConfig, seed: int) -> "VllmSampler":
    """Starts vLLM in this process, on the policy's device, and publishes the policy's weights to it.

    With ``config.publish = "shared"`` the policy's parameters become views of vLLM's tensors: build the optimizer
    afterwards. ``config.memory_frac``: on a GPU vLLM's share of all GPU memory; on the CPU the share of the RAM for
    weights and KV cache, of which the KV cache takes at most what ``max_seqs`` sequences of ``max_model_len`` tokens
    need. ``max_model_len`` is limited to the model's own positions. ``seed``: of vLLM itself; each request has its own.

    Raises UserError where vLLM is missing, is of another version or build, or cannot sample exactly from this policy.
    """
    import_vllm(policy.device)
    check_setup(policy)
    return VllmSampler(policy, config, seed=seed)


class VllmSampler:
    """A ``Sampler``; ``start_vllm`` makes it. The same seed, weights and prompts give the same rollouts."""

    def __init__(self, policy: Policy, config: SamplerConfig, *, seed: int) -> None:
        self.policy = policy
        self.policy_version = 0
        self.max_model_len = min(config.max_model_len, policy.max_model_len)
        self.llm = start_engine(policy, config, self.max_model_len, seed)
        try:
            self.model = model_of(self.llm)
            own: type[SharedWeights | CopiedWeights] = SharedWeights if config.publish == "shared" else CopiedWeights
            with policy.unsharded():
                self._weights = own(self.model, policy)
                self.publish(0)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        on_step: OnStep | None = None,
        dialogue: Dialogue | None = None,
    ) -> list[Rollout]:
        """``samples_per_prompt`` rollouts for each prompt, in the order of the prompts, samples ascending.

        Raises UserError for a temperature or a length that vLLM does not support. However it ends, also by an exception
        of ``on_group`` or ``on_step``, no request remains in the engine.
        """
        self._refuse(prompts, sampling)
        if not prompts:
            return []
        self._clear_prefix_cache()  # so that results do not depend on earlier calls
        # vLLM uses the global generator as well
        with torch.random.fork_rng(devices=_cuda_devices(self.policy.device)):
            is_timed = self.policy.device.type == "cpu"
            conversations = Conversations(dialogue, sampling.max_new_tok, is_timed=is_timed)
            try:
                if dialogue is None:
                    return self._sample(prompts, sampling, on_group, on_step)
                stops = StopStrings(sampling.stop, self.policy.text) if sampling.stop else None
                turns = VllmTurns(self.llm, prompts, sampling, self.policy_version, conversations, stops)
                for index, rollouts in turns.run(on_step or (lambda: None)):
                    if on_group is not None:
                        on_group(index, rollouts)
                return [rollout for group in turns.groups for rollout in group]
            finally:
                conversations.close()
                self._empty()

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Context: vLLM is paused. On a GPU the memory of its KV cache is free while it is open; weights stay.

        On the CPU vLLM cannot free the KV cache and is only paused. ``publish`` and ``close`` are allowed inside,
        ``generate`` and a second ``asleep`` raise RuntimeError.
        """
        self._refuse_asleep()
        self._empty()
        self.llm.sleep(level=0)  # level 0 pauses; levels 1 and 2 would also move the weights
        try:
            if self._frees_memory:
                self.llm.release_kv_cache_memory()
            yield
        finally:
            if "llm" in self.__dict__:  # not closed inside
                self._wake()

    def publish(self, version: int) -> Publication:
        """Syncs the policy's present weights to vLLM, as ``version``; clears the prefix cache."""
        start = time.perf_counter()
        num_bytes = self._weights.publish()
        self._clear_prefix_cache()
        move_s = time.perf_counter() - start
        self.policy_version = version
        own = self.fingerprint()
        seconds = time.perf_counter() - start - move_s
        return Publication(version=version, num_bytes=num_bytes, fingerprint=own, move_s=move_s, fingerprint_s=seconds)

    def fingerprint(self) -> str:
        """Hash of vLLM's weights in the layout of the policy's tensors; of their addresses where they are shared.

        For a weight that vLLM keeps only prepacked: of the tensor that was prepacked.
        """
        return self._weights.fingerprint()

    def close(self) -> None:
        """Ends vLLM and its process group. The policy keeps its weights, shared ones too. May be called twice."""
        if "llm" not in self.__dict__:
            return
        if self.llm.llm_engine.is_sleeping():
            self._wake()  # vLLM's allocator can free only memory that is mapped
        self.llm.llm_engine.engine_core.shutdown()
        for name in ("llm", "model", "_weights"):
            self.__dict__.pop(name, None)  # frees vLLM's tensors, except those that the policy views
        clean_up()

    @property
    def _frees_memory(self) -> bool:
        return bool(self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode)

    def _wake(self) -> None:
        """Maps the freed memory again and resumes scheduling. Raises RunFailed if vLLM does not wake up."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        freed = sorted(executor.sleeping_tags)
        if not self.llm.wake_up(tags=[*freed, "scheduling"]):
            raise RunFailed(f"vLLM did not wake up: no memory for {', '.join(executor.sleeping_tags)}")
        if freed:
            self.llm.collective_rpc(_zero_kv)

    def _empty(self) -> None:
        """Aborts unfinished requests, then steps until scheduler and batch queue are empty.

        vLLM's output processor and its engine core each keep the requests; ``abort_request`` removes them from both, a
        pause only from the core.
        """
        engine = self.llm.llm_engine
        core, front = engine.engine_core.engine_core, engine.output_processor
        engine.abort_request(list(front.parent_requests), internal=True)  # including their samples
        engine.abort_request(list(front.request_states), internal=True)
        while core.scheduler.has_requests() or core.batch_queue:
            engine.step()

    def _refuse_asleep(self) -> None:
        if self.llm.llm_engine.is_sleeping():
            raise RuntimeError("vLLM is paused: leave the context of asleep() first")

    def _refuse(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._refuse_asleep()
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"sampling.temperature must be 0 or >= {LEAST_TEMPERATURE} with vLLM, got {sampling.temperature}"
            )
        if sampling.temperature > 0 and sampling.truncation.is_on:
            raise UserError(NO_KEPT_TOKENS)
        longest = max((len(p.token_ids) for p in prompts), default=0) + sampling.max_new_tok
        if longest > self.max_model_len:
            raise UserError(
                f"the longest prompt and sampling.max_new_tok={sampling.max_new_tok} make {longest} tokens, vLLM was "
                f"started for {self.max_model_len}: raise sampler.max_model_len (at most {self.policy.max_model_len}, "
                "the model's positions), lower max_new_tok or leave long prompts out"
            )

    def _clear_prefix_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RunFailed("vLLM could not clear its prefix cache, because some of its requests have not ended")

    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_group: OnGroup | None, on_step: OnStep | None
    ) -> list[Rollout]:
        requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        params = [sampling_params(prompt, sampling) for prompt in prompts]
        groups: dict[int, list[Rollout]] = {}
        names = self.llm.enqueue(requests, params, use_tqdm=False)
        if sampling.stop:
            watch_for_strings(self.llm, StopStrings(sampling.stop, self.policy.text))
        # vLLM names the request "12-9f3c", but its result "12"
        index_of = {name.partition("-")[0]: i for i, name in enumerate(names)}
        while self.llm.llm_engine.has_unfinished_requests():
            for result in self.llm.llm_engine.step():
                if result.finished:
                    index = index_of[result.request_id]
                    groups[index] = self._rollouts(prompts[index], result, sampling)
                    if on_group is not None:
                        on_group(index, groups[index])
            if on_step is not None:
                on_step()
        return [rollout for i in range(len(prompts)) for rollout in groups[i]]

    def _rollouts(self, prompt: Prompt, result: Any, sampling: Sampling) -> list[Rollout]:
        return [self._rollout(prompt, sample, result, sampling) for sample in range(sampling.samples_per_prompt)]

    def _rollout(self, prompt: Prompt, sample: int, result: Any, sampling: Sampling) -> Rollout:
        is_greedy = sampling.temperature == 0
        output = result.outputs[0 if is_greedy else sample]
        if output.finish_reason not in ("stop", "length"):
            raise RunFailed(
                f"vLLM ended a response with finish_reason {output.finish_reason!r} (prompt {prompt.prompt_id})"
            )
        finish: Finish = output.finish_reason
        logprob = None
        if not is_greedy:
            logprob = torch.tensor(output.logprobs.logprobs, dtype=torch.float32)
            assert len(logprob) == len(output.token_ids), (len(logprob), len(output.token_ids))
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample=sample,
            token_ids=torch.tensor(output.token_ids, dtype=torch.int64),
            sampler_logprob=logprob,
            finish=finish,
            policy_version=self.policy_version,
        )


def _zero_kv(worker: Any) -> None:
    """Newly mapped memory may hold NaN, which attention masks do not remove: 0 * NaN is NaN."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _cuda_devices(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []
