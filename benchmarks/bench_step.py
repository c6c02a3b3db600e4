"""One GRPO step of isomorph beside one of TRL, alternating in one process.

    python benchmarks/bench_step.py --model FOLDER [--dtype bfloat16] [--steps 6] [--sampler builtin]
        [--prompts 4] [--group 8] [--max-new-tok 64] [--kl 0.0] [--device cpu] [--out benchmarks/results/step.jsonl]

Same model, prompts, reward, group, lengths, KL, loss, learning rate and dtype. A turn is one whole step: generate,
score, update; the first turn of both is a warm-up and does not count. Reported: medians, their ratio, tokens per second
(of completions, and with every completion's prompt), peak memory above that before the turn, the share of padding in
what the model computed, and the time per phase.

Settings. TRL: its fused head, no gradient checkpointing, ``--trl-accumulation`` micro-batches (at one, the activations
of 32 completions pass 24 GiB in float32), generation by transformers as by default, ``--trl-generation continuous``
for its continuous batching, ``--trl-generation vllm`` for vLLM in its process (on a GPU), ``--trl-liger`` for Liger's
layers (on a GPU). In bfloat16 its weights and moments are bfloat16, the fastest it has; ours keep float32 masters.
isomorph: packed groups, the built-in sampler or vLLM with shared storage. verl and OpenRLHF have no step that runs in
one process: both start Ray, and pin versions of transformers below ours. Needs the extra [bench].
"""

import argparse
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

from compare import PeakMemory, append_rows, machine, now

from isomorph.curriculum.tasks.async_plan import Difficulty, make_task
from isomorph.engine.config import ModelConfig, SamplerConfig, Stage
from isomorph.engine.model.load import load_policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Sampling
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import RewardThread, score

LEARNING_RATE = 1e-6
PHASES = ("generate_s", "judge_s", "update_s")
Row = dict[str, Any]


def questions(num: int) -> list[str]:
    rngs = (random.Random(i) for i in range(num))
    return [make_task(rng, Difficulty(), "natural", split="train").question for rng in rngs]


def variety(text: str) -> float:
    """A reward that differs within every group, so that neither side can skip work."""
    return len(set(text)) / max(len(text), 1)


