"""Memory of every rank in a short run, beside what the planner says of it.

    python benchmarks/bench_memory.py --model FOLDER [--layers 10] [--dtypes float32 bfloat16] [--cases 1:data ...]
                                      [--checkpoint-every 1] [--again FILE] [--out benchmarks/results/memory.jsonl]

A case is a number of ranks and ``parallel.kind``; with ``:host`` the optimizer is in host memory. Each is a run of two
steps on the CPU (gloo), whose ranks are forks of this process, with a checkpoint after every ``checkpoint-every``-th
step. Each rank tells the peak of its resident memory in every phase (``VmHWM``, reset at its beginning). The plan
is that of `isomorph plan RECIPE --ranks N`, the process included, for responses of the greatest length. Compared are
the peaks of the second step's phases: moments exist from then on, and a copy for the checkpoint after the first. Bytes
do not depend on how busy the machine is, but for how long that copy lives, which the disk decides.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from isomorph.curriculum.commands.train import train_in
from isomorph.curriculum.estimate import plan_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.record.telemetry import Telemetry, process_memory_gib

CASES = ("1:data", "2:data", "2:fsdp", "4:data", "4:fsdp", "1:data:host")
WAIT_S = 3000.0
MEASURED = ("measured_gib", "before_gib")
STEP = ("publish", "generate", "judge", "pack", "update")  # phases of a step
RECIPE = """
[model]
path = "{model}"
dtype = "{dtype}"
offload_optimizer = {on_host}
[parallel]
kind = "{kind}"
[run]
checkpoint_every = {checkpoint_every}
[data.plans]
kind = "async_plan"
difficulty = {{ form = "terse", demonstration = "compact", min_steps = 3, max_steps = 5 }}
[[stage]]
name = "rl"
steps = 2
objective = {{ name = "dapo", entropy_coef = 0.01 }}
sampling = {{ max_new_tok = {new_tok}, samples_per_prompt = 2 }}
batch = {{ prompts = 4, micro_batch_tok = {micro_tok} }}
mixture = [{{ data = "plans", representation = "graph" }}]
[eval]
data = "plans"
representations = ["graph"]
prompts = 1
max_new_tok = 2
"""


def with_layers(model: Path, num_layers: int, folder: Path) -> Path:
    """A copy of ``model`` in ``folder`` with its first ``num_layers`` layers: the same tensors, but fewer."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    kept = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < num_layers:
            kept[name] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def watch_phases(file: Path) -> None:
    """Has this process append to ``file``, after each step, the peak in every phase since the step before."""
    peaks: dict[str, float] = {}
    phases, timed, end = ["between"], RunLog.time, Telemetry.end
    before_gib = process_memory_gib()[0]

    def credit() -> None:
        peak_gib = process_memory_gib()[1]
        assert peak_gib is not None
        peaks[phases[-1]] = max(peaks.get(phases[-1], 0.0), peak_gib)
        Path("/proc/self/clear_refs").write_text("5")

    @contextlib.contextmanager
    def time(self: RunLog, phase: str) -> Iterator[None]:
        credit()
        phases.append(phase)
        with timed(self, phase):
            yield
        credit()
        phases.pop()

    def told(self: Telemetry, **options: Any) -> dict[str, Any]:
        credit()
        with file.open("a") as out:
            out.write(json.dumps({"before_gib": before_gib, "peaks_gib": peaks}) + "\n")
        peaks.clear()
        return end(self, **options)

    RunLog.time, Telemetry.end = time, told  # type: ignore[assignment,method-assign]


def serve(rank: int, num_ranks: int, port: int, folder: Path) -> None:
    """Trains as one of ``num_ranks`` and writes the peak of each of its steps to ``folder``."""
    sys.stdout = sys.stderr = (folder / f"{rank}.txt").open("w")
    torch.set_num_threads(1)
    if num_ranks > 1:  # as torchrun starts them
        os.environ |= {"TORCHELASTIC_RUN_ID": "bench", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    watch_phases(folder / f"{rank}.jsonl")
    recipe = load_recipe(folder / "recipe.toml", [], Recipe)
    console = Console(file=sys.stdout, width=200)
    train_in(folder / "run", recipe, console, is_named=True, resume=False, report=False)


def run(num_ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """The rows that each rank told."""
    context = multiprocessing.get_context("fork")  # no import for every rank; nothing has computed here, so no threads
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=serve, args=(rank, num_ranks, port, folder)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(WAIT_S)
    if any(process.exitcode != 0 for process in ranks):
        raise SystemExit("".join((folder / f"{r}.txt").read_text()[-2000:] for r in range(num_ranks)))
    return [[json.loads(line) for line in (folder / f"{r}.jsonl").read_text().splitlines()] for r in range(num_ranks)]


def planned_in(case: str, dtype: str, model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The plan of one case, whose recipe goes to ``folder``."""
    ranks, kind, *rest = case.split(":")
    settings = {
        "model": model,
        "dtype": dtype,
        "on_host": "true" if rest == ["host"] else "false",
        "kind": kind,
        "checkpoint_every": args.checkpoint_every,
        "micro_tok": args.micro_tok,
        "new_tok": args.new_tok,
    }
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**settings))
    planned: dict[str, Any] = plan_recipe(load_recipe(recipe, [], Recipe), None, None, int(ranks))["stages"][0]
    return planned


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Peaks of one case by rank; its recipe is in ``folder``, where the run's files go."""
    told = run(int(case.split(":")[0]), folder)
    facts = [{name: gib for name, gib in rows[1]["peaks_gib"].items() if name in STEP} for rows in told]
    return {"measured_gib": facts, "before_gib": max(rows[0]["before_gib"] for rows in told)}


def compared(planned: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Both, with the ratio of the highest peaks."""
    fact_gib = max(max(one.values()) for one in measured["measured_gib"])
    plan_gib = max(planned["peak_gib"].values())
    both = {"plan_gib": plan_gib, "fact_gib": fact_gib, "ratio": plan_gib / fact_gib}
    return {**both, "peaks_gib": planned["peak_gib"], "plan": planned["arenas_gib"], **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with one file of weights")
    parser.add_argument("--layers", type=int, help="only the model's first ones; default: all")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--checkpoint-every", type=int, default=1)
    parser.add_argument("--micro-tok", type=int, default=4096)
    parser.add_argument("--new-tok", type=int, default=4)
    parser.add_argument("--again", type=Path, help="a result file: what it has is planned again, and not measured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    old = [json.loads(line) for line in args.again.read_text().splitlines()] if args.again else []
    print(f"{'ranks:kind':14}{'dtype':10}{'planned':>9}{'measured':>10}{'ratio':>7}   GiB, the largest rank")
    for dtype, case in itertools.product(args.dtypes, args.cases):
        with tempfile.TemporaryDirectory(prefix="isomorph-memory-") as text:
            folder = Path(text)
            model = args.model if args.layers is None else with_layers(args.model, args.layers, folder / "model")
            planned = planned_in(case, dtype, model, args, folder)
            same = {"case": case, "dtype": dtype, "layers": args.layers, "checkpoint_every": args.checkpoint_every}
            known = next((one for one in old if same.items() <= one.items()), None)
            measured = {key: known[key] for key in MEASURED} if known else measure(case, folder)
        row = {"case": case, "dtype": dtype, **compared(planned, measured)}
        print(f"{case:14}{dtype:10}{row['plan_gib']:9.2f}{row['fact_gib']:10.2f}{row['ratio']:7.2f}", flush=True)
        row |= {"model": args.model.name, "layers": args.layers, "checkpoint_every": args.checkpoint_every}
        row |= {"torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        if args.out is not None:
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
