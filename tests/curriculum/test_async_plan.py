"""Procedures, their surfaces and worked solutions."""

import ast
import random
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from pydantic import ValidationError

from isomorph.curriculum.judge import judge
from isomorph.curriculum.tasks import wording
from isomorph.curriculum.tasks.async_plan import (
    HELD_OUT,
    REPRESENTATIONS,
    TRAINED,
    Difficulty,
    Procedure,
    demonstration,
    draw,
    draw_tasks,
    make_task,
    render,
    sequential_sum,
    solve,
    vocabulary,
)
from isomorph.curriculum.tasks.longest_path import topological_order
from isomorph.curriculum.tasks.procedure import Duration
from isomorph.curriculum.tasks.task import DataError, Task

TERSE = Difficulty(form="terse", demonstration="compact")
TERSE_MIXED = Difficulty(form="terse", demonstration="compact", units=("min", "hour"), shuffled=True)
FULL = Difficulty(max_steps=7, max_predecessors=3)
FULL_MIXED = Difficulty(max_steps=9, units=("sec", "min", "hour", "day", "week"), shuffled=True)
DIFFICULTIES = {"terse": TERSE, "terse_mixed": TERSE_MIXED, "full": FULL, "full_mixed": FULL_MIXED}

SECONDS = {"second": 1, "sec": 1, "minute": 60, "min": 60, "hour": 3600, "day": 86400, "week": 604800}
Plan = tuple[dict[int, int], set[tuple[int, int]]]  # seconds of each step, edges (before, after)


def _seconds(text: str) -> int:
    number, unit = text.split()
    return int(number) * SECONDS[unit if unit in SECONDS else unit.removesuffix("s")]


# Independent readers of each surface: they share nothing with the renderers but the texts.


def _read_natural(text: str) -> Plan:
    times: dict[int, int] = {}
    edges: set[tuple[int, int]] = set()
    duration = r"(\d+ (?:sec|min|second|minute|hour|day|week)s?)"
    for number, time in re.findall(rf"Step (\d+)[.:]? (?!must|can|needs)[a-z -]*?[^\n.]*?{duration}", text):
        times.setdefault(int(number), _seconds(time))
    patterns = {
        "ab": (
            r"Step (\d+) must precede step (\d+)",
            r"Finish step (\d+) before step (\d+)",
            r"Step (\d+) has to be finished before step (\d+)",
            r"With step (\d+) done, step (\d+) can start",
        ),
        "ba": (
            r"Step (\d+) can start only after step (\d+)",
            r"Step (\d+) needs step (\d+) done first",
            r"Step (\d+) must start after step (\d+)",
            r"To start step (\d+) you must do step (\d+) first",
            r"Step (\d+) can only begin once step (\d+)",
            r"Do not start step (\d+) until step (\d+)",
            r"Step (\d+) relies on the result of step (\d+)",
        ),
    }
    for order, many in patterns.items():
        for pair in (p for pattern in many for p in re.findall(pattern, text)):
            one, other = map(int, pair)
            edges.add((one, other) if order == "ab" else (other, one))
    return times, edges


def _read_graph(text: str) -> Plan:
    adjacency, times = re.findall(r"\{.*?\}", text)
    if unit := re.search(r"(\w+) = \{[^[\]]*\} time\?", text):
        if unit[1] != "durations":
            times = re.sub(r": (\d+)", rf": '\1 {unit[1]}'", times)
        else:
            times = re.sub(r": (\d+ \w+)", r": '\1'", times)
    edges = {(a, b) for a, after in ast.literal_eval(adjacency).items() for b in after}
    return {a: _seconds(time) for a, time in ast.literal_eval(times).items()}, edges


def _read_code(text: str) -> Plan:
    unit = 1
    if terse := re.match(r"(\w+) = ", text):
        unit = 1 if terse[1] == "adj" else SECONDS[terse[1].removesuffix("s")]
    else:
        printed = re.search(r"print\(.*, '(\w+)'\)", text)
        assert printed
        unit = 1 if " * " in text else SECONDS[printed[1]]
    times: dict[int, int] = {}
    edges: set[tuple[int, int]] = set()
    for name, row in re.findall(r"(\d+): \[(.*?)\]", text):
        for to, weight in re.findall(r"\(([\w']+), ([\d a-z*]+)\)", row):
            factor, _, word = weight.partition(" * ")
            times[int(name)] = int(factor) * (SECONDS[word] if word else unit)
            if to.isdigit() and to != "0":
                edges.add((int(name), int(to)))
    return times, edges


