"""Routes and arithmetic: every rendering parsed back, answers by networkx and by Python, shortcuts by hand, splits."""

import ast
import contextlib
import io
import json
import operator
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import TINY, run, summary_of

from isomorph.curriculum.commands.data import inspect_file, make_rows, parse_difficulty
from isomorph.curriculum.judge import judge
from isomorph.curriculum.named_recipes import FOLDER
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.rewards.answer import last_answer
from isomorph.curriculum.sources import tiny_vocabulary
from isomorph.curriculum.stage import Curriculum
from isomorph.curriculum.tasks.arithmetic.expression import ArithmeticDifficulty, Expression, ExpressionTree, named
from isomorph.curriculum.tasks.arithmetic.generator import ARITHMETIC
from isomorph.curriculum.tasks.arithmetic.shortcuts import SHORTCUTS as OF_SUMS
from isomorph.curriculum.tasks.arithmetic.wording import FACTS, TERSE_FACTS
from isomorph.curriculum.tasks.battery import BAG
from isomorph.curriculum.tasks.facts import error_of, item_record, rates_of, view_of
from isomorph.curriculum.tasks.generator import TOKEN
from isomorph.curriculum.tasks.routes.generator import ROUTES
from isomorph.curriculum.tasks.routes.road_map import RoadGraph, RoadMap, RouteDifficulty, renumbered
from isomorph.curriculum.tasks.routes.shortcuts import SHORTCUTS as OF_ROUTES
from isomorph.curriculum.tasks.routes.wording import FULL, TERSE
from isomorph.curriculum.tasks.task import DataError, Split, Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.recipe_file import load_recipe

TRANSFER = Path(FOLDER) / "transfer.toml"
SIZE = {"min_places": 4, "max_places": 6, "shuffled": True}
FORMS = [(form, directed) for form in ("terse", "full") for directed in (False, True)]
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}

# 0 to 3: by 1 it is 4 + 1 + 2 = 7 (through 2), directly 9; 4 is a dead end next to 0
SMALL = RoadGraph(5, ((0, 1, 4), (0, 3, 9), (0, 4, 1), (1, 2, 1), (1, 3, 5), (2, 3, 2)), 0, 3, False)
# ((7 - (2 + 1)) * 2): listed as product, sum, difference
TREE = ExpressionTree((("*", -3, 2), ("+", 2, 1), ("-", 7, -2)), 0)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TRANSFER, [], Recipe)


def _graph_of(view: RoadGraph, names: tuple[str, ...]) -> Any:
    graph = nx.DiGraph() if view.directed else nx.Graph()
    graph.add_weighted_edges_from((names[a], names[b], weight) for a, b, weight in view.roads)
    return graph


def _same(found: Any, graph: Any) -> bool:
    return {frozenset(e[:2]) if not graph.is_directed() else e[:2]: e[2] for e in found.edges(data="weight")} == {
        frozenset(e[:2]) if not graph.is_directed() else e[:2]: e[2] for e in graph.edges(data="weight")
    }


def _instances(generator: Any, difficulty: Any, num: int) -> Iterator[tuple[random.Random, Any]]:
    for i in range(num):
        rng = random.Random(i)
        yield rng, generator.draw(rng, difficulty, split="train")


def _fitting(frames: tuple[str, ...], text: str) -> Iterator[tuple[str, str, str]]:
    """What {a}, {b} and the number may stand for in a sentence, by every frame that it matches."""
    for frame in frames:
        pattern = re.escape(frame.format(a="@A", b="@B", way="@W", time="@T", spelled="@T"))
        for mark, group in (("@A", "(?P<a>.+?)"), ("@B", "(?P<b>.+?)"), ("@W", "[a-z ]+"), ("@T", r"(?P<t>\d+) \w+")):
            pattern = pattern.replace(mark, group, 1)
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            yield match["a"], match["b"], match["t"]


def _road_sentences(question: str, is_terse: bool) -> list[str]:
    body = question if is_terse else question.split("\n\n")[1]
    return re.findall(r"[^.?]+[.?]", body)


