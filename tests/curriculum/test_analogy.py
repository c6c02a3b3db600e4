"""Analogy against networkx and hand-computed graphs; traces; estimates against scipy; the command."""

import importlib.util
import io
import json
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from isomorph.curriculum.analogy.analysis import alignment_row
from isomorph.curriculum.analogy.correlation import Estimate, difference, pearson, slope
from isomorph.curriculum.analogy.items import Item, read_items
from isomorph.curriculum.analogy.strength import ROUNDS, strengths
from isomorph.curriculum.analogy.structure import Structure, structure_of
from isomorph.curriculum.analogy.trace import alignment, read_trace
from isomorph.curriculum.cli import app
from isomorph.curriculum.tasks.async_plan import Difficulty, draw_tasks, solve
from isomorph.curriculum.tasks.draw import draw
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.engine.record.runlog import RunLog


def structure(durations: list[float], predecessors: list[list[int]], key: str = "") -> Structure:
    return Structure(key, tuple((d, d) for d in durations), tuple(map(tuple, predecessors)))


# -- strength
def test_strength_of_small_graphs_is_what_a_hand_computes() -> None:
    chain, apart = structure([1, 1], [[], [0]]), structure([1, 2], [[], []])
    # colours of four rounds: the chain's own value is 4 + 3 * 2, that of two lone steps 4 * 4, together 4
    kernel = 4 / math.sqrt(10 * 16)
    np.testing.assert_allclose(strengths([chain], [apart]), 0.4 * (1 / 3) + 0.6 * kernel)
    # histograms {1: 2, 2: 1} and {1: 1, 2: 2}: smaller counts 2, larger 4; the order is the same
    one, other = structure([1, 1, 2], [[], [0], [1]]), structure([2, 1, 2], [[], [0], [1]])
    np.testing.assert_allclose(strengths([one], [other]), 0.4 * 0.5 + 0.6)
    np.testing.assert_allclose(strengths([one, chain], [one, chain]).diagonal(), 1.0)


def random_structure(rng: random.Random) -> Structure:
    n = rng.randint(1, 9)
    order = rng.sample(range(n), n)  # steps are not numbered in a feasible order
    before: list[list[int]] = [[] for _ in range(n)]
    for place, j in enumerate(order):
        before[j] = rng.sample(order[:place], min(place, rng.randint(0, 3)))
    return structure([rng.randint(1, 4) for _ in range(n)], before)


def hashes(graph: networkx.DiGraph) -> dict[int, list[str]]:
    """Since 3.5 networkx passes colours along and against the edges, and tells the two apart, as ours."""
    with warnings.catch_warnings(action="ignore"):  # that it did not before
        found: dict[int, list[str]] = networkx.weisfeiler_lehman_subgraph_hashes(
            graph, node_attr="colour", iterations=ROUNDS, include_initial_labels=True
        )
    return found


def test_the_kernel_is_that_of_networkx_colours_and_ignores_numbering() -> None:
    rng = random.Random(0)
    some = [random_structure(rng) for _ in range(25)]

    def colours(one: Structure) -> Counter[Any]:
        graph = networkx.DiGraph()
        graph.add_nodes_from(range(len(one.durations)), colour="step")
        graph.add_edges_from((i, j) for j, before in enumerate(one.predecessors) for i in before)
        return Counter((r, digest) for of_node in hashes(graph).values() for r, digest in enumerate(of_node))

    counts = [colours(one) for one in some]
    value = np.array([[sum(a[c] * b[c] for c in a) for b in counts] for a in counts], dtype=float)
    kernel = value / np.sqrt(np.outer(value.diagonal(), value.diagonal()))
    bags = [Counter(one.durations) for one in some]
    jaccard = np.array([[(a & b).total() / (a | b).total() for b in bags] for a in bags])
    np.testing.assert_allclose(strengths(some, some), 0.4 * jaccard + 0.6 * kernel, atol=1e-12)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = importlib.util.spec_from_file_location(
        "paper_rows", Path(__file__).parents[2] / "studies" / "paper_rows.py"
    )
    assert found is not None and found.loader is not None
    sys.modules["paper_rows"] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("rows")
    module.write(folder, num_train=12, num_test=6, seed=3)
    return folder


