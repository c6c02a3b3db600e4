"""The paper's files: every row is read, solved, demonstrated and split."""

import importlib.util
import json
import os
import re
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from isomorph.curriculum.judge import judge
from isomorph.curriculum.rewards.duration import Interval, parse_timedeltas
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.tasks.asynchow import Plan, parse_question
from isomorph.curriculum.tasks.jsonl import demonstrate_question, read_rows, solve_question, split_rows
from isomorph.curriculum.tasks.longest_path import topological_order
from isomorph.curriculum.tasks.task import DataError, Task

FILES = {
    "natural": "asynchow_natural_train.jsonl",
    "graph": "asynchow_graph_train.jsonl",
    "code": "asynchow_python_train.jsonl",
}
NUM_ROWS = 1373
NUM_PROCEDURES = 1323  # up to the numbering of steps: 50 rows repeat an earlier one

# Line numbers whose stated answer our longest path contradicts. In each, the critical path holds a duration of two
# parts ("2 hours 30 minutes", "1 days 6 hours"), of which the stated answer counts the last part alone. The code
# file states the right answer for the same procedures.
DISAGREEING = {"natural": {110, 242, 410, 1208}, "graph": {110, 242, 410, 1208}, "code": set()}
# Line numbers whose stated interval holds ours, but begins earlier: months against weeks or hours on other paths.
WIDER = {"natural": {1253, 1289}, "graph": {1253, 1289}, "code": set()}


def _data_folder() -> Path:
    named = os.environ.get("ISOMORPH_ASYNCHOW")
    root = Path(__file__).resolve().parents[2]
    for folder in [Path(named)] if named else [root / "../shared/data"]:
        for candidate in (folder, folder / "asynchow"):
            if (candidate / FILES["natural"]).is_file():
                return candidate
    pytest.skip("the paper's data is not here: set ISOMORPH_ASYNCHOW to the folder of asynchow_*_train.jsonl")


@cache
def _rows(representation: str) -> list[Task]:
    return read_rows(_data_folder() / FILES[representation], "async_plan", representation)


@pytest.mark.parametrize("representation", FILES)
def test_our_longest_path_is_every_rows_answer_but_for_the_known_ones(representation: str) -> None:
    rows = _rows(representation)
    assert len(rows) == NUM_ROWS
    wrong, wider = set(), set()
    for line, task in enumerate(rows, start=1):
        stated = _stated(task.answer)
        solved = solve_question(task.question, representation)
        low, high = solved if isinstance(solved, Interval) else (solved, solved)
        if not stated[0] <= low <= high <= stated[1]:
            wrong.add(line)
        elif (low, high) != stated:
            wider.add(line)
    assert (wrong, wider) == (DISAGREEING[representation], WIDER[representation])


def _stated(answer: str) -> tuple[Any, Any]:
    return parse_timedeltas(answer) if "timedelta" in answer else (Decimal(answer), Decimal(answer))


@pytest.mark.parametrize("representation", FILES)
def test_demonstrations_are_judged_right_where_the_answer_is(representation: str) -> None:
    wrong = set()
    for line, task in enumerate(_rows(representation), start=1):
        assert task.demonstration == demonstrate_question(task.question, representation)
        if judge("async_plan", task.demonstration, task.answer) != 1.0:
            wrong.add(line)
    assert wrong == DISAGREEING[representation]


def test_the_sequential_answer_is_almost_never_right() -> None:
    for representation in FILES:
        rows = _rows(representation)
        right = sum(judge("async_plan", f"<answer>{t.sequential_answer}</answer>", t.answer) for t in rows)
        assert 0 < right <= 5


def test_row_i_is_one_procedure_in_all_files_and_repeats_share_a_key() -> None:
    keys = {name: [task.key for task in _rows(name)] for name in FILES}
    assert keys["natural"] == keys["graph"] == keys["code"]
    assert len(set(keys["natural"])) == NUM_PROCEDURES
    assert all(int(key) <= i for i, key in enumerate(keys["natural"]))