def _parsed_map(question: str, representation: str, instance: RoadMap) -> Any:
    directed, is_terse = instance.graph.directed, instance.domain is None
    graph: Any = nx.DiGraph() if directed else nx.Graph()
    places = set(instance.places)
    text = question.replace("\n", " ")
    if representation == "natural":
        known = {place.lower(): place for place in places}
        for sentence in _road_sentences(question, is_terse):
            frames = (TERSE if is_terse else FULL).one_way if directed else (TERSE if is_terse else FULL).roads
            for a, b, weight in _fitting(frames, sentence.strip()):
                if a.lower() in known and b.lower() in known:
                    graph.add_edge(known[a.lower()], known[b.lower()], weight=int(weight))
        return graph
    if representation == "table":
        for line in question.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|" if "|" in line else ",")]
            if len(cells) == 3 and cells[0] in places:
                graph.add_edge(cells[0], cells[1], weight=int(cells[2].split()[0]))
        return graph
    if rows := re.findall(r"'?([^'(){}\[\],:]+?)'?: \[((?:\([^)]*\)(?:, )?)*)\]", text):
        for place, ahead in rows:
            for other, weight in re.findall(r"\('?([^',]+)'?, (\d+)\)", ahead):
                graph.add_edge(place.strip(), other, weight=int(weight))
        return graph
    lines = re.findall(r"\('?([^',(]+)'?, '?([^',]+)'?, (\d+)\)", text) or re.findall(
        r"^(.+?) -[->] (.+?): (\d+)", question, re.M
    )
    graph.add_weighted_edges_from((a, b, int(weight)) for a, b, weight in lines)
    return graph


@pytest.mark.parametrize(("form", "directed"), FORMS)
def test_every_rendering_of_a_map_reads_back_to_it(form: Any, directed: bool) -> None:
    difficulty = RouteDifficulty(form=form, directed=directed, **SIZE)
    for rng, instance in _instances(ROUTES, difficulty, 12):
        graph = _graph_of(instance.graph, instance.places)
        start, goal = instance.places[instance.graph.start], instance.places[instance.graph.goal]
        for representation in ROUTES.representations:
            for is_kept in (False, True):
                question = ROUTES.write(rng, instance, difficulty, representation, is_kept=is_kept).question
                assert _same(_parsed_map(question, representation, instance), graph), question
                asked = question.replace("\n", " ")
                assert re.search(re.escape(start) + ".*" + re.escape(goal), asked), question


@pytest.mark.parametrize(("form", "directed"), FORMS)
def test_the_answer_and_the_demonstration_are_the_shortest_path_of_networkx(form: Any, directed: bool) -> None:
    difficulty = RouteDifficulty(form=form, directed=directed, **SIZE)
    for rng, instance in _instances(ROUTES, difficulty, 25):
        graph = _graph_of(instance.graph, instance.places)
        start, goal = instance.places[instance.graph.start], instance.places[instance.graph.goal]
        right = nx.dijkstra_path_length(graph, start, goal)
        fewest = {nx.path_weight(graph, p, "weight") for p in nx.all_shortest_paths(graph, start, goal)}
        paths = [p for p in nx.all_simple_paths(graph, start, goal) if nx.path_weight(graph, p, "weight") == right]
        assert instance.graph.num_roads == min(map(len, paths)) - 1
        assert instance.graph.total == right and ROUTES.answer(instance) == f"{right} min"
        written = ROUTES.write(rng, instance, difficulty, "graph")
        assert judge("routes", written.demonstrate(False), f"{right} min") == 1.0
        assert int((last_answer(written.demonstrate(True)) or "").split()[0]) in fewest
        for a, b, total in re.findall(r"(\d+) \+ (\d+) = (\d+)", written.demonstrate(False)):
            assert int(a) + int(b) == int(total)


