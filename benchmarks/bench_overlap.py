"""Seconds of a step with and without ``sampler.overlap``, interleaved, by what a reward costs.

    python benchmarks/bench_overlap.py [--model FOLDER] [--rounds 5] [--steps 6] [--wait-s 0 0.5 2]
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_overlap.py ...              the same on two ranks

Both forms have objective.old_logprob = "sampler". A round makes one run of each form, the order turned every round; of
a run the median of its steps but the first two, the time between steps included. ``--wait-s``: seconds that the
reward's service is waited for, once a step. Prints a JSON object for each of these: ``off`` and ``on`` of every round,
their ratio (median, 20 % to 80 %), the staleness of every step, and the load before, which must be near 0 for the
seconds to mean anything.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.distributed.launch import open_ranks
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.runlog import read_steps

TINY = "[model.tiny]\nhidden_size = 128\nnum_layers = 4\nmax_model_len = 256"
RECIPE = """
%(model)s

[sampler]
overlap = %(overlap)s

[log]
tensorboard = false

[data.sums]
kind = "rows"
path = "rows.jsonl"
prompt = "{question}"
rewards = [{ function = "slow.py:slow" }]

[[stage]]
name = "sums"
steps = %(steps)d
objective = { name = "grpo", old_logprob = "sampler" }
batch = { prompts = 8, micro_batch_tok = 2048 }
sampling = { max_new_tok = 64, samples_per_prompt = 8 }
mixture = [{ data = "sums" }]

[eval]
data = "sums"
prompts = 1
"""
SLOW = """
import time

def slow(prompts, completions, **kwargs):
    time.sleep(%(wait_s)g)
    return [float(len(set(text)) %% 7) for text in completions]
"""


def seconds_of(folder: Path, ranks: Ranks, given: argparse.Namespace, wait_s: float, overlap: str) -> dict[str, Any]:
    """Median seconds of a run's steps, and how stale they were."""
    if ranks.is_first:
        model = TINY if given.model is None else f'[model]\npath = "{given.model.resolve()}"'
        told = {"model": model, "overlap": overlap, "steps": given.steps}
        (folder / "run").mkdir()
        (folder / "recipe.toml").write_text(RECIPE % told)
        (folder / "slow.py").write_text(SLOW % {"wait_s": wait_s})
        rows = ({"question": f"{a} + {b}"} for a in range(20) for b in range(20))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranks.wait()
    recipe = load_recipe(folder / "recipe.toml", [], Recipe)
    console = Console(file=io.StringIO())
    run_recipe(recipe, folder / "run", console, lambda: False, ranks, resume=False, report=False)
    ranks.wait()
    rows = read_steps(folder / "run")
    steps = [row["time/step_s"] + row["time/between_s"] for row in rows[2:]]
    return {"seconds": statistics.median(steps), "staleness": [row["staleness"] for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--wait-s", type=float, nargs="+", default=[0.0, 0.5, 2.0])
    given = parser.parse_args()
    with open_ranks() as ranks:
        for wait_s in given.wait_s:
            load, found = os.getloadavg()[0], {"false": [], "true": []}
            for number in range(given.rounds):
                for overlap in ("false", "true") if number % 2 == 0 else ("true", "false"):
                    folder = Path(ranks.from_first(tempfile.mkdtemp))
                    found[overlap].append(seconds_of(folder, ranks, given, wait_s, overlap))
            off, on = ([one["seconds"] for one in found[overlap]] for overlap in ("false", "true"))
            ratios = np.array(off) / np.array(on)
            row = {"wait_s": wait_s, "ranks": ranks.size, "load_average": round(load, 1), "off_s": off, "on_s": on}
            row |= dict(zip(("off/on", "p20", "p80"), np.quantile(ratios, [0.5, 0.2, 0.8]).tolist(), strict=True))
            row |= {"staleness": found["true"][0]["staleness"], "date": time.strftime("%Y-%m-%d")}
            if ranks.is_first:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