def test_a_split_shares_no_procedure_and_is_the_same_for_all_files() -> None:
    rows = {name: _rows(name) for name in FILES}
    train, held_out = split_rows(rows, eval_share=0.1, seed=5)
    assert train.keys() == held_out.keys() == rows.keys()
    for name in FILES:
        assert len(train[name]) + len(held_out[name]) == NUM_ROWS
        assert {t.key for t in train[name]}.isdisjoint(t.key for t in held_out[name])
        assert [t.key for t in held_out[name]] == [t.key for t in held_out["natural"]]
    assert len({t.key for t in held_out["code"]}) == round(0.1 * NUM_PROCEDURES)
    assert split_rows(rows, eval_share=0.1, seed=5) == (train, held_out)
    assert split_rows(rows, eval_share=0.1, seed=6) != (train, held_out)


@pytest.mark.parametrize("family", ["math", "physics"])
def test_mathematics_and_physics_files_are_read(family: str) -> None:
    folder = _data_folder().parent / "physics_math"
    if not folder.is_dir():
        pytest.skip("the paper's mathematics and physics files are not here")
    rows = {
        name: read_rows(folder / f"{family}_long_{name}_train.jsonl", family, name) for name in ("natural", "python")
    }
    assert {len(tasks) for tasks in rows.values()} == {{"math": 1411, "physics": 227}[family]}
    assert all(task.demonstration is None for tasks in rows.values() for task in tasks)
    split_rows(rows, eval_share=0.1, seed=0)


# From here on without the paper's data: questions of its form in our own words.

NATURAL = """To rest, here are the steps and the times needed for each step.
Step 1. Brew tea (5 min)
Step 2. Find a book (maybe) (1 hours)
Step 3. Sit down (30 sec)
Step 4. Read (2 hours 30 minutes)


These ordering constraints need to be obeyed when executing above steps:
Step 1 must precede step 3 and 4.
Step 2 must precede step 4.

Question: how long?"""

GRAPH = """You have a graph:
{'1': ['3', '4'], '2': ['4'], '3': ['END'], '4': ['END'], 'END': [], 'START': ['1', '2']}

labelled:
{'4': '2 hours 30 minutes', '1': '5 min', '2': '1 hours', '3': '30 sec'}
how long?"""

CODE = """```python
adj_list = {7: [(9, 0.5), (4, 150.0)], 2: [(4, 150.0)], 9: [(8, 0.0)], 4: [(8, 0.0)], 8: [], 1: [(7, 5.0), (2, 60.0)]}
source = 1
target = 8
```"""

QUESTIONS = {"natural": NATURAL, "graph": GRAPH, "code": CODE}


def test_the_three_forms_are_solved() -> None:
    assert solve_question(NATURAL, "natural") == solve_question(GRAPH, "graph") == (12_600, 12_600)
    assert solve_question(CODE, "code") == 210


def test_months_and_years_are_solved_as_intervals() -> None:
    question = "Step 1. Wait (2 month)\nStep 2. Work (1 year)\nStep 1 must precede step 2."
    assert solve_question(question, "natural") == ((56 + 365) * 86_400, (62 + 366) * 86_400)
    assert demonstrate_question(question, "natural").endswith("<answer>425 days</answer>")


def test_demonstrations_name_predecessors_and_convert_units() -> None:
    assert demonstrate_question(NATURAL, "natural", style="compact") == (
        "<think>1: 5 min = 300, 0 + 300 = 300; 2: 1 hours = 3600, 0 + 3600 = 3600; 3: 1 300 > 300 + 30 = 330; "
        "4: 2 hours 30 minutes = 9000, 1 300 2 3600 > 3600 + 9000 = 12600</think> <answer>12600 sec</answer>"
    )
    assert demonstrate_question(NATURAL, "natural", style="listed") == (
        "<think>1: 0; 2: 0; 3: 1; 4: 1 2. 1: 5 min = 300, 0 + 300 = 300; 2: 1 hours = 3600, 0 + 3600 = 3600; "
        "3: 1 300 > 300 + 30 = 330; 4: 2 hours 30 minutes = 9000, 1 300 2 3600 > 3600 + 9000 = 12600</think> "
        "<answer>12600 sec</answer>"
    )
    assert demonstrate_question(CODE, "code").endswith("<answer>210</answer>")
    assert "Node 9 takes 0.5 and comes after node 7 (finished at 5)" in demonstrate_question(CODE, "code")