def test_programs_of_routes_and_arithmetic_print_the_answer() -> None:
    drawn: list[tuple[Any, Any]] = [(ROUTES, RouteDifficulty(directed=d, **SIZE)) for d in (False, True)]
    for generator, difficulty in [*drawn, (ARITHMETIC, ArithmeticDifficulty(shuffled=True))]:
        forms = set()
        for rng, instance in _instances(generator, difficulty, 10):
            question = generator.write(rng, instance, difficulty, "code").question
            program = question.split("```python\n")[1].split("\n```")[0]
            forms.add(program.split()[0])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(program, {})
            assert judge(generator.name, f"<answer>{printed.getvalue()}</answer>", generator.answer(instance)) == 1.0
        assert len(forms) >= 2


def _evaluated(node: ast.expr, known: dict[str, ast.expr]) -> int:
    """Of Python's syntax tree: numbers, + - *, calls of operator's functions and of the definitions in ``known``."""
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    if isinstance(node, ast.BinOp):
        sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(node.op)]  # type: ignore[index]
        return APPLY[sign](_evaluated(node.left, known), _evaluated(node.right, known))
    if isinstance(node, ast.Name):
        return _evaluated(known[node.id], known)
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if node.func.id in ("add", "sub", "mul"):
        return int(getattr(operator, node.func.id)(*(_evaluated(own, known) for own in node.args)))
    return _evaluated(known[node.func.id], known)


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _parsed_tree(question: str, representation: str, instance: Expression) -> tuple[dict[str, ast.expr], ast.expr]:
    """Definitions by name, and what is asked."""
    names = "|".join(instance.names)
    asked = _parsed(re.findall(rf"\b({names})\b", question)[-1]) if re.search(rf"\b({names})\b", question) else None
    if representation == "expression":
        line = question.split(" = ?")[0] if instance.is_terse else question.split("\n")[1]
        return {}, _parsed(line)
    if representation == "code":
        known = re.findall(r"def (\w+)\(\):\s+return (.+?)(?= def| print|\n|$)", question)
        last = re.findall(r"print\((.+)\)", question)[-1]
        return {name: _parsed(body) for name, body in known}, _parsed(last)
    assert asked is not None
    if representation == "graph":
        triples = re.findall(r"'?(\w+)'?: \('?([-+*])'?, '?(\w+)'?, '?(\w+)'?\)", question)
        if not triples:
            signs = re.findall(rf"({names}): ([-+*])", question)
            edges = re.findall(rf"\((\w+), ({names})\)|(\w+) -> ({names})", question)
            own = [(a or c, b or d) for a, b, c, d in edges]
            triples = [(name, sign, *(a for a, b in own if b == name)) for name, sign in signs]
        return {name: _parsed(f"{a} {sign} {b}") for name, sign, a, b in triples}, asked
    if representation == "table":
        rows = re.findall(rf"^\W*({names})\W+([-+*])\W+(\w+)\W+(\w+)\W*$", question, re.M)
        return {name: _parsed(f"{a} {sign} {b}") for name, sign, a, b in rows}, asked
    found: dict[str, ast.expr] = {}
    frames = TERSE_FACTS if instance.is_terse else FACTS
    body = question if instance.is_terse else question.split("\n\n")[1]
    for j, (sign, a, b) in enumerate(instance.tree.nodes):
        kinds = " ".join("n" if operand >= 0 else "who" for operand in (a, b))
        readings = set()
        for (other, kind), own in frames.items():
            for frame in own:
                pattern = re.escape(frame.format(x="@X", a="@A", b="@B", things=instance.things))
                for mark, side in (("@A", kind.split()[0]), ("@B", kind.split()[1])):
                    first, *later = pattern.split(mark)
                    group = rf"(?P<{mark[1].lower()}>{r'[0-9]+' if side == 'n' else names})"
                    pattern = first + group + rf"(?P={mark[1].lower()})".join(later)
                pattern = pattern.replace("@X", instance.names[j])
                for match in re.finditer(rf"(?:^|[.] ){pattern}(?= |$)", body):
                    readings.add((f"{match['a']} {other} {match['b']}", kind))
        assert {kind for _, kind in readings} == {kinds} and len(readings) == 1, (question, readings)
        found[instance.names[j]] = _parsed(next(iter(readings))[0])
        assert f" {sign} " in next(iter(readings))[0]
    return found, asked


