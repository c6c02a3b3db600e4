"""Renders a map in its representations, and works out its answer: natural language, graph, code, and a table.

Places have the same names in all of them. Graph and code have two forms, one of adjacency and one of edges; on a
map whose roads lead both ways the adjacency lists each road at both of its ends.
"""

import random
from collections.abc import Callable, Sequence

from isomorph.curriculum.tasks.longest_path import with_unit
from isomorph.curriculum.tasks.render import spelled
from isomorph.curriculum.tasks.routes.road_map import RoadGraph, RoadMap, RouteDifficulty
from isomorph.curriculum.tasks.routes.wording import (
    ADJACENCY,
    EDGE_LIST,
    FULL,
    GRAPH_NOTE,
    GRAPH_QUESTION,
    TABLE_INTRO,
    TABLE_QUESTION,
    TERSE,
)
from isomorph.curriculum.tasks.sieve import chosen
from isomorph.curriculum.tasks.wording import CODE_INTRO, CODE_QUESTION, INSTRUCTION

# All tokens of the terse graph, code and table forms besides places, numbers and units.
TERSE_SYNTAX = "graph = {Cork: [(Riga, 5)]} edges = arcs = Cork to Riga, time? print(shortest_path(x)) from and between"
TRACE_SYNTAX = "<think>Cork 0: Riga 0 + 4 = 4, Porto; Riga 4:</think> <answer></answer>"


def render(
    instance: RoadMap, representation: str, rng: random.Random, difficulty: RouteDifficulty, *, is_kept: bool
) -> str:
    """The whole question. ``rng`` chooses wordings, and forms of graphs and programs."""
    is_terse = instance.domain is None
    if representation == "natural":
        return _natural(instance, rng, difficulty, is_kept=is_kept)
    if representation == "table":
        return (_table_terse if is_terse else _table)(instance)
    forms = _FORMS[representation, is_terse][: difficulty.templates]
    return rng.choice(forms)(instance)


def worked(instance: RoadMap, *, sequential: bool) -> str:
    """A response: places by their distance from the start, each with what it leads to; then the answer.

    ``Cork 0: Riga 0 + 4 = 4, Porto 0 + 7 = 7; Riga 4: Porto 4 + 2 = 6; Porto 6``: at each place the sums for all
    neighbours whose distance is not settled yet. ``sequential``: along the route with the fewest roads only.
    """
    graph, name = instance.graph, instance.places
    lines, distances = [], _distances_along(graph, graph.fewest) if sequential else _distances(graph)
    places = list(distances)
    for i, place in enumerate(places[:-1]):
        own = distances[place]
        ahead = [found for found in graph.neighbours[place] if found[0] not in places[:i]]
        if sequential:
            ahead = [found for found in ahead if found[0] == places[i + 1]]
        sums = ", ".join(f"{name[other]} {own} + {weight} = {own + weight}" for other, weight in ahead)
        lines.append(f"{name[place]} {own}: {sums}" if sums else f"{name[place]} {own}")
    total = distances[graph.goal]
    lines.append(f"{name[graph.goal]} {total}")
    return f"<think>{'; '.join(lines)}</think> <answer>{with_unit(total, instance.unit)}</answer>"


def fewest_total(graph: RoadGraph) -> int:
    """The length of the route with the fewest roads."""
    return _distances_along(graph, graph.fewest)[graph.goal]


def _distances(graph: RoadGraph) -> dict[int, int]:
    """In the order in which they are settled, up to the goal."""
    found: dict[int, int] = {}
    for place, distance, _ in graph.settled:
        found[place] = distance
        if place == graph.goal:
            break
    return found


def _distances_along(graph: RoadGraph, route: Sequence[int]) -> dict[int, int]:
    found = {route[0]: 0}
    for a, b in zip(route, route[1:], strict=False):
        found[b] = found[a] + (graph.weight(a, b) or 0)
    return found


def _natural(instance: RoadMap, rng: random.Random, difficulty: RouteDifficulty, *, is_kept: bool) -> str:
    graph, places = instance.graph, instance.places
    frames = TERSE if instance.domain is None else FULL
    area, way = ("", "road") if instance.domain is None else (instance.domain.area, instance.domain.way)

    def frame(kind: Sequence[str]) -> str:
        return chosen(rng, kind, difficulty.templates, is_kept=is_kept)

    intro = frame(frames.intros).format(area=area, way=way)
    note = (frames.one_way_note if graph.directed else frames.both_ways_note).format(way=way)
    roads = []
    for a, b, weight in graph.roads:
        ends = (b, a) if not graph.directed and rng.random() < 0.5 else (a, b)
        roads.append(
            frame(frames.one_way if graph.directed else frames.roads).format(
                a=places[ends[0]],
                b=places[ends[1]],
                way=way,
                time=with_unit(weight, instance.unit),
                spelled=spelled(weight, instance.unit),
            )
        )
    rng.shuffle(roads)
    question = frame(frames.questions).format(a=places[graph.start], b=places[graph.goal])
    if instance.domain is None:
        return " ".join([intro, note, *roads, question])
    sentences = " ".join(road[:1].upper() + road[1:] for road in roads)
    return "\n\n".join([f"{intro} {note}", sentences, f"{question}\n{_instruction(instance)}"])


def _adjacency(instance: RoadMap, quote: str) -> list[str]:
    rows = []
    for j, own in enumerate(instance.graph.neighbours):
        ahead = ", ".join(f"({quote}{instance.places[k]}{quote}, {weight})" for k, weight in own)
        rows.append(f"{quote}{instance.places[j]}{quote}: [{ahead}]")
    return rows


