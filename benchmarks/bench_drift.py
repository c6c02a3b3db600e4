"""Difference between the built-in sampler's and the trainer's log-probabilities, on a real model's own responses.

    python benchmarks/bench_drift.py --model FOLDER [--dtype bfloat16] [--tok 1000000] [--step-tok 2000]
                                     [--faults] [--out benchmarks/results/drift.jsonl]

Two computations of the same weights: the sampler decodes token by token over its cache, with prepacked weights; the
learner's forward pass runs over packed groups. Tokens are checked in steps of ``step-tok`` as in a run, by
``engine.drift.check_step`` for each step and ``Surprise`` for all steps; no token of a step is left out, and a step's
last response is truncated where the step is full. A row covers many steps: the extremes of each statistic over them,
how many steps failed the check, and the running sums of surprise. A later call with the same --out continues after the
last row of its model and dtype. Results are counts and nats, so load on the machine does not change them.

``--faults`` instead computes after how many tokens ``Surprise`` sees a sampler that draws from another distribution
than it reports. The mean and the square of surprise minus entropy under each fault are exact sums over the vocabulary,
in the contexts of one lot's first 2,000 tokens.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isomorph.engine.config import ModelConfig, SamplerConfig
from isomorph.engine.drift import DriftSums, Surprise, check_step, mean_limit, step_drift, tail_count
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_stats
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, RunFailed, Sampling, StepDrift

PROMPTS, SAMPLES, NEW_TOK = 16, 16, 64  # of a lot: at most 16,384 tokens
PARTS = 4  # prompts scored in one packed pass
QUESTIONS = (
    "Write a few lines on the number {}.",
    "What is {} plus 17? Explain.",
    "List some facts about the year {}.",
    "Write a Python function that returns the first {} primes.",
)


def drawn(policy: Policy, sampler: BuiltinSampler, lot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens of lot number ``lot`` by the trainer and by the sampler, and the entropy."""
    prompts = prompts_of(policy, lot)
    rollouts = sampler.generate(prompts, sampling_of(policy, lot))
    parts = [range(i, i + PARTS) for i in range(0, PROMPTS, PARTS)]
    stats = [
        trainer_stats(
            policy,
            [prompts[i] for i in part],
            rollouts[part.start * SAMPLES : part.stop * SAMPLES],
            temperature=1.0,
        )
        for part in parts
    ]
    q = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
    return torch.cat([s.logprob for s in stats]), q, torch.cat([s.entropy for s in stats])


def prompts_of(policy: Policy, lot: int) -> list[Prompt]:
    texts = [QUESTIONS[i % len(QUESTIONS)].format(lot * PROMPTS + i) for i in range(PROMPTS)]
    return [
        Prompt(prompt_id=i, token_ids=policy.text.encode_prompt(t), task="", representation="", payload=None)
        for i, t in enumerate(texts)
    ]


def sampling_of(policy: Policy, lot: int) -> Sampling:
    return Sampling(
        temperature=1.0,
        max_new_tok=NEW_TOK,
        samples_per_prompt=SAMPLES,
        stop_ids=policy.text.stop_ids,
        seed=lot,
    )


# -- what is drawn, from the log-probabilities that are reported; both [N, V]
def at_temperature(temperature: float) -> Callable[[Tensor], Tensor]:
    return lambda logprob_NV: (logprob_NV / temperature).softmax(-1)


def top_p(share: float) -> Callable[[Tensor], Tensor]:
    def drawn_NV(logprob_NV: Tensor) -> Tensor:
        prob, at = logprob_NV.exp().sort(-1, descending=True)
        kept = prob.masked_fill(prob.cumsum(-1) - prob > share, 0).gather(1, at.argsort(1))
        return kept / kept.sum(-1, keepdim=True)

    return drawn_NV


FAULTS = {
    "temperature 1.05": at_temperature(1.05),
    "temperature 0.95": at_temperature(0.95),
    "top-p 0.95": top_p(0.95),
}