def _read_table(text: str) -> Plan:
    times: dict[int, int] = {}
    edges: set[tuple[int, int]] = set()
    for row in text.splitlines():
        terse = re.fullmatch(r"(\d+), (.+?), \[(.*)\]", row)
        full = re.fullmatch(r"\| (\d+) \| .* \| (.*) \| (.*) \|", row)
        if match := terse or full:
            number, time, before = match.groups()
            unit = re.match(r"step, (\w+), after", text)
            times[int(number)] = _seconds(time if " " in time else f"{time} {unit[1] if unit else ''}")
            edges |= {(int(b), int(number)) for b in re.findall(r"\d+", before)}
    return times, edges


def _read_terse(text: str, step: str, edge: tuple[str, ...], many: tuple[str, ...] = ()) -> Plan:
    """``step``: a pattern with the groups n and time; ``edge``: with a and b; ``many``: with b and a list."""
    times = {int(m["n"]): _seconds(m["time"]) for m in re.finditer(step, text)}
    edges = {(int(m["a"]), int(m["b"])) for pattern in edge for m in re.finditer(pattern, text)}
    for pattern in many:
        for m in re.finditer(pattern, text):
            edges |= {(int(a), int(m["b"])) for a in re.findall(r"\d+", m["many"])}
    return times, edges


_TIME = r"(?P<time>\d+ (?:seconds?|minutes?|sec|min|hours?|days?|weeks?))"


def _read_paraphrase(text: str) -> Plan:
    many = r"(?P<many>(?:activity )?\d+(?:(?:, | and )(?:activity )?\d+)*)"
    lists = (
        rf"Finish these before step (?P<b>\d+): {many}",
        rf"To start step (?P<b>\d+) you must do these first: {many}",
        rf"Activity (?P<b>\d+) may be taken up upon completion of {many}",
        rf"Completion of {many} is a prerequisite of activity (?P<b>\d+)",
    )
    for step in (
        rf"takes {_TIME} \(step (?P<n>\d+)\)",
        rf"step (?P<n>\d+) \({_TIME}\)",
        rf"{_TIME} go into activity (?P<n>\d+)",
        rf'Activity (?P<n>\d+) \(".*?"\) occupies {_TIME}',
    ):
        if re.search(step, text):
            return _read_terse(text, step, (), lists)
    raise AssertionError(text)


def _read_dialect(text: str) -> Plan:
    edges = (
        r"Step (?P<b>\d+) start only after step (?P<a>\d+) done",
        r"Step (?P<a>\d+) done first, step (?P<b>\d+) can start",
        r"Can't nobody start step (?P<b>\d+) till step (?P<a>\d+) done",
        r"Step (?P<a>\d+) gotta be done 'fore step (?P<b>\d+) start",
        r"Step (?P<b>\d+) don't never start 'less step (?P<a>\d+) done",
        r"Step (?P<b>\d+) be waitin' on step (?P<a>\d+)",
    )
    step = (
        rf"Step (?P<n>\d+)(?: take {_TIME.replace('time', 'early')}|[.:,] .*?, it take {_TIME.replace('time', 'late')})"
    )
    times = {}
    for m in re.finditer(step, text):
        times[int(m["n"])] = _seconds(m["early"] or m["late"])
    if not times:
        for m in re.finditer(rf"Step (?P<n>\d+)[:,] .*? (?:be takin'|nothin' but) {_TIME}", text):
            times[int(m["n"])] = _seconds(m["time"])
    return times, _read_terse(text, r"(?!)(?P<n>)(?P<time>)", edges)[1]


READERS: dict[str, Callable[[str], Plan]] = {
    "natural": _read_natural,
    "graph": _read_graph,
    "code": _read_code,
    "table": _read_table,
    "paraphrase": _read_paraphrase,
    "dialect": _read_dialect,
}