def _edges(instance: RoadMap, quote: str) -> list[str]:
    names = instance.places
    return [f"({quote}{names[a]}{quote}, {quote}{names[b]}{quote}, {w})" for a, b, w in instance.graph.roads]


def _units(instance: RoadMap) -> str:
    return spelled(2, instance.unit).split()[1]


def _ends(instance: RoadMap) -> tuple[str, str]:
    return instance.places[instance.graph.start], instance.places[instance.graph.goal]


def _edge_word(instance: RoadMap) -> str:
    return "arcs" if instance.graph.directed else "edges"


def _graph_terse(instance: RoadMap) -> str:
    a, b = _ends(instance)
    return f"graph = {{{', '.join(_adjacency(instance, ''))}}} {a} to {b}, {_units(instance)}?"


def _edges_terse(instance: RoadMap) -> str:
    a, b = _ends(instance)
    return f"{_edge_word(instance)} = [{', '.join(_edges(instance, ''))}] {a} to {b}, {_units(instance)}?"


def _code_terse(instance: RoadMap) -> str:
    a, b = _ends(instance)
    name, rows = _units(instance), ", ".join(_adjacency(instance, ""))
    return f"{name} = {{{rows}}} print(shortest_path({name}, {a}, {b}))"


def _calls_terse(instance: RoadMap) -> str:
    a, b = _ends(instance)
    name, roads = _units(instance), ", ".join(_edges(instance, ""))
    return f"{name} = {_edge_word(instance)}({roads}) print(shortest_path({name}, {a}, {b}))"


def _table_terse(instance: RoadMap) -> str:
    a, b = _ends(instance)
    head = f"from, to, {_units(instance)}" if instance.graph.directed else f"between, and, {_units(instance)}"
    rows = [f"{instance.places[i]}, {instance.places[j]}, {weight}" for i, j, weight in instance.graph.roads]
    return "\n".join([head, *rows, f"{a} to {b}, time?"])


def _instruction(instance: RoadMap) -> str:
    return INSTRUCTION.format(example=with_unit(1, instance.unit))


def _graph_question(instance: RoadMap) -> str:
    a, b = _ends(instance)
    return f"{GRAPH_QUESTION.format(a=a, b=b, units=_units(instance))}\n{_instruction(instance)}"


def _graph(instance: RoadMap) -> str:
    rows = ",\n".join(f" {row}" for row in _adjacency(instance, "'"))
    note = f"{GRAPH_NOTE[instance.graph.directed]} {ADJACENCY.format(units=_units(instance))}"
    return "\n\n".join([f"{note}\n{{\n{rows}\n}}", _graph_question(instance)])


def _edge_list(instance: RoadMap) -> str:
    sign, names = ("->" if instance.graph.directed else "--"), instance.places
    rows = [f"{names[a]} {sign} {names[b]}: {with_unit(w, instance.unit)}" for a, b, w in instance.graph.roads]
    note = f"{GRAPH_NOTE[instance.graph.directed]} {EDGE_LIST}"
    return "\n\n".join(["\n".join([note, *rows]), _graph_question(instance)])


_QUEUE = """from heapq import heappop, heappush

roads = {{
{rows}
}}
waiting = [(0, {a!r})]
reached = {{}}
while waiting:
    time, place = heappop(waiting)
    if place not in reached:
        reached[place] = time
        for other, more in roads[place]:
            heappush(waiting, (time + more, other))

print(reached[{b!r}], {unit!r})"""

_ROUNDS = """roads = [
{rows}
]
{both}least = {{{a!r}: 0}}
for _ in range({num}):
    for start, end, time in roads:
        if start in least:
            least[end] = min(least.get(end, least[start] + time), least[start] + time)

print(least[{b!r}], {unit!r})"""


def _program(instance: RoadMap, program: str) -> str:
    return "\n\n".join(
        [CODE_INTRO, f"```python\n{program}\n```", f"{CODE_QUESTION}\n{_instruction(instance)}"],
    )


def _queue(instance: RoadMap) -> str:
    a, b = _ends(instance)
    rows = "\n".join(f"    {row}," for row in _adjacency(instance, "'"))
    return _program(instance, _QUEUE.format(rows=rows, a=a, b=b, unit=instance.unit))


def _rounds(instance: RoadMap) -> str:
    a, b = _ends(instance)
    both = "" if instance.graph.directed else "roads += [(end, start, time) for start, end, time in roads]\n"
    rows, num = "\n".join(f"    {edge}," for edge in _edges(instance, "'")), instance.graph.num_places
    return _program(instance, _ROUNDS.format(rows=rows, both=both, a=a, b=b, num=num, unit=instance.unit))


def _table(instance: RoadMap) -> str:
    names = instance.places
    rows = [f"| {names[a]} | {names[b]} | {spelled(w, instance.unit)} |" for a, b, w in instance.graph.roads]
    head = "| from | to | time |" if instance.graph.directed else "| place | place | time |"
    a, b = _ends(instance)
    return "\n\n".join(
        [
            TABLE_INTRO[instance.graph.directed],
            "\n".join([head, "| --- | --- | --- |", *rows]),
            f"{TABLE_QUESTION.format(a=a, b=b)}\n{_instruction(instance)}",
        ]
    )


_FORMS: dict[tuple[str, bool], tuple[Callable[[RoadMap], str], ...]] = {
    ("graph", True): (_graph_terse, _edges_terse),
    ("code", True): (_code_terse, _calls_terse),
    ("graph", False): (_graph, _edge_list),
    ("code", False): (_queue, _rounds),
}
