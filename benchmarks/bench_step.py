"""One GRPO step, ours beside TRL's, in one process and taking turns.

    python benchmarks/bench_step.py --model FOLDER [--steps 3] [--sampler builtin] [--out benchmarks/results/step.jsonl]

Same model, prompts, reward, group size, length limit, learning rate and dtype. TRL generates through transformers, its
default without a GPU. A turn is one whole step: generate, judge, update. Reported: the median of the turns after the
first, and the ratio. Needs the extra [bench].
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from isomorph.curriculum.tasks.async_plan import Difficulty, make_task
from isomorph.engine.config import ModelConfig, SamplerConfig, Stage
from isomorph.engine.policy import load_policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Sampling
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.pack import pack
from isomorph.engine.update.score import score

GROUP, PROMPTS, MAX_NEW_TOK, LEARNING_RATE = 8, 4, 64, 1e-6


def questions(num: int) -> list[str]:
    rngs = (random.Random(i) for i in range(num))
    return [make_task(rng, Difficulty(), "natural", split="train").question for rng in rngs]


def variety(text: str) -> float:
    """A reward that differs within every group, so that neither side can skip work."""
    return len(set(text)) / max(len(text), 1)


class Ours:
    """One step a call, on ``PROMPTS`` new prompts."""

    def __init__(self, model: str, sampler: str, dtype: str) -> None:
        config = ModelConfig(path=model, dtype=dtype)  # type: ignore[arg-type]
        self.policy = load_policy(config, vocabulary=[], seed=0, device=torch.device("cpu"))
        if sampler == "vllm":
            from isomorph.engine.rollout.vllm import start_vllm

            settings = SamplerConfig(kind="vllm", publish="shared", max_model_len=1024, max_seqs=GROUP * PROMPTS)
            self.sampler: Any = start_vllm(self.policy, settings, seed=0)
        else:
            self.sampler = BuiltinSampler(self.policy, SamplerConfig())
        self.stage = Stage(
            name="bench",
            steps=1_000,
            objective={"name": "grpo"},  # type: ignore[arg-type]
            optim={"lr": LEARNING_RATE},  # type: ignore[arg-type]
            batch={"prompts": PROMPTS, "max_tok": 4096},  # type: ignore[arg-type]
            sampling={"max_new_tok": MAX_NEW_TOK, "samples_per_prompt": GROUP},  # type: ignore[arg-type]
        )
        self.learner = Learner(self.policy)
        self.learner.enter(self.stage)
        self.version = 0

    def step(self, texts: list[str]) -> dict[str, float]:
        text = self.policy.text
        prompts = [
            Prompt(prompt_id=i, token_ids=text.encode_prompt(q), task="bench", representation="natural", payload=None)
            for i, q in enumerate(texts)
        ]
        sampling = Sampling(
            temperature=1.0,
            max_new_tok=MAX_NEW_TOK,
            samples_per_prompt=GROUP,
            stop_ids=text.stop_ids,
            seed=self.version,
        )
        marks = [time.perf_counter()]
        rollouts = self.sampler.generate(prompts, sampling)
        marks.append(time.perf_counter())
        judge = lambda _, answers: [variety(a) for a in answers]  # noqa: E731
        groups, _ = score(prompts, rollouts, judge, text.decode, self.stage.objective)
        updates = pack(
            groups,
            max_tok=self.stage.batch.max_tok,
            prompts_per_update=None,
            objective=self.stage.objective,
            device=self.policy.device,
        )
        marks.append(time.perf_counter())
        stats = self.learner.update(updates, self.stage, 0)
        marks.append(time.perf_counter())
        self.version += 1
        self.sampler.publish(self.version)
        marks.append(time.perf_counter())
        phases = ("generate_s", "judge_pack_s", "update_s", "publish_s")
        return {
            **{name: after - before for name, before, after in zip(phases, marks, marks[1:], strict=False)},
            "step_s": marks[-1] - marks[0],
            "response_tok": sum(len(r.token_ids) for r in rollouts),
            "trunk_tok": stats.num_trunk_tok,
            "drift_max": stats.drift_max,
        }


def run_interleaved(args: argparse.Namespace) -> list[dict[str, Any]]:
    """TRL drives; after each of its steps ours takes one on the same prompts."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ours = Ours(args.model, args.sampler, args.dtype)
    asked = questions(PROMPTS * args.steps)
    rows: list[dict[str, Any]] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [variety(c[0]["content"]) for c in completions]

    class Turns(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, config: Any, state: Any, *_: Any, **__: Any) -> None:
            index = state.global_step - 1
            rows.append({"who": "trl", "turn": index, "step_s": time.perf_counter() - self.started})
            turn = ours.step(asked[index * PROMPTS : (index + 1) * PROMPTS])
            rows.append({"who": "isomorph", "turn": index, **turn})
            for row in rows[-2:]:
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=GROUP * PROMPTS // 2,  # all at once, TRL's activations pass 24 GiB
            gradient_accumulation_steps=2,
            num_generations=GROUP,
            max_completion_length=MAX_NEW_TOK,
            max_steps=args.steps,
            learning_rate=LEARNING_RATE,
            beta=0.0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": args.dtype},
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in asked])
        trainer = GRPOTrainer(
            model=args.model, reward_funcs=reward, args=config, train_dataset=data, callbacks=[Turns()]
        )
        trainer.train()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M in safetensors")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sampler", choices=("builtin", "vllm"), default="builtin")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = run_interleaved(args)
    median = {
        who: statistics.median(r["step_s"] for r in rows if r["who"] == who and (r["turn"] or args.steps == 1))
        for who in ("trl", "isomorph")
    }
    summary = {
        "who": "ratio",
        "trl_s": median["trl"],
        "isomorph_s": median["isomorph"],
        "ratio": median["trl"] / median["isomorph"],
        "sampler": args.sampler,
        "dtype": args.dtype,
        "turns": args.steps,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"TRL {median['trl']:.2f} s, isomorph {median['isomorph']:.2f} s a step: {summary['ratio']:.2f} times")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*rows, summary])


if __name__ == "__main__":
    main()