def test_only_nodes_between_start_and_end_count() -> None:
    dead_end = CODE.replace("8: []", "8: [], 3: [(5, 999.0)], 5: []").replace("(7, 5.0)", "(7, 5.0), (5, 999.0)")
    assert solve_question(dead_end, "code") == 210


@pytest.mark.parametrize(
    ("representation", "question", "named"),
    [
        ("graph", "{'START': ['END'], 'END': []}\n{}", "between START and END"),
        ("code", "adj_list = {}\nsource = 1\ntarget = 1", "node 1 is named, but not listed"),
        ("code", "adj_list = {1: [(2, True)], 2: []}\nsource = 1\ntarget = 2", "weight"),
    ],
)
def test_a_question_without_steps_is_refused(representation: str, question: str, named: str) -> None:
    for read in (parse_question, solve_question, demonstrate_question):
        with pytest.raises(DataError, match=named):
            read(question, representation)


@pytest.mark.parametrize(
    ("representation", "old", "new", "named"),
    [
        ("natural", "(5 min)", "(5 moons)", "moons"),
        ("natural", "(5 min)", "(5-10 min)", "duration"),
        ("natural", "step 3 and 4", "step 3 and 9", "9"),
        ("natural", "Step 2 must precede step 4", "Step 4 must precede step 1", "cycle"),
        ("natural", "Step ", "Stage ", "steps"),
        ("natural", "Step 2 must precede step 4.", "You gotta deal with 2 before hittin' the 4.", "hittin"),
        ("natural", "Step 2 must precede step 4.", "Step 2 must come before step 4.", "come before"),
        ("natural", "Step 2 must precede step 4.", "Step 2 must precede step 4 and step 3.", "and step 3"),
        (
            "natural",
            "Step 2 must precede step 4.",
            "Step 2 must precede step 4. Step 1 must precede step 2.",
            "Step 2 m",
        ),
        ("natural", "Step 1 must precede step 3 and 4.\nStep 2 must precede step 4.\n", "All in order.\n", "in order"),
        ("natural", "Step 3. Sit", "Step 3.Sit", r"Step 3\.Sit"),
        ("natural", "Step 3. Sit", "Step 2. Sit", "twice"),
        ("natural", "Step 1. Brew", "Step 2 must come first.\nStep 1. Brew", "come first"),
        ("natural", NATURAL[NATURAL.index("These") : NATURAL.index("Question")], "\n", "found neither"),
        ("graph", "'END': [],", "", "END"),
        ("graph", "'3': '30 sec'", "'3': 30", "durations"),
        ("graph", ", '3': '30 sec'", "", "'3'"),
        ("graph", "['1', '2']}", "['1', '2']", "adjacency"),
        ("graph", "'2': ['4']", "'2': __import__('os').getcwd()", "literal"),
        ("graph", "'3': ['END']", "'3': ['1']", "cycle"),
        ("code", "source = 1", "source = 5", "path"),
        ("code", "target = 8", "", "target"),
        ("code", "(9, 0.5)", "(9, -0.5)", "weight"),
        ("code", "(9, 0.5)", "(9, 1e999)", "weight"),
        ("code", "(9, 0.5)", "9", "adj_list"),
        ("code", "2: [(4, 150.0)]", "2: [(4, 151.0)]", "one weight"),
        ("code", "8: [],", "", "8"),
        ("code", "adj_list = {", "adj_list = {" + "{" * 5000, "literal"),
    ],
)
def test_a_broken_question_is_refused_by_what_is_wrong(representation: str, old: str, new: str, named: str) -> None:
    question = QUESTIONS[representation].replace(old, new)
    assert question != QUESTIONS[representation]
    with pytest.raises(DataError, match=named):
        demonstrate_question(question, representation)


