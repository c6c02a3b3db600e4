"""The vLLM sampler: ``vllm.LLM`` in the trainer's process.

vLLM starts with random weights; every weight that it ever computes with was published from the policy. Two ways:

    shared   vLLM's fused tensors are the storage and the policy's parameters view them: publishing moves 0 bytes.
             Start the sampler before the learner, so that nothing holds on to the policy's earlier storage.
    copy     vLLM has tensors of its own; publishing copies every weight, adapters merged in.

On the CPU vLLM multiplies with packed copies of its weights and throws the originals away. With "copy" the packs are
made anew at each publish, tensor by tensor. With "shared" nothing is packed, which costs decoding speed.

While the learner works the engine is paused, on every device; on a GPU its KV cache then gives its memory back. vLLM
allows that only where its scheduler knows of no request, and the scheduler drops a finished one in the step after
its last token. ``VllmSampler`` therefore leaves the engine empty after every draw, also after one that raised.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.vllm_engine import (
    clean_up,
    import_vllm,
    model_of,
    refuse_what_is_not_exact,
    sampling_params,
    start_engine,
)
from isomorph.engine.rollout.weights import CopiedWeights, SharedWeights
from isomorph.engine.types import Finish, OnGroup, OnStep, Prompt, Publication, Rollout, RunFailed, Sampling

LEAST_TEMPERATURE = 0.01  # vLLM silently raises what is lower


def start_vllm(policy: Policy, config: SamplerConfig, seed: int) -> "VllmSampler":
    """Starts vLLM in this process, on the policy's device.

    With ``config.publish = "shared"`` the policy's parameters become views of vLLM's tensors: build the optimizer
    afterwards. ``config.memory_frac`` is, on a GPU, vLLM's share of the whole memory; on the CPU the share of the RAM
    for weights and KV, of which no more is taken than ``max_seqs`` sequences of ``max_model_len`` tokens can fill.
    Sequences are limited to the model's own positions where ``max_model_len`` is above them.
    Raises UserError where vLLM is missing or cannot do exactly what is asked.
    """
    import_vllm(policy.device)
    refuse_what_is_not_exact(policy)
    return VllmSampler(policy, config, seed=seed)


class VllmSampler:
    """Samples by vLLM. Made by ``start_vllm``. The same seed, weights and prompts give the same rollouts."""

    def __init__(self, policy: Policy, config: SamplerConfig, *, seed: int) -> None:
        self.policy = policy
        self.policy_version = 0
        self.max_model_len = min(config.max_model_len, policy.max_model_len)
        self.llm = start_engine(policy, config, self.max_model_len, seed)
        try:
            self.model = model_of(self.llm)
            own: type[SharedWeights | CopiedWeights] = SharedWeights if config.publish == "shared" else CopiedWeights
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
    ) -> list[Rollout]:
        """``samples_per_prompt`` rollouts a prompt, in order. Raises UserError for what vLLM cannot draw as asked.

        Whatever ends it, an exception of ``on_group`` or ``on_step`` too: no request is left behind.
        """
        self._refuse(prompts, sampling)
        if not prompts:
            return []
        self._forget_prefixes()  # what ran before must not change a bit
        # vLLM draws from the global generator too
        with torch.random.fork_rng(devices=_cuda_devices(self.policy.device)):
            try:
                return self._draw(prompts, sampling, on_group, on_step)
            finally:
                self._empty()

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """While open, vLLM is paused and draws nothing. On a GPU the KV cache's memory is given back; weights stay.

        On the CPU vLLM can give nothing back: it is paused and its KV cache stays. ``publish`` and ``close`` are
        allowed inside, ``generate`` and a second ``asleep`` raise RuntimeError.
        """
        self._refuse_asleep()
        self._empty()
        self.llm.sleep(level=0)  # pauses; levels 1 and 2 would move the weights away
        try:
            if self._gives_memory_back:
                self.llm.release_kv_cache_memory()
            yield
        finally:
            if "llm" in self.__dict__:  # not closed inside
                self._wake()

    def publish(self, version: int) -> Publication:
        """From now on sample from the policy's present weights."""
        start = time.perf_counter()
        num_bytes = self._weights.publish()
        self._forget_prefixes()
        move_s = time.perf_counter() - start
        self.policy_version = version
        own = self.fingerprint()
        seconds = time.perf_counter() - start - move_s
        return Publication(version=version, num_bytes=num_bytes, fingerprint=own, move_s=move_s, fingerprint_s=seconds)

    def fingerprint(self) -> str:
        """Of vLLM's weights, cut into the policy's tensors; of their places where they are shared.

        Where vLLM keeps nothing but a packed copy: of the tensor that the copy was made of.
        """
        return self._weights.fingerprint()

    def close(self) -> None:
        """Ends vLLM, and the process group with it. The policy keeps its weights, shared ones too. Once is enough."""
        if "llm" not in self.__dict__:
            return
        if self.llm.llm_engine.is_sleeping():
            self._wake()  # vLLM's allocator can free only what has memory
        self.llm.llm_engine.engine_core.shutdown()
        for name in ("llm", "model", "_weights"):
            self.__dict__.pop(name, None)  # the last references to vLLM's tensors, but for the policy's own views
        clean_up()

    @property
    def _gives_memory_back(self) -> bool:
        return bool(self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode)

    def _wake(self) -> None:
        """Gives back to vLLM whatever memory it is without; with all of it there vLLM schedules again."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        lacking = sorted(executor.sleeping_tags)
        if not self.llm.wake_up(tags=[*lacking, "scheduling"]):
            raise RunFailed(f"vLLM did not wake up: it lacks the memory of {', '.join(executor.sleeping_tags)}")
        if lacking:
            self.llm.collective_rpc(_zero_kv)

    def _empty(self) -> None:
        """Aborts what is unfinished and steps until the scheduler and the queue of running batches hold nothing.

        vLLM's front and its core each have a list of requests; ``abort_request`` clears both, a pause only the core's.
        """
        engine = self.llm.llm_engine
        core, front = engine.engine_core.engine_core, engine.output_processor
        engine.abort_request(list(front.parent_requests), internal=True)  # with their samples
        engine.abort_request(list(front.request_states), internal=True)
        while core.scheduler.has_requests() or core.batch_queue:
            engine.step()

    def _refuse_asleep(self) -> None:
        if self.llm.llm_engine.is_sleeping():
            raise RuntimeError("vLLM is asleep: leave the block of asleep() first")

    def _refuse(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._refuse_asleep()
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"sampling.temperature must be 0 or >= {LEAST_TEMPERATURE} with vLLM, got {sampling.temperature}"
            )
        longest = max((len(p.token_ids) for p in prompts), default=0) + sampling.max_new_tok
        if longest > self.max_model_len:
            raise UserError(
                f"the longest prompt and sampling.max_new_tok={sampling.max_new_tok} make {longest} tokens, vLLM was "
                f"started for {self.max_model_len}: raise sampler.max_model_len (the model has positions for "
                f"{self.policy.max_model_len}), lower max_new_tok or leave long prompts out"
            )

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RunFailed("vLLM refuses to forget cached prompts: some of its requests have not ended")

    def _draw(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_group: OnGroup | None, on_step: OnStep | None
    ) -> list[Rollout]:
        requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        params = [sampling_params(prompt, sampling) for prompt in prompts]
        drawn: dict[int, list[Rollout]] = {}
        names = self.llm.enqueue(requests, params, use_tqdm=False)
        # a result is called by the number alone, "12", its request inside vLLM "12-9f3c"
        index_of = {name.partition("-")[0]: i for i, name in enumerate(names)}
        while self.llm.llm_engine.has_unfinished_requests():
            for result in self.llm.llm_engine.step():
                if result.finished:
                    index = index_of[result.request_id]
                    drawn[index] = self._rollouts(prompts[index], result, sampling)
                    if on_group is not None:
                        on_group(index, drawn[index])
            if on_step is not None:
                on_step()
        return [rollout for i in range(len(prompts)) for rollout in drawn[i]]

    def _rollouts(self, prompt: Prompt, result: Any, sampling: Sampling) -> list[Rollout]:
        return [self._rollout(prompt, sample, result, sampling) for sample in range(sampling.samples_per_prompt)]

    def _rollout(self, prompt: Prompt, sample: int, result: Any, sampling: Sampling) -> Rollout:
        is_greedy = sampling.temperature == 0
        drawn = result.outputs[0 if is_greedy else sample]
        if drawn.finish_reason not in ("stop", "length"):
            raise RunFailed(f"vLLM ended a response by {drawn.finish_reason!r} (prompt {prompt.prompt_id})")
        finish: Finish = drawn.finish_reason
        logprob = None
        if not is_greedy:
            logprob = torch.tensor(drawn.logprobs.logprobs, dtype=torch.float32)
            assert len(logprob) == len(drawn.token_ids), (len(logprob), len(drawn.token_ids))
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample=sample,
            token_ids=torch.tensor(drawn.token_ids, dtype=torch.int64),
            sampler_logprob=logprob,
            finish=finish,
            policy_version=self.policy_version,
        )


def _zero_kv(worker: Any) -> None:
    """What memory holds that came from the driver is not defined, and a NaN gets through attention's masks: 0 x NaN."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _cuda_devices(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []
