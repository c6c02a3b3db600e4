"""One optimizer step with each prompt computed once per group, beside the same step with the prompt repeated.

    python benchmarks/bench_update.py --model FOLDER [--dtype bfloat16] [--prompt-tok 600] [--response-tok 100]
        [--groups 1] [--group 8] [--rounds 5] [--gradient-checkpointing-every N] [--compile] [--device cpu]
        [--out benchmarks/results/update.jsonl]

An update is forward, backward, clip and AdamW on one micro-batch of random tokens: GRPO, no KL. Both sides alternate
and compute the same gradient. Reported: the median with p20 and p80, peak memory above that before (weights, masters
and moments), the ratio of both, and the model FLOP utilisation: 6 FLOP for each weight of the layers
and each token that goes through them, 12 d for each pair of a query and a key it sees (of each head), 6 V D for each
predicted token, over the median and over the rate of the layers' largest GEMM in the same process and dtype.
Recomputed layers do more than this model counts.
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

from compare import PeakMemory, append_rows, machine, now

from isomorph.engine.config import ModelConfig, Stage
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.types import Group, Prompt, Rollout
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import Update, pack

Row = dict[str, Any]


def random_groups(policy: Policy, args: argparse.Namespace) -> list[Group]:
    """Advantages differ within each group, so that no response can be left out."""
    generator = torch.Generator().manual_seed(0)

    def ids(num: int) -> torch.Tensor:
        return torch.randint(10, policy.unembedding.shape[0] - 10, (num,), generator=generator)

    groups = []
    for i in range(args.groups):
        prompt_ids = tuple(ids(args.prompt_tok).tolist())
        prompt = Prompt(prompt_id=i, token_ids=prompt_ids, task="bench", representation="none", payload=None)
        rollouts = tuple(
            Rollout(
                prompt_id=i,
                sample=g,
                token_ids=ids(args.response_tok),
                sampler_logprob=torch.full((args.response_tok,), -5.0),
                finish="length",
                policy_version=0,
            )
            for g in range(args.group)
        )
        advantages = tuple(1.0 if g % 2 else -1.0 for g in range(args.group))
        groups.append(Group(prompt=prompt, rollouts=rollouts, rewards=advantages, advantages=advantages))
    return groups


def repeated(groups: list[Group]) -> list[Group]:
    """The same groups with the prompt before each response, as trainers without shared prompts have them."""
    return [
        Group(prompt=g.prompt, rollouts=(r,), rewards=(a,), advantages=(a,))
        for g in groups
        for r, a in zip(g.rollouts, g.advantages, strict=True)
    ]


def update_flop(policy: Policy, update: Update) -> float:
    """Of forward and backward, by the model above."""
    config = policy.config
    head = policy.unembedding
    layer_weights = sum(p.numel() for n, p in policy.named_parameters().items() if ".layers." in n and p.dim() == 2)
    total = 0.0
    for batch in update.batches:
        position_T = batch.positions.double()
        pairs = float((position_T + 1).sum())  # a token sees its prompt and itself, whatever is packed around it
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * policy.head_dim * pairs
        total += 6 * layer_weights * len(position_T) + attention + 6 * head.numel() * batch.num_loss_tok
    return total


def gemm_flop_s(policy: Policy, num_tok: int, rounds: int) -> float:
    """The rate of [T, D] x [D, F], the layers' largest GEMM."""
    config = policy.config
    x_TD = torch.randn(num_tok, config.hidden_size, device=policy.device).to(policy.dtype)
    weight_DF = torch.randn(config.hidden_size, config.intermediate_size, device=policy.device).to(policy.dtype)
    seconds = []
    for _ in range(4 * rounds):
        start = now()
        x_TD @ weight_DF
        seconds.append(now() - start)
    return 2 * num_tok * weight_DF.numel() / statistics.median(seconds)


def measure(args: argparse.Namespace) -> list[Row]:
    config = ModelConfig(
        path=args.model,
        dtype=args.dtype,
        gradient_checkpointing_every=args.gradient_checkpointing_every,
        compile=args.compile,
    )
    policy = load_policy(config, vocabulary=[], seed=0, device=torch.device(args.device))
    groups = random_groups(policy, args)
    per_seq = args.prompt_tok + args.response_tok
    stage = Stage.model_validate(
        {
            "name": "bench",
            "steps": 1_000_000,
            "objective": {"name": "grpo"},
            "batch": {"prompts": args.groups, "micro_batch_tok": args.groups * args.group * per_seq},
            "sampling": {"max_new_tok": args.response_tok, "samples_per_prompt": max(args.group, 2)},
        }
    )
    learner = Learner(policy)
    learner.enter(stage)
    updates = {
        name: pack(
            side,
            micro_batch_tok=stage.batch.micro_batch_tok,
            prompts_per_update=None,
            objective=stage.objective,
            device=policy.device,
        )
        for name, side in (("shared", groups), ("repeated", repeated(groups)))
    }
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    peaks: dict[str, list[float | None]] = {name: [] for name in updates}
    for turn in range(args.rounds + 1):
        for name, update in updates.items():
            memory, start = PeakMemory(), now()
            learner.update(update, stage, 0)
            if turn:  # the first one of both warms up
                seconds[name].append(now() - start)
                peaks[name].append(memory.mib())
    ceiling = gemm_flop_s(policy, sum(len(b.token_ids) for b in updates["shared"][0].batches), args.rounds)
    return [_row(name, policy, updates[name][0], seconds[name], peaks[name], ceiling) for name in updates]


def _row(
    name: str, policy: Policy, update: Update, seconds: list[float], peaks: list[float | None], ceiling: float
) -> Row:
    median, flop = statistics.median(seconds), update_flop(policy, update)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    known = [peak for peak in peaks if peak is not None]
    return {
        "who": name,
        "forward_tok": sum(len(b.token_ids) for b in update.batches),
        "loss_tok": update.num_loss_tok,
        "median_s": median,
        "p20_s": deciles[1],
        "p80_s": deciles[7],
        "peak_mib": max(known) if known else None,
        "tflop": flop / 1e12,
        "mfu": flop / median / ceiling,
        "gemm_tflop_s": ceiling / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M in safetensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt-tok", type=int, default=600)
    parser.add_argument("--response-tok", type=int, default=100)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gradient-checkpointing-every", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    shared, other = rows
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    ratio = {
        "who": "ratio",
        "speed": other["median_s"] / shared["median_s"],
        "memory": other["peak_mib"] / shared["peak_mib"] if shared["peak_mib"] else None,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "machine": machine(args.device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/bench_update.py", *_told(args)]),
    }
    print(f"prompt shared: {ratio['speed']:.2f} times faster, {ratio['memory'] or float('nan'):.2f} times less memory")
    if args.out:
        append_rows(args.out, [*rows, ratio])


def _told(args: argparse.Namespace) -> list[str]:
    """The options as given, the model's folder without its parents."""
    told = []
    for key, value in vars(args).items():
        if value in (None, False) or key == "out":
            continue
        told.append(f"--{key.replace('_', '-')}")
        told += [] if value is True else [Path(value).name if key == "model" else str(value)]
    return told


if __name__ == "__main__":
    main()