@torch.no_grad()
def tokens_to_see_faults(policy: Policy, sampler: BuiltinSampler, num_tok: int = 2_000) -> dict[str, Any]:
    prompts = prompts_of(policy, 0)[:2]
    rollouts = sampler.generate(prompts, sampling_of(policy, 0))
    parts = [Part(p, tuple(rollouts[i * SAMPLES : (i + 1) * SAMPLES]), (0.0,) * SAMPLES) for i, p in enumerate(prompts)]
    batch = pack_parts(parts, policy.device)
    hidden_ND = policy.hidden(batch)[batch.row_index[:num_tok]]
    sums = {name: [0.0, 0.0] for name in FAULTS}
    for rows_ND in hidden_ND.split(100):
        logprob_NV = (rows_ND @ policy.unembedding.T).double().log_softmax(-1)
        entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1, keepdim=True)
        surprise_NV = -logprob_NV - entropy_N
        for name, drawn_NV in FAULTS.items():
            prob_NV = drawn_NV(logprob_NV)
            sums[name][0] += (prob_NV * surprise_NV).sum().item()
            sums[name][1] += (prob_NV * surprise_NV.square()).sum().item()
    n = len(hidden_ND)
    return {
        name: {
            "nats_a_token": total / n,
            "variance": square / n,
            "needs_tok": Surprise(n, total, square).tokens_until(abs(total / n)),
        }
        for name, (total, square) in sums.items()
    }


def judged(found: StepDrift, run: Surprise, policy: Policy) -> str:
    """The error that would have ended a run; empty where there is none."""
    try:
        check_step(found, policy.dtype, policy.config.num_hidden_layers, None)
        run.check()
    except RunFailed as failure:
        return str(failure)
    return ""


def steps_of(tokens: tuple[Tensor, Tensor, Tensor], step_tok: int) -> list[StepDrift]:
    found = []
    for chunk in zip(*(t.split(step_tok) for t in tokens), strict=True):
        sums = DriftSums(torch.device("cpu"))
        sums.add(*chunk)
        found.append(step_drift([sums.tensors()], 0, 0))
    return found


def row_of(steps: list[StepDrift]) -> dict[str, Any]:
    """Extremes over steps; ``*_z_rms`` is 1 where a standard error is what it says."""
    n = sum(s.num_tok for s in steps)
    mass_z, slope_z = [s.mass / s.mass_error for s in steps], [s.slope / s.slope_error for s in steps]
    return {
        "steps": len(steps),
        "tok": n,
        "mean": sum(s.mean * s.num_tok for s in steps) / n,
        "mean_max": max(s.mean for s in steps),
        "p999_max": max(s.p999 for s in steps),
        "largest": max(s.largest for s in steps),
        "mass_z_rms": math.sqrt(sum(z * z for z in mass_z) / len(steps)),
        "mass_z_max": max(map(abs, mass_z)),
        "slope_z_rms": math.sqrt(sum(z * z for z in slope_z) / len(steps)),
        "slope_z_max": max(map(abs, slope_z)),
    }


def run_sums(run: Surprise) -> dict[str, float]:
    shown = {"surprise/z": run.z, "surprise/limit": run.limit, "surprise/needs_tok": run.tokens_needed()}
    return {**run.totals(), **shown}


def rows_so_far(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in about.items())]


def circumstances() -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "command": shlex.join(["python", "benchmarks/bench_drift.py", *sys.argv[1:]]),
    }


def append(out: Path, row: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tok", type=int, default=1_000_000)
    parser.add_argument("--step-tok", type=int, default=2_000)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "drift.jsonl")
    args = parser.parse_args()
    policy = load_policy(
        ModelConfig(path=args.model, dtype=args.dtype), vocabulary=[], seed=0, device=torch.device("cpu")
    )
    sampler = BuiltinSampler(policy, SamplerConfig(max_seqs=PROMPTS * SAMPLES))
    layers = policy.config.num_hidden_layers
    about = {
        "bench": "faults" if args.faults else "drift",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "step_tok": args.step_tok,
    }
    before = rows_so_far(args.out, about)
    if args.faults:
        append(args.out, {**about, **tokens_to_see_faults(policy, sampler), **circumstances()})
        return
    run, lot = Surprise.of(before[-1]) if before else Surprise(), len(before)
    while run.num_tok < args.tok:
        steps, tripped = steps_of(drawn(policy, sampler, lot), args.step_tok), []
        for found in steps:
            run = run.plus(found)
            tripped += [why] if (why := judged(found, run, policy)) else []
        row = {
            **about,
            "lot": lot,
            **row_of(steps),
            "tripped": tripped,
            "mean_limit": mean_limit(policy.dtype, layers),
            "tail_count": tail_count(args.step_tok),
            **run_sums(run),
            **circumstances(),
        }
        append(args.out, row)
        lot += 1


if __name__ == "__main__":
    main()