@pytest.mark.parametrize("form", ["terse", "full"])
def test_every_rendering_of_an_expression_reads_back_to_its_value(form: Any) -> None:
    """By Python's syntax tree; the numbers of the text are those of the instance."""
    difficulty = ArithmeticDifficulty(form=form, shuffled=True, max_operations=5)
    for rng, instance in _instances(ARITHMETIC, difficulty, 12):
        for representation in ARITHMETIC.representations:
            for is_kept in (False, True):
                written = ARITHMETIC.write(rng, instance, difficulty, representation, is_kept=is_kept)
                known, asked = _parsed_tree(written.question, representation, instance)
                assert _evaluated(asked, known) == instance.tree.total, written.question
                assert not known or len(known) == len(instance.tree.nodes)
                for name, node in known.items():
                    assert _evaluated(node, known) == instance.tree.values[instance.names.index(name)]
                assert judge("arithmetic", written.demonstrate(False), ARITHMETIC.answer(instance)) == 1.0
                assert last_answer(written.demonstrate(True)) == str(sum(instance.tree.numbers))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_values_agree_with_python_and_parentheses_are_enough(seed: int, num: int) -> None:
    difficulty = ArithmeticDifficulty(min_operations=num, max_operations=num, form="terse", max_value=100_000)
    rng = random.Random(seed)
    shape = ARITHMETIC.shape(rng, difficulty)
    tree = None if shape is None else ARITHMETIC.filled(rng, shape, difficulty)
    if tree is None:
        return
    instance = named(rng, tree, difficulty)
    for _ in range(2):
        question = ARITHMETIC.write(rng, instance, difficulty, "expression").question
        assert _evaluated(_parsed(question.removesuffix(" = ?")), {}) == tree.total
    assert tree.total >= 0 and tree.depth <= num


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_maps_key_does_not_depend_on_numbering_and_changes_with_a_weight(seed: int, directed: bool) -> None:
    rng = random.Random(seed)
    instance = ROUTES.draw(rng, RouteDifficulty(directed=directed, **SIZE), split="train")
    graph = instance.graph
    moved = renumbered(graph, rng.sample(range(graph.num_places), graph.num_places))
    (a, b, weight), *others = graph.roads
    heavier = RoadGraph(graph.num_places, ((a, b, weight + 100), *others), graph.start, graph.goal, directed)
    keys = [RoadMap(graph=g, places=(), domain=None, unit="min").key for g in (graph, moved, heavier)]
    assert keys[0] == keys[1] != keys[2]
    assert ROUTES.structure_of(graph) == ROUTES.structure_of(moved) == ROUTES.structure_of(heavier)


def test_each_shortcut_of_routes_on_a_map_worked_out_by_hand() -> None:
    assert SMALL.total == 7
    assert {name: answer(SMALL) for name, answer in OF_ROUTES.items()} == {
        "nearest_neighbour": None,  # 4 is nearest, and leads nowhere else
        "nearest_neighbour_back": 7,  # 3, 2 (2), 1 (1), 0 (4)
        "nearest_until_direct": 9,
        "fewest_roads": 9,
        "in_order_of_listing": 7,  # 1 before 2 before 3
        "at_most_two_roads": 9,  # 4 + 5 by place 1
        "direct_road": 9,
        "longest_road": 9,
        "shortest_road": 1,
        "sum_of_all": 22,
    }
    back = renumbered(SMALL, [0, 2, 1, 3, 4])  # 2 is listed before 1, so its road to 3 is passed over
    assert OF_ROUTES["in_order_of_listing"](back) == 9 and back.total == 7


def test_each_shortcut_of_arithmetic_on_an_expression_worked_out_by_hand() -> None:
    assert TREE.total == (7 - (2 + 1)) * 2 == 8
    assert {name: answer(TREE) for name, answer in OF_SUMS.items()} == {
        "along_first": (7 - 2) * 2,
        "along_second": 7 * 2,
        "left_to_right": (7 - 2 + 1) * 2,
        "by_precedence": 7 - 2 + 1 * 2,
        "in_order_of_listing": 0,  # the difference is not known yet
        "running_total": 7 - (2 + 2 + 1),  # 2; the sum joins it; then 7 less that
        "last_operation": 1 * 2,
        "last_listed": 7 - 2,
        "sum_of_all": 12,
        "product_of_all": 28,
        "largest_number": 7,
        "last_number": 7,
    }


