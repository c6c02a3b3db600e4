"""Maps with a start and a goal: the instance that a route question is rendered from.

Places are 0 .. n-1. A road has a weight, the time that it takes; it leads both ways, or on a directed map one way.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from typing import ClassVar

from pydantic import Field

from isomorph.curriculum.tasks.canonical import relation_key
from isomorph.curriculum.tasks.procedure import Unit
from isomorph.curriculum.tasks.routes.wording import DOMAINS, MAX_PLACES, TERSE_PLACES, Domain
from isomorph.curriculum.tasks.sieve import SievedDifficulty

Road = tuple[int, int, int]  # from, to, weight; on an undirected map the lower number first


class RouteDifficulty(SievedDifficulty):
    """Size and wording of generated maps. The defaults are the smallest useful setting."""

    ranges: ClassVar[tuple[str, ...]] = ("places", "weight")

    min_places: int = Field(4, ge=2, le=MAX_PLACES)
    max_places: int = Field(5, ge=2, le=MAX_PLACES)
    edge_probability: float = Field(0.5, ge=0, le=1)  # that a road joins two places
    directed: bool = False  # each road leads one way, drawn at random
    min_weight: int = Field(1, ge=1, le=10_000)  # in ``unit``
    max_weight: int = Field(9, ge=1, le=10_000)
    min_roads: int = Field(1, ge=1, le=MAX_PLACES - 1)  # on the cheapest route; the fewest where several are cheapest
    unit: Unit = "min"  # of all weights and of the answer
    shuffled: bool = False  # list the places at random instead of by their distance from the start


@dataclass(frozen=True)
class RoadGraph:
    """A map as its shortcuts see it. Places are numbered as they are listed."""

    num_places: int
    roads: tuple[Road, ...]
    start: int
    goal: int
    directed: bool

    @cached_property
    def neighbours(self) -> list[list[tuple[int, int]]]:
        """Of each place where its roads lead, by number, and their weights."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.num_places)]
        for a, b, weight in self.roads:
            found[a].append((b, weight))
            if not self.directed:
                found[b].append((a, weight))
        return [sorted(own) for own in found]

    @cached_property
    def backward(self) -> list[list[tuple[int, int]]]:
        """Of each place the places that roads to it come from."""
        if not self.directed:
            return self.neighbours
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.num_places)]
        for a, b, weight in self.roads:
            found[b].append((a, weight))
        return [sorted(own) for own in found]

    @cached_property
    def settled(self) -> list[tuple[int, int, int]]:
        """Places by distance from the start, those of equal distance by number: place, distance, roads of the route."""
        neighbours, done = self.neighbours, dict[int, tuple[int, int]]()
        heap = [(0, 0, self.start)]
        while heap:
            distance, roads, place = heappop(heap)
            if place not in done:  # the first entry has the least distance, and of these the fewest roads
                done[place] = distance, roads
                for other, weight in neighbours[place]:
                    if other not in done:
                        heappush(heap, (distance + weight, roads + 1, other))
        return sorted(((place, *found) for place, found in done.items()), key=lambda item: (item[1], item[0]))

    @property
    def total(self) -> int:
        """The length of the cheapest route: the right answer. Raises ValueError where the goal cannot be reached."""
        return self._to_goal[1]

    @property
    def num_roads(self) -> int:
        """Roads of the cheapest route; the fewest where several are cheapest."""
        return self._to_goal[2]

    @property
    def _to_goal(self) -> tuple[int, int, int]:
        for found in self.settled:
            if found[0] == self.goal:
                return found
        raise ValueError(f"a route must lead from place {self.start} to place {self.goal}, there is none")

    @cached_property
    def fewest(self) -> list[int]:
        """The places of the route with the fewest roads; of several the one that is found first by number."""
        before: dict[int, int | None] = {self.start: None}
        queue = [self.start]
        for place in queue:
            for other, _ in self.neighbours[place]:
                if other not in before:
                    before[other] = place
                    queue.append(other)
        route: list[int] = []
        step: int | None = self.goal
        while step is not None:
            route.append(step)
            step = before[step]
        return route[::-1]

    def weight(self, a: int, b: int) -> int | None:
        """Of the road from a to b; None without one."""
        return next((weight for other, weight in self.neighbours[a] if other == b), None)