def _longest_by_enumeration(plan: Plan) -> int:
    """Every path, one by one."""
    times, edges = plan

    def best(step: int) -> int:
        return times[step] + max((best(b) for a, b in edges if a == step), default=0)

    return max(map(best, times))


def _stated_seconds(answer: str) -> int:
    return _seconds(answer)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", DIFFICULTIES)
def test_an_independent_reader_finds_the_same_procedure_and_answer(name: str, representation: str) -> None:
    rng = random.Random(f"{name} {representation}")
    for _ in range(150):
        procedure = draw(rng, DIFFICULTIES[name], split="train")
        times, edges = READERS[representation](render(procedure, representation, rng, DIFFICULTIES[name]))
        assert times == {j + 1: d.seconds for j, d in enumerate(procedure.durations)}
        assert edges == {(i + 1, j + 1) for j, before in enumerate(procedure.predecessors) for i in before}
        assert _longest_by_enumeration((times, edges)) == _stated_seconds(solve(procedure)[0])


def test_wordings_of_the_test_exam_are_read_the_same_and_have_no_word_of_their_own() -> None:
    words = set(vocabulary(TERSE))
    trained = {make_task(random.Random(i), TERSE, "natural", split="train").question for i in range(300)}
    kept = []
    for i in range(200):
        procedure = draw(random.Random(f"p{i}"), TERSE, split="test")
        text = render(procedure, "natural", random.Random(i), TERSE, is_kept=True)
        kept.append(re.sub(r"\d+", "0", text))
        times, edges = _read_natural(text)
        assert times == {j + 1: d.seconds for j, d in enumerate(procedure.durations)}
        assert edges == {(i + 1, j + 1) for j, before in enumerate(procedure.predecessors) for i in before}
        assert set(TOKEN.findall(text)) <= words
    questions = {re.split(r"(?<=[.?]) ", text)[-1] for text in kept}
    assert questions.isdisjoint(re.split(r"(?<=[.?]) ", text)[-1] for text in trained)


def test_half_of_the_test_exam_is_in_kept_wordings_and_nothing_else_is() -> None:
    tasks = {split: draw_tasks(TERSE, "natural", 300, seed=1, split=split) for split in ("train", "dev", "test")}
    kept = {split: sum(task.row["wording"] == "kept" for task in found) for split, found in tasks.items()}
    assert kept["train"] == kept["dev"] == 0
    assert 110 <= kept["test"] <= 190


@pytest.mark.parametrize(
    ("difficulty", "representation", "has_kept"),
    [
        (TERSE, "natural", True),
        (Difficulty(language="rich"), "natural", True),
        (Difficulty(), "natural", False),  # plain: four wordings a kind, all trained on
        (TERSE.model_copy(update={"templates": 3}), "natural", False),
        (TERSE, "graph", False),
        (TERSE, "dialect", False),
    ],
)
def test_only_questions_in_wordings_of_the_test_exam_are_called_kept(
    difficulty: Difficulty, representation: str, has_kept: bool
) -> None:
    tasks = draw_tasks(difficulty, representation, 60, seed=1, split="test")
    assert {task.row["wording"] for task in tasks} == ({"kept", "trained"} if has_kept else {"trained"})


@pytest.mark.parametrize("name", ["full", "full_mixed"])
def test_the_program_prints_the_answer(name: str) -> None:
    rng = random.Random(7)
    procedures = [draw(rng, DIFFICULTIES[name], split="train") for _ in range(6)]
    for procedure in procedures:
        text = render(procedure, "code", rng, DIFFICULTIES[name])
        program = text.split("```python\n")[1].split("\n```")[0]
        printed = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
        assert judge("async_plan", f"<answer>{printed.stdout}</answer>", solve(procedure)[0]) == 1.0


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", DIFFICULTIES)
def test_demonstrations_are_right_and_sequential_ones_only_where_the_sum_is(name: str, representation: str) -> None:
    rng = random.Random(3)
    num_sequential_right = 0
    for _ in range(100):
        difficulty = DIFFICULTIES[name]
        procedure = draw(rng, difficulty, split="train")
        answer = solve(procedure)[0]
        right, sequential = (demonstration(procedure, representation, difficulty, sequential=n) for n in (False, True))
        assert judge("async_plan", right, answer) == 1.0
        sum_is_right = sum(d.seconds for d in procedure.durations) == _stated_seconds(answer)
        assert judge("async_plan", sequential, answer) == float(sum_is_right)
        assert judge("async_plan", f"<answer>{sequential_sum(procedure)}</answer>", answer) == float(sum_is_right)
        num_sequential_right += sum_is_right
    assert 0 < num_sequential_right < 50