def test_an_unknown_representation_is_refused() -> None:
    with pytest.raises(DataError, match="representation"):
        solve_question(NATURAL, "python")


GOLD = "[datetime.timedelta(seconds=12600), datetime.timedelta(seconds=12600)]"
ROW = json.dumps({"question": NATURAL, "answer": GOLD})


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{broken", "JSON"),
        (json.dumps({"question": "half \ud83d", "answer": GOLD}), "question holds half a surrogate"),
        (json.dumps({"question": NATURAL, "answer": GOLD, "key": "\udc00"}), "key holds half a surrogate"),
        ("[1, 2]", "object"),
        ("[" * 100_000, "JSON"),
        (json.dumps({"answer": GOLD}), "question"),
        (json.dumps({"question": 7, "answer": GOLD}), "question"),
        (json.dumps({"question": NATURAL}), "answer"),
        (json.dumps({"question": NATURAL, "answer": True}), "answer"),
        (json.dumps({"question": NATURAL, "answer": None}), "answer"),
        (json.dumps({"question": NATURAL, "answer": "soon"}), "answer"),
        (json.dumps({"question": NATURAL, "answer": GOLD.replace("12600", "__import__('os')")}), "answer"),
        (json.dumps({"question": NATURAL, "answer": float("nan")}), "answer"),
        (json.dumps({"question": "how long?", "answer": GOLD}), "steps"),
        (json.dumps({"question": NATURAL.replace("must precede", "goes before"), "answer": GOLD}), "goes before"),
    ],
)
def test_a_broken_row_is_refused_with_file_and_line(tmp_path: Path, row: str, named: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ROW}\n{row}\n{ROW}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{named}"):
        read_rows(path, "async_plan", "natural")


def test_empty_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, named in (("empty.jsonl", "is empty"), ("binary.jsonl", "UTF-8"), ("missing.jsonl", "readable")):
        with pytest.raises(DataError, match=named):
            read_rows(tmp_path / name, "async_plan", "natural")
    with pytest.raises(ValueError, match="family"):
        read_rows(tmp_path / "empty.jsonl", "chess", "natural")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_rows_are_read_as_other_programs_write_them(tmp_path: Path, start: bytes, ending: str) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"question": f"{n} + 1 \U0001f600", "answer": n + 1}) for n in range(3)]

    def read(*lines: str) -> list[Task]:
        path.write_bytes(start + ending.join(lines).encode())
        return read_rows(path, "math", "natural")

    plain = read(*rows)
    assert [task.question for task in plain] == [f"{n} + 1 \U0001f600" for n in range(3)]
    for lines in ((*rows, ""), ("", *rows), (rows[0], "", "  \t", *rows[1:], "", "")):
        assert read(*lines) == plain
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: "):
        read(rows[0], "", rows[1], "{broken")
    with pytest.raises(DataError, match="is empty"):
        read("", " ", "")


def test_a_question_may_hold_any_unicode_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    question = "one\u2028two\x85three"
    path.write_text(json.dumps({"question": question, "answer": 7}, ensure_ascii=False) + "\n", encoding="utf-8")
    (task,) = read_rows(path, "math", "natural")
    assert (task.question, task.answer) == (question, "7")


def _made_up(keys: list[int]) -> list[Task]:
    return [
        Task(family="math", representation="r", question=f"{i}", answer="1", key=f"{k}") for i, k in enumerate(keys)
    ]


