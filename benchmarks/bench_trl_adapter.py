"""TRL's forward and backward of a micro-batch, with and without ``pack_groups``, alternating in one process.

    python benchmarks/bench_trl_adapter.py --model FOLDER [--dtype bfloat16] [--prompt-tok 200] [--response-tok 64]
        [--groups 4] [--group 8] [--rounds 5] [--device cpu] [--out benchmarks/results/trl_adapter.jsonl]

What GRPOTrainer computes for a micro-batch of random tokens: log-probabilities, a sum of them, backward; without
gradient checkpointing. Reported: the median with p20 and p80, and peak memory above that before.
Needs the extra [bench].
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

from compare import PeakMemory, append_rows, machine, now

from isomorph.engine.adapters.trl import IGNORED, pack_groups

Row = dict[str, Any]


def random_batch(num_vocab: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """[B, L] each, as TRL makes them: prompts repeated, responses of 1/2 to 1 times the longest, padded."""
    generator = torch.Generator().manual_seed(0)
    num_rows, width = args.groups * args.group, args.prompt_tok + args.response_tok
    ids_BL = torch.randint(10, num_vocab - 10, (num_rows, width), generator=generator)
    ids_BL[:, : args.prompt_tok] = ids_BL[:: args.group, : args.prompt_tok].repeat_interleave(args.group, 0)
    lens_B = torch.randint(args.response_tok // 2, args.response_tok + 1, (num_rows,), generator=generator)
    mask_BL = (torch.arange(width) < args.prompt_tok + lens_B[:, None]).long()
    labels_BL = ids_BL.masked_fill(mask_BL == 0, IGNORED)
    labels_BL[:, : args.prompt_tok] = IGNORED
    batch = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def measure(args: argparse.Namespace) -> list[Row]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=args.group,
            num_generations=args.group,
            use_cpu=args.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": args.dtype},
            report_to=[],
        )
        data = Dataset.from_dict({"prompt": ["nothing is drawn here"] * args.group})
        trainer = GRPOTrainer(args.model, lambda completions, **_: [0.0] * len(completions), config, data)
    model = trainer.model.to(args.device).train()
    forwards = {"trl": model.forward}
    pack_groups(trainer)
    forwards["packed"] = model.forward
    batch = random_batch(model.config.vocab_size, args)
    seconds: dict[str, list[float]] = {who: [] for who in forwards}
    peaks: dict[str, list[float | None]] = {who: [] for who in forwards}
    sums: dict[str, float] = {}
    for turn in range(args.rounds + 1):
        for who, forward in forwards.items():
            model.forward = forward
            model.zero_grad()
            memory, start = PeakMemory(), now()
            total = model(**batch, fused_lm_head=True).log_probs.float().sum()
            total.backward()
            if turn:  # the first one of both warms up
                seconds[who].append(now() - start)
                peaks[who].append(memory.mib())
            sums[who] = total.item()
    assert abs(sums["packed"] / sums["trl"] - 1) < 0.01, sums
    return [
        {
            "who": who,
            "median_s": statistics.median(times),
            "p20_s": statistics.quantiles(times, n=5, method="inclusive")[0],
            "p80_s": statistics.quantiles(times, n=5, method="inclusive")[-1],
            "peak_mib": None if None in peaks[who] else statistics.median(filter(None, peaks[who])),
        }
        for who, times in seconds.items()
    ]


def summarized(rows: list[Row], args: argparse.Namespace) -> Row:
    trl, packed = rows
    options = ["--model", "FOLDER", *(["--name", args.name] if args.name else []), "--dtype", args.dtype]
    options += ["--prompt-tok", args.prompt_tok, "--response-tok", args.response_tok, "--groups", args.groups]
    options += ["--group", args.group, "--rounds", args.rounds, "--device", args.device]
    return {
        "who": "ratio",
        "ratio": trl["median_s"] / packed["median_s"],
        "low": trl["p20_s"] / packed["p80_s"],
        "high": trl["p80_s"] / packed["p20_s"],
        "memory": trl["peak_mib"] / packed["peak_mib"] if packed["peak_mib"] else None,
        **{name: getattr(args, name) for name in ("dtype", "prompt_tok", "response_tok", "groups", "group")},
        "model": args.name or Path(args.model).name,
        "machine": machine(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": shlex.join(map(str, ["python", "benchmarks/bench_trl_adapter.py", *options])),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face's format, for example SmolLM2-135M's")
    parser.add_argument("--name", help="what the results call the model; default: the folder's name")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt-tok", type=int, default=200)
    parser.add_argument("--response-tok", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="responses per prompt")
    parser.add_argument("--rounds", type=int, default=5, help="2 or more")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON Lines file to append to")
    args = parser.parse_args()
    rows = measure(args)
    summary = summarized(rows, args)
    for row in rows:
        spread = f"{row['p20_s']:.2f} to {row['p80_s']:.2f}"
        print(f"{row['who']:<7} {row['median_s']:.2f} s ({spread}), {row['peak_mib'] or float('nan'):.0f} MiB")
    print(f"{summary['ratio']:.2f} times as fast, {summary['memory'] or float('nan'):.2f} times less memory")
    if args.out:
        append_rows(args.out, [*rows, summary])


if __name__ == "__main__":
    main()