def test_compact_chain_of_thought_is_the_agreed_one() -> None:
    procedure = _procedure([5, 8, 7], [(), (), (0, 1)])
    right = demonstration(procedure, "graph", TERSE, sequential=False)
    assert right == "<think>1: 0 + 5 = 5; 2: 0 + 8 = 8; 3: 1 5 2 8 > 8 + 7 = 15</think> <answer>15 min</answer>"
    sequential = demonstration(procedure, "graph", TERSE, sequential=True)
    assert sequential == "<think>1: 0 + 5 = 5; 2: 5 + 8 = 13; 3: 1 5 2 13 > 13 + 7 = 20</think> <answer>20 min</answer>"


def test_every_line_of_a_demonstration_adds_up() -> None:
    rng = random.Random(5)
    for name, difficulty in DIFFICULTIES.items():
        text = " ".join(make_task(rng, difficulty, "natural", split="train").demonstration or "" for _ in range(40))
        sums = re.findall(r"(\d+) \+ (\d+) = (\d+)", text)
        assert len(sums) >= 40 * 3, name
        assert all(int(a) + int(b) == int(c) for a, b, c in sums)


def _procedure(minutes: list[int], predecessors: list[tuple[int, ...]], unit: str = "min") -> Procedure:
    return Procedure(
        goal="rest",
        activities=tuple("boil water" for _ in minutes),
        durations=tuple(Duration(value=m, unit=unit) for m in minutes),
        predecessors=tuple(predecessors),
    )


def test_splits_share_no_procedure_however_it_is_numbered() -> None:
    rng = random.Random(0)
    tiny = Difficulty(min_steps=2, max_steps=3, max_duration=4)  # few procedures: both splits are nearly exhausted
    splits = ("train", "dev", "test")
    train, dev, test = ({_identity(draw(rng, tiny, split=split)) for _ in range(800)} for split in splits)
    assert len(train) > 120 and len(dev) > 15 and len(test) > 15
    assert train.isdisjoint(dev) and train.isdisjoint(test) and dev.isdisjoint(test)


def _identity(procedure: Procedure) -> tuple[object, ...]:
    """The least of all renumberings: an exact canonical form, for three steps or fewer."""
    from itertools import permutations

    steps = range(procedure.num_steps)
    closure = {(i, j) for j in steps for i in procedure.predecessors[j]}
    closure |= {(a, d) for a, b in closure for c, d in closure if b == c}
    forms = []
    for new in permutations(steps):
        durations = tuple(d for _, d in sorted((new[j], procedure.durations[j].seconds) for j in steps))
        forms.append((durations, tuple(sorted((new[i], new[j]) for i, j in closure))))
    return min(forms)


def test_key_ignores_numbering_units_and_redundant_edges_and_nothing_else() -> None:
    chain = _procedure([1, 2, 3], [(), (0,), (1,)])
    assert chain.key == _procedure([1, 2, 3], [(), (0,), (0, 1)]).key
    assert chain.key == _procedure([3, 2, 1], [(1,), (2,), ()]).key
    assert chain.key == _procedure([60, 120, 180], [(), (0,), (1,)], unit="sec").key
    assert chain.key != _procedure([1, 2, 3], [(), (0,), (0,)]).key
    assert chain.key != _procedure([1, 2, 4], [(), (0,), (1,)]).key
    assert chain.key != _procedure([2, 1, 3], [(), (0,), (1,)]).key
    # stored keys decide splits of finished runs: a change of the scheme must be seen
    assert chain.key == "a1a18081c7eb9979"


def test_one_in_eight_procedures_is_of_each_exam() -> None:
    rng = random.Random(1)
    procedures = [_procedure([rng.randint(1, 999) for _ in range(5)], [()] * 5) for _ in range(2000)]
    for part in ("dev", "test"):
        share = sum(p.part("procedure") == part for p in procedures) / 2000
        assert abs(share - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 2000) ** 0.5