def test_a_procedure_has_one_structure_in_every_form(stand_ins: Path) -> None:
    forms = {"natural": "natural", "graph": "graph", "code": "python"}
    read = [
        [structure_of(t) for t in read_rows(stand_ins / f"asynchow_{file}_train.jsonl", "async_plan", form)]
        for form, file in forms.items()
    ]
    for alike in zip(*read, strict=True):
        np.testing.assert_allclose(strengths(alike, alike), 1.0)  # type: ignore[arg-type]
    for style in ("compact", "listed", "sentences"):
        difficulty = Difficulty(max_predecessors=3, max_steps=7, units=("min", "hour"), demonstration=style)
        for i, task in enumerate(draw_tasks(difficulty, "graph", 8, seed=5, split="train")):
            procedure = draw(random.Random(f"5:{i}"), difficulty, split="train")
            seconds = [float(d.seconds) for d in procedure.durations]
            want = structure(seconds, [list(before) for before in procedure.predecessors])
            np.testing.assert_allclose(strengths([structure_of(task)], [want]), 1.0)  # type: ignore[list-item]


@pytest.mark.parametrize("style", ["compact", "listed", "sentences"])
def test_durations_of_seven_digits_are_read_whole(style: Any) -> None:
    difficulty = Difficulty(units=("sec", "week"), max_duration=9, demonstration=style)
    tasks = draw_tasks(difficulty, "natural", 30, seed=0, split="train")
    assert any(max(task.row["amounts"]) > 1_000_000 for task in tasks)
    seconds = {"sec": 1, "week": 604_800}
    for task in tasks:
        read = structure_of(task)
        assert read is not None
        want = sorted(amount * seconds[task.row["unit"]] for amount in task.row["amounts"])
        assert sorted(low for low, _ in read.durations) == want


# -- traces
@pytest.mark.parametrize("style", ["compact", "listed", "sentences"])
def test_the_finish_times_of_demonstrations_are_read(style: Any) -> None:
    difficulty = Difficulty(max_predecessors=3, max_steps=7, units=("min", "hour"), demonstration=style)
    for i, task in enumerate(draw_tasks(difficulty, "natural", 20, seed=1, split="train")):
        procedure = draw(random.Random(f"1:{i}"), difficulty, split="train")
        trace = read_trace(task.demonstration or "")
        assert {name: step.finish for name, step in trace.items()} == {
            str(j + 1): finish for j, finish in enumerate(solve(procedure)[1])
        }
        for name, step in trace.items():
            assert {int(p) - 1 for p in step.predecessors} == set(procedure.predecessors[int(name) - 1])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1: 0 + 3 = 3; 2: 1 3 > 3 + 4 = 7", {"1": 3, "2": 7}),
        ("<think>step 1: 3 min\nStep 2: 3 + 4 = 7 min.</think> <answer>7 min</answer>", {"1": 3, "2": 7}),
        ("Step 2 ends at 7 minutes.\n- Node 3 is completed at time 3 + 4 = 7.", {"2": 7, "3": 7}),
        ("1: 0 + 3 = 3; 1: 0 + 4 = 4; 2: what", {"1": 4}),
        ("<answer>3: 4</answer>", {}),
        ("<think> 1 : 0 ; 2 : 1 . 1 : 0 + 3 = 3 ; 2 : 1 3 > 3 + 4 = 7 </think>", {"1": 3, "2": 7}),
        ("<think>1: 0; 2: 1; 3: 1 2. 2: 0 + 4 = 4</think>", {"2": 4}),
        ("no step here", {}),
        ("Step 4 (finished at 2) is late", {}),
    ],
)
def test_what_models_write_is_read_where_it_can_be(text: str, want: dict[str, float]) -> None:
    assert {name: step.finish for name, step in read_trace(text).items()} == want


def test_alignment_counts_steps_that_finish_alike() -> None:
    one = read_trace("1: 0 + 3 = 3; 2: 1 3 > 3 + 4 = 7; 3: 2 7 > 7 + 1 = 8")
    assert alignment(one, one) == 1.0
    assert alignment(one, read_trace("1: 0 + 3 = 3; 2: 0 + 4 = 4")) == pytest.approx(1 / 3)  # of three steps
    assert alignment(one, {}) is None
    # the paper's code: other names, seconds for minutes, a start that takes no time
    code = read_trace("947: 0 + 0 = 0; 830: 947 0 > 0 + 180 = 180; 711: 830 180 > 180 + 240 = 420; 5: 0 + 480 = 480")
    assert alignment(one, code) == 1.0


