"""Seconds of a step that data and rewards cost: 512 prompts x 16 cheap responses, by each form of reward function.

    python benchmarks/bench_rewards.py [--prompts 512] [--samples 16] [--steps 5] [--model FOLDER] [--rows 100000]

Rewards: the groups arrive one after the other, as from a sampler that is never waited for, so that nothing is hidden
behind sampling; in a run most of this passes while other responses are drawn. Data: rows are drawn, rendered and
tokenised as a run takes its prompts.

With ``--model``: the share of a step of that model, ``--response-tok`` tokens a response. Its step (generate, score,
update, weight sync) is timed in the same run, once after each form, with ``--step-prompts`` prompts, and multiplied by
the ratio of response tokens. A large step takes less time a token than a small one, so that the share is a lower bound:
raise ``--step-prompts`` until it no longer changes. Of seconds and shares the median, the lowest and the highest: those
of the share are the lowest cost over the longest step, and the reverse. Prints one JSON object a line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH Python leaves a script's folder out

from bench_rows import rows
from bench_step import Ours, questions

from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rewards.table_judge import Source, TableJudge
from isomorph.curriculum.rows.source import RowsSource
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.sources import as_prompt
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.model.text import TextCodec, byte_tokenizer
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


def seconds_of_rewards(functions: tuple[str, ...], args: argparse.Namespace) -> list[float]:
    """Of each step but the first."""
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
    return seconds[1:]


def seconds_of_data(text: TextCodec, file: Path, args: argparse.Namespace) -> list[float]:
    """Of each step but the first: its prompts drawn from ``file`` and tokenised."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(args.rows)))
    data = RowsData(kind="rows", path=str(file), prompt="{question}\nEnd with ####.", answer="answer", eval_share=0.01)
    source, position, seconds = RowsSource(data, text, "rows"), 0, []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        for i in range(args.prompts):
            task, position = source.draw("natural", position, 0)
            as_prompt(i, task, text)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


class Steps:
    """Steps of a model with few prompts, and what they say of a step of ``args.prompts`` x ``args.samples``."""

    def __init__(self, args: argparse.Namespace) -> None:
        own = {"prompts": args.step_prompts, "group": args.samples, "max_new_tok": args.response_tok}
        settings = {**vars(args), **own, "sampler": "builtin", "kl": 0.0, "micro_batch_tok": 4096}
        self.ours, self.args = Ours(argparse.Namespace(**settings)), args
        self.seconds: list[float] = []
        self.ours.step(questions(args.step_prompts))  # a warm-up

    def measure(self) -> None:
        args, row = self.args, self.ours.step(questions(self.args.step_prompts))
        whole = args.prompts * args.samples * args.response_tok
        self.seconds.append(row["step_s"] * whole / row["completion_tok"])


def told(name: str, seconds: Sequence[float], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "cost": name,
        "responses": args.prompts * args.samples,
        "cores": os.cpu_count(),
        "s_per_step": [round(f(seconds), 4) for f in (statistics.median, min, max)],
    }


def shares(cost: Sequence[float], steps: Sequence[float]) -> list[float]:
    """Median, lowest and highest share that ``cost`` is of a step that takes ``steps`` without it."""
    pairs = [(statistics.median(cost), statistics.median(steps)), (min(cost), max(steps)), (max(cost), min(steps))]
    return [round(one / (one + step), 5) for one, step in pairs]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", help="folder of a model: prints the share of its step")
    parser.add_argument("--step-prompts", type=int, default=4)
    parser.add_argument("--response-tok", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    steps = Steps(args) if args.model else None
    text = steps.ours.policy.text if steps else TextCodec(byte_tokenizer(), chat_template=False, stop_ids=[1])
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.py"
        file.write_text(FILE)
        ours, trl, verl = (f"{file}:{name}" for name in ("ours", "trl", "compute_score"))
        found["data"] = seconds_of_data(text, Path(folder) / "rows.jsonl", args)
        for name, functions in (
            ("numeric (built in)", ("numeric",)),
            ("f(answer)", (ours,)),
            ("TRL", (trl,)),
            ("verl", (verl,)),
            ("all four", ("numeric", ours, trl, verl)),
        ):
            found[name] = seconds_of_rewards(functions, args)
            if steps:
                steps.measure()
    found["data and all four"] = [a + b for a, b in zip(found["data"], found["all four"], strict=True)]
    if steps:
        what = {"tok_per_response": args.response_tok, "measured_prompts": args.step_prompts, "device": args.device}
        print(
            json.dumps({**told(f"a step of {Path(args.model).name}, scaled", steps.seconds, args), **what}), flush=True
        )
    for name, seconds in found.items():
        share = {"share_of_step": shares(seconds, steps.seconds)} if steps else {}
        print(json.dumps({**told(name, seconds, args), **share}), flush=True)


if __name__ == "__main__":
    main()