class Ours:
    """isomorph's side: one step per call."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = ModelConfig(path=args.model, dtype=args.dtype)
        self.policy = load_policy(config, vocabulary=[], seed=0, device=torch.device(args.device))
        self.sampler: Any
        if args.sampler == "vllm":
            from isomorph.engine.rollout.vllm import start_vllm

            num_seqs = args.group * args.prompts
            settings = SamplerConfig(kind="vllm", publish="shared", max_model_len=2048, max_seqs=num_seqs)
            self.sampler = start_vllm(self.policy, settings, seed=0)
        else:
            self.sampler = BuiltinSampler(self.policy, SamplerConfig())
        self.stage = Stage.model_validate(
            {
                "name": "bench",
                "steps": 1_000,
                "objective": {"name": "grpo", "kl_coef": args.kl},
                "optim": {"lr": LEARNING_RATE},
                "batch": {"prompts": args.prompts, "micro_batch_tok": args.micro_batch_tok},
                "sampling": {"max_new_tok": args.max_new_tok, "samples_per_prompt": args.group},
            }
        )
        self.learner = Learner(self.policy)
        self.learner.enter(self.stage)
        self.version = 0

    def step(self, texts: list[str]) -> Row:
        text, stage = self.policy.text, self.stage
        prompts = [
            Prompt(prompt_id=i, token_ids=text.encode_prompt(q), task="bench", representation="natural", payload=None)
            for i, q in enumerate(texts)
        ]
        sampling = Sampling(
            temperature=1.0,
            max_new_tok=stage.sampling.max_new_tok,
            samples_per_prompt=stage.sampling.samples_per_prompt,
            stop_ids=text.stop_ids,
            seed=self.version,
        )
        memory, marks = PeakMemory(), [now()]
        with RewardThread(_judge, text.decode, prompts) as scoring:
            rollouts = self.sampler.generate(prompts, sampling, scoring.add)
            marks.append(now())
            _, scores = scoring.results()
        groups = score(prompts, rollouts, scores, stage.objective)
        updates = pack(
            groups,
            micro_batch_tok=stage.batch.micro_batch_tok,
            prompts_per_update=None,
            objective=stage.objective,
            device=self.policy.device,
        )
        marks.append(now())
        with self.sampler.asleep():
            stats = self.learner.update(updates, stage, 0)
        self.version += 1
        self.sampler.publish(self.version)
        marks.append(now())
        prompt_tok = stage.sampling.samples_per_prompt * sum(len(p.token_ids) for p in prompts)
        completion_tok = sum(len(r.token_ids) for r in rollouts)
        return {
            **{name: after - before for name, before, after in zip(PHASES, marks, marks[1:], strict=False)},
            "step_s": marks[-1] - marks[0],
            "completion_tok": completion_tok,
            "all_tok": completion_tok + prompt_tok,
            "computed_tok": stats.num_forward_tok,  # every prompt once
            "padding_share": 0.0,
            "peak_mib": memory.mib(),
            "drift_max": stats.drift.largest,
        }


def _judge(_: Any, answers: Any) -> list[float]:
    return [variety(answer) for answer in answers]


def _trl_config(args: argparse.Namespace, folder: str) -> Any:
    """The same step as ours, as TRL writes it down."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.group * args.prompts // args.trl_accumulation,
        gradient_accumulation_steps=args.trl_accumulation,
        num_generations=args.group,
        max_completion_length=args.max_new_tok,
        max_steps=args.steps,
        learning_rate=LEARNING_RATE,
        loss_type="grpo",
        beta=args.kl,
        temperature=1.0,
        use_cpu=args.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": args.dtype},
        shuffle_dataset=False,
        use_liger_kernel=args.trl_liger,
        use_transformers_continuous_batching=args.trl_generation == "continuous",
        use_vllm=args.trl_generation == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def run_interleaved(args: argparse.Namespace) -> list[Row]:
    """Runs TRL's trainer; after each of its steps isomorph makes one on the same prompts."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    ours = Ours(args)
    asked = questions(args.prompts * args.steps)
    is_chat = ours.policy.text.uses_chat_template
    rows: list[Row] = []

    class Timed(GRPOTrainer):
        """Records the time of a step's phases."""

        turn: Row = {}

        def _generate(self, *inputs: Any, **options: Any) -> Any:
            start = now()
            out = super()._generate(*inputs, **options)
            self.turn["generate_s"] = now() - start
            return out

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = now()
            out = super()._generate_and_score_completions(inputs)
            self.turn["judge_s"] = now() - start - self.turn["generate_s"]  # and the reference's pass
            real = [int(out[name].sum()) for name in ("prompt_mask", "completion_mask")]
            computed = sum(out[name].numel() for name in ("prompt_mask", "completion_mask"))
            self.turn |= {"completion_tok": real[1], "all_tok": sum(real), "computed_tok": computed}
            self.turn["padding_share"] = 1 - sum(real) / computed
            return out

    class Turns(TrainerCallback):
        started = 0.0
        memory: PeakMemory

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.memory, self.started = PeakMemory(), now()

        def on_step_end(self, config: Any, state: Any, *_: Any, **__: Any) -> None:
            index, step_s = state.global_step - 1, now() - self.started
            turn = {**trainer.turn, "step_s": step_s, "peak_mib": self.memory.mib()}
            turn["update_s"] = step_s - turn["generate_s"] - turn["judge_s"]
            rows.append({"who": "trl", "turn": index, **turn})
            turn = ours.step(asked[index * args.prompts : (index + 1) * args.prompts])
            rows.append({"who": "isomorph", "turn": index, **turn})
            for row in rows[-2:]:
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if args.out:  # at once: what is measured outlives a run that is cut short
                append_rows(args.out, rows[-2:])

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [variety(c[0]["content"] if is_chat else c) for c in completions]

    with tempfile.TemporaryDirectory() as scratch:
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": q}] if is_chat else q} for q in asked])
        config = _trl_config(args, scratch)
        trainer = Timed(model=args.model, reward_funcs=reward, args=config, train_dataset=data, callbacks=[Turns()])
        trainer.train()
    return rows