# -- estimates
def test_estimates_are_scipys_and_numpys() -> None:
    rng = np.random.default_rng(1)
    x, other = rng.normal(size=80), rng.normal(size=80)
    y = 0.5 * x + rng.normal(size=80)
    found = pearson(x.tolist(), y.tolist())
    assert found.value == pytest.approx(stats.pearsonr(x, y).statistic)
    peer = stats.bootstrap(
        (x, y), lambda a, b: stats.pearsonr(a, b).statistic, paired=True, vectorized=False, n_resamples=500,
        method="percentile", random_state=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=0.05)
    apart = difference(x.tolist(), other.tolist(), y.tolist())
    assert apart.value == pytest.approx(found.value - stats.pearsonr(other, y).statistic)
    fitted = np.linalg.lstsq(np.column_stack([np.ones(80), x, other]), y, rcond=None)[0]
    assert slope(x.tolist(), y.tolist(), other.tolist()).value == pytest.approx(fitted[1])
    assert slope(x.tolist(), y.tolist(), [0.0] * 80).value == pytest.approx(stats.linregress(x, y).slope)


def test_what_is_not_defined_has_no_number() -> None:
    constant, some = [1.0] * 5, [1.0, 2.0, 3.0, 4.0, 6.0]
    for estimate in (
        pearson(constant, some),
        pearson([1.0, 2.0], [1.0, 2.0]),
        slope(some, constant, some),
        slope(some, some, [2 * x for x in some]),
        pearson([], []),
    ):
        assert math.isnan(estimate.value) and estimate.to_dict()["low"] is None
        assert str(estimate) == "not defined"
    assert isinstance(pearson(some, some), Estimate)


# -- the command
def test_alignment_before_a_stage_is_set_against_the_gain_in_it() -> None:
    """Items whose traces agree gain, the others do not: the slope is 1."""
    texts = ["1: 0 + 3 = 3", "1: 0 + 4 = 4"] * 6
    before = [Item(f"{i}", "graph", True, "1: 0 + 3 = 3") for i in range(12)]
    before += [Item(f"{i}", "natural", False, text) for i, text in enumerate(texts)]
    after = [Item(f"{i}", "natural", i % 2 == 0, None) for i in range(12)]
    row = alignment_row(before, after, "graph", "natural", "graph -> natural")
    assert (row["items"], row["readable"], row["alignment"], row["gain"]) == (12, 12, 0.5, 0.5)
    assert row["slope"]["value"] == row["with_gain"]["value"] == pytest.approx(1.0)


def test_a_run_is_analysed_by_its_own_recipe(finished_run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["analogy", str(finished_run), "--out", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["representation"] for row in found["analogy"]] == ["natural", "graph", "code", "table"]
    assert all(row["items"] == 16 and row["unknown"] == 0 for row in found["analogy"])
    assert [(row["change"], row["from"], row["to"]) for row in found["alignment"]] == [
        ("symbols -> words", "graph", "code"),
        ("symbols -> words", "graph", "natural"),
    ]


@pytest.fixture
def items(stand_ins: Path, tmp_path: Path) -> Iterator[Path]:
    rows = [{"key": str(i), "representation": "natural", "correct": i % 2 == 0} for i in range(6)]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield file


def test_a_file_of_items_is_analysed_by_files_of_questions(items: Path, stand_ins: Path) -> None:
    train, test = (str(stand_ins / f"asynchow_graph_{split}.jsonl") for split in ("train", "test"))
    done = CliRunner().invoke(app, ["analogy", str(items), "--train", train, "--test", test])
    assert done.exit_code == 0, done.output
    found = json.loads(items.with_suffix(".analogy.json").read_text())
    assert found["training"] == 12 and found["analogy"][0]["items"] == 6
    refused = CliRunner().invoke(app, ["analogy", str(items), "--train", train])
    assert "name the file of its questions with --test" in str(refused.exception)
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    odd = [{**row, "answer": "3\u2028min\x85"} for row in rows]  # JSON has them within a line
    items.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in odd), encoding="utf-8")
    done = CliRunner().invoke(app, ["analogy", str(items), "--train", train, "--test", test])
    assert done.exit_code == 0, done.exception
    (items.parent / "bad.jsonl").write_text('{"key": 1}\n')
    refused = CliRunner().invoke(app, ["analogy", str(items.parent / "bad.jsonl"), "--train", train, "--test", test])
    assert "line 1: must have key, representation and correct" in str(refused.exception)


def test_items_with_line_separators_in_their_texts_are_read(tmp_path: Path) -> None:
    row = {"key": "k", "representation": "natural", "correct": True, "answer": "5\u2028min\u0085"}
    log = RunLog(tmp_path, Console(file=io.StringIO()))
    log.write_items("last", [row, {**row, "correct": False}])
    assert [one["correct"] for one in read_items(tmp_path / "evaluations" / "last.jsonl")] == [True, False]