def test_no_shortcut_solves_more_than_35_percent_and_exams_share_no_structure(recipe: Recipe) -> None:
    for name in ("routes", "sums"):
        data = recipe.data[name]
        assert isinstance(data, GeneratedData)
        structures: dict[Split, set[str]] = {}
        for split in ("train", "dev", "test"):
            part: Split = split  # type: ignore[assignment]
            tasks = data.tasks("graph", 60, seed=999, split=part)
            rates = rates_of(tasks)
            assert BAG in rates and max(rates.values()) <= 0.35, rates
            assert split == "train" or len({task.key for task in tasks}) == 60
            structures[part] = {data.generator.structure_of(view_of(task)) for task in tasks}  # type: ignore[attr-defined]
        assert not structures["train"] & structures["dev"] and not structures["test"] & structures["dev"]
        assert not structures["train"] & structures["test"]
        hard = data.difficulty.model_copy(update={"hard_share": 1.0})
        assert not any(rates_of(data.generator.tasks(hard, "graph", 3, seed=0, split="train")).values())


def test_tasks_are_the_same_instance_in_every_form_and_made_again_by_the_seed(recipe: Recipe) -> None:
    for name in ("routes", "sums"):
        data = recipe.data[name]
        assert isinstance(data, GeneratedData)
        forms = [data.tasks(form, 4, seed=3, split="test") for form in data.representations]
        assert len({tuple((task.key, task.answer) for task in tasks) for tasks in forms}) == 1
        assert forms[0] == data.tasks(data.representations[0], 4, seed=3, split="test")
        assert forms[0] != data.tasks(data.representations[0], 4, seed=4, split="test")
        for tasks in forms:
            for task in tasks:
                assert Task.from_json(task.to_json()) == task


def test_a_tiny_models_vocabulary_has_all_words_of_the_mixture(recipe: Recipe) -> None:
    for name in ("routes", "sums"):
        data = recipe.data[name]
        assert isinstance(data, GeneratedData)
        known = set(data.vocabulary())
        for form in data.representations:
            for split in ("train", "test"):
                for task in data.tasks(form, 20, seed=1, split=split):  # type: ignore[arg-type]
                    assert not set(TOKEN.findall(task.question + (task.demonstration or ""))) - known
    assert set(tiny_vocabulary(recipe)) >= set(recipe.data["routes"].vocabulary())  # type: ignore[union-attr]
    with pytest.raises(DataError, match="closed vocabulary"):
        ROUTES.vocabulary(RouteDifficulty())


def test_what_is_kept_of_an_item_and_what_a_wrong_answer_shows(recipe: Recipe) -> None:
    route = ROUTES.tasks(RouteDifficulty(**SIZE), "graph", 1, seed=0, split="dev")[0]
    facts = {**route.row, "num_places": 5, "roads": [list(road) for road in SMALL.roads], "start": 0, "goal": 3}
    route = Task.from_json(json.dumps({**json.loads(route.to_json()), "row": facts, "answer": "7 min"}))
    for text, error in (
        ("7", "format"),
        ("a 4 + 1 = 6 <answer>8 min</answer>", "arithmetic"),
        ("<answer>9 minutes</answer>", "shortcut:nearest_until_direct"),
        ("<answer>8 min</answer>", "wrong path"),
    ):
        assert error_of(route, SMALL, text) == error
    record = item_record(route, "<answer>7 min</answer>", is_correct=True, has_answer=True)
    assert (record["steps"], record["width"], record["path_len"], record["hard"]) == (5, None, 3, False)
    total = ARITHMETIC.tasks(ArithmeticDifficulty(), "graph", 1, seed=0, split="dev")[0]
    facts = {**total.row, "nodes": [list(node) for node in TREE.nodes], "root": TREE.root}
    total = Task.from_json(json.dumps({**json.loads(total.to_json()), "row": facts, "answer": "8"}))
    for text, error in (
        ("<answer>many</answer>", "format"),
        ("2 + 1 = 3; 7 - 3 = 5 <answer>10</answer>", "arithmetic"),
        ("<answer>12</answer>", "shortcut:left_to_right"),
        ("<answer>6</answer>", "wrong value"),
    ):
        assert error_of(total, TREE, text) == error
    record = item_record(total, "<answer>8</answer>", is_correct=True, has_answer=True)
    assert (record["steps"], record["path_len"], record["error"]) == (3, 3, "none")