def summarized(rows: list[Row], args: argparse.Namespace) -> Row:
    """Medians over the turns that count, with machine and settings."""
    sides, step_s = {}, {}
    for who in ("trl", "isomorph"):
        turns = [row for row in rows if row["who"] == who and (row["turn"] or args.steps == 1)]
        side = {key: statistics.median(turn[key] for turn in turns) for key in turns[0] if key not in ("who", "turn")}
        for kind in ("completion", "all"):
            side[f"{kind}_tok_s"] = statistics.median(turn[f"{kind}_tok"] / turn["step_s"] for turn in turns)
        sides[who], step_s[who] = side, [turn["step_s"] for turn in turns]
    return {
        "who": "ratio",
        **sides,
        "ratio": sides["trl"]["step_s"] / sides["isomorph"]["step_s"],
        "ratios": [trl / ours for trl, ours in zip(step_s["trl"], step_s["isomorph"], strict=True)],
        **{name: getattr(args, name) for name in ("sampler", "dtype", "prompts", "group", "max_new_tok", "kl")},
        **{name: getattr(args, name) for name in ("trl_generation", "trl_accumulation", "trl_liger")},
        "model": args.name or Path(args.model).name,
        "turns": args.steps,
        "machine": machine(args.device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "command": _command(args),
        "date": time.strftime("%Y-%m-%d"),
    }


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the run, without this machine's folders."""
    options = ["--model", "FOLDER", *(["--name", args.name] if args.name else []), "--dtype", args.dtype]
    options += ["--steps", args.steps, "--sampler", args.sampler, "--prompts", args.prompts, "--group", args.group]
    options += ["--max-new-tok", args.max_new_tok, "--micro-batch-tok", args.micro_batch_tok, "--kl", f"{args.kl:g}"]
    options += ["--device", args.device, "--trl-accumulation", args.trl_accumulation]
    options += ["--trl-generation", args.trl_generation, *(["--trl-liger"] if args.trl_liger else [])]
    return shlex.join(map(str, ["python", "benchmarks/bench_step.py", *options]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face's format, for example SmolLM2-135M's")
    parser.add_argument("--name", help="what the results call the model; default: the folder's name")
    parser.add_argument("--steps", type=int, default=6, help="turns; the first does not count")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--max-new-tok", type=int, default=64)
    parser.add_argument("--micro-batch-tok", type=int, default=4096, help="of isomorph: packed tokens per micro-batch")
    parser.add_argument("--kl", type=float, default=0.0, help="coefficient of the KL to the first weights, k3")
    parser.add_argument("--sampler", choices=("builtin", "vllm"), default="builtin", help="of isomorph")
    parser.add_argument("--trl-generation", choices=("transformers", "continuous", "vllm"), default="transformers")
    parser.add_argument("--trl-accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--trl-liger", action="store_true", help="Liger's layers in TRL's model; needs a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON Lines file to append to")
    args = parser.parse_args(argv)
    if args.device == "cpu" and (args.trl_liger or args.trl_generation == "vllm"):
        parser.error("TRL's Liger layers and its vLLM need a GPU: --device cuda, or leave them out")
    if args.group * args.prompts % args.trl_accumulation:
        parser.error(f"--trl-accumulation must divide {args.group * args.prompts} completions")
    return args


def main() -> None:
    args = parse_args()
    rows = run_interleaved(args)
    summary = summarized(rows, args)
    for who in ("trl", "isomorph"):
        side = summary[who]
        print(
            f"{who:<9} {side['step_s']:.2f} s a step ({', '.join(f'{p[:-2]} {side[p]:.2f}' for p in PHASES)}), "
            f"{side['completion_tok_s']:.0f} completion tok/s, {side['all_tok_s']:.0f} tok/s, "
            f"{side['peak_mib']:.0f} MiB, {side['padding_share']:.0%} padding"
        )
    print(f"{summary['ratio']:.2f} times, {shlex.quote(summary['model'])}, {args.dtype}")
    if args.out:
        append_rows(args.out, [summary])


if __name__ == "__main__":
    main()
