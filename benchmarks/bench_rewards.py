"""Seconds of a step that rewards cost: 512 prompts x 16 cheap responses, by each form of reward function.

    python benchmarks/bench_rewards.py [--prompts 512] [--samples 16] [--steps 5] [--share-of SECONDS]

The groups arrive one after the other, as from a sampler that is never waited for, so that nothing is hidden behind
sampling: in a run most of this passes while other responses are drawn. ``--share-of``: seconds of a step, to print the
share. Prints one JSON object a line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rewards.table_judge import Source, TableJudge
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.types import Prompt, Rollout
from isomorph.engine.update.score import RewardThread

ROW = {"question": "How many apples does the farm bear in a year? " * 4, "answer": "12 * 7 = 84\n#### 84"}
TEXT = "Each of the 12 fields has 7 trees, which makes 84 trees in all, so the answer is this.\n#### 84"
FILE = """
def ours(answer):
    return float(answer.text.rpartition("####")[2].strip() == answer.gold)


def trl(prompts, completions, answer, **kwargs):
    golds = [gold.rpartition("####")[2] for gold in answer]
    return [float(text.rpartition("####")[2] == gold) for text, gold in zip(completions, golds)]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.rpartition("####")[2].strip() == ground_truth)
"""


def groups(num_prompts: int, num_samples: int, num_tok: int = 64) -> tuple[list[Prompt], list[list[Rollout]]]:
    prompts, drawn = [], []
    for i in range(num_prompts):
        task = Task(
            family="rows",
            representation="natural",
            question=ROW["question"],
            answer="84",
            key=str(i),
            data="gsm",
            row={**ROW, "index": i},
        )
        prompts.append(Prompt(prompt_id=i, token_ids=(1,), task="rows", representation="natural", payload=task))
        drawn.append(
            [
                Rollout(
                    prompt_id=i,
                    sample=s,
                    token_ids=torch.arange(num_tok),
                    sampler_logprob=None,
                    finish="stop",
                    policy_version=0,
                )
                for s in range(num_samples)
            ]
        )
    return prompts, drawn


def measure(name: str, functions: tuple[str, ...], args: argparse.Namespace) -> dict[str, object]:
    prompts, drawn = groups(args.prompts, args.samples)
    table = RewardTable(rewards=tuple(RewardEntry(function=function) for function in functions))
    seconds = []
    with (
        RewardPool() as pool,
        TableJudge({"gsm": Source(table=table, columns=frozenset(ROW) | {"index"})}, pool) as judge,
    ):
        judge.start()
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            with RewardThread(judge, lambda ids: TEXT, prompts) as rewarding:
                for i, rollouts in enumerate(drawn):
                    rewarding.add(i, rollouts)
                _, scores = rewarding.results()
            seconds.append(time.perf_counter() - start)
            assert set(scores.rewards) == {float(len(functions))} and judge.counts.by_name == {}
    median = statistics.median(seconds[1:])
    row: dict[str, object] = {
        "rewards": name,
        "responses": args.prompts * args.samples,
        "workers": judge.code.max_workers,
        "s_per_step": round(median, 4),
        "us_per_response": round(1e6 * median / (args.prompts * args.samples), 1),
    }
    return row if args.share_of is None else {**row, "share_of_step": round(median / args.share_of, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--share-of", type=float)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.py"
        file.write_text(FILE)
        ours, trl, verl = (f"{file}:{name}" for name in ("ours", "trl", "compute_score"))
        for name, functions in (
            ("numeric (built in)", ("numeric",)),
            ("f(answer)", (ours,)),
            ("TRL", (trl,)),
            ("verl", (verl,)),
            ("all four", ("numeric", ours, trl, verl)),
        ):
            print(json.dumps(measure(name, functions, args)), flush=True)


if __name__ == "__main__":
    main()