def test_rows_joined_over_different_files_stay_together() -> None:
    # file a says rows 0 and 1 are the same, file b says 1 and 2 are: all three are one procedure
    files = {"a": _made_up([0, 0, 2, 3, 4, 5]), "b": _made_up([0, 1, 1, 3, 4, 5])}
    for seed in range(20):
        sides = split_rows(files, eval_share=0.4, seed=seed)
        for name in files:
            found = [{int(t.question) for t in side[name]} & {0, 1, 2} for side in sides]
            assert sorted(map(len, found)) == [0, 3]


def test_impossible_splits_are_refused() -> None:
    rows = {"a": _made_up([0, 1, 2])}
    with pytest.raises(ValueError, match="eval_share"):
        split_rows(rows, eval_share=1.0, seed=0)
    with pytest.raises(DataError, match="leaves no task"):
        split_rows(rows, eval_share=0.01, seed=0)
    with pytest.raises(DataError, match="rows"):
        split_rows({**rows, "b": _made_up([0])}, eval_share=0.5, seed=0)


def test_accepted_intervals_accept_what_their_steps_add_up_to() -> None:
    """No answer has a tolerance of its own; "2 months 3 weeks" must still be right where the steps say so."""
    refused = {}
    for line, task in enumerate(_rows("natural"), start=1):
        low, high = _stated(task.answer)
        if low == high:
            continue
        plan = parse_question(task.question, "natural")
        text = " ".join(f"{n} {unit}" for unit, n in _along_the_longest(plan).items())
        if judge("async_plan", f"<answer>{text}</answer>", task.answer) != 1.0:
            refused[line] = (text, task.answer)
    assert refused == {}


def _along_the_longest(plan: Plan) -> dict[str, int]:
    """Units on the longest way, the largest first; a month counts 30 days."""
    days = {"year": 365, "month": 30, "week": 7, "day": 1, "hour": 1 / 24, "min": 1 / 1440}
    ends: dict[int, dict[str, int]] = {}
    for j in topological_order(plan.predecessors):
        before = max((ends[i] for i in plan.predecessors[j]), key=lambda way: _days(way, days), default={})
        ends[j] = dict(before)
        for number, unit in re.findall(r"(\d+) ([a-z]+)", plan.durations[j]):
            ends[j][unit] = ends[j].get(unit, 0) + int(number)
    longest = max(ends.values(), key=lambda way: _days(way, days))
    return dict(sorted(longest.items(), key=lambda item: -days[item[0]]))


def _days(way: dict[str, int], days: dict[str, float]) -> float:
    return sum(n * days[unit] for unit, n in way.items())


@pytest.mark.parametrize("gold", ["green ideas sleep", "5 m and 6 m", "((((5 m", "9**9**9**9 m"])
def test_a_physics_gold_that_cannot_be_read_is_refused_with_file_and_line(tmp_path: Path, gold: str) -> None:
    pytest.importorskip("pint")
    path = tmp_path / "rows.jsonl"
    golds = ["5 m", "2*sqrt(5)/3 m", r"-45 $\mu \mathrm{C}$", gold, "1 1/2 m"]
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": a}) + "\n" for n, a in enumerate(golds)))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: answer: .*physics"):
        read_rows(path, "physics", "natural")


def test_many_plain_physics_golds_start_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pint")
    monkeypatch.setattr(RewardPool, "_workers", lambda self: pytest.fail("a worker was started"))
    path = tmp_path / "rows.jsonl"
    rows = ({"question": f"{n}?", "answer": f"{n}.5e-{n % 9} kg*m/s^2"} for n in range(20_000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_rows(path, "physics", "natural")) == 20_000


@pytest.mark.parametrize(("family", "missing"), [("physics", "pint"), ("math", "sympy")])
def test_a_missing_extra_is_refused_when_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, missing: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": "5"}) + "\n")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{family} needs {missing}: pip install 'isomorph\[math\]'"):
        read_rows(path, family, "natural")
    if family == "math":
        assert read_rows(path, family, "natural", reward="paper")