@dataclass(frozen=True, kw_only=True)
class RoadMap:
    """A graph, and what its places are called."""

    graph: RoadGraph
    places: tuple[str, ...]
    domain: Domain | None  # None: of the terse form
    unit: str

    @cached_property
    def key(self) -> str:
        """The same for maps that differ only in names, numbering and unit."""
        return _key(self.graph, is_weighted=True)


def structure_of(graph: RoadGraph) -> str:
    """The same for maps that differ only in names, numbering and weights."""
    return _key(graph, is_weighted=False)


def _key(graph: RoadGraph, *, is_weighted: bool) -> str:
    ends = {graph.start: "start", graph.goal: "goal"}
    links: list[list[tuple[tuple[str, int], int]]] = [[] for _ in range(graph.num_places)]
    for a, b, weight in graph.roads:
        shown = weight if is_weighted else 0
        links[a].append((("to", shown), b))
        links[b].append((("from" if graph.directed else "to", shown), a))
    return relation_key([ends.get(j, "") for j in range(graph.num_places)], links)


def random_shape(rng: random.Random, difficulty: RouteDifficulty) -> RoadGraph | None:
    """A map whose goal is any place that is far enough from the start by some weights; None where none is."""
    n, drawn, roads = rng.randint(difficulty.min_places, difficulty.max_places), rng.random, []
    for a in range(n):
        for b in range(a + 1, n):
            if drawn() < difficulty.edge_probability:
                ends = (b, a) if difficulty.directed and drawn() < 0.5 else (a, b)
                roads.append((*ends, rng.randint(difficulty.min_weight, difficulty.max_weight)))
    start = int(n * drawn())
    graph = RoadGraph(n, tuple(roads), start, start, difficulty.directed)
    goals = [place for place, _, num in graph.settled if num >= difficulty.min_roads]
    return replace(graph, goal=goals[int(len(goals) * drawn())]) if goals else None


def with_weights(rng: random.Random, shape: RoadGraph, difficulty: RouteDifficulty) -> RoadGraph | None:
    """The map with random weights; None where the cheapest route has too few roads."""
    drawn, low, span = rng.random, difficulty.min_weight, difficulty.max_weight - difficulty.min_weight + 1
    graph = replace(shape, roads=tuple((a, b, low + int(span * drawn())) for a, b, _ in shape.roads))
    if graph.num_roads < difficulty.min_roads:
        return None
    return graph if difficulty.shuffled else _by_distance(graph)


def named(rng: random.Random, graph: RoadGraph, difficulty: RouteDifficulty) -> RoadMap:
    """The map with places of a random domain."""
    domain = None if difficulty.form == "terse" else rng.choice(DOMAINS)
    places = tuple(rng.sample(TERSE_PLACES if domain is None else domain.places, graph.num_places))
    return RoadMap(graph=graph, places=places, domain=domain, unit=difficulty.unit)


def _by_distance(graph: RoadGraph) -> RoadGraph:
    order = [place for place, _, _ in graph.settled]
    order += [j for j in range(graph.num_places) if j not in order]
    return renumbered(graph, [order.index(j) for j in range(graph.num_places)])


def renumbered(graph: RoadGraph, new: Sequence[int]) -> RoadGraph:
    """Place j becomes ``new[j]``."""
    roads = [(new[a], new[b], weight) for a, b, weight in graph.roads]
    if not graph.directed:
        roads = [(min(a, b), max(a, b), weight) for a, b, weight in roads]
    return RoadGraph(graph.num_places, tuple(sorted(roads)), new[graph.start], new[graph.goal], graph.directed)