def test_rows_are_made_inspected_and_settings_checked(tmp_path: Path) -> None:
    for kind in ("routes", "arithmetic"):
        difficulty = parse_difficulty(['form="terse"', "shuffled=true"], kind)
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(make_rows(["natural"], 6, difficulty, kind=kind, seed=0, split="dev")))
        inspection = inspect_file(file, kind, "natural")
        assert len(inspection.tasks) == inspection.num_procedures == 6 and inspection.unsolved == ()
    with pytest.raises(UserError, match="min_place"):
        parse_difficulty(["min_place=3"], "routes")
    with pytest.raises(UserError, match="--kind must be one of async_plan, routes, arithmetic"):
        parse_difficulty([], "poems")
    with pytest.raises(UserError, match="min_weight must be at most max_weight"):
        parse_difficulty(["min_weight=30"], "routes")
    with pytest.raises(UserError, match="expression, table, got 'poem'"):
        make_rows(["poem"], 1, ArithmeticDifficulty(), kind="arithmetic", seed=0, split="dev")


def test_one_recipe_mixes_the_kinds_and_refuses_their_held_out_forms(recipe: Recipe) -> None:
    curriculum = Curriculum(
        recipe, TextCodec(word_tokenizer(tiny_vocabulary(recipe)), chat_template=False, stop_ids=[1])
    )
    drawn = curriculum.take(60)
    assert {(prompt.task, prompt.representation) for prompt in drawn} == {
        ("async_plan", "graph"),
        ("async_plan", "natural"),
        ("routes", "graph"),
        ("routes", "code"),
        ("arithmetic", "graph"),
        ("arithmetic", "expression"),
    }
    with pytest.raises(UserError, match="'table' is for evaluation only"):
        load_recipe(TRANSFER, ['stage.1.mixture=[{data="routes",representation="table"}]'], Recipe)


MIXED = """
[data.routes]
kind = "routes"
difficulty = { form = "terse" }
[data.sums]
kind = "arithmetic"
difficulty = { form = "terse" }
[[stage]]
name = "both"
steps = 2
objective.name = "sft"
optim = { lr = 1e-3 }
batch = { prompts = 4, micro_batch_tok = 2048 }
sampling = { max_new_tok = 200, samples_per_prompt = 1 }
mixture = [{ data = "routes", representation = "code" }, { data = "sums", representation = "expression" }]
[eval]
max_new_tok = 8
[[eval.sets]]
data = "routes"
representations = ["natural"]
prompts = 3
[[eval.sets]]
data = "sums"
representations = ["table"]
prompts = 3
"""


def test_a_run_of_two_kinds_leaves_shortcuts_items_and_a_page(tmp_path: Path) -> None:
    file = tmp_path / "mixed.toml"
    file.write_text(TINY + "max_model_len = 512\n" + MIXED)
    folder, _ = run(file, report=True)
    shortcuts = summary_of(folder)["shortcuts"]
    assert set(shortcuts["routes"]) == {*OF_ROUTES, BAG} and set(shortcuts["sums"]) == {*OF_SUMS, BAG}
    rows = [json.loads(line) for line in (folder / "evaluations" / "both.jsonl").read_text().splitlines()]
    assert {(row["set"], row["steps"] is not None, row["width"]) for row in rows} == {
        ("routes", True, None),
        ("sums", True, None),
    }
    assert "nearest until direct" in (folder / "report" / "report.html").read_text()
