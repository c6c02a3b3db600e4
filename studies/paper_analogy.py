"""Likeness of the paper's procedures, without a model: each test procedure against all training procedures.

    python studies/paper_analogy.py TRAIN.jsonl [TEST.jsonl] [--out FILE]

Without TEST.jsonl the last 225 rows of TRAIN.jsonl are compared with the others. Prints and appends one row.
"""

import argparse
import datetime
import json
import resource
import time
from pathlib import Path

import numpy as np

from isomorph.curriculum.analogy.analysis import RELATED
from isomorph.curriculum.analogy.strength import strengths
from isomorph.curriculum.analogy.structure import Structure, structure_of
from isomorph.curriculum.rewards.families import ASYNC_PLAN
from isomorph.curriculum.tasks.jsonl import read_rows

NUM_TEST = 225


def structures(file: Path) -> list[Structure]:
    found = [structure_of(task) for task in read_rows(file, ASYNC_PLAN.name, "graph")]
    return [one for one in found if one is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="a file of graphs, such as asynchow_graph_train.jsonl")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    given = parser.parse_args()
    training = structures(given.train)
    if given.test is None:
        training, test = training[:-NUM_TEST], training[-NUM_TEST:]
    else:
        test = structures(given.test)
    started = time.perf_counter()
    found = strengths(test, training)
    seconds = time.perf_counter() - started
    nearest = found.max(axis=1)
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "train": given.train.name,
        "test": given.test.name if given.test else f"last {NUM_TEST} rows of train",
        "training": len(training),
        "tested": len(test),
        "nearest": {f"{q:g}": round(float(np.quantile(nearest, q)), 4) for q in (0, 0.25, 0.5, 0.75, 1)},
        "equal": int((nearest > 1 - 1e-9).sum()),  # test procedures of strength 1 with a training procedure
        "mean": round(float(found.mean()), 4),
        "related": round(float((found >= RELATED).sum(axis=1).mean()), 2),  # training procedures a test procedure
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(row), f"{seconds:.2f} s")
    with given.out.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