def test_the_same_seed_gives_the_same_task_and_another_seed_another() -> None:
    def tasks(seed: int) -> list[Task]:
        rng = random.Random(seed)
        return [make_task(rng, FULL_MIXED, r, split="train", sequential_rate=0.5) for r in REPRESENTATIONS]

    assert tasks(11) == tasks(11)
    assert tasks(11) != tasks(12)


def test_representations_drawn_from_one_seed_are_of_one_procedure() -> None:
    keys = {make_task(random.Random(4), TERSE, r, split="eval").key for r in REPRESENTATIONS}
    assert len(keys) == 1


def test_sequential_rate_is_the_share_of_sequential_demonstrations() -> None:
    rng = random.Random(2)
    wide = TERSE.model_copy(update={"edge_probability": 0.0})  # the sum is never right
    tasks = [make_task(rng, wide, "graph", split="train", sequential_rate=0.6) for _ in range(1000)]
    sequential = sum(judge("async_plan", t.demonstration or "", t.answer) == 0.0 for t in tasks) / 1000
    assert abs(sequential - 0.6) < 4 * (0.6 * 0.4 / 1000) ** 0.5


TOKEN = re.compile(r"<\/?[a-z]+>|[A-Za-z]+|\d+|[^\sA-Za-z\d]")


@pytest.mark.parametrize(
    ("difficulty", "num_tasks"),
    [
        (TERSE, 3000),
        (TERSE_MIXED, 3000),
        (TERSE.model_copy(update={"templates": 1}), 800),
        (TERSE.model_copy(update={"demonstration": "listed"}), 3000),
    ],
)
def test_the_vocabulary_holds_every_token_and_no_other_word(difficulty: Difficulty, num_tasks: int) -> None:
    words = vocabulary(difficulty)
    assert words == sorted(set(words))
    rng = random.Random(0)
    seen: set[str] = set()
    for i in range(num_tasks):
        representation = REPRESENTATIONS[i % len(REPRESENTATIONS)]
        task = make_task(rng, difficulty, representation, split="train", sequential_rate=0.5)
        seen |= set(TOKEN.findall(f"{task.question} {task.demonstration}"))
    assert seen <= set(words)
    unused = {w for w in set(words) - seen if not w.isdigit()}
    assert not unused


def test_the_held_out_form_has_no_token_of_its_own() -> None:
    rng = random.Random(0)
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for representation in REPRESENTATIONS:
        for _ in range(400):
            question = make_task(rng, TERSE, representation, split="train").question
            seen[representation in HELD_OUT] |= set(TOKEN.findall(question))
    assert seen[True] <= seen[False]


def test_terse_prompts_are_short() -> None:
    # the lengths that the quickstart's time budget was measured with
    rng = random.Random(0)
    lengths = {}
    for representation in TRAINED:
        tasks = [make_task(rng, TERSE, representation, split="train") for _ in range(400)]
        lengths[representation] = sum(len(TOKEN.findall(t.question)) for t in tasks) / 400
        answers = [len(TOKEN.findall(t.demonstration or "")) for t in tasks]
        assert 40 <= sum(answers) / 400 <= 50
        assert max(answers) <= 71  # with the stop token at most 72
    assert lengths["natural"] == pytest.approx(75, abs=5)
    assert lengths["graph"] == pytest.approx(47, abs=5)
    assert lengths["code"] == pytest.approx(57, abs=5)


def test_a_vocabulary_of_millions_of_numbers_is_refused() -> None:
    with pytest.raises(DataError, match="numbers"):
        vocabulary(Difficulty(form="terse", demonstration="compact", units=("sec", "week")))
    with pytest.raises(DataError, match="terse"):
        vocabulary(FULL)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_width_is_the_most_steps_under_way_at_once(width: int) -> None:
    rng = random.Random(width)
    difficulty = Difficulty(min_steps=4, max_steps=6, min_width=width, max_width=width)
    for _ in range(50):
        procedure = draw(rng, difficulty, split="train")
        finish = solve(procedure)[1]
        spans = [(f - a, f) for f, a in zip(finish, procedure.amounts, strict=True)]
        assert max(sum(s <= t < f for s, f in spans) for t in range(max(finish))) == width
        assert (sequential_sum(procedure) == solve(procedure)[0]) == (width == 1)


