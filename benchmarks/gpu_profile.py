"""Part of the GPU suite that says where the device's time goes: kernels of an update and of decoding, by PyTorch's
profiler.

A row for each kind of kernel with its seconds, its share of the wall-clock time without a profiler and its number of
launches, "nothing runs" last (less than is true where kernels overlap); then a detail row for each of the longest
kernels. With ``rehearse`` operators on the CPU take the place of kernels.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compare import DEVICE, free_memory, now
from gpu_models import QWEN_1_5B, TINY, VOCAB_QWEN, VOCAB_TINY, make_policy, make_prompts
from gpu_parts import make_groups
from torch.profiler import ProfilerActivity, profile

Rows = Iterator[dict[str, Any]]
KINDS = {  # the first that is found in a kernel's name
    "copy and fill": r"memcpy|memset|fill|copy_kernel|CatArray|direct_copy",
    "matrix product": r"gemm|nvjet|cutlass|xmma|cublas|splitK|aten::(mm|addmm|bmm)",
    "optimizer": r"multi_tensor_apply|FusedAdam|lpnorm|_fused_adamw",
    "elementwise": r"elementwise|vectorized|unrolled|aten::(add|mul|silu|neg|pow)",
    "reduction": r"reduce|softmax|aten::(mean|sum)",
    "gather, scatter, index": r"index|gather|scatter|embedding|sort",
}
SHOWN, LONGEST = 16, 40


def kernels(rehearse: bool) -> Rows:
    """An update of Qwen2.5-1.5B's shape, nothing recomputed, then 32 decoded tokens of 64 sequences."""
    policy = make_policy(*((TINY, VOCAB_TINY) if rehearse else (QWEN_1_5B, VOCAB_QWEN)))
    yield from _profiled("update", _update(policy, rehearse))
    free_memory()
    yield from _profiled("decode", _decode(policy, rehearse))


def _update(policy: Any, rehearse: bool) -> Callable[[], object]:
    from isomorph.engine.update.learner import Learner
    from isomorph.engine.update.micro_batches import pack

    groups, stage = make_groups(rehearse, 8192)
    updates = pack(groups, micro_batch_tok=8192, prompts_per_update=None, objective=stage.objective, device=DEVICE)
    learner = Learner(policy)
    learner.enter(stage)

    def call(is_last: bool = False) -> None:
        learner.update(updates, stage, 0)
        if is_last:
            learner.close()

    return call


def _decode(policy: Any, rehearse: bool) -> Callable[[], object]:
    from isomorph.engine.config import SamplerConfig
    from isomorph.engine.rollout.builtin import BuiltinSampler
    from isomorph.engine.types import Sampling

    num, group, length, new = (2, 2, 6, 3) if rehearse else (8, 8, 512, 32)
    builtin = BuiltinSampler(policy, SamplerConfig(max_seqs=num * group))
    prompts = make_prompts(num, length, VOCAB_TINY if rehearse else VOCAB_QWEN)
    sampling = Sampling(temperature=1.0, max_new_tok=new, samples_per_prompt=group, stop_ids=(), seed=0)
    return lambda is_last=False: builtin.generate(prompts, sampling)  # type: ignore[misc]


def _profiled(what: str, call: Callable[..., object]) -> Rows:
    call()
    start = now()
    call()
    wall_s = now() - start
    is_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as profiler:
        call(True)
        now()
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in profiler.events() or []:
        if is_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        seconds[event.name] += (event.device_time_total if is_gpu else event.self_cpu_time_total) / 1e6
        launches[event.name] += 1
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in seconds:
        kinds[_kind(name)].append(name)
    busy_s = sum(seconds.values())

    def row(check: str, names: list[str]) -> dict[str, Any]:
        took_s = sum(seconds[name] for name in names)
        return {"check": f"{what}: {check}", "median_s": took_s, "percent": 100 * took_s / wall_s,
                "launches": sum(launches[name] for name in names)}  # fmt: skip

    yield {"check": f"{what}: wall-clock time without a profiler", "median_s": wall_s}
    by_time = sorted(kinds.items(), key=lambda item: -sum(seconds[name] for name in item[1]))
    for kind, names in by_time[:SHOWN]:
        yield row(kind, names)
    yield row("others", [name for _, names in by_time[SHOWN:] for name in names])
    idle_s = max(0.0, wall_s - busy_s)
    yield {"check": f"{what}: nothing runs", "median_s": idle_s, "percent": 100 * idle_s / wall_s}
    for name in sorted(seconds, key=lambda name: -seconds[name])[:LONGEST]:
        yield {**row(name[:200], [name]), "detail": True}


def _kind(name: str) -> str:
    """Of a kernel that no pattern knows: its own name, without C++'s arguments; Triton's are ours."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name):
            return kind
    return re.split(r"[<(]", name)[0][:60]