def test_draws_stay_inside_the_difficulty() -> None:
    rng = random.Random(0)
    difficulty = Difficulty(
        min_steps=4, max_steps=8, max_predecessors=3, edge_probability=0.9, min_duration=10, max_duration=12
    )
    procedures = [draw(rng, difficulty, split="train") for _ in range(300)]
    assert {p.num_steps for p in procedures} == {4, 5, 6, 7, 8}
    assert {d.value for p in procedures for d in p.durations} == {10, 11, 12}
    assert max(len(before) for p in procedures for before in p.predecessors) == 3
    assert all(len(set(p.activities)) == p.num_steps for p in procedures)
    assert all(before == tuple(sorted(before)) for p in procedures for before in p.predecessors)


def test_shuffled_numbers_are_not_always_in_order() -> None:
    rng = random.Random(0)
    drawn = {
        shuffled: [draw(rng, Difficulty(shuffled=shuffled), split="train") for _ in range(50)] for shuffled in (0, 1)
    }
    later = {s: any(i > j for p in ps for j, b in enumerate(p.predecessors) for i in b) for s, ps in drawn.items()}
    assert later == {0: False, 1: True}


def test_contradicting_limits_are_refused_and_do_not_hang() -> None:
    chains = Difficulty(edge_probability=0.0, max_width=1)
    with pytest.raises(DataError, match="widen the width"):
        draw(random.Random(0), chains, split="train")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"min_steps": 5, "max_steps": 3}, "min_steps"),
        ({"max_steps": 21}, "max_steps"),
        ({"min_duration": 0}, "min_duration"),
        ({"min_duration": 4, "max_duration": 3}, "min_duration"),
        ({"units": ()}, "units"),
        ({"units": ("min", "min")}, "units"),
        ({"units": ("month",)}, "units"),
        ({"edge_probability": 1.5}, "edge_probability"),
        ({"min_width": 6}, "min_width"),
        ({"form": "terse"}, "compact"),
        ({"tempaltes": 2}, "tempaltes"),
    ],
)
def test_impossible_difficulties_are_refused_by_name(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Difficulty.model_validate(wrong)


def test_unknown_representations_splits_and_rates_are_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="representation"):
        make_task(rng, TERSE, "haiku", split="train")
    with pytest.raises(ValueError, match="split"):
        make_task(rng, TERSE, "graph", split="exam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequential_rate"):
        make_task(rng, TERSE, "graph", split="train", sequential_rate=1.1)


def test_full_questions_end_with_the_instruction() -> None:
    rng = random.Random(0)
    for representation in REPRESENTATIONS:
        question = make_task(rng, FULL, representation, split="train").question
        assert question.splitlines()[-1].endswith("<answer>1 min</answer>.")


def test_every_scenario_has_enough_different_activities() -> None:
    for goal, activities in (*wording.SCENARIOS, ("", wording.TERSE_ACTIVITIES)):
        assert len(set(activities)) == len(activities) == wording.MAX_STEPS, goal


def test_topological_order_puts_predecessors_first_and_finds_cycles() -> None:
    rng = random.Random(0)
    for _ in range(100):
        before = draw(rng, FULL_MIXED, split="train").predecessors
        order = topological_order(before)
        place = {j: k for k, j in enumerate(order)}
        assert all(place[i] < place[j] for j, many in enumerate(before) for i in many)
    assert list(pairwise(topological_order([[], [], []]))) == [(0, 1), (1, 2)]
    with pytest.raises(ValueError, match="cycle"):
        topological_order([[1], [0], []])


def test_constraints_come_in_any_order_and_wording() -> None:
    procedure = _procedure([1, 2, 3], [(), (0,), (1,)])
    texts = {render(procedure, "natural", random.Random(i), TERSE) for i in range(200)}
    for pattern in (*wording.TERSE_INTROS, *wording.TERSE_QUESTIONS):
        assert any(pattern in text for text in texts)
    one_wording = TERSE.model_copy(update={"templates": 1})
    texts = {render(procedure, "natural", random.Random(i), one_wording) for i in range(50)}
    assert len(texts) == 2  # the two orders of the constraints
